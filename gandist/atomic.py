"""Files that a crash leaves as they were or as they should be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a file anew: readers see the old content or the new one. Raises OSError that names the file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            write_synced(partial, text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_synced(path: Path, text: str) -> None:
    with naming(path):
        path.write_text(text)
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of the file to an OSError of the block that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
