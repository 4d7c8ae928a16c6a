"""Command-line arguments that several commands have, and their types."""

import argparse
from pathlib import Path

from gandist.resolution import resolution_of


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def resolution(text: str) -> int | tuple[int, int]:
    height, times, width = text.partition("x")
    try:
        return resolution_of(positive(height), positive(width if times else height))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: say 64, or 48x64 for images 48 pixels high, 64 wide") from error


def add_config(parser: argparse.ArgumentParser) -> None:
    """A configuration: `config`, `overrides`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file; default: the built-in digits")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # deepspeed's launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration, such as train.kimg=200")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """What to load: `run`, `step`, `best`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, a checkpoint's, or an exported one")
    add_choice(parser)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Which of a run's checkpoints: `step`, `best`."""
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--step", type=positive, metavar="N", help="this checkpoint of the run (default: the newest)")
    chosen.add_argument("--best", action="store_true", help="the best one by the run's checkpoint.best")
