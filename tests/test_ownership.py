"""A run folder has one owner: on this host, on others, when it dies, and when it comes back to life."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gandist import checkpoint
from gandist.checkpoint.folder import find_damage
from gandist.ownership import FOLDER
from tests.ranks import ROOT, launch, run_module, run_ranks, start_ranks
from tests.test_survival import STEP, options, saved_steps

RENEWAL, LEASE = 0.2, 2.0  # s
PREPARED = f"import gandist.ownership as o; o.RENEWAL, o.LEASE = {RENEWAL}, {LEASE}; "
OWN = PREPARED + (
    "import sys, time; from pathlib import Path; from gandist.distributed import join_world, run\n"
    "def main():\n"
    "    with join_world() as world, o.owning(Path(sys.argv[1]), world):\n"
    "        print('mine', flush=True); sys.stdin.readline()\n"
    "run(main)"
)
TRAIN = (
    PREPARED
    + "import sys; from gandist.train import main; from gandist.distributed import run; run(lambda: main(sys.argv[1:]))"
)


def start(code: str, *arguments: object, host: str | None = None, **variables: str) -> subprocess.Popen:
    """A process that runs the code, on a host of this name, which it alone sees."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if host:
        command = ["unshare", "--map-root-user", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | variables
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def owner(run_dir: Path, host: str | None = None) -> subprocess.Popen:
    process = start(OWN, run_dir, host=host)
    assert process.stdout.readline() == "mine\n"
    return process


def refused(run_dir: Path, host: str | None = None) -> str:
    output, _ = (process := start(OWN, run_dir, host=host)).communicate(timeout=30)
    assert process.returncode == 1, output
    return output


def test_owners_come_and_go(tmp_path: Path) -> None:
    first = owner(tmp_path)
    assert re.fullmatch(
        rf"error: {tmp_path} is in use: process {first.pid} on \S+ has had it since \S+: stop that run, or choose another "
        "run_dir\n",
        refused(tmp_path),
    )
    elsewhere = refused(tmp_path, "elsewhere")
    assert elsewhere.count("\n") == 2, "it waits for a sign of life, which comes"
    assert f"error: {tmp_path} is in use: process {first.pid} on " in elsewhere
    first.send_signal(signal.SIGSTOP)
    time.sleep(LEASE)
    assert "is in use" in refused(tmp_path), "on the same host a stopped process is known to be alive"
    first.kill()
    second = owner(tmp_path)  # at once, though the first is not buried yet
    second.communicate("\n", timeout=10)
    assert second.returncode == 0
    third = owner(tmp_path, "elsewhere")  # at once, as it was released
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    third.kill()
    third.wait()
    began = time.monotonic()
    fourth = owner_after_a_wait(tmp_path)
    assert LEASE <= time.monotonic() - began < LEASE + 10
    fourth.kill()
    for process in (first, fourth):
        process.wait()


def owner_after_a_wait(run_dir: Path, host: str | None = None) -> subprocess.Popen:
    process = start(OWN, run_dir, host=host)
    assert "waits up to 2 s for a sign of life" in process.stdout.readline()
    assert process.stdout.readline() == "mine\n"
    return process


@pytest.mark.parametrize("case", ["silent", "requeued"])
def test_an_owner_that_lost_its_claim_ends_without_writing(tmp_path: Path, cache_dir: Path, case: str) -> None:
    """A node hangs, or only Slurm does not hear of it and requeues the job: another one goes on, and then it is back."""
    run_dir = tmp_path / "r"
    training = [*options(run_dir, cache_dir), f"tracking.every_kimg={STEP}", f"checkpoint.every_kimg={10 * STEP}"]
    job = {"SLURM_JOB_ID": "7"}
    old = start(TRAIN, *training, "train.kimg=10000", host="node-a", **job)
    while not saved_steps(run_dir):
        assert old.poll() is None, old.communicate()[0]
        time.sleep(0.05)
    if case == "silent":
        old.send_signal(signal.SIGSTOP)
    else:
        job["SLURM_RESTART_COUNT"] = "1"
    new = start(TRAIN, *training, "train.kimg=3.2", host="node-b", **job)
    output, _ = new.communicate(timeout=60)
    assert new.returncode == 0, output
    assert ("waits up to 2 s for a sign of life" in output) == (case == "silent")
    files = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file() and path.name[0] != "."}
    old.send_signal(signal.SIGCONT)
    output, _ = old.communicate(timeout=30)
    assert old.returncode == 1
    assert re.search(r"^error: .*/r is no longer this run's: process \d+ on node-b, Slurm job 7, has had it", output, re.M)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert find_damage(checkpoint.complete_steps(run_dir)[-1]) is None
    rows = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, rows[-1] + 1))


def test_of_two_that_start_at_once_one_trains(tmp_path: Path, cache_dir: Path) -> None:
    """With other learning rates, so that a mixture would show. `benchmarks/crash.py` starts more pairs."""
    length = ["train.kimg=1.28", "checkpoint.every_kimg=0.128", f"tracking.every_kimg={STEP}"]

    def start_two_ranks(run_dir: Path, rate: float) -> list:
        arguments = options(run_dir, cache_dir, *length, f"optimizer.generator_lr={rate}")
        return start_ranks(2, lambda rank: (run_module, tmp_path / "out", tmp_path / "err", "gandist.train", arguments))

    folders = tmp_path / "a", tmp_path / "b"
    pairs = [[start_two_ranks(run_dir, rate) for rate in (1e-3, 2e-3)] for run_dir in folders]
    for run_dir, pair in zip(folders, pairs, strict=True):
        for rank in (rank for ranks in pair for rank in ranks):
            rank.join(60)
        assert sorted([rank.exitcode for rank in ranks] for ranks in pair) == [[0, 0], [1, 1]]
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 21))
        assert len({row["lr/generator"] for row in rows}) == 1
        assert [find_damage(path) for path in checkpoint.complete_steps(run_dir)] == [None, None]
        assert len((run_dir / "starts.jsonl").read_text().splitlines()) == 1
    assert re.fullmatch(r"(error: .* is in use: process \d+ on .*\n){2}", (tmp_path / "err").read_text())


def test_fresh_moves_nothing_but_runs(tmp_path: Path, cache_dir: Path) -> None:
    thesis = tmp_path / "documents" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("all I have")
    result = launch(2, "gandist.train", "--fresh", *options(thesis.parent, cache_dir))
    assert result.returncode == 1
    assert re.fullmatch(
        r"error: --fresh moves a run aside, and \S+/documents is not one \(it has thesis\.tex\).*\n", result.stderr
    )
    assert [*tmp_path.rglob("*")] == [thesis.parent, thesis]


def _take_often(run_dir: Path, log: Path) -> None:
    from gandist.errors import RunFolderError
    from gandist.ownership import take

    for _ in range(200):
        try:
            claim = take(run_dir)
        except RunFolderError:
            continue
        with log.open("a") as file:
            file.write(f"{os.getpid()} takes\n")
        with log.open("a") as file:
            file.write(f"{os.getpid()} releases\n")
        claim.release()


@pytest.mark.parametrize("kept", [True, False], ids=["claims stay", "claims go"])
def test_never_two_at_a_time(tmp_path: Path, kept: bool) -> None:
    """Where nothing is written in between, the folder of claims goes each time, and their numbers begin anew."""
    log, run_dir = tmp_path / "log", tmp_path / "r"
    if kept:
        (run_dir / FOLDER).mkdir(parents=True)
    run_ranks(4, _take_often, run_dir, log)
    lines = log.read_text().splitlines()
    assert len({line.split()[0] for line in lines}) > 1
    for takes, releases in zip(lines[::2], lines[1::2], strict=True):
        process = takes.split()[0]
        assert (takes, releases) == (f"{process} takes", f"{process} releases")
