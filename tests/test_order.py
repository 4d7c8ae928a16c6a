"""The order of samples: each once an epoch whatever the shards, ranks, blocks and lanes, and any position at once."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from gandist.data.loader import EvaluationBatches, ShuffledBatches, TrainingBatches
from gandist.data.order import SampleOrder, permutation, shuffle

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=9)


@given(
    sizes=SIZES,
    batch=st.integers(1, 12),
    world=st.sampled_from([1, 2, 3, 4, 6, 8]),
    block=st.integers(0, 4),
    lanes=st.integers(1, 9),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=200)
def test_each_sample_once_an_epoch_at_any_world_size(sizes, batch, world, block, lanes, seed) -> None:
    total, epochs, batch_size = sum(sizes), 3, batch * world
    order = SampleOrder(sizes, seed=seed, shuffle_block=block, lanes=lanes)
    dealt = np.full(epochs * total + batch_size, -1)
    numbers = range(epochs * total // batch_size + 1)
    for rank in range(world):
        batches = TrainingBatches(order, batch_size, rank, world, start=0).samples(numbers)
        for number, samples in zip(numbers, batches, strict=True):
            first = number * batch_size
            dealt[first + rank : first + batch_size : world] = samples
    alone = SampleOrder(sizes, seed=seed, shuffle_block=block, lanes=lanes).samples(np.arange(epochs * total))
    assert (dealt[: epochs * total] == alone).all()
    for epoch in range(epochs):
        assert sorted(alone[epoch * total : (epoch + 1) * total]) == list(range(total))


@given(sizes=SIZES, start=st.integers(0, 10**12), count=st.integers(1, 100), block=st.integers(0, 4), lanes=st.integers(1, 5))
@settings(max_examples=100)
def test_seeking_gives_what_reading_on_would(sizes, start, count, block, lanes) -> None:
    def order() -> SampleOrder:
        return SampleOrder(sizes, seed=1, shuffle_block=block, lanes=lanes)

    together = order().samples(np.arange(start, start + count))
    one_by_one = [order().samples(np.array([position]))[0] for position in range(start, start + count)]
    assert together.tolist() == one_by_one


def test_shuffle_blocks_read_few_shards_at_a_time() -> None:
    order = SampleOrder([10] * 20, seed=0, shuffle_block=4)
    samples = order.samples(np.arange(200))
    for block in samples.reshape(5, 40):
        assert len(np.unique(block // 10)) == 4
    epochs = order.samples(np.arange(400)).reshape(2, 200)
    assert (epochs[0] != epochs[1]).any()


@given(
    sizes=SIZES,
    block=st.integers(0, 4),
    world=st.integers(1, 4),
    multiple=st.integers(1, 3),
    start=st.integers(0, 500),
    epoch=st.integers(0, 3),
)
@settings(max_examples=150)
def test_with_lanes_a_rank_reads_the_shards_it_announces(sizes, block, world, multiple, start, epoch) -> None:
    lanes = world * multiple
    order = SampleOrder(sizes, seed=7, shuffle_block=block, lanes=lanes)
    start += epoch * order.num_samples
    starts = np.cumsum([0, *sizes])
    for rank in range(world):
        batches = TrainingBatches(order, 2 * lanes, rank, world, start, rank, world)
        announced = set(batches.shards_from(0))
        now = order.block(start)
        positions = start + np.arange(rank, now.end - start, world)
        read = np.searchsorted(starts, order.samples(positions), "right") - 1
        assert set(read.tolist()) <= announced


def test_lanes_share_the_shards_out() -> None:
    """16 shards of a block, 4 ranks: each reads its 4, and all are read."""
    order = SampleOrder([25] * 64, seed=0, shuffle_block=16, lanes=4)
    shards = [set((order.samples(np.arange(rank, 400, 4)) // 25).tolist()) for rank in range(4)]
    assert [len(each) for each in shards] == [4] * 4
    assert len(set.union(*shards)) == 16


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_shuffles_come_up_equally_often(size: int) -> None:
    count = 200 * math.factorial(size)
    seen = Counter(tuple(shuffle(np.arange(size), size, 7, key)) for key in range(count))
    assert chisquare([seen[each] for each in itertools.permutations(range(size))]).pvalue > 1e-4


def test_shuffles_are_uniform_and_without_pattern() -> None:
    """Every place is as likely for every item, and neighbours end up any distance apart."""
    size, count = 500, 2000
    moved = np.stack([shuffle(np.arange(size), size, 3, key) for key in range(count)])
    assert (np.sort(moved, axis=1) == np.arange(size)).all()
    for item in (0, 1, 250, 499):
        assert chisquare(np.bincount(moved[:, item] // 10, minlength=50)).pvalue > 1e-4
    for lag in (1, 2, 22, 23, 250):
        distances = (moved[:, lag:] - moved[:, :-lag]) % size
        assert chisquare(np.bincount(distances.ravel(), minlength=size)[1:]).pvalue > 1e-4


def test_huge_sets_cost_nothing() -> None:
    """10¹² samples: a list of them would not fit into any memory."""
    samples = SampleOrder([10**6] * 10**6, seed=0).samples(np.arange(10**15, 10**15 + 1000))
    assert len(set(samples.tolist())) == 1000
    assert 0 <= samples.min() < 10**11
    assert 9 * 10**11 < samples.max() < 10**12


def test_the_order_never_changes() -> None:
    """Golden values: another order would break the resume of every run there is."""
    assert permutation(10, 1, 2, 3).tolist() == [0, 7, 5, 8, 3, 6, 9, 2, 1, 4]
    assert shuffle(np.arange(10), 10, 1, 2, 3).tolist() == [8, 2, 3, 7, 1, 4, 9, 5, 6, 0]
    order = SampleOrder([3, 4, 5], seed=1, shuffle_block=2, lanes=2)
    assert order.samples(np.arange(5, 17)).tolist() == [4, 8, 5, 9, 1, 0, 2, 9, 11, 8, 0, 7]


@given(sizes=SIZES, batch=st.integers(1, 20), world=st.integers(1, 5), planned=st.integers(1, 7))
def test_evaluation_reads_each_sample_once(sizes, batch, world, planned) -> None:
    seen = []
    for rank in range(world):
        batches = EvaluationBatches(sizes, batch, rank, world)
        first = 0
        while parts := batches.samples(range(first, first + planned)):
            seen += [sample for part in parts for sample in part.tolist()]
            first += planned
    assert sorted(seen) == list(range(sum(sizes)))


@given(sizes=SIZES, batch=st.integers(1, 20), world=st.integers(1, 5), epochs=st.sampled_from([0.4, 1, 2.5]))
def test_shuffled_batches_do_not_depend_on_the_ranks(sizes, batch, world, epochs) -> None:
    order, limit = SampleOrder(sizes, seed=3), math.ceil(sum(sizes) * epochs)
    dealt = [ShuffledBatches(order, batch, rank, world, limit).samples(range(limit)) for rank in range(world)]
    assert all(shard < len(sizes) for shard in ShuffledBatches(order, batch, 0, world, limit).shards_from(limit))
    in_turn = [part for turn in itertools.zip_longest(*dealt) for part in turn if part is not None]
    assert {len(part) for part in in_turn[:-1]} <= {batch}
    assert np.concatenate(in_turn).tolist() == order.samples(np.arange(limit)).tolist()
