"""Positions → batches of decoded images, through webdataset's pipeline and worker processes."""

import multiprocessing.util
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from gandist.data.decode import ImageError, ImageFormat, decode_into
from gandist.data.order import SampleOrder
from gandist.data.shards import RawSample, ShardDataset
from gandist.errors import DataError
from gandist.preemption import ignore_signals

PREFETCHED_BATCHES = 4


class Batch(NamedTuple):
    """images: uint8 [B, H, W, C]; labels: int64 [B]"""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass
class TrainingBatches:
    """This rank's part of every global batch, for ever: places rank, rank + world_size, … of positions [kB, (k+1)B)."""

    order: SampleOrder
    batch_size: int  # global
    rank: int
    world_size: int
    start: int  # positions consumed before batch 0

    def __getitem__(self, batch: int) -> np.ndarray:
        first = self.start + batch * self.batch_size
        return self.order.samples(np.arange(first + self.rank, first + self.batch_size, self.world_size))


@dataclass
class EvaluationBatches:
    """Every sample once, in order: batches rank, rank + world_size, … of fixed size, so no batch depends on the ranks."""

    num_samples: int
    batch_size: int
    rank: int
    world_size: int

    def __getitem__(self, batch: int) -> np.ndarray:
        first = (self.rank + batch * self.world_size) * self.batch_size
        if first >= self.num_samples:
            raise IndexError(batch)
        return np.arange(first, min(first + self.batch_size, self.num_samples))


class _Source(IterableDataset):
    """Stage 0: the raw samples of each batch. Worker w of K yields batches w, w + K, …, which DataLoader puts in order."""

    def __init__(self, dataset: ShardDataset, batches: TrainingBatches | EvaluationBatches):
        self.dataset = dataset
        self.batches = batches

    def __iter__(self) -> Iterator[list[RawSample] | DataError]:
        worker = get_worker_info()
        for batch in count(worker.id, worker.num_workers) if worker else count():
            try:
                samples = self.batches[batch]
            except IndexError:
                return
            try:
                yield self.dataset.read(samples)
            except DataError as error:
                yield error


def load_batches(
    dataset: ShardDataset,
    batches: TrainingBatches | EvaluationBatches,
    image_format: ImageFormat,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Decoded batches in the order of `batches`. Raises DataError for an image that cannot be used."""
    pipeline = wds.DataPipeline(_Source(dataset, batches), wds.map(partial(_decode_batch, image_format=image_format)))
    workers = {"prefetch_factor": PREFETCHED_BATCHES, "worker_init_fn": _init_worker} if num_workers else {}
    if num_workers:
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=num_workers, pin_memory=pin_memory, **workers)
    for batch in loader:
        # Workers pass errors as values: an exception would arrive with its text buried in the worker's traceback.
        if isinstance(batch, DataError):
            raise batch
        yield Batch(*batch)


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    ignore_signals()


def _end_workers() -> None:
    """At exit multiprocessing terminates its daemons and waits for them for ever; ours ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as a failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _decode_batch(samples: list[RawSample] | DataError, image_format: ImageFormat) -> Batch | DataError:
    if isinstance(samples, DataError):
        return samples
    images = np.empty((len(samples), *image_format.shape), np.uint8)
    for pixels, sample in zip(images, samples, strict=True):
        try:
            decode_into(pixels, sample.image, image_format)
        except ImageError as error:
            return DataError(f"{sample}: {error}")
    return Batch(torch.from_numpy(images), torch.tensor([sample.label for sample in samples]))
