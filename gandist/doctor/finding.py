"""Runs checks, and reports what they find: one line for all ranks that find the same."""

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from gandist.config import Config
from gandist.errors import GandistError
from gandist.launcher import Launch

TIME_LIMIT = 20.0  # s of one check
OK, WARNING, ERROR = "ok", "warning", "error"


class Finding(NamedTuple):
    """status: OK, WARNING or ERROR; advice: what to do; figures: measured, so they differ between ranks that are alike"""

    status: str
    text: str
    advice: str = ""
    figures: str = ""


class Place(NamedTuple):
    """What a check looks at. device: of this rank, for the checks of it"""

    config: Config
    launch: Launch
    device: torch.device = torch.device("cpu")


Check = Callable[[Place], Finding]
Findings = dict[str, Finding]  # by the name of the check


def examine(check: Check, place: Place, seconds: float = TIME_LIMIT) -> Finding:
    """What the check finds; an error if it raises or takes longer than `seconds`."""
    found: list[Finding] = []

    def work() -> None:
        try:
            if place.device.type == "cuda":
                torch.cuda.set_device(place.device)  # in a new thread it is the first one
            found.append(check(place))
        except GandistError as error:
            found.append(Finding(ERROR, str(error)))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            found.append(Finding(ERROR, f"the check failed ({type(error).__name__}: {reason})"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else Finding(ERROR, f"no answer after {seconds:g} s", "what is checked here hangs")


class Report:
    """Counts findings, and prints them if `prints`."""

    def __init__(self, *, prints: bool):
        self.counts = Counter({WARNING: 0, ERROR: 0})
        self._prints = prints

    def add(self, check: str, finding: Finding, ranks: str = "") -> None:
        """ranks: whose finding it is, where not that of rank 0"""
        self.counts[finding.status] += 1
        said = ", ".join(filter(None, [finding.text, finding.figures]))
        advice = f": {finding.advice}" if finding.advice else ""
        self.say(f"{finding.status:7}  {check:10}  {f'rank {ranks}: ' if ranks else ''}{said}{advice}")

    def say(self, line: str) -> None:
        if not self._prints:
            return
        try:
            print(line, flush=True)
        except BrokenPipeError:  # nobody reads on; the exit status still counts
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def differing(known: Findings, others: Mapping[int, Findings]) -> list[tuple[str, Finding, list[int]]]:
    """What `others` found that is not `known`, figures aside: the check, the finding of the first such rank, all such ranks."""
    found: dict[tuple[str, Finding], tuple[str, Finding, list[int]]] = {}
    for rank, findings in others.items():
        for name, finding in findings.items():
            essence = finding._replace(figures="")
            if name not in known or known[name]._replace(figures="") != essence:
                found.setdefault((name, essence), (name, finding, []))[2].append(rank)
    return list(found.values())
