"""Positions → batches of decoded images, through webdataset's pipeline and worker processes."""

import multiprocessing.util
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from gandist.data.decode import ImageError, ImageFormat, decode_into
from gandist.data.order import Block, SampleOrder
from gandist.data.prefetch import Prefetcher
from gandist.data.shards import ShardDataset
from gandist.errors import DataError
from gandist.preemption import ignore_signals

PREFETCHED_BATCHES = 4
SHARED_BATCHES = PREFETCHED_BATCHES + 1  # of a worker: those asked of it, and the one that is being copied
PLANNED_BATCHES = 16  # whose samples are looked up at once


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
    """Batches in their order, read in `num_workers` processes. Raises DataError for a sample that cannot be used.

    pin_memory: copy them to page-locked memory, for a GPU, which there must be
    """
    pipeline = wds.DataPipeline(_Source(batches, dataset), wds.map(partial(_read, reader=reader)))
    workers = {"prefetch_factor": PREFETCHED_BATCHES, "worker_init_fn": _init_worker} if num_workers else {}
    if num_workers:
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
    # DataLoader draws a seed for its workers, who use none: not from the run's own stream.
    options = {"num_workers": num_workers, "pin_memory": pin_memory, "collate_fn": _as_it_is, "generator": torch.Generator()}
    loader = wds.WebLoader(pipeline, batch_size=None, **options, **workers)
    for batch in loader:
        # Workers pass errors as values: an exception would arrive with its text buried in the worker's traceback.
        if isinstance(batch, DataError):
            raise batch
        if isinstance(batch, Batch):
            yield batch  # pinned: a copy
        else:
            images, labels, skipped = batch
            # A worker will overwrite its images.
            yield Batch(images.clone() if num_workers else images, torch.from_numpy(labels), skipped)


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
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as a failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
