"""Training with a part of the labels: of each class as many in proportion, the same ones whoever reads them."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gandist.config import DataConfig
from gandist.data import Batch, Dataset, open_dataset
from gandist.data.labels import HiddenLabels, choose_labelled
from gandist.distributed import World, join_world
from tests.ranks import run_ranks
from tests.shards import write_shards

COUNTS = [100, 37, 4, 1, 0, 258]


def some_labels() -> np.ndarray:
    labels = np.repeat([-1, *range(len(COUNTS))], [50, *COUNTS])
    return np.random.default_rng(0).permutation(labels)


@pytest.mark.parametrize(
    ("share", "counts"), [(0.1, [10, 4, 1, 1, 0, 26]), (0.5, [50, 18, 2, 1, 0, 129]), (1e-6, [1, 1, 1, 1, 0, 1])]
)
def test_of_each_class_as_many_in_proportion(share: float, counts: list[int]) -> None:
    labels = some_labels()
    chosen = choose_labelled(labels, share, seed=3)
    assert (labels[chosen] >= 0).all()
    assert np.bincount(labels[chosen], minlength=len(COUNTS)).tolist() == counts
    assert (chosen == choose_labelled(labels, share, seed=3)).all()
    assert not chosen[~choose_labelled(labels, 0.6, seed=3)].any()  # of a larger share they are a part


def test_the_seed_says_which_ones() -> None:
    labels = np.zeros(1000, np.int64)
    chosen = [choose_labelled(labels, 0.5, seed) for seed in range(4)]
    for i, mine in enumerate(chosen):
        for other in chosen[:i]:
            assert 200 < (mine & other).sum() < 300


def test_all_is_all() -> None:
    labels = some_labels()
    assert (choose_labelled(labels, 1.0, 0) == (labels >= 0)).all()


def open_partly(cache_dir: Path, world: World, spec: str = "digits:train", **options) -> Dataset:
    config = DataConfig(**{"labelled": 0.1, "labelled_seed": 5, "cache_dir": cache_dir} | options)
    return open_dataset(spec, config, world, split=spec.partition(":")[2])


def training(dataset: Dataset, batches: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of some batches of 500 images, of this rank's part, [batches, 500 / world_size, …]"""
    found = islice(dataset.training_batches(seed=3, batch_size=500, start=700), batches)
    images, labels = zip(*((images.clone(), labels) for images, labels, _ in found), strict=True)
    return torch.stack(images), torch.stack(labels)


def read_in_each_way(cache_dir: Path) -> list[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
    ways = [{}, {"in_memory": 0, "num_workers": 0}, {"in_memory": 0, "num_workers": 2}]
    with join_world() as world:
        datasets = [open_partly(cache_dir, world, **options) for options in ways]
        return [(*training(dataset), dataset.class_counts) for dataset in datasets]


def test_ranks_workers_and_memory_have_no_part_in_it(cache_dir: Path, world: World) -> None:
    whole = open_partly(cache_dir, world, labelled=1.0)
    images, labels = training(whole)
    dataset = open_partly(cache_dir, world)
    alone = training(dataset)
    seen = alone[1] >= 0
    assert torch.equal(alone[0], images)
    assert torch.equal(alone[1][seen], labels[seen])
    everything = islice(dataset.training_batches(seed=0, batch_size=len(dataset), start=0), 1)
    counts = np.bincount(next(everything).labels + 1, minlength=11)[1:]
    expected = np.round(whole.class_counts * 0.1).astype(int).tolist()
    assert counts.tolist() == dataset.class_counts.tolist() == expected
    ranks = run_ranks(2, read_in_each_way, cache_dir)
    for ways in zip(*ranks, strict=True):
        for found, alone_found in zip(zip(*ways, strict=True), (*alone, dataset.class_counts), strict=True):
            if isinstance(alone_found, np.ndarray):
                assert all((each == alone_found).all() for each in found)
            else:
                assert torch.equal(torch.stack(found, 2).flatten(1, 2), alone_found)


def test_what_is_measured_is_measured_with_all_labels(cache_dir: Path, world: World) -> None:
    for spec in ("digits:test", "digits:train"):
        partly, whole = (open_partly(cache_dir, world, spec, labelled=share) for share in (0.1, 1.0))
        labels = [torch.cat([batch.labels for batch in each.evaluation_batches(256)]) for each in (partly, whole)]
        assert (labels[0] >= 0).all()
        assert torch.equal(*labels)
        assert partly.identity == whole.identity  # what is kept of the images' statistics serves both


def test_declared_counts_do_not_spare_the_look_at_the_labels(tmp_path: Path, world: World) -> None:
    paths = write_shards(tmp_path / "a", [30, 10])
    (tmp_path / "a" / "sizes.json").write_text(f'{{"{paths[0].name}": 30, "{paths[1].name}": 10}}')
    options = {"resolution": 4, "stage": True, "in_memory": 0}
    assert open_partly(tmp_path / "cache", world, str(tmp_path / "a"), labelled=1.0, **options).shards.content is None
    assert open_partly(tmp_path / "cache", world, str(tmp_path / "a"), labelled=0.5, **options).labelled.sum() == 20


def test_what_stands_in_for_another_has_no_label() -> None:
    def read(samples: np.ndarray) -> Batch:
        return Batch(torch.zeros(len(samples)), torch.from_numpy(samples % 3), {4: "damaged"})

    labelled = np.array([True, False, True, False, True, True])
    samples = np.array([5, 4, 3, 2, 1])
    assert HiddenLabels(read, labelled)(samples).labels.tolist() == [2, -1, -1, 2, -1]
