"""Writing checkpoints: whole or not at all, in the foreground or in the background."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from gandist.checkpoint.folder import META, SUMS, UNFINISHED, checkpoint_path, sha256, sync, write_synced
from gandist.checkpoint.loading import root_cause
from gandist.checkpoint.retention import prune, remove
from gandist.checkpoint.tensors import Tensors, flatten, nest, share
from gandist.config import CheckpointConfig
from gandist.distributed import World
from gandist.errors import CheckpointError, GandistError

HEADER_BYTES = 4096  # a tensor's name, form and alignment take less
LAST_WAIT = 60  # seconds that a run which fails waits for the checkpoint it is writing


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of a checkpoint."""

    step: int
    meta: dict[str, Any]
    mine: Tensors  # this rank's share of the tensors
    total_bytes: int  # of all tensors


def save(
    run_dir: Path,
    step: int,
    state: dict[str, Any],
    meta: dict[str, Any],
    world: World,
    config: CheckpointConfig = CheckpointConfig(),  # noqa: B008
) -> Path:
    """Saves `state`, nested dicts of tensors that are equal on all ranks, and removes the checkpoints that may go.

    Every rank calls it. Raises CheckpointError on all of them if any cannot write; older checkpoints are untouched then.
    """
    return _write(run_dir, _snapshot(step, state, meta, world), world, config)


class Saver:
    """Saves the checkpoints of a run, as `checkpoint` of its configuration says. Every rank makes one and calls it.

    In the background, the ranks first copy their shares of the state to CPU memory, which is all that training waits for.
    A thread of each rank then writes them; the threads agree in a group of their own, never in one that training uses.
    Used within `with`, whose end waits for the checkpoint that is being written.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, world: World):
        self.run_dir = run_dir
        self.config = config
        self.world = world
        self._writing: Future[Path] | None = None
        self._failure: CheckpointError | None = None  # of the newest checkpoint
        self._staged: Tensors = {}
        if config.asynchronous:
            self._background = replace(world, control=dist.new_group(backend="gloo", timeout=world.timeout))

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Raises CheckpointError on all ranks, or warns, as `on_error` says, where this checkpoint or the one that was
        being written before it cannot be written."""
        self._settle()
        snapshot = _snapshot(step, state, meta, self.world)
        if self.config.asynchronous:
            self._writing = self._start(replace(snapshot, mine=self._stage(snapshot.mine)))
        else:
            self._judge(lambda: _write(self.run_dir, snapshot, self.world, self.config))

    def check(self) -> None:
        """Like `save`, of the checkpoint that is being written, if that is over."""
        if self._writing is not None and any(self.world.gather(self._writing.done())):
            self._settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Raises CheckpointError if the run would end without its last checkpoint."""
        if error is None:
            self._settle()
            if self._failure:
                raise self._failure
        elif self._writing is not None:
            with suppress(TimeoutError):
                self._writing.exception(LAST_WAIT)

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written, if any."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._judge(writing.result)

    def _judge(self, finish: Callable[[], Path]) -> None:
        self._failure = None
        try:
            finish()
        except CheckpointError as error:
            if self.config.on_error == "stop":
                raise
            self._failure = error
            if self.world.is_main:
                print(f"warning: {error} (checkpoint.on_error=continue)", flush=True)

    @torch.no_grad()
    def _stage(self, tensors: Tensors) -> Tensors:
        """A copy in CPU memory, which is allocated once and used again."""
        if not self._staged:
            self._staged = {
                path: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for path, tensor in tensors.items()
            }
        for path, tensor in tensors.items():
            self._staged[path].copy_(tensor, non_blocking=True)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return self._staged

    def _start(self, snapshot: Snapshot) -> Future[Path]:
        written: Future[Path] = Future()

        def work() -> None:
            try:
                if self.world.device.type == "cuda":
                    torch.cuda.set_device(self.world.device)  # each thread begins with the first GPU
                written.set_result(_write(self.run_dir, snapshot, self._background, self.config))
            except BaseException as error:
                written.set_exception(error)

        # A daemon: the process of a rank that failed does not wait for it.
        threading.Thread(target=work, name="checkpoint", daemon=True).start()
        return written


def _snapshot(step: int, state: dict[str, Any], meta: dict[str, Any], world: World) -> Snapshot:
    tensors = flatten(state)
    total_bytes = sum(tensor.nbytes + HEADER_BYTES for tensor in tensors.values())
    return Snapshot(step, meta, share(tensors, world.rank, world.size), total_bytes)


def _write(run_dir: Path, snapshot: Snapshot, world: World, config: CheckpointConfig) -> Path:
    """The folder has its final name only when all of it is on the disk."""
    final = checkpoint_path(run_dir, snapshot.step)
    partial = final.with_name(UNFINISHED + final.name)
    try:
        with world.together():
            if world.is_main:
                _begin(partial, snapshot)
        _write_shards(partial, snapshot.mine, world)
        sums = {}
        with world.together():
            for path in partial.iterdir():
                # Each rank sees what it wrote itself at once, whatever a network's file system caches.
                if path.name.startswith(f"__{world.rank}_") or (world.is_main and not path.name.startswith("__")):
                    sums[path.name] = sha256(path)
        sums = {name: digest for part in world.gather(sums) for name, digest in part.items()}
        with world.together():
            if world.is_main:
                _finish(partial, final, sums)
                prune(run_dir, config)
    except GandistError as error:
        # Of a full disk, torch says "unexpected pos".
        reason = world.broadcast(_lack_of_room(partial, snapshot) if world.is_main else None) or error
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot save {final}: {reason}. The checkpoints before it are intact", on_every_rank=True
        ) from error
    return final


def _begin(partial: Path, snapshot: Snapshot) -> None:
    for unfinished in partial.parent.glob(UNFINISHED + "*"):
        remove(unfinished)
    partial.mkdir(parents=True)
    if lack := _lack_of_room(partial, snapshot):
        raise CheckpointError(lack)
    (partial / META).write_text(json.dumps(snapshot.meta, indent=2) + "\n")


def _lack_of_room(partial: Path, snapshot: Snapshot) -> str | None:
    """What is missing, if the disk has no room for what is not yet written."""
    try:
        missing = snapshot.total_bytes - sum(file.stat().st_size for file in partial.iterdir())
        free = shutil.disk_usage(partial).free
    except OSError:  # the disk is not full but gone
        return None
    if free >= missing:
        return None
    return (
        f"{missing / 1e6:,.1f} MB more are needed in {partial.parent}, {free / 1e6:,.1f} MB are free: make room there, lower "
        "checkpoint.keep, or take run_dir to a larger disk"
    )


def _write_shards(partial: Path, tensors: Tensors, world: World) -> None:
    try:
        dcp.save(nest(tensors), checkpoint_id=partial, process_group=world.control)
    except CheckpointException as error:
        raise CheckpointError(root_cause(error)) from error


def _finish(partial: Path, final: Path, sums: dict[str, str]) -> None:
    for name in sums:
        if not (partial / name).exists():
            raise CheckpointError(f"{partial / name} is not there on rank 0: all nodes must share run_dir")
    write_synced(partial / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    sync(partial / META)
    sync(partial)
    if final.exists():
        remove(final)
    partial.rename(final)
    sync(final.parent)
