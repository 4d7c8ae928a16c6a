"""Positions → batches of decoded images, through webdataset's pipeline and worker processes."""

import multiprocessing.util
import os
import re
import resource
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gandist.data.decode import ImageError, ImageFormat, decode_into
from gandist.data.order import Block, SampleOrder
from gandist.data.prefetch import Prefetcher
from gandist.data.shards import ShardDataset
from gandist.errors import DataError
from gandist.preemption import ignore_signals

PREFETCHED_BATCHES = 4
SHARED_BATCHES = PREFETCHED_BATCHES + 1  # of a worker: those asked of it, and the one that is being copied
PLANNED_BATCHES = 16  # whose samples are looked up at once
FILES_PER_WORKER = 3 + SHARED_BATCHES  # that the main process opens: pipes, and the memory of batches
_NO_SHARED_MEMORY = re.compile(r"shared memory\(shm\) for file|</torch_.*No space left|^\[Errno 28\] No space left on device$")
_NO_FILES = ("Too many open files", "items of ancdata")


class Batch(NamedTuple):
    """images: uint8 [B, H, W, C]; labels: int64 [B], −1 for none; skipped: samples replaced by others, and why"""

    images: torch.Tensor
    labels: torch.Tensor
    skipped: dict[int, str]


class _Passed(NamedTuple):
    """A batch as workers pass it: as a tensor the labels, too, would take a file descriptor, which is slow to hand over."""

    images: torch.Tensor
    labels: np.ndarray
    skipped: dict[int, str]

    def pin_memory(self) -> Batch:
        """As DataLoader calls it: copies in page-locked memory."""
        return Batch(self.images.pin_memory(), torch.from_numpy(self.labels).pin_memory(), self.skipped)


Reader = Callable[[Sequence[int]], Batch]  # sample ids [B] → Batch


class Batches(Protocol):
    """Which samples make which batch of this rank."""

    def samples(self, batches: Sequence[int]) -> list[np.ndarray]:
        """Sample ids, int64 [B], of each of these ascending batches; fewer batches when there are no more."""

    def shards_from(self, batch: int) -> Sequence[int]:
        """Shards that this rank brings to its node now, in the order that they are wanted."""


@dataclass
class TrainingBatches:
    """This rank's part of every global batch, for ever: places rank, rank + world_size, … of positions [kB, (k+1)B)."""

    order: SampleOrder
    batch_size: int  # global
    rank: int
    world_size: int
    start: int  # positions consumed before batch 0
    local_rank: int = 0
    local_size: int = 1
    _planned: tuple[int, list[int]] = field(default=(-1, []), init=False, repr=False)  # start of a block, shards from there

    def samples(self, batches: Sequence[int]) -> list[np.ndarray]:
        firsts = self.start + np.asarray(batches)[:, None] * self.batch_size
        positions = firsts + np.arange(self.rank, self.batch_size, self.world_size)
        return list(self.order.samples(positions.ravel()).reshape(positions.shape))

    def shards_from(self, batch: int) -> list[int]:
        """Of this block and the next: the shards of this rank's lanes, or where all ranks read all, its share of them."""
        now = self.order.block(self.start + batch * self.batch_size)
        if now.start != self._planned[0]:
            self._planned = now.start, self._plan([now, self.order.block(now.end)])
        return self._planned[1]

    def _plan(self, blocks: Sequence[Block]) -> list[int]:
        if self.order.lanes % self.world_size or self.batch_size % self.order.lanes:
            return [int(shard) for block in blocks for shard in block.shards[self.local_rank :: self.local_size]]
        lanes = range((self.start + self.rank) % self.world_size, self.order.lanes, self.world_size)
        return [int(shard) for block in blocks for shard in self.order.shards_of_lanes(block, lanes)]


@dataclass
class EvaluationBatches:
    """Every sample once, in order: batches rank, rank + world_size, … of fixed size, so no batch depends on the ranks.

    limit: only so many, evenly spaced
    """

    shard_sizes: Sequence[int]
    batch_size: int
    rank: int
    world_size: int
    limit: int | None = None

    def __post_init__(self) -> None:
        self._ends = np.cumsum(self.shard_sizes)
        self._size = int(self._ends[-1])
        self._count = min(self._size, self.limit or self._size)

    def samples(self, batches: Sequence[int]) -> list[np.ndarray]:
        places = _dealt(batches, self.batch_size, self.rank, self.world_size, self._count)
        return [place * self._size // self._count for place in places]

    def shards_from(self, batch: int) -> list[int]:
        """This one and two more."""
        first = (self.rank + batch * self.world_size) * self.batch_size
        shard = int(np.searchsorted(self._ends, first * self._size // self._count, "right"))
        return list(range(shard, min(shard + 3, len(self._ends))))


@dataclass
class ShuffledBatches:
    """Samples at positions [0, limit) of the order, dealt as those of EvaluationBatches are."""

    order: SampleOrder
    batch_size: int
    rank: int
    world_size: int
    limit: int

    def samples(self, batches: Sequence[int]) -> list[np.ndarray]:
        places = _dealt(batches, self.batch_size, self.rank, self.world_size, self.limit)
        return [self.order.samples(place) for place in places]

    def shards_from(self, batch: int) -> list[int]:
        """Those of the block where it begins."""
        return self.order.block((self.rank + batch * self.world_size) * self.batch_size).shards.tolist()


def _dealt(batches: Sequence[int], batch_size: int, rank: int, world_size: int, count: int) -> list[np.ndarray]:
    """The places of these batches of a rank, among `count` that are dealt to all ranks batch by batch."""
    firsts = [(rank + batch * world_size) * batch_size for batch in batches]
    return [np.arange(first, min(first + batch_size, count)) for first in firsts if first < count]


@dataclass
class ShardReader:
    """Reads and decodes the samples of a batch.

    skip: a sample that cannot be used is replaced by the next of its shard that can, instead of raising DataError
    """

    dataset: ShardDataset
    image_format: ImageFormat
    skip: bool = False
    _shared: deque[torch.Tensor] = field(default_factory=deque, init=False, repr=False)

    def __call__(self, samples: Sequence[int]) -> Batch:
        """Sample ids [B] → Batch; in a worker, its images are overwritten SHARED_BATCHES later. Raises DataError."""
        raw_samples = self.dataset.read(samples)
        images = self._room(len(raw_samples))
        pixels = images.numpy()
        labels = np.array([raw.label for raw in raw_samples], np.int64)
        skipped = {}
        for place, raw in enumerate(raw_samples):
            try:
                decode_into(pixels[place], raw.image, self.image_format)
            except ImageError as error:
                sample = int(samples[place])
                failure = f"{self.dataset.describe(sample)}: {error}"
                if not self.skip:
                    raise DataError(failure) from error
                labels[place] = self._substitute(pixels[place], sample, failure)
                skipped[sample] = failure
        return Batch(images, torch.from_numpy(labels), skipped)

    def _room(self, count: int) -> torch.Tensor:
        """Memory for a batch, uint8 [count, H, W, C]: in a worker shared with the main process, one of several in turn.

        The pages of new shared memory take half as long as decoding into them, and used ones nothing.
        """
        if get_worker_info() is None:
            return torch.from_numpy(np.empty((count, *self.image_format.shape), np.uint8))
        room = self._shared.popleft() if len(self._shared) == SHARED_BATCHES else None
        if room is None or len(room) < count:
            room = torch.empty((count, *self.image_format.shape), dtype=torch.uint8).share_memory_()
        self._shared.append(room)
        return room[:count]

    def _substitute(self, pixels: np.ndarray, sample: int, failure: str) -> int:
        """Decodes another sample in its place; returns its label."""
        for other in self.dataset.after(sample):
            (raw,) = self.dataset.read([other])
            try:
                decode_into(pixels, raw.image, self.image_format)
            except ImageError:
                continue
            return raw.label
        raise DataError(f"{failure} (nor can any other sample of this shard be used)")


class _Source(IterableDataset):
    """Stage 0: the samples of each batch. Worker w of K yields batches w, w + K, …, which DataLoader puts in order."""

    def __init__(self, batches: Batches, dataset: ShardDataset):
        self.batches = batches
        self.dataset = dataset

    def __iter__(self) -> Iterator[np.ndarray | DataError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        prefetcher = Prefetcher(self.dataset) if number == 0 and self.dataset.is_cached else None
        for first in count(number, workers * PLANNED_BATCHES):
            planned = range(first, first + workers * PLANNED_BATCHES, workers)
            samples = self.batches.samples(planned)
            for batch, ids in zip(planned, samples, strict=False):
                if prefetcher:
                    try:
                        prefetcher.want(self.batches.shards_from(batch))
                    except DataError as error:
                        yield error
                yield ids
            if len(samples) < len(planned):
                return


def load_batches(
    reader: Reader,
    batches: Batches,
    dataset: ShardDataset,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches in their order, read in `num_workers` processes. Raises DataError for a sample that cannot be used, and where
    a worker dies, or lacks shared memory or open files.

    pin_memory: copy them to page-locked memory, for a GPU, which there must be
    """
    pipeline = wds.DataPipeline(_Source(batches, dataset), wds.map(partial(_read, reader=reader)))
    workers = {"prefetch_factor": PREFETCHED_BATCHES, "worker_init_fn": _init_worker} if num_workers else {}
    if num_workers:
        _check_open_files(num_workers)
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
    # DataLoader draws a seed for its workers, who use none: not from the run's own stream.
    options = {"num_workers": num_workers, "pin_memory": pin_memory, "collate_fn": _as_it_is, "generator": torch.Generator()}
    loader = DataLoader(pipeline, batch_size=None, **options, **workers)
    for batch in _from_workers(loader) if num_workers else loader:
        # Workers pass errors as values: an exception would arrive with its text buried in the worker's traceback.
        if isinstance(batch, DataError):
            raise batch
        if isinstance(batch, Batch):
            yield batch  # pinned: a copy
        else:
            images, labels, skipped = batch
            # A worker will overwrite its images.
            yield Batch(images.clone() if num_workers else images, torch.from_numpy(labels), skipped)


def _from_workers(loader: DataLoader) -> Iterator[Any]:
    """The batches of `loader`. Raises DataError where a worker dies, or lacks shared memory or open files."""
    others = set(multiprocessing.active_children())
    workers: set[multiprocessing.Process] = set()
    try:
        made = iter(loader)
        workers = set(multiprocessing.active_children()) - others
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise the death of a worker wherever the main thread is; the loader sees it as well.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from made
    except (RuntimeError, OSError, EOFError) as error:
        codes = [worker.exitcode for worker in workers if worker.exitcode]
        if problem := _explain(error, codes):
            raise DataError(f"on {socket.gethostname()}, {problem}") from error
        raise


def _explain(error: Exception, codes: Sequence[int]) -> str | None:
    """What a user can do about an error of the loader; None for other errors. codes: the exit codes of workers that died"""
    if any(sign in str(error) for sign in _NO_FILES):
        return (
            "the limit of open files is too low for the decoding workers: raise it (ulimit -n 4096), or set data.num_workers=0"
        )
    if _NO_SHARED_MEMORY.search(str(error)) or -signal.SIGBUS in codes:
        advice = "give it more (docker run --shm-size=8g), or set data.num_workers=0"
        return f"/dev/shm is too small for the batches of the decoding workers: {advice}"
    if codes and codes[0] < 0:
        killed = f"a decoding worker was killed by {signal.Signals(-codes[0]).name}"
        return f"{killed}, often for lack of memory: lower data.num_workers"
    if codes or isinstance(error, EOFError | ConnectionError):
        return "a decoding worker died, perhaps for lack of memory: lower data.num_workers"
    return None


def _check_open_files(num_workers: int) -> None:
    """A worker that cannot pass a batch on loses it, and the main process would wait for it for ever. Raises DataError."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + num_workers * FILES_PER_WORKER
    if wanted > limit // 2:  # the rest is for shards, and for all else that a process opens meanwhile
        raise DataError(
            f"the limit of {limit} open files is too low for data.num_workers={num_workers}: raise it (ulimit -n "
            f"{max(1024, 4 * wanted)}), or set data.num_workers=0"
        )


def _read(samples: np.ndarray | DataError, reader: Reader) -> _Passed | DataError:
    if isinstance(samples, DataError):
        return samples
    try:
        images, labels, skipped = reader(samples)
        return _Passed(images, labels.numpy(), skipped)
    except DataError as error:
        return error


def _as_it_is(batch: Any) -> Any:
    """In place of DataLoader's own collation, which would make tensors of arrays."""
    return batch


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    ignore_signals()


def _end_workers() -> None:
    """At exit multiprocessing terminates its daemons and waits for them for ever; ours ignore SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
