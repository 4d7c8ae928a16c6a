"""Writing checkpoints: whole or not at all, in the foreground or in the background."""

import json
import secrets
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
from safetensors import SafetensorError
from safetensors.torch import save_file

from gandist.atomic import sync, write_synced
from gandist.checkpoint.folder import (
    FOLDER,
    INDEX,
    META,
    REPLACED,
    SUMS,
    UNFINISHED,
    WEIGHT_MAP,
    checkpoint_path,
    restore_replaced,
    sha256,
)
from gandist.checkpoint.retention import prune, remove
from gandist.checkpoint.tensors import Tensors, assign, flatten, name_of
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
    writers: dict[tuple[str, ...], int]  # the rank that writes each tensor
    mine: Tensors  # those that this rank writes
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
    return _write(run_dir, _snapshot(step, state, meta, world), world, config, lambda: None)


class Saver:
    """Saves the checkpoints of a run, as `checkpoint` of its configuration says. Every rank makes one and calls it.

    In the background, the ranks first copy their shares of the state to CPU memory, which is all that training waits for.
    A thread of each rank then writes them; the threads agree in a group of their own, never in one that training uses.
    Used within `with`, whose end waits for the checkpoint that is being written.

    confirm_owner: called on rank 0 before a checkpoint gets its name; raises GandistError where this run may no longer write
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, world: World, confirm_owner: Callable[[], None] = lambda: None):
        self.run_dir = run_dir
        self.config = config
        self.world = world
        self.confirm_owner = confirm_owner
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
            self._judge(lambda: _write(self.run_dir, snapshot, self.world, self.config, self.confirm_owner))

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
                written.set_result(_write(self.run_dir, snapshot, self._background, self.config, self.confirm_owner))
            except BaseException as error:
                written.set_exception(error)

        # A daemon: the process of a rank that failed does not wait for it.
        threading.Thread(target=work, name="checkpoint", daemon=True).start()
        return written


def _snapshot(step: int, state: dict[str, Any], meta: dict[str, Any], world: World) -> Snapshot:
    tensors = flatten(state)
    total_bytes = sum(tensor.nbytes + HEADER_BYTES for tensor in tensors.values())
    writers = assign(tensors, world.size)
    mine = {path: tensor for path, tensor in tensors.items() if writers[path] == world.rank}
    return Snapshot(step, meta, writers, mine, total_bytes)


def _write(
    run_dir: Path, snapshot: Snapshot, world: World, config: CheckpointConfig, confirm_owner: Callable[[], None]
) -> Path:
    """The folder has its final name only when all of it is on the disk."""
    final = checkpoint_path(run_dir, snapshot.step)
    # A name of its own: a start that has lost the run folder must not write into what another one writes.
    partial = final.with_name(f"{UNFINISHED}{final.name}-{world.broadcast(secrets.token_hex(4))}")
    try:
        with world.together():
            if world.is_main:
                _begin(run_dir, partial, snapshot)
        sums = {}
        with world.together():
            if not partial.is_dir():
                raise CheckpointError(f"{partial} is not there on rank {world.rank}: all nodes must share run_dir")
            if snapshot.mine:
                file = partial / _file_of(world.rank)
                _write_tensors(file, snapshot.mine)
                # Each rank sees what it wrote itself at once, whatever a network's file system caches.
                sums[file.name] = sha256(file)
        sums = {name: digest for part in world.gather(sums) for name, digest in part.items()}
        with world.together():
            if world.is_main:
                _finish(partial, final, sums, confirm_owner)
                prune(run_dir, config)
    except GandistError as error:
        # safetensors says less of a full disk.
        reason = world.broadcast(_lack_of_room(partial, snapshot) if world.is_main else None) or error
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot save {final}: {reason}. The checkpoints before it are intact", on_every_rank=True
        ) from error
    return final


def _begin(run_dir: Path, partial: Path, snapshot: Snapshot) -> None:
    restore_replaced(run_dir)
    for unfinished in (run_dir / FOLDER).glob(UNFINISHED + "*"):
        remove(unfinished)
    partial.mkdir(parents=True)
    if lack := _lack_of_room(partial, snapshot):
        raise CheckpointError(lack)
    files = {name_of(path): _file_of(rank) for path, rank in snapshot.writers.items()}
    write_synced(partial / META, json.dumps(snapshot.meta, indent=2) + "\n")
    write_synced(partial / INDEX, json.dumps({WEIGHT_MAP: files}, indent=2) + "\n")


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


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _write_tensors(file: Path, tensors: Tensors) -> None:
    try:
        save_file({name_of(path): tensor.contiguous() for path, tensor in tensors.items()}, file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: {error}") from error
    sync(file)


def _finish(partial: Path, final: Path, sums: dict[str, str], confirm_owner: Callable[[], None]) -> None:
    sums |= {name: sha256(partial / name) for name in (META, INDEX)}
    write_synced(partial / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    sync(partial)
    confirm_owner()
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    if replaced.exists():
        remove(replaced)
