"""The input: shards → order → loader → `Batch`."""

from collections.abc import Iterator
from contextlib import suppress

from gandist.config import BUILT_IN, DataConfig, ShardSpec
from gandist.data.decode import ImageFormat
from gandist.data.loader import Batch, EvaluationBatches, TrainingBatches, load_batches
from gandist.data.order import SampleOrder
from gandist.data.shards import ShardDataset, open_shards, read_info
from gandist.distributed import World
from gandist.errors import DataError

__all__ = ["Batch", "ShardDataset", "class_names", "evaluation_batches", "open_dataset", "training_batches"]


def open_dataset(spec: ShardSpec, config: DataConfig, world: World) -> ShardDataset:
    """The data set of `data.train` or `data.test`; the built-in digits are packed on first use. Raises DataError."""
    if isinstance(spec, str) and spec.startswith(BUILT_IN):
        spec = _built_in_digits(spec, config, world)
    return open_shards(spec, num_classes=config.num_classes, cache_dir=config.cache_dir, world=world)


def training_batches(
    dataset: ShardDataset, config: DataConfig, world: World, *, seed: int, batch_size: int, start: int
) -> Iterator[Batch]:
    """This rank's part of every global batch of `batch_size` images, without end, from position `start`."""
    order = SampleOrder(dataset.shard_sizes, seed=seed, shuffle_block=config.shuffle_block)
    batches = TrainingBatches(order, batch_size, world.rank, world.size, start)
    return load_batches(
        dataset, batches, _image_format(config), num_workers=config.num_workers, pin_memory=world.device.type == "cuda"
    )


def evaluation_batches(dataset: ShardDataset, config: DataConfig, world: World, batch_size: int) -> Iterator[Batch]:
    """This rank's share of all samples, each once over the ranks."""
    batches = EvaluationBatches(len(dataset), batch_size, world.rank, world.size)
    return load_batches(dataset, batches, _image_format(config))


def class_names(dataset: ShardDataset, config: DataConfig) -> list[str]:
    """From `_info.json` beside the shards, else the numbers."""
    names = read_info(dataset.paths[0].parent).get("classes", [])
    return names if len(names) == config.num_classes else [str(label) for label in range(config.num_classes)]


def _image_format(config: DataConfig) -> ImageFormat:
    return ImageFormat(config.resolution, config.channels)


def _built_in_digits(spec: str, config: DataConfig, world: World) -> list[str]:
    # Imported here, as `python -m gandist.data.pack` imports this package first.
    from gandist.data.pack import DIGITS_SHARDS, pack_digits, shard_names
    from gandist.data.writer import FolderExists

    split = spec.removeprefix(BUILT_IN)
    if split not in DIGITS_SHARDS:
        raise DataError(
            f"no built-in data '{spec}': there are {', '.join(BUILT_IN + name for name in DIGITS_SHARDS)}", on_every_rank=True
        )
    folder = config.cache_dir / f"digits-{config.resolution}"
    with world.together():
        if world.local_rank == 0:
            with suppress(FolderExists):  # from before, or packed by another node meanwhile
                pack_digits(folder, config.resolution)
    return [str(folder / name) for name in shard_names(split)]
