"""Checkpoints: saved whole or not at all, verified before they are loaded.

`step-00012000/` holds the tensors, sharded over the ranks by torch.distributed.checkpoint; `meta.json` with the counters
and how the run was made; and `SHA256SUMS` (`sha256sum -c SHA256SUMS` checks it by hand). A folder has its final name only
when all of it is on the disk.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from gandist.distributed import World
from gandist.errors import CheckpointError

FOLDER = "checkpoints"  # of a run folder
META = "meta.json"
SUMS = "SHA256SUMS"
_STEP = re.compile(r"step-(\d{8})")


def complete_steps(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name) and (path / SUMS).exists())


def save(run_dir: Path, step: int, state: dict[str, Any], meta: dict[str, Any], world: World, *, keep: int) -> Path:
    """Saves `state`, nested dicts of tensors that are equal on all ranks, and removes all but the `keep` newest.

    Every rank calls it. Raises CheckpointError on all of them if any cannot write; older checkpoints are untouched then.
    """
    folder = run_dir / FOLDER
    final = folder / f"step-{step:08d}"
    partial = folder / f".tmp-{final.name}"
    with world.together():
        if world.is_main:
            for unfinished in folder.glob(".tmp-*"):
                shutil.rmtree(unfinished)
            partial.mkdir(parents=True)
            (partial / META).write_text(json.dumps(meta, indent=2) + "\n")
    try:
        dcp.save(state, checkpoint_id=partial, process_group=world.control)
    except CheckpointException as error:
        raise CheckpointError(
            f"cannot save {final}: {_root_cause(error)}. The checkpoints before it are intact", on_every_rank=True
        ) from error
    written = world.broadcast(sorted(path.name for path in partial.iterdir()) if world.is_main else None)
    with world.together():
        sums = {name: _sha256(partial / name) for name in written[world.rank :: world.size]}
    sums = {name: digest for part in world.gather(sums) for name, digest in part.items()}
    with world.together():
        if world.is_main:
            _write_synced(partial / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
            _sync(partial / META)
            _sync(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync(folder)
            for old in complete_steps(run_dir)[:-keep]:
                shutil.rmtree(old)
    return final


def newest(run_dir: Path, world: World) -> Path | None:
    """The newest checkpoint that is whole, on every rank; `None` in a new run.

    A damaged one is renamed to `….damaged` and the one before it is taken. Raises CheckpointError if all are damaged.
    """
    candidates = world.broadcast(complete_steps(run_dir))
    for path in reversed(candidates):
        damage = verify(path, world)
        if not damage:
            return path
        if world.is_main:
            shutil.rmtree(aside := path.with_name(f"{path.name}.damaged"), ignore_errors=True)
            path.rename(aside)
            print(f"warning: {damage}; set aside as {aside.name}", flush=True)
    if candidates or world.broadcast(any((run_dir / FOLDER).glob("*.damaged"))):
        raise CheckpointError(
            f"every checkpoint in {run_dir / FOLDER} is damaged (renamed to *.damaged): restore one from a copy, or start "
            "over with --fresh",
            on_every_rank=True,
        )
    return None


def verify(path: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, or None. The ranks share the work."""
    expected, damage = world.broadcast(_read_sums(path) if world.is_main else None)
    if damage:
        return damage
    names = sorted(expected)[world.rank :: world.size]
    with world.together():
        try:
            wrong = [name for name in names if _sha256(path / name) != expected[name]]
        except FileNotFoundError as error:  # rank 0 saw it
            raise CheckpointError(
                f"{error.filename} is not there on rank {world.rank}: all nodes must share run_dir"
            ) from error
    return next((f"{path / name} does not match {SUMS}" for names in world.gather(wrong) for name in names), None)


def _read_sums(path: Path) -> tuple[dict[str, str], str | None]:
    """File names → SHA-256, and what is missing, if anything."""
    try:
        sums = dict(reversed(line.split("  ", 1)) for line in (path / SUMS).read_text().splitlines())
    except (OSError, ValueError) as error:
        return {}, f"{path / SUMS} cannot be read: {error}"
    missing = [name for name in {META, ".metadata", *sums} if name not in sums or not (path / name).exists()]
    return sums, f"{path} is not whole: no {missing[0]}" if missing else None


def load(path: Path, state: dict[str, Any], world: World) -> None:
    """Copies a verified checkpoint into the tensors of `state`. Raises CheckpointError where they do not fit it."""
    try:
        dcp.load(state, checkpoint_id=path, process_group=world.control)
    except CheckpointException as error:
        raise CheckpointError(f"{path} does not fit this configuration: {_root_cause(error)}", on_every_rank=True) from error


def read_meta(path: Path) -> dict[str, Any]:
    """The counters and provenance of a checkpoint."""
    return json.loads((path / META).read_text())


def _root_cause(error: CheckpointException) -> str:
    """The first rank's reason, without the tracebacks that follow."""
    cause = next(iter(error.failures.values()))[0]
    return " ".join(str(cause).split())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
