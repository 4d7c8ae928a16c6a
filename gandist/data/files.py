"""Image files, read as they are: to be measured or classified, not to be trained on."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from gandist.config import BUILT_IN, DataConfig
from gandist.data.collections import Collection, Samples
from gandist.data.decode import ImageError, ImageFormat, decode_into, fit
from gandist.data.device import DeviceBatch, on_device
from gandist.data.encode import upright
from gandist.data.index import UNLABELLED
from gandist.data.loader import Batch, EvaluationBatches, load_batches
from gandist.distributed import World
from gandist.errors import DataError


def is_folder_of_files(spec: str) -> bool:
    """Rather than of shards."""
    return not spec.startswith(BUILT_IN) and Path(spec).is_dir() and not any(Path(spec).glob("*.tar"))


class ImageFiles:
    """The images of a collection, of all its splits: has what of Dataset an evaluation uses.

    turned:   whether they are turned upright as their EXIF data say; to be measured they are not, as FID has no notion of it
    identity: tells these files from any others, by name, size and time
    """

    is_cached = False  # as loading asks of shards

    def __init__(self, found: Collection, config: DataConfig, world: World, *, turned: bool = False):
        self._splits = list(found.splits.values())
        self._ends = np.cumsum([len(split) for split in self._splits])
        self._format = ImageFormat(config.resolution, config.channels, config.resize)
        self._turned = turned
        self._world = world
        self._num_workers = config.num_workers
        self.num_classes = config.num_classes
        self.class_names = (found.classes or [])[: self.num_classes]
        labels = np.concatenate([split.labels for split in self._splits])
        self._labels = np.where(labels < self.num_classes, labels, UNLABELLED)
        described = ""
        for path in map(self.name, range(len(self))):
            status = os.stat(path)
            described += f"{path} {status.st_size} {status.st_mtime_ns}\n"
        self.identity = hashlib.sha256(os.fsencode(f"{described}{self._format}")).hexdigest()[:32]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def evaluation_batches(self, batch_size: int, limit: int | None = None) -> Iterator[DeviceBatch]:
        """As Dataset's."""
        world = self._world
        batches = EvaluationBatches([len(self)], batch_size, world.rank, world.size, limit)
        options = {"num_workers": self._num_workers, "pin_memory": world.device.type == "cuda"}
        return on_device(load_batches(self, batches, self, **options), world.device)

    def encoded(self, sample: int) -> bytes:
        """As Dataset's."""
        split, index = self._locate(sample)
        return split.source.read(index)

    def name(self, sample: int) -> str:
        """As Dataset's."""
        split, index = self._locate(sample)
        return split.source.name(index)

    def _locate(self, sample: int) -> tuple[Samples, int]:
        """The split, and the image's number in its source."""
        split = int(np.searchsorted(self._ends, sample, "right"))
        return self._splits[split], int(self._splits[split].indices[sample - (self._ends[split - 1] if split else 0)])

    def __call__(self, samples: Sequence[int]) -> Batch:
        """Sample ids [B] → Batch. Raises DataError."""
        images = np.empty((len(samples), *self._format.shape), np.uint8)
        labels = np.empty(len(samples), np.int64)
        for row, sample in enumerate(map(int, samples)):
            labels[row] = self._labels[sample]
            try:
                self._decode_into(images[row], self.encoded(sample))
            except ImageError as error:
                raise DataError(f"{self.name(sample)}: {error}") from error
            except OSError as error:
                raise DataError(f"{self.name(sample)}: {error.strerror}") from error
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), {})

    def _decode_into(self, pixels: np.ndarray, encoded: bytes) -> None:
        if self._turned:
            pixels[:] = fit(upright(encoded, self._format.channels), self._format.resolution, self._format.resize)
        else:
            decode_into(pixels, encoded, self._format)
