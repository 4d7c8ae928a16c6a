"""Finding the newest checkpoint that is whole, and loading it."""

import shutil
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from gandist.checkpoint.folder import DAMAGED, FOLDER, complete_steps, mismatches, read_sums
from gandist.checkpoint.tensors import flatten, nest
from gandist.distributed import World
from gandist.errors import CheckpointError

OBJECTIVE = "objective"  # a part of a player's state


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
