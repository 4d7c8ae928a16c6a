"""Runs that are stopped, killed, hung: what is lost, what is said, and that the same command goes on."""

import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch

from gandist import checkpoint
from gandist.config import TrainConfig
from gandist.evaluation.evaluator import Evaluation, Evaluator
from gandist.train import main
from tests.ranks import ROOT, launch, run_and_kill, run_command, run_ranks, start_ranks
from tests.small_disk import mount_small_disk
from tests.test_promises import final_state

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STEP = 0.064  # kimg


def options(run_dir: Path, cache_dir: Path, *overrides: str) -> list[str]:
    small = ["model.generator_width=2", "model.discriminator_width=2", "evaluation.metrics=[]", "tracking.wandb=off"]
    return [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", *small, *overrides]


def start(*arguments: str, launcher: list[str] = TORCHRUN, **variables: str) -> subprocess.Popen:
    """The command on two ranks; standard output and error in one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"} | variables
    return subprocess.Popen(
        [*launcher, "-m", "gandist.train", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rank_of(process: subprocess.Popen, rank: int) -> psutil.Process:
    def is_rank(child: psutil.Process) -> bool:
        return child.environ().get("RANK") == str(rank)

    return next(child for child in psutil.Process(process.pid).children() if is_rank(child))


def until_it_trains(process: subprocess.Popen, run_dir: Path, rows: int = 1) -> None:
    deadline = time.monotonic() + 90
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= rows):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def saved_steps(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.complete_steps(run_dir)]


def assert_same_weights(a: Path, b: Path) -> None:
    state_a, state_b = final_state(a), final_state(b)
    assert state_a.keys() == state_b.keys()
    assert [name for name, tensor in state_a.items() if not torch.equal(tensor, state_b[name])] == []


def test_torchrun_that_dies_does_not_leave_its_ranks_behind(tmp_path: Path, cache_dir: Path) -> None:
    """It knows nothing of SIGUSR2; its ranks save and end."""
    process = start(*options(tmp_path / "r", cache_dir, "train.kimg=10000", f"tracking.every_kimg={STEP}"))
    until_it_trains(process, tmp_path / "r")
    ranks = [rank_of(process, rank) for rank in (0, 1)]
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert "stopped by a signal at kimg" in output
    psutil.wait_procs(ranks, timeout=30)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert len(saved_steps(tmp_path / "r")) == 1


def test_a_closed_terminal_loses_nothing(tmp_path: Path, cache_dir: Path) -> None:
    """The launcher and the ranks get SIGHUP, and what they print fails."""
    run_dir = tmp_path / "r"
    arguments = options(run_dir, cache_dir, "train.kimg=10000", f"tracking.every_kimg={STEP}", "checkpoint.every_kimg=1000")
    process, terminal = pty.fork()
    if process == 0:
        environment = os.environ | {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.execvpe("bash", ["bash", str(ROOT / "launch/torchrun.sh"), *arguments], environment)
    deadline = time.monotonic() + 90
    while not (run_dir / "metrics.jsonl").exists() or len((run_dir / "metrics.jsonl").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65536)
    ranks = psutil.Process(process).children(recursive=True)
    os.close(terminal)
    os.waitpid(process, 0)
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    (step,) = saved_steps(run_dir)
    assert step >= 5
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == step


def train_in_silence(run_dir: Path, cache_dir: Path, where: str) -> None:
    """Standard output and error are a full disk, or a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    descriptor = os.open("/dev/full", os.O_WRONLY) if where == "full disk" else writing
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    main(options(run_dir, cache_dir, "train.kimg=0.256", f"tracking.every_kimg={STEP}"))
    sys.stdout = sys.stderr = None  # what is still to be flushed


@pytest.mark.parametrize("where", ["full disk", "closed pipe"])
def test_a_run_outlives_what_it_prints_to(tmp_path: Path, cache_dir: Path, where: str) -> None:
    run_ranks(1, train_in_silence, tmp_path / "r", cache_dir, where)
    assert saved_steps(tmp_path / "r") == [4]


def train_on_a_small_disk(run_dir: Path, cache_dir: Path, checkpoints: Path) -> str:
    mount_small_disk(run_dir, 60_000)
    (run_dir / "checkpoints").symlink_to(checkpoints)
    with redirect_stdout(StringIO()) as said:
        main(options(run_dir, cache_dir, "train.kimg=5.12", f"tracking.every_kimg={STEP}", "tracking.samples_every_kimg=1000"))
    assert all(json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return said.getvalue()


def test_a_full_disk_under_the_metrics_does_not_end_the_run(tmp_path: Path, cache_dir: Path) -> None:
    run_dir, checkpoints = tmp_path / "r", tmp_path / "elsewhere" / "checkpoints"
    run_dir.mkdir()
    checkpoints.mkdir(parents=True)
    (said,) = run_ranks(1, train_on_a_small_disk, run_dir, cache_dir, checkpoints)
    assert said.count(f"warning: {run_dir / 'metrics.jsonl'}: No space left on device; the run goes on") == 1
    assert f"finished: {run_dir}" in said
    assert saved_steps(checkpoints.parent)[-1] == 80


def die(*_: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die_measuring_the_best(arguments: list[str]) -> None:
    with patch.object(Evaluator, "measure_checkpoint", die):
        main(arguments)


def test_the_best_is_measured_again_after_a_kill(tmp_path: Path, cache_dir: Path) -> None:
    measured = ["train.kimg=0.128", "evaluation.metrics=[accuracy]", "checkpoint.best=classification/test_top1"]
    arguments = [*options(tmp_path, cache_dir), *measured]
    (rank,) = start_ranks(1, lambda rank: (train_and_die_measuring_the_best, arguments))
    rank.join(60)
    assert rank.exitcode == -signal.SIGKILL
    assert "best/" not in (tmp_path / "evaluations.jsonl").read_text()
    for _ in range(2):
        run_ranks(1, main, arguments)
        metrics = [json.loads(line)["metric"] for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
        assert "best/test_top1" in metrics
        assert len(metrics) == len(set(metrics))


def train_and_die_having_saved(arguments: list[str]) -> None:
    def save_and_die(saver: checkpoint.Saver, *state: Any, really: Callable = checkpoint.Saver.save) -> None:
        really(saver, *state)
        die()

    with patch.object(checkpoint.Saver, "save", save_and_die):
        main(arguments)


def test_a_kill_right_after_a_save_loses_nothing_of_that_step(tmp_path: Path, cache_dir: Path) -> None:
    every = [f"{section}.every_kimg={STEP}" for section in ("tracking", "checkpoint", "evaluation")]
    arguments = [*options(tmp_path, cache_dir), *every, "train.kimg=0.128", "evaluation.metrics=[accuracy]"]
    for _ in range(2):
        (rank,) = start_ranks(1, lambda rank: (train_and_die_having_saved, arguments))
        rank.join(60)
        assert rank.exitcode == -signal.SIGKILL
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations if row["metric"] == "classification/test_top1"] == [1, 2]


def evaluate_and_die(arguments: list[str]) -> None:
    with patch.object(checkpoint.Saver, "save", die):
        main(arguments)


def test_damaged_lines_do_not_keep_a_run_from_going_on(tmp_path: Path, cache_dir: Path) -> None:
    run_ranks(1, main, options(tmp_path, cache_dir, "train.kimg=0.128", f"tracking.every_kimg={STEP}"))
    metrics = tmp_path / "metrics.jsonl"
    first, second = metrics.read_bytes().splitlines()
    metrics.write_bytes(first + b"\n\0\0\0\n\xff\xfe\n" + second + b'\n{"step": 2, "ki')
    result = launch(1, "gandist.train", *options(tmp_path, cache_dir, "train.kimg=0.256", f"tracking.every_kimg={STEP}"))
    assert result.returncode == 0, result.stderr
    assert re.findall(r"warning: .*/metrics\.jsonl, line (\d), is damaged and skipped", result.stdout) == ["2", "3"]
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_rank_that_hangs_ends_the_run(tmp_path: Path, cache_dir: Path) -> None:
    arguments = options(
        tmp_path / "r", cache_dir, "train.kimg=10000", f"tracking.every_kimg={STEP}", "train.timeout_minutes=0.1"
    )
    process = start(*arguments)
    until_it_trains(process, tmp_path / "r")
    hanging = rank_of(process, 1)
    hanging.suspend()
    suspended = time.monotonic()
    said = next((line for line in process.stdout if line.startswith("error (rank 0)")), "")
    assert said.startswith("error (rank 0): another rank does not answer")
    assert time.monotonic() - suspended < 20
    hanging.kill()  # torchrun gives it half a minute more
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_the_watchdog_says_what_a_rank_waits_for() -> None:
    code = """
import time
from gandist.watchdog import Watchdog
watchdog = Watchdog(1.0)
with watchdog.watching():
    watchdog.doing("compiling", patience=3)
    time.sleep(2)
    for _ in range(15):
        watchdog.doing("waiting for data after step 7")
        time.sleep(0.1)
    print("alive", flush=True)
    time.sleep(100)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 1
    assert result.stdout == "alive\n"
    assert result.stderr.startswith("error: no progress for 1 s, waiting for data after step 7: the stacks of this rank follow")
    assert 'File "<string>", line 12 in <module>' in result.stderr


@pytest.fixture
def two_nodes() -> Iterator[list[str]]:
    """Names of two network namespaces joined by a cable: 10.99.0.1 at eth1 of the first, 10.99.0.2 at eth2 of the second."""
    names = [f"gandist-{os.getpid()}-{number}" for number in (1, 2)]
    plug = [
        *(f"netns add {name}" for name in names),
        f"link add eth1 netns {names[0]} type veth peer name eth2 netns {names[1]}",
        *(f"-n {name} addr add 10.99.0.{number}/24 dev eth{number}" for number, name in enumerate(names, 1)),
        *(f"-n {name} link set {device} up" for number, name in enumerate(names, 1) for device in ("lo", f"eth{number}")),
    ]
    try:
        for arguments in plug:
            done = run_command("ip", *arguments.split()) if shutil.which("ip") else None
            if done is None or done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr if done else 'no ip command'}")
        yield names
    finally:
        for name in names if shutil.which("ip") else []:
            run_command("ip", "netns", "del", name)


def test_a_cut_cable_ends_both_ranks(tmp_path: Path, cache_dir: Path, two_nodes: list[str]) -> None:
    run_dir, world = tmp_path / "r", {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    arguments = options(run_dir, cache_dir, "train.kimg=10000", f"tracking.every_kimg={STEP}", "train.timeout_minutes=0.1")
    ranks = [
        start(
            *arguments,
            launcher=["ip", "netns", "exec", name, sys.executable],
            RANK=str(rank),
            MASTER_ADDR="10.99.0.1",
            MASTER_PORT="29511",
            GLOO_SOCKET_IFNAME=f"eth{rank + 1}",
            **world,
        )
        for rank, name in enumerate(two_nodes)
    ]
    until_it_trains(ranks[0], run_dir)
    cut = time.monotonic()
    assert run_command("ip", "-n", two_nodes[0], "link", "set", "eth1", "down").returncode == 0
    for rank, process in enumerate(ranks):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1, output
        assert re.search(
            rf"^error \(rank {rank}\): (another rank does not answer|the connection to another rank was lost)", output, re.M
        )
    assert time.monotonic() - cut < 40


def interrupted_evaluation(run_dir: Path, cache_dir: Path) -> None:
    """A signal reaches one rank while generated images are judged."""

    def evaluate(evaluator: Evaluator, *arguments: Any, really: Callable = Evaluator.__call__, **options: Any) -> Evaluation:
        if os.environ["RANK"] == "1":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return really(evaluator, *arguments, **options)

    many = ["train.kimg=0.128", "evaluation.metrics=[accuracy,fd_classifier]", "evaluation.num_images=10000000"]
    with patch.object(Evaluator, "__call__", evaluate):
        main(options(run_dir, cache_dir, *many))


def test_a_stop_in_an_evaluation_is_followed_at_once_and_the_evaluation_made_up_for(tmp_path: Path, cache_dir: Path) -> None:
    run_dir = tmp_path / "r"
    run_ranks(2, interrupted_evaluation, run_dir, cache_dir, timeout=60)
    assert saved_steps(run_dir) == [2]
    assert not (run_dir / "evaluations.jsonl").exists()
    (rank,) = start_ranks(
        1, lambda rank: (evaluate_and_die, options(run_dir, cache_dir, "train.kimg=0.128", "evaluation.metrics=[accuracy]"))
    )
    rank.join(60)
    assert rank.exitcode == -signal.SIGKILL, "what it told of the evaluation is told again"
    run_ranks(1, main, options(run_dir, cache_dir, "train.kimg=0.128", "evaluation.metrics=[accuracy]"))
    records = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert {record["step"] for record in records} == {2}
    assert len(records) == len({record["metric"] for record in records})
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 1, "no step was trained for it"
    run_ranks(1, main, options(run_dir, cache_dir, "train.kimg=0.128", "evaluation.metrics=[accuracy]"))
    assert len((run_dir / "evaluations.jsonl").read_text().splitlines()) == len(records), "once"


def test_a_killed_rank_is_started_anew_and_nothing_is_lost_but_time(tmp_path: Path, cache_dir: Path) -> None:
    length = ["train.kimg=1.28", "checkpoint.every_kimg=0.64", f"tracking.every_kimg={STEP}"]
    command = [*TORCHRUN, "--max-restarts=1", "-m", "tests.dies", "15", *options(tmp_path / "killed", cache_dir, *length)]
    result = run_command(*command, timeout=250)
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    run_ranks(2, main, options(tmp_path / "straight", cache_dir, *length))
    assert_same_weights(tmp_path / "killed", tmp_path / "straight")


def test_a_run_killed_again_and_again_is_the_run_that_was_not(tmp_path: Path, cache_dir: Path) -> None:
    """`benchmarks/crash.py` does so longer and with the launcher."""
    length = ["train.kimg=3.2", "checkpoint.every_kimg=0.256", f"tracking.every_kimg={STEP}"]
    moments = random.Random(0)
    killed = tmp_path / "killed"
    for _ in range(6):
        run_and_kill(2, moments.uniform(0.3, 3.0), main, options(killed, cache_dir, *length))
    run_ranks(2, main, options(killed, cache_dir, *length))
    run_ranks(2, main, options(tmp_path / "straight", cache_dir, *length))
    assert_same_weights(killed, tmp_path / "straight")


@pytest.mark.parametrize(("world_size", "expected"), [(1, 8), (2, 4), (4, 2), (8, 1), (16, 1)])
def test_accumulation_adapts_to_the_ranks(world_size: int, expected: int) -> None:
    assert TrainConfig(batch_size=64, micro_batch_size=8).accumulation_on(world_size) == expected
    assert TrainConfig(batch_size=64, accumulation=2).accumulation_on(world_size) == 2
    assert TrainConfig(batch_size=60, micro_batch_size=8).accumulation_on(1) == 10, "6 images divide 60, 7 and 8 do not"
