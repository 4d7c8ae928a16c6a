"""A checkpoint on the disk: its folder, its manifest, and whether it is whole."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gandist.errors import CheckpointError

FOLDER = "checkpoints"  # of a run folder
META = "meta.json"
INDEX = "index.json"
WEIGHT_MAP = "weight_map"  # key of the index, as in those of Hugging Face: name of a tensor → its file
SUMS = "SHA256SUMS"
UNFINISHED = ".tmp-"  # prefix of folders that are being written or removed
REPLACED = ".tmp-replaced-"  # prefix of a checkpoint while a newer one of the same step takes its name
DAMAGED = ".damaged"  # suffix of checkpoints that were set aside
_OLDER = ".metadata"  # a file of checkpoints that older versions saved with torch.distributed.checkpoint
_STEP = re.compile(r"step-(\d{8,})")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is the folder of a checkpoint."""
    return (path / META).exists() or _STEP.fullmatch(path.resolve().name) is not None


def all_steps(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, with those that have no manifest."""
    folder = run_dir / FOLDER
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if _STEP.fullmatch(path.name)), key=lambda path: int(path.name[5:]))


def complete_steps(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in all_steps(run_dir) if (path / SUMS).exists()]


def read_meta(path: Path) -> dict[str, Any]:
    """The counters and provenance of a checkpoint."""
    return json.loads((path / META).read_text())


def read_index(path: Path) -> dict[str, str]:
    """The name of each tensor → the file that has it."""
    return dict(json.loads((path / INDEX).read_text())[WEIGHT_MAP])


def read_sums(path: Path) -> tuple[dict[str, str], str | None]:
    """File names → SHA-256, and the first file that is missing, if any.

    Raises OSError where a file cannot be read: that is not damage. Raises CheckpointError for a checkpoint of an older version.
    """
    try:
        sums = dict(reversed(line.split("  ", 1)) for line in (path / SUMS).read_text().splitlines())
        if (path / _OLDER).exists() and INDEX not in sums:
            raise CheckpointError(f"{path} was saved by an older version of gandist, as pickles: resume it with that version")
        needed = {META, INDEX, *read_index(path).values()}
    except FileNotFoundError as error:
        return {}, f"{path} is not whole: no {Path(error.filename).name}"
    except (ValueError, LookupError, TypeError) as error:
        return {}, f"{path} is not whole: {' '.join(str(error).split())}"
    missing = [name for name in sorted(needed | sums.keys()) if name not in sums or not _is_file_of(path, name)]
    return sums, f"{path} is not whole: no {missing[0]}" if missing else None


def mismatches(path: Path, sums: dict[str, str], names: Iterable[str]) -> list[str]:
    """The files of a checkpoint, of these names, that do not match their checksums."""
    return [f"{path / name} does not match {SUMS}" for name in names if sha256(path / name) != sums[name]]


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads all of it. Raises as `read_sums` does."""
    sums, damage = read_sums(path)
    return damage or next(iter(mismatches(path, sums, sorted(sums))), None)


def restore_replaced(run_dir: Path) -> None:
    """Gives a checkpoint its name back where a killed process had not yet renamed the one that replaces it."""
    for replaced in (run_dir / FOLDER).glob(REPLACED + "*"):
        final = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not final.exists():
            replaced.rename(final)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_file_of(folder: Path, name: str) -> bool:
    return "/" not in name and (folder / name).is_file()
