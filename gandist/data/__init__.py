"""The input: shards → order → loader → `Batch` → device."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from gandist.config import BUILT_IN, DataConfig, ShardSpec
from gandist.data.ahead import ahead
from gandist.data.cache import ShardCache
from gandist.data.decode import ImageFormat
from gandist.data.device import DeviceBatch, normalize, on_device, to_uint8, upload
from gandist.data.index import LabelRule
from gandist.data.labels import HiddenLabels, choose_labelled
from gandist.data.loader import (
    Batch,
    Batches,
    EvaluationBatches,
    Reader,
    ShardReader,
    ShuffledBatches,
    TrainingBatches,
    load_batches,
)
from gandist.data.memory import DecodedImages, decode_all, decoded_folder, decoded_size, identity
from gandist.data.order import SampleOrder
from gandist.data.remote import Remote
from gandist.data.shards import LabelPolicy, ShardDataset, open_shards
from gandist.data.sources import Shard, ShardList, find_shards
from gandist.data.storage import Storage
from gandist.distributed import World
from gandist.errors import ConfigError, DataError
from gandist.redaction import is_redacted
from gandist.resolution import as_option

__all__ = ["Batch", "Dataset", "DeviceBatch", "normalize", "open_dataset", "to_uint8", "upload"]

AHEAD = 2  # batches gathered and pinned before they are wanted
SORTED_BY_CLASS = 0.5  # a class mixing below this


class Dataset:
    """A data set as a configuration describes it, opened by all ranks together.

    class_names:  of `_info.json` beside the shards, else the numbers
    declared_classes: of `_info.json`, however many
    labelled:     the samples whose labels are trained with, bool [N]; None: all that have one
    class_counts: images of each class that are trained with their labels, int64 [num_classes]; ones where they are not known
    identity:     tells these images, as they are decoded, from any others; None where the shards have not all been seen
    """

    def __init__(self, found: ShardList, config: DataConfig, world: World):
        self._config = config
        self._world = world
        self.declared_classes = [str(name) for name in found.classes]
        fitting = len(found.classes) == config.num_classes
        self.class_names = self.declared_classes if fitting else [str(number) for number in range(config.num_classes)]
        image_format = ImageFormat(config.resolution, config.channels, config.resize)
        shards = _open(found, config, image_format, world)
        self.shards = shards
        self.labelled = None
        self.class_counts = shards.class_counts if shards.class_counts.any() else np.ones_like(shards.class_counts)
        if shards.labels is not None:
            self.labelled = choose_labelled(shards.labels, config.labelled, config.labelled_seed)
            self.class_counts = np.bincount(shards.labels[self.labelled], minlength=config.num_classes)
        if config.shuffle_block and (shards.class_mixing or 1) < SORTED_BY_CLASS and world.is_main:
            print(
                "warning: the shards are sorted by class, so data.shuffle_block makes batches of few classes: pack the images "
                "anew in shuffled order, or say data.shuffle_block=0",
                flush=True,
            )
        self._read = ShardReader(shards, image_format, skip=config.on_error == "skip")
        self.identity = identity(self._read)
        self._num_workers = config.num_workers
        if self.identity and decoded_size(len(shards), image_format) <= config.in_memory:
            folder = decoded_folder(config.cache_folder, self.identity)
            with world.together():
                if world.local_rank == 0 and not folder.exists():
                    decode_all(folder, self._read, config.num_workers)
            self._read = DecodedImages(folder)
            self._num_workers = 0

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def num_classes(self) -> int:
        return len(self.class_counts)

    @property
    def fingerprint(self) -> dict[str, str | None]:
        return self.shards.fingerprint

    def training_batches(self, *, seed: int, batch_size: int, start: int) -> Iterator[DeviceBatch]:
        """This rank's part of every global batch of `batch_size` images, without end, from position `start`.

        Here alone the labels of others than the `labelled` samples are left out: what is measured is measured with all.
        """
        config, world = self._config, self._world
        sizes = self.shards.shard_sizes
        order = SampleOrder(sizes, seed=seed, shuffle_block=config.shuffle_block, lanes=config.lanes)
        placement = {"local_rank": world.local_rank, "local_size": world.local_size}
        read = None if self.labelled is None else HiddenLabels(self._read, self.labelled)
        return self._batches(TrainingBatches(order, batch_size, world.rank, world.size, start, **placement), read)

    def evaluation_batches(self, batch_size: int, limit: int | None = None) -> Iterator[DeviceBatch]:
        """This rank's share of all samples, or of `limit` that are evenly spaced, each once over the ranks."""
        world = self._world
        return self._batches(EvaluationBatches(self.shards.shard_sizes, batch_size, world.rank, world.size, limit))

    def shuffled_batches(self, batch_size: int, total: int, *, seed: int) -> Iterator[DeviceBatch]:
        """This rank's share of `total` samples: all in an order chosen by the seed, again and again in others."""
        world = self._world
        order = SampleOrder(self.shards.shard_sizes, seed=seed, shuffle_block=self._config.shuffle_block)
        return self._batches(ShuffledBatches(order, batch_size, world.rank, world.size, total))

    def some(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 [N, C, H, W] and labels [N], on the CPU: evenly spaced, or the first where they come from afar."""
        size, shards = len(self), self.shards
        samples = np.arange(min(count, size, shards.shard_sizes[0] if shards.is_cached else size))
        images, labels, _ = self._read(samples if shards.is_cached else samples * size // len(samples))
        return images.permute(0, 3, 1, 2), labels

    def encoded(self, sample: int) -> bytes:
        """One image as it lies in its shard."""
        return self.shards.read([sample])[0].image

    def name(self, sample: int) -> str:
        """For people."""
        return self.shards.name(sample)

    def _batches(self, batches: Batches, read: Reader | None = None) -> Iterator[DeviceBatch]:
        device, on_gpu = self._world.device, self._world.device.type == "cuda"
        options = {"num_workers": self._num_workers, "pin_memory": on_gpu}
        loaded = load_batches(read or self._read, batches, self.shards, **options)
        if on_gpu and isinstance(self._read, DecodedImages):  # else workers gather, and DataLoader's thread pins
            loaded = ahead(loaded, AHEAD, begin=partial(torch.cuda.set_device, device))
        return on_device(loaded, device)


def open_dataset(spec: ShardSpec, config: DataConfig, world: World, *, split: str = "train") -> Dataset:
    """The data set of `data.train` or `data.test`; the built-in digits are packed on first use.

    Raises DataError, and ConfigError where the secrets of a URL were left out.
    """
    for url in [spec] if isinstance(spec, str) else spec:
        if is_redacted(url):
            raise ConfigError(
                f"{url}: the folder of a run keeps no passwords and signatures: give the address again, as data.{split}=…"
            )
    if isinstance(spec, str) and spec.startswith(BUILT_IN):
        spec = _built_in_digits(spec, config, world)
    found = None
    with world.together():
        if world.is_main:
            found = find_shards(spec, Remote(allow_pipe=config.allow_pipe), split=split)
    found = world.broadcast(asdict(found) if found else None)
    shards = tuple(Shard(**shard) for shard in found.pop("shards"))
    return Dataset(ShardList(shards, **found), config, world)


def _open(found: ShardList, config: DataConfig, image_format: ImageFormat, world: World) -> ShardDataset:
    cache = ShardCache(config.cache_folder / "shards", config.cache_limit, Remote(allow_pipe=config.allow_pipe))
    rule = LabelRule(config.label if config.num_classes else "", found.classes)
    storage = Storage(config.cache_folder / "index", cache, rule, stage=config.stage)
    policy = LabelPolicy(config.num_classes, config.unlabelled == "allow")
    total = sum(shard.count or 0 for shard in found.shards)
    small = decoded_size(total, image_format) <= config.in_memory
    in_place = not all(map(storage.is_cached, found.shards))
    options = {"scan_all": small or in_place, "with_labels": config.labelled < 1}
    return open_shards(found, storage, policy, world, **options)


def _built_in_digits(spec: str, config: DataConfig, world: World) -> list[str]:
    # Imported here, as `python -m gandist.data.pack` imports this package first.
    from gandist.data.pack import DIGITS_SHARDS, pack_digits, shard_names
    from gandist.data.writer import FolderExists

    split = spec.removeprefix(BUILT_IN)
    if split not in DIGITS_SHARDS:
        raise DataError(
            f"no built-in data '{spec}': there are {', '.join(BUILT_IN + name for name in DIGITS_SHARDS)}", on_every_rank=True
        )
    folder = config.cache_folder / f"digits-{as_option(config.resolution)}"
    with world.together():
        if world.local_rank == 0:
            with suppress(FolderExists):  # from before, or packed by another node meanwhile
                pack_digits(folder, config.resolution)
    return [str(folder / name) for name in shard_names(split)]
