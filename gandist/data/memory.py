"""Small data sets, decoded once and held in memory: one file that all ranks of a node map, and find again in the next run."""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gandist.data.decode import ImageFormat
from gandist.data.loader import Batch, EvaluationBatches, ShardReader, load_batches

BATCH_SIZE = 256
_IMAGES, _LABELS, _SKIPPED = "images.npy", "labels.npy", "skipped.json"


class DecodedImages:
    """Reads batches from the decoded copy in `folder`."""

    def __init__(self, folder: Path):
        self._images = np.load(folder / _IMAGES, mmap_mode="r")
        self._labels = np.load(folder / _LABELS)
        self._skipped = {int(sample): failure for sample, failure in json.loads((folder / _SKIPPED).read_text()).items()}

    def __call__(self, samples: Sequence[int]) -> Batch:
        """Sample ids [B] → Batch"""
        images, labels = self._images[samples], self._labels[samples]
        skipped = {sample: self._skipped[sample] for sample in self._skipped.keys() & set(samples)} if self._skipped else {}
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), skipped)


def decoded_size(num_samples: int, image_format: ImageFormat) -> int:
    """Bytes."""
    return num_samples * math.prod(image_format.shape)


def identity(reader: ShardReader) -> str | None:
    """Another content or format has another one; None where the content is not known."""
    known = f"{reader.dataset.identity} {reader.dataset.policy} {reader.image_format} {reader.skip}"
    return hashlib.sha256(known.encode()).hexdigest()[:32] if reader.dataset.identity else None


def decoded_folder(cache_dir: Path, identity: str) -> Path:
    """Where the decoded copy of a data set is or will be."""
    return cache_dir / "decoded" / identity


def decode_all(folder: Path, reader: ShardReader, num_workers: int) -> None:
    """Makes the decoded copy, whole or not at all. Raises DataError."""
    dataset = reader.dataset
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        shape = (len(dataset), *reader.image_format.shape)
        images = np.lib.format.open_memmap(partial / _IMAGES, mode="w+", dtype=np.uint8, shape=shape)
        labels = np.empty(len(dataset), np.int64)
        skipped, start = {}, 0
        for batch in load_batches(
            reader, EvaluationBatches(dataset.shard_sizes, BATCH_SIZE, 0, 1), dataset, num_workers=num_workers
        ):
            end = start + len(batch.labels)
            images[start:end], labels[start:end] = batch.images.numpy(), batch.labels.numpy()
            skipped |= batch.skipped
            start = end
        images.flush()
        np.save(partial / _LABELS, labels)
        (partial / _SKIPPED).write_text(json.dumps(skipped))
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has made the same meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
