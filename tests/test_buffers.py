"""Workers write batch after batch into the same shared memory: what was taken from them stays as it was."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from gandist.data.decode import ImageFormat
from gandist.data.loader import SHARED_BATCHES, EvaluationBatches, ShardReader, TrainingBatches, load_batches
from gandist.data.order import SampleOrder
from gandist.distributed import World
from tests.shards import open_files, write_shards


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_from_workers_may_be_kept(tmp_path: Path, world: World, workers: int) -> None:
    paths = write_shards(tmp_path / "shards", [40, 30, 30])
    dataset = open_files([str(path) for path in paths], tmp_path / "cache", world)
    reader = ShardReader(dataset, ImageFormat(4, 1))
    training = TrainingBatches(SampleOrder(dataset.shard_sizes, seed=0), 8, rank=0, world_size=1, start=0)
    evaluation = EvaluationBatches(dataset.shard_sizes, 8, rank=0, world_size=1)  # ends with a smaller one
    for batches, count in ((training, 8 * SHARED_BATCHES), (evaluation, 13)):
        kept = list(islice(load_batches(reader, batches, dataset, num_workers=workers), count))
        alone = list(islice(load_batches(reader, batches, dataset), count))
        assert len(kept) == count
        for one, other in zip(kept, alone, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
