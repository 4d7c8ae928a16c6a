"""What a checkpoint is on the disk: its folder, its manifest, and whether it is whole."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = "checkpoints"  # of a run folder
META = "meta.json"
SUMS = "SHA256SUMS"
UNFINISHED = ".tmp-"  # begins the names of what is being written or removed
DAMAGED = ".damaged"  # ends the names of what was set aside
_STEP = re.compile(r"step-(\d{8,})")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Rather than a run's folder."""
    return (path / META).exists() or _STEP.fullmatch(path.resolve().name) is not None


def all_steps(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, and what looks like one but has no manifest."""
    folder = run_dir / FOLDER
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if _STEP.fullmatch(path.name)), key=lambda path: int(path.name[5:]))


def complete_steps(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in all_steps(run_dir) if (path / SUMS).exists()]


def read_meta(path: Path) -> dict[str, Any]:
    """The counters and provenance of a checkpoint."""
    return json.loads((path / META).read_text())


def read_sums(path: Path) -> tuple[dict[str, str], str | None]:
    """File names → SHA-256, and what is missing, if anything."""
    try:
        sums = dict(reversed(line.split("  ", 1)) for line in (path / SUMS).read_text().splitlines())
    except (OSError, ValueError) as error:
        return {}, f"{path / SUMS} cannot be read: {error}"
    missing = [name for name in sorted({META, ".metadata", *sums}) if name not in sums or not (path / name).exists()]
    return sums, f"{path} is not whole: no {missing[0]}" if missing else None


def mismatches(path: Path, sums: dict[str, str], names: Iterable[str]) -> list[str]:
    """What is wrong with these files of a checkpoint."""
    return [f"{path / name} does not match {SUMS}" for name in names if sha256(path / name) != sums[name]]


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads all of it."""
    sums, damage = read_sums(path)
    try:
        return damage or next(iter(mismatches(path, sums, sorted(sums))), None)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
