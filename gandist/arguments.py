"""Types of command-line arguments that several commands have."""

import argparse

from gandist.resolution import resolution_of


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def resolution(text: str) -> int | tuple[int, int]:
    height, times, width = text.partition("x")
    try:
        return resolution_of(positive(height), positive(width if times else height))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: say 64, or 48x64 for images 48 pixels high, 64 wide") from error
