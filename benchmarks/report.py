"""What every benchmark prints: when and on what it ran, and aligned tables."""

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

RECORDS = "GANDIST_RECORDS"  # names a file, to which `record` appends
PACKAGES = ("torch", "torchvision", "webdataset", "simplejpeg", "pillow", "numpy")


def header() -> str:
    """Date, processor, versions."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cores = len(os.sched_getaffinity(0))
    packages = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {cores} core(s) of {models[0] if models else 'an unnamed processor'}\n"
        f"Python {python_version()}, {packages}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they need be: the first to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in lines)


def record(title: str, head: Sequence[str], row: Sequence[object]) -> None:
    """A row of a table, as soon as it is known, for `benchmarks.device`, which collects rows of many processes."""
    if path := os.environ.get(RECORDS):
        with Path(path).open("a") as file:
            file.write(json.dumps({"table": title, "row": dict(zip(head, map(str, row), strict=True))}) + "\n")


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table for a page."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
