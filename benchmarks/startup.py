"""Seconds from the command to the first step, of a new run and of a resumed one: `python -m benchmarks.startup`."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median

from benchmarks.report import header, table

OPTIONS = ["evaluation.metrics=[]", "tracking.wandb=off", "tracking.every_kimg=0.064", "checkpoint.every_kimg=0.064"]
LAUNCHERS = {
    "python": ["gandist.train"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "gandist.train"],
}
MARKS = {"described": "plan:", "first step": "kimg "}  # the beginnings of lines on the console


def time_marks(command: list[str]) -> dict[str, float]:
    """When each first stood on the console."""
    begin, found = time.perf_counter(), {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            for mark, start in MARKS.items():
                if line.startswith(start):
                    found.setdefault(mark, time.perf_counter() - begin)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS), help="default: both")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    seconds: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for launcher in options.launchers:
            with tempfile.TemporaryDirectory() as folder:
                for kind, kimg in (("new", 0.064), ("resumed", 0.128)):
                    command = [sys.executable, "-m", *LAUNCHERS[launcher], f"run_dir={folder}/run", f"train.kimg={kimg}"]
                    marks = time_marks([*command, *OPTIONS, *options.overrides])
                    seconds.setdefault((launcher, kind), []).append(marks)
    print(header())
    rows = [[*key, *(f"{median(marks[mark] for marks in found):.1f}" for mark in MARKS)] for key, found in seconds.items()]
    print(table(["launched by", "run", *(f"to {mark}, s" for mark in MARKS)], rows))


if __name__ == "__main__":
    main()
