"""Which labels of a data set are used: all, or those of some images of each class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gandist.data.index import UNLABELLED
from gandist.data.loader import Batch, Reader
from gandist.data.order import permutation


def choose_labelled(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [N]: whether a sample's label is used, of the labels int64 [N], −1 for none.

    Of each class they are round(share · count), at least one; with the same seed a larger share has those of a smaller one.
    """
    order = permutation(len(labels), seed)
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, starts = np.unique(labels[by_class], return_index=True)
    chosen = np.zeros(len(labels), bool)
    for samples in np.split(by_class, starts[1:]):
        chosen[samples[: max(1, round(share * len(samples)))]] = True
    return chosen & (labels >= 0)


@dataclass
class HiddenLabels:
    """Reads batches without the labels of all others than the `labelled` samples, bool [N]."""

    read: Reader
    labelled: np.ndarray

    def __call__(self, samples: Sequence[int]) -> Batch:
        """Sample ids [B] → Batch. What stands in for a sample that cannot be used may be any other, so it has no label."""
        batch = self.read(samples)
        known = torch.from_numpy(self.labelled[samples] & ~np.isin(samples, list(batch.skipped)))
        return batch._replace(labels=batch.labels.where(known, UNLABELLED))
