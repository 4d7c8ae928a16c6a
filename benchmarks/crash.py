"""Kills runs at random and at chosen moments, again and again: `python -m benchmarks.crash`. Each must end as the same run left
alone does. Pairs of runs are started on one folder, too, which must have one owner."""

import argparse
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.crash_aims import AIMS, train_and_die
from benchmarks.crash_pairs import start_pairs
from benchmarks.crash_run import KINDS, LONGEST, SAVED, Run, prepare_data, until, weights
from benchmarks.report import header, table
from gandist import checkpoint
from tests.ranks import ROOT, end_ranks

PATIENCE = 30.0  # s in which ranks that live must notice the death of one
DOUBLE = "train.precision=float64"
AT_RANDOM = "at random"
EAGER = [AT_RANDOM, *(name for name in AIMS if name != "compile")]
MOMENTS = dict.fromkeys(KINDS, EAGER) | {"compiled": [AT_RANDOM, "compile"]}


class Kill(NamedTuple):
    """phase: what the run did; lost: steps; seconds: until the ranks left had ended"""

    phase: str
    lost: int
    seconds: float


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


def kill_ranks(run: Run, name: str, moments: random.Random) -> Kill | None:
    """Starts the run, and kills ranks. None: it was done before."""
    victims = moments.sample(range(run.ranks), moments.choice([1, min(2, run.ranks), run.ranks]))
    if name == AT_RANDOM:
        ranks, began = run.start(), time.time()
        if not wait([rank.sentinel for rank in ranks], timeout=moments.uniform(0.2, 6)):
            name = phase(run.folder, began)
            for victim in victims:
                ranks[victim].kill()
    else:
        aim = AIMS[name]
        victim = victims[0] if aim.anyone else 0
        ranks = run.start(train_and_die, name, moments.choice(aim.ways), moments.randint(1, aim.calls), victim)
        assert wait([rank.sentinel for rank in ranks], timeout=LONGEST), run.complaint("hung")
        if ranks[victim].exitcode == -signal.SIGKILL:
            for each in victims[1:]:
                ranks[each].kill()
    first_death = time.monotonic()
    for rank in ranks:
        rank.join(PATIENCE)
    seconds = time.monotonic() - first_death
    assert not end_ranks(ranks), run.complaint(f"hung for {PATIENCE:g} s after the death of ranks {victims} in {name}")
    codes = {rank.exitcode for rank in ranks}
    assert codes <= {0, 1, -signal.SIGKILL}, run.complaint(f"ended with {codes}")
    if -signal.SIGKILL in codes:
        return Kill(name, run.steps_lost(), seconds)
    assert codes == {0}, run.complaint("failed")
    return None


def kill_again_and_again(
    folder: Path, kind: str, times: int, options: argparse.Namespace, moments: random.Random
) -> list[Kill]:
    """Of runs of one kind; the next begins when one is done."""
    straight = Run(folder / f"{kind}-straight", kind, options.ranks, options.steps)
    straight.to_the_end()
    expected = weights(straight.folder)
    straight.check(expected)
    kills: list[Kill] = []
    number = 0
    while len(kills) < times:
        number += 1
        run = Run(folder / f"{kind}-{number}", kind, options.ranks, options.steps)
        done = False
        while len(kills) < times and not done:
            name = moments.choice(MOMENTS[kind])
            if name == AT_RANDOM or AIMS[name].prepare(run):
                kill = kill_ranks(run, name, moments)
                kills += [kill] if kill else []
                done = kill is None
        if not done:
            run.to_the_end()
        run.check(expected)
        print(f"{kind}: {len(kills)} kills, {number} run(s) ended as the one left alone", flush=True)
    return kills


# The launcher, and nodes.


def torchrun(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_launcher(run: Run, seconds: float) -> Kill:
    """SIGKILL for torchrun alone, so long after the first step: its ranks must save and end."""
    process = torchrun("--standalone", f"--nproc_per_node={run.ranks}", "-m", "gandist.train", *run.settings)
    until(run, 1, process.poll)
    time.sleep(seconds)
    ranks = psutil.Process(process.pid).children()
    process.kill()
    killed = time.monotonic()
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE)
    assert not alive, "ranks outlived torchrun"
    process.wait()
    return Kill("launcher", run.steps_lost(), time.monotonic() - killed)


def restart(run: Run, victim: int) -> float:
    """SIGKILL for one rank beneath `torchrun --max-restarts=3`, which must bring the run to its end. Seconds it took."""
    began = time.monotonic()
    options = ["--standalone", f"--nproc_per_node={run.ranks}", "--max-restarts=3"]
    process = torchrun(*options, "-m", "gandist.train", *run.settings)
    until(run, SAVED, process.poll)
    next(rank for rank in psutil.Process(process.pid).children() if rank.environ().get("RANK") == str(victim)).kill()
    assert process.wait(LONGEST) == 0, "torchrun could not restart the ranks"
    return time.monotonic() - began


def lose_a_node(run: Run) -> float:
    """Two nodes of one rank each under `torchrun --nnodes=1:2`, and one is killed: the other must go on alone to the end.
    Seconds from there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    command = [*options, "--rdzv-id=crash", "-m", "gandist.train", *run.settings]
    first, second = torchrun(*command), torchrun(*command)
    until(run, SAVED, first.poll)
    began = time.monotonic()
    # The node that serves the rendezvous must stay.
    listening = {c.laddr.port for c in psutil.Process(first.pid).net_connections() if c.status == "LISTEN"}
    lost = second if int(endpoint.rpartition(":")[2]) in listening else first
    for process in (*psutil.Process(lost.pid).children(recursive=True), psutil.Process(lost.pid)):
        process.kill()
    lost.wait()
    assert (first if lost is second else second).wait(LONGEST) == 0, "the node that was left did not go on"
    return time.monotonic() - began


def use_torchrun(folder: Path, options: argparse.Namespace, moments: random.Random) -> list[Kill]:
    """Kills torchrun, ranks beneath it, and nodes. The kills of torchrun itself."""

    def run_named(name: str, *more: str) -> Run:
        return Run(folder / name, "plain", options.ranks, options.steps, more)

    straight, precise = run_named("straight"), run_named("straight-float64", DOUBLE)
    if options.launcher_kills or options.restarts:
        straight.to_the_end()
    kills, times = [], []
    for number in range(options.launcher_kills):
        run = run_named(f"launcher-{number}")
        kills.append(kill_launcher(run, moments.uniform(0, 1)))
        run.to_the_end()
        run.check(weights(straight.folder))
    for number in range(options.restarts):
        run = run_named(f"restarted-{number}")
        times.append(restart(run, number % run.ranks))
        run.check(weights(straight.folder))
    if times:
        spent = f"{min(times):.0f} to {max(times):.0f} s each, start included"
        print(f"torchrun --max-restarts=3: {len(times)} recovered, bit-identical; {spent}", flush=True)
    for number in range(options.node_losses):
        if not number:
            precise.to_the_end()
        run = run_named(f"one-node-left-{number}", DOUBLE)
        seconds = lose_a_node(run)
        assert distance(weights(run.folder), weights(precise.folder)) < 1e-9, f"{run.folder.name} has other weights"
        print(f"a node of two lost: the other went on alone to the same weights, {seconds:.0f} s from there", flush=True)
    return kills


def distance(a: checkpoint.Tensors, b: checkpoint.Tensors) -> float:
    return max((tensor.double() - b[path].double()).abs().max().item() for path, tensor in a.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="of ranks, in all kinds of run together (default: 100)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of run; may be given again (default: all)")
    parser.add_argument("--ranks", type=int, default=3, help="of each run (default: 3)")
    parser.add_argument("--steps", type=int, default=60, help="length of a run; another begins when it is done (default: 60)")
    parser.add_argument("--pairs", type=int, default=10, help="of runs started on one folder at once (default: 10)")
    parser.add_argument("--host-pairs", type=int, default=10, help="the same on two hosts (default: 10)")
    parser.add_argument("--launcher-kills", type=int, default=5, help="of torchrun, which starts slowly (default: 5)")
    parser.add_argument("--restarts", type=int, default=20, help="of torchrun after the death of a rank (default: 20)")
    parser.add_argument("--node-losses", type=int, default=2, help="of one of two nodes of a job (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    chosen = parser.parse_args(arguments)
    kinds = chosen.kind or [*KINDS]
    moments = random.Random(chosen.seed)
    print(header(), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_data(folder)
        kills: dict[str, list[Kill]] = defaultdict(list)
        shares = Counter(moments.choices(kinds, [len(MOMENTS[kind]) for kind in kinds], k=chosen.kills))
        for kind in shares:
            for kill in kill_again_and_again(folder, kind, shares[kind], chosen, moments):
                kills[kill.phase].append(kill)
        start_pairs(folder, chosen.pairs, [])
        start_pairs(folder, chosen.host_pairs, ["node-a", "node-b"])
        for kill in use_torchrun(folder, chosen, moments):
            kills[kill.phase].append(kill)

    head = ["killed in", "times", "steps lost: mean", "at most", "ranks left ended within s"]
    print(table(head, [summary(name, kills[name]) for name in sorted(kills)]))
    print(f"{sum(map(len, kills.values()))} kills, all recovered, bit-identical; a checkpoint every {SAVED} steps")


def summary(phase: str, kills: list[Kill]) -> list[object]:
    lost, seconds = [kill.lost for kill in kills], [kill.seconds for kill in kills]
    return [phase, len(kills), f"{sum(lost) / len(lost):.1f}", max(lost), f"{max(seconds):.1f}"]


if __name__ == "__main__":
    main()
