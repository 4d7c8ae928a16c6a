"""Finding a checkpoint that is whole, and loading it."""

import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gandist.checkpoint.folder import (
    DAMAGED,
    FOLDER,
    all_steps,
    checkpoint_path,
    find_damage,
    is_checkpoint,
    mismatches,
    read_index,
    read_sums,
    restore_replaced,
)
from gandist.checkpoint.retention import best
from gandist.checkpoint.tensors import Tensors, flatten, name_of, path_of
from gandist.config import CheckpointConfig
from gandist.distributed import World
from gandist.errors import CheckpointError

OBJECTIVE = "objective"  # a part of a player's state
AVERAGED = "generator_ema"  # the part of a checkpoint that is used and shared


def newest(run_dir: Path, world: World) -> Path | None:
    """The newest checkpoint that is whole, on every rank; `None` in a new run.

    A damaged one is renamed to `….damaged` and the one before it is taken. Raises CheckpointError if all are damaged.
    """
    candidates = []
    with world.together():
        if world.is_main:
            restore_replaced(run_dir)
            candidates = all_steps(run_dir)
    candidates = world.broadcast(candidates)
    for path in reversed(candidates):
        damage = verify(path, world)
        if not damage:
            return path
        if world.is_main:
            shutil.rmtree(aside := path.with_name(path.name + DAMAGED), ignore_errors=True)
            path.rename(aside)
            print(f"warning: {damage}; set aside as {aside.name}", flush=True)
    if candidates or world.broadcast(any((run_dir / FOLDER).glob("*" + DAMAGED))):
        raise CheckpointError(
            f"every checkpoint in {run_dir / FOLDER} is damaged (renamed to *{DAMAGED}): restore one from a copy, or start "
            "over with --fresh",
            on_every_rank=True,
        )
    return None


def choose(path: Path, *, step: int | None = None, best_by: CheckpointConfig | None = None) -> Path:
    """A verified checkpoint, to be used: `path`, if it is one; else of the run there that of `step`, the best one, or the
    newest that is whole. For one process alone, and nothing is changed. Raises CheckpointError.

    best_by: says what the best one is
    """
    if is_checkpoint(path):
        if best_by or step is not None:
            raise CheckpointError(f"{path} is one checkpoint: there is no other to choose")
        chosen = path
    elif best_by:
        chosen = best(path, best_by)
        if chosen is None:
            raise CheckpointError(f"no checkpoint of {path} has a value of checkpoint.best={best_by.best}: name a step")
    elif step is not None:
        chosen = checkpoint_path(path, step)
        if chosen not in (known := all_steps(path)):
            names = ", ".join(each.name for each in known) or "none"
            raise CheckpointError(f"{path} has no checkpoint {chosen.name}; there are: {names}")
    else:
        return _newest_whole(path)
    if damage := find_damage(chosen):
        raise CheckpointError(damage)
    return chosen


def _newest_whole(run_dir: Path) -> Path:
    candidates = all_steps(run_dir)
    for path in reversed(candidates):
        damage = find_damage(path)
        if not damage:
            return path
        print(f"warning: {damage}; the one before it is taken", file=sys.stderr, flush=True)
    if candidates:
        raise CheckpointError(f"every checkpoint in {run_dir / FOLDER} is damaged: restore one from a copy")
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: no such folder: name the folder of a run")
    raise CheckpointError(f"{run_dir} has no checkpoint yet: train it first")


def verify(path: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, or None. The ranks share the work."""
    found = None
    with world.together():
        if world.is_main:
            found = read_sums(path)
    sums, damage = world.broadcast(found)
    if damage:
        return damage
    with world.together():
        try:
            wrong = mismatches(path, sums, sorted(sums)[world.rank :: world.size])
        except FileNotFoundError as error:  # rank 0 saw it
            raise CheckpointError(
                f"{error.filename} is not there on rank {world.rank}: all nodes must share run_dir"
            ) from error
    return next((damage for part in world.gather(wrong) for damage in part), None)


def load(path: Path, state: dict[str, Any], world: World, *, entire: bool = False) -> None:
    """Copies a verified checkpoint into the tensors of `state`. Raises CheckpointError where they do not fit it.

    entire: whether it may have no tensor that `state` has not
    What objectives keep may be missing or left over in either: a run may go on with other losses.
    """
    saved = read_index(path).keys()
    tensors = {name_of(each): tensor for each, tensor in flatten(state).items()}
    if left := sorted(name for name in saved - tensors.keys() if OBJECTIVE not in path_of(name)) if entire else []:
        raise _misfit(path, f"it has {left[0]}, and this configuration has not ({len(left)} such tensors)")
    if missing := sorted(name for name in tensors.keys() - saved if OBJECTIVE not in path_of(name)):
        raise _misfit(path, f"it does not have {missing[0]} ({len(missing)} such tensors)")
    with world.together(), torch.no_grad():
        for name, source in _read_tensors(path, tensors.keys() & saved):
            if source.shape != tensors[name].shape:
                sizes = f"{list(source.shape)} there, {list(tensors[name].shape)} now"
                raise _misfit(path, f"the size of {name} is another one: {sizes}")
            tensors[name].copy_(source)


def read(path: Path, *parts: str) -> Tensors:
    """The tensors of a verified checkpoint, on the CPU; parts: only those of these parts of the state."""
    names = [name for name in read_index(path) if not parts or path_of(name)[0] in parts]
    return {path_of(name): tensor for name, tensor in _read_tensors(path, names)}


def _read_tensors(path: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """These tensors, file by file, on the CPU."""
    index = read_index(path)
    for file, group in groupby(sorted(names, key=index.__getitem__), index.__getitem__):
        try:
            with safe_open(path / file, "pt") as tensors:
                for name in group:
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path / file} is not whole: {error}") from error


def _misfit(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} does not fit this configuration: {reason}", on_every_rank=True)
