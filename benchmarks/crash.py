"""Kills a run at random moments, again and again: `python -m benchmarks.crash`. It must end with the weights of a run that was
left alone."""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from benchmarks.report import header, table
from gandist import checkpoint
from gandist.train import main as train
from tests.ranks import ROOT, end_ranks, start_ranks

RANKS = 2
SAVED, LOGGED, EVALUATED = 0.256, 0.064, 0.64  # kimg; a step is 0.064
PATIENCE = 30.0  # s in which ranks that live must notice the death of one


def options(run_dir: Path, cache: Path, kimg: float, overrides: Sequence[str] = ()) -> list[str]:
    settings = {
        "run_dir": run_dir,
        "data.cache_dir": cache,
        "data.in_memory": 0,
        "model.generator_width": 2,
        "model.discriminator_width": 2,
        "train.kimg": kimg,
        "checkpoint.every_kimg": SAVED,
        "tracking.every_kimg": LOGGED,
        "tracking.samples_every_kimg": EVALUATED,
        "tracking.wandb": "off",
        "evaluation.every_kimg": EVALUATED,
        "evaluation.metrics": "[accuracy,fd_classifier]",
        "evaluation.num_images": 500,
    }
    return [*(f"{key}={value}" for key, value in settings.items()), *overrides]


def phase(run_dir: Path, began: float) -> str:
    """What the run does at this moment, by its files."""
    if any((run_dir / checkpoint.FOLDER).glob(".tmp-*")):
        return "save"
    files = {name: run_dir / name for name in ("metrics.jsonl", "evaluations.jsonl")}
    times = {name: path.stat().st_mtime if path.exists() else 0.0 for name, path in files.items()}
    drawn = max((path.stat().st_mtime for path in run_dir.glob("samples/*.png")), default=0.0)
    if drawn > max(times["evaluations.jsonl"], began):
        return "evaluation"
    return "step" if times["metrics.jsonl"] > began else "start"


def last_step(run_dir: Path) -> int:
    """The last one that was logged whole."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def newest_step(run_dir: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in checkpoint.complete_steps(run_dir)), default=0)


def quietly(arguments: list[str]) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    train(arguments)


def kill_ranks(run_dir: Path, arguments: list[str], seconds: float, victims: list[int]) -> tuple[str, int, float] | None:
    """The phase, the steps lost, and how long the others took to end. None: the run was done before."""
    ranks = start_ranks(RANKS, lambda rank: (quietly, arguments))
    began = time.time()
    time.sleep(seconds)
    if not all(rank.is_alive() for rank in ranks):
        end_ranks(ranks)
        return None
    moment = phase(run_dir, began)
    for victim in victims:
        ranks[victim].kill()
    killed = time.monotonic()
    for rank in ranks:
        rank.join(PATIENCE)
    took = time.monotonic() - killed
    assert not end_ranks(ranks), f"a rank hung for {PATIENCE:g} s after the death of {victims} in {moment}"
    return moment, last_step(run_dir) - newest_step(run_dir), took


def kill_launcher(run_dir: Path, arguments: list[str], seconds: float) -> tuple[str, int, float]:
    """SIGKILL for torchrun alone, so long after the first step: its ranks must save and end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", "-m"]
    before = last_step(run_dir)
    process = subprocess.Popen([*command, "gandist.train", *arguments], cwd=ROOT, stdout=-1, stderr=subprocess.STDOUT)
    while last_step(run_dir) <= before and process.poll() is None:
        time.sleep(0.02)
    time.sleep(seconds)
    ranks = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE)
    assert not alive, "ranks outlived torchrun"
    process.communicate()
    return "launcher", last_step(run_dir) - newest_step(run_dir), time.monotonic() - killed


def restart(settings: list[str], run_dir: Path, victim: int) -> float:
    """SIGKILL for one rank beneath `torchrun --max-restarts=3`, which must bring the run to its end. Seconds it took."""
    began = time.monotonic()
    options = ["--standalone", f"--nproc_per_node={RANKS}", "--max-restarts=3", "-m", "gandist.train", *settings]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while last_step(run_dir) < SAVED / LOGGED and process.poll() is None:
        time.sleep(0.02)
    next(rank for rank in psutil.Process(process.pid).children() if rank.environ().get("RANK") == str(victim)).kill()
    assert process.wait(300) == 0, "torchrun could not restart the ranks"
    return time.monotonic() - began


def lose_a_node(settings: list[str], run_dir: Path) -> float:
    """Two nodes of one rank each under `torchrun --nnodes=1:2`, of which one is killed: the other must go on alone to the end.
    Seconds from there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--rdzv-id=crash", "-m", "gandist.train", *settings]
    first, second = (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)
    )
    while last_step(run_dir) < SAVED / LOGGED and first.poll() is None:
        time.sleep(0.02)
    began = time.monotonic()
    # The node that serves the rendezvous must stay.
    listening = {c.laddr.port for c in psutil.Process(first.pid).net_connections() if c.status == "LISTEN"}
    lost = second if int(endpoint.rpartition(":")[2]) in listening else first
    for process in (*psutil.Process(lost.pid).children(recursive=True), psutil.Process(lost.pid)):
        process.kill()
    lost.wait()
    assert (first if lost is second else second).wait(300) == 0, "the node that was left did not go on"
    return time.monotonic() - began


def weights(run_dir: Path) -> checkpoint.Tensors:
    return checkpoint.read(checkpoint.complete_steps(run_dir)[-1])


def equal(a: checkpoint.Tensors, b: checkpoint.Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[path]) for path, tensor in a.items())


def distance(a: checkpoint.Tensors, b: checkpoint.Tensors) -> float:
    return max((tensor.double() - b[path].double()).abs().max().item() for path, tensor in a.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="of one rank or of all (default: 100)")
    parser.add_argument("--launcher-kills", type=int, default=5, help="of torchrun, which starts slowly (default: 5)")
    parser.add_argument("--restarts", type=int, default=20, help="of torchrun after the death of a rank (default: 20)")
    parser.add_argument("--node-losses", type=int, default=2, help="of one of two nodes of a job (default: 2)")
    parser.add_argument("--kimg", type=float, default=6.4, help="length of a run; it is begun anew when done (default: 6.4)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the runs, as checkpoint.asynchronous=true")
    chosen = parser.parse_intermixed_args(arguments)
    moments = random.Random(chosen.seed)
    print(header(), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def to_the_end(run_dir: Path, *special: str) -> None:
            settings = [*options(run_dir, folder / "cache", chosen.kimg, chosen.overrides), *special]
            ranks = start_ranks(RANKS, lambda rank: (quietly, settings))
            for rank in ranks:
                rank.join()
            assert [rank.exitcode for rank in ranks] == [0] * RANKS, "the run could not be recovered"

        to_the_end(folder / "straight")
        expected = weights(folder / "straight")
        restarted = []
        for number in range(chosen.restarts):
            run_dir = folder / f"restarted-{number}"
            restarted.append(
                restart(options(run_dir, folder / "cache", chosen.kimg, chosen.overrides), run_dir, number % RANKS)
            )
            assert equal(weights(run_dir), expected), f"{run_dir.name} ended with other weights"
        if restarted:
            times = f"{min(restarted):.0f} to {max(restarted):.0f} s each, start included"
            print(
                f"torchrun --max-restarts=3: {len(restarted)} of {chosen.restarts} recovered, bit-identical; {times}",
                flush=True,
            )
        double = "train.precision=float64"
        for number in range(chosen.node_losses):
            if not number:
                to_the_end(folder / "straight-float64", double)
            run_dir = folder / f"one-node-left-{number}"
            seconds = lose_a_node([*options(run_dir, folder / "cache", chosen.kimg, chosen.overrides), double], run_dir)
            assert distance(weights(run_dir), weights(folder / "straight-float64")) < 1e-9, f"{run_dir.name} has other weights"
            print(f"a node of two lost: the other went on alone to the same weights, {seconds:.0f} s from there", flush=True)
        runs, kills, lost, took = 1, Counter(), [], []
        run_dir = folder / "killed-1"
        while sum(kills.values()) < chosen.kills + chosen.launcher_kills:
            run_dir = folder / f"killed-{runs}"
            settings = options(run_dir, folder / "cache", chosen.kimg, chosen.overrides)
            if kills["launcher"] < chosen.launcher_kills and moments.random() < 0.05:
                result = kill_launcher(run_dir, settings, moments.uniform(0, 1))
            else:
                victims = moments.choice([[0], [1], [0, 1]])
                result = kill_ranks(run_dir, settings, moments.uniform(0.2, 3), victims)
            if result is None:
                runs += 1
                assert equal(weights(run_dir), expected), f"{run_dir.name} ended with other weights"
                continue
            moment, steps, seconds = result
            kills[moment] += 1
            lost.append(steps)
            took.append(seconds)
        if not kills:
            return
        to_the_end(run_dir)
        assert equal(weights(run_dir), expected), f"{run_dir.name} ended with other weights"

    print(table(["killed in", "times"], [[name, count] for name, count in kills.most_common()]))
    print(f"{sum(kills.values())} kills, all recovered; {runs} run(s) ended bit-identical to the one left alone")
    print(f"steps lost: mean {sum(lost) / len(lost):.1f}, at most {max(lost)} (a checkpoint every {SAVED / LOGGED:g})")
    print(f"ranks left ended within {max(took):.1f} s")


if __name__ == "__main__":
    main()
