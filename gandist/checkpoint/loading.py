"""Finding a checkpoint that is whole, and loading it."""

import shutil
import sys
import warnings
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from gandist.checkpoint.folder import (
    DAMAGED,
    FOLDER,
    checkpoint_path,
    complete_steps,
    find_damage,
    is_checkpoint,
    mismatches,
    read_sums,
)
from gandist.checkpoint.retention import best
from gandist.checkpoint.tensors import Tensors, flatten, nest
from gandist.config import CheckpointConfig
from gandist.distributed import World
from gandist.errors import CheckpointError

OBJECTIVE = "objective"  # a part of a player's state
AVERAGED = "generator_ema"  # the part of a checkpoint that is used and shared


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
        if chosen not in (known := complete_steps(path)):
            names = ", ".join(each.name for each in known) or "none"
            raise CheckpointError(f"{path} has no checkpoint {chosen.name}; there are: {names}")
    else:
        return _newest_whole(path)
    if damage := find_damage(chosen):
        raise CheckpointError(damage)
    return chosen


def _newest_whole(run_dir: Path) -> Path:
    candidates = complete_steps(run_dir)
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
    sums, damage = world.broadcast(read_sums(path) if world.is_main else None)
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
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata.keys()
        if entire:
            _refuse_what_is_left(path, saved, state)
        tensors = {name: tensor for name, tensor in flatten(state).items() if ".".join(name) in saved or OBJECTIVE not in name}
        dcp.load(nest(tensors), checkpoint_id=path, process_group=world.control)
    except CheckpointException as error:
        raise _misfit(path, root_cause(error)) from error


def read(path: Path, *parts: str) -> Tensors:
    """The tensors of a verified checkpoint, or those whose path begins with one of these names; by this process alone."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    named = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in metadata.state_dict_metadata.items()
        if not parts or metadata.planner_data[name][0] in parts
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(named, checkpoint_id=path, no_dist=True)
    return {metadata.planner_data[name]: tensor for name, tensor in named.items()}


def _refuse_what_is_left(path: Path, saved: Set[str], state: dict[str, Any]) -> None:
    known = {".".join(name) for name in flatten(state)}
    if left := sorted(name for name in saved - known if OBJECTIVE not in name.split(".")):
        raise _misfit(path, f"it has {left[0]}, and this configuration has not ({len(left)} such tensors)")


def _misfit(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} does not fit this configuration: {reason}", on_every_rank=True)


def root_cause(error: CheckpointException) -> str:
    """The first rank's reason, without the tracebacks that follow."""
    cause = next(iter(error.failures.values()))[0]
    return " ".join(str(cause).split())
