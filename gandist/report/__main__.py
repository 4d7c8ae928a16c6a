"""Writes the report: `python -m gandist.report RUN [RUN …] [--output FILE.html]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gandist.errors import GandistError, ReportError
from gandist.report.page import render
from gandist.report.runs import read_runs

NAME = "report.html"
EXAMPLES = """\
examples:
  python -m gandist.report runs/digits
      writes runs/digits/report.html
  python -m gandist.report runs/digits runs/r1 --output comparison.html
      compares two runs: their curves in the same plots, their values side by side, and where their configurations differ
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.report",
        description="Write a report of training runs: one HTML file that needs neither network nor other files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the run's folder; several are compared")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help=f"default: {NAME} in the run's folder, of several runs in the current one",
    )
    options = parser.parse_args(arguments)
    runs = read_runs(options.runs)
    output = options.output or (runs[0].folder / NAME if len(runs) == 1 else Path(NAME))
    write(output, render(runs))
    print(f"{output}, {output.stat().st_size / 1e6:.1f} MB")


def write(path: Path, text: str) -> None:
    """The whole file or none. ReportError: it cannot be written."""
    partial = path.with_name(path.name + ".tmp")
    try:
        try:
            partial.write_text(text)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    try:
        main()
    except GandistError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
