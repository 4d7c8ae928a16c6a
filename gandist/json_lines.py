"""Files of one JSON object a line, that grow while a run goes on."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gandist.atomic import naming

Row = dict[str, Any]


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds all of the rows, or on failure none. Raises OSError that names the file."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with naming(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(content) < len(content):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_rows(path: Path, *wanted: str) -> list[Row]:
    """The rows of a file, all with these keys; none if it is absent. Skips lines that are damaged, with a warning."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not row.keys() >= {*wanted}:
                raise ValueError
        except ValueError:
            if line.endswith("\n"):  # else it is still being written
                print(f"warning: {path}, line {number}, is damaged and skipped: {line[:60]!r}", flush=True)
            continue
        rows.append(row)
    return rows
