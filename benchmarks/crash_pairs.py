"""Pairs of runs that `benchmarks.crash` starts on one folder, at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.crash_run import LONGEST, SAVED, Poll, Run, until
from gandist.ownership import FOLDER as CLAIMS
from tests.ranks import ROOT

TRAIN_PAIRED = "import sys; from benchmarks.crash_pairs import train_paired; train_paired(*sys.argv[1:])"
ON_HOST = 'hostname "$0" && ip link set lo up && exec "$@"'
UNSHARE = ["unshare", "--map-root-user", "--uts", "--net"]
RATES = "0.001", "0.002"


def paired(folder: Path, rate: str) -> Run:
    """One of two, with a log of its own. It trains until it is stopped."""
    return Run(folder, "plain", 2, 10**6, (f"optimizer.generator_lr={rate}",), suffix=f".{rate}.log")


def exit_status(ranks: Sequence[Any]) -> int | None:
    """That of all; None while one of them runs."""
    codes = {rank.exitcode for rank in ranks}
    assert None in codes or len(codes) == 1, f"ranks ended with {codes}"
    return None if None in codes else codes.pop()


def train_paired(folder: str, rate: str) -> None:
    ranks = paired(Path(folder), rate).start()
    for rank in ranks:
        rank.join()
    sys.exit(exit_status(ranks))


def start_here(folder: Path, rate: str) -> Poll:
    return partial(exit_status, paired(folder, rate).start())


def start_on(host: str, folder: Path, rate: str) -> Poll:
    command = [*UNSHARE, "sh", "-c", ON_HOST, host, sys.executable, "-c", TRAIN_PAIRED, str(folder), rate]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}).poll


def start_pair(folder: Path, hosts: Sequence[str]) -> float:
    """Two runs on one folder at once, here or on two hosts: one trains, the other ends with one line, after so many seconds."""
    began = time.monotonic()
    starts = [partial(start_on, host) for host in hosts] or [start_here, start_here]
    polls = [start(folder, rate) for start, rate in zip(starts, RATES, strict=True)]
    while all(poll() is None for poll in polls):
        assert time.monotonic() - began < LONGEST, f"two runs train in {folder}"
        time.sleep(0.02)
    seconds = time.monotonic() - began
    loser = 0 if polls[0]() is not None else 1
    winner = 1 - loser
    run, other = (paired(folder, RATES[number]) for number in (winner, loser))
    until(run, 3 * SAVED, polls[winner])
    (claim,) = (folder / CLAIMS).iterdir()
    owner = json.loads(claim.read_text())
    os.kill(owner["process"], signal.SIGTERM)
    while polls[winner]() is None:
        assert time.monotonic() - began < LONGEST, run.complaint("did not stop")
        time.sleep(0.02)
    codes = polls[winner](), polls[loser]()
    assert codes == (0, 1), run.complaint(f"and the other ended with {codes}") + other.complaint("")
    errors = [line for line in other.log.read_text().splitlines() if line.startswith("error")]
    refusal = f"error: {folder} is in use: process {owner['process']} on {owner['host']} has had it since"
    assert len(errors) == 1, other.complaint("said more than a line")
    assert errors[0].startswith(refusal), other.complaint("said something else")
    assert not hosts or owner["host"] == hosts[winner]
    assert {row["lr/generator"] for row in run.rows("metrics.jsonl")} == {float(RATES[winner])}, run.complaint("is mixed")
    assert len(run.rows("starts.jsonl")) == 1, run.complaint("was started twice")
    run.check_files()
    return seconds


def start_pairs(folder: Path, number: int, hosts: Sequence[str]) -> None:
    where = "two hosts" if hosts else "one host"
    if hosts and subprocess.run([*UNSHARE, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        print("no network namespaces here: no pairs on two hosts")
        return
    times = [start_pair(folder / f"pair {each} on {where}", hosts) for each in range(number)]
    if times:
        print(
            f"{number} pair(s) of starts on {where}: one owner each, nothing mixed; the other was refused after "
            f"{min(times):.0f} to {max(times):.0f} s, start included",
            flush=True,
        )
