"""How well the classes are mixed in the shards, which is all the mixing that samples of one block can have."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

WINDOW = 256  # consecutive samples whose classes are counted


class ShuffleQuality(NamedTuple):
    """The mean number of classes among WINDOW samples of a shard.

    as_packed: consecutive ones; in_shard: ones drawn from the whole shard; ideal: ones drawn from all shards
    """

    as_packed: float
    in_shard: float
    ideal: float

    def share(self, classes: float) -> float:
        """1: as many as in shuffled data; 0: one class only."""
        return (classes - 1) / (self.ideal - 1) if self.ideal > 1 else 1.0


def expected_classes(class_counts: np.ndarray, drawn: int) -> float:
    """The expected number of classes among so many samples drawn at random, without replacement, from `class_counts`."""
    left = class_counts.sum() - np.arange(drawn)
    missed = (1 - class_counts[:, None] / left).clip(0).prod(axis=1)
    return float((1 - missed).sum())


def shuffle_quality(labels: Sequence[np.ndarray]) -> ShuffleQuality | None:
    """Of the labelled samples of each shard; None where there are fewer than two classes."""
    labelled = [shard[shard >= 0] for shard in labels]
    labelled = [shard for shard in labelled if len(shard)]
    class_counts = np.unique(np.concatenate(labelled or [[]]), return_counts=True)[1]
    if len(class_counts) < 2:
        return None
    ideal = cache(lambda drawn: expected_classes(class_counts, drawn))
    means = []
    for shard in labelled:
        window = min(WINDOW, len(shard))
        in_shard = expected_classes(np.unique(shard, return_counts=True)[1], window)
        windows = shard[: len(shard) // window * window].reshape(-1, window)
        means += [(len(np.unique(each)), in_shard, ideal(window)) for each in windows]
    return ShuffleQuality(*np.mean(means, axis=0).tolist())
