"""How well class logits agree with labels, counted over all ranks."""

import warnings
from dataclasses import dataclass

import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from gandist.distributed import World


@dataclass(frozen=True)
class ClassificationReport:
    """top1 in [0, 1]; the others float [K] per class; confusion int64 [K, K]: rows are labels, columns predictions."""

    top1: float
    precision: list[float]
    recall: list[float]
    f1: list[float]
    confusion: list[list[int]]


class Classification:
    """Collects predictions of this rank and reports over all."""

    def __init__(self, num_classes: int, world: World):
        per_class = {"num_classes": num_classes, "process_group": world.control}
        self._metrics = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro", process_group=world.control),
                "precision": MulticlassPrecision(average=None, **per_class),
                "recall": MulticlassRecall(average=None, **per_class),
                "f1": MulticlassF1Score(average=None, **per_class),
                "confusion": MulticlassConfusionMatrix(**per_class),
            },
            compute_groups=False,  # they form at the first update, and a rank may have none
        )

    def update(self, class_logits: torch.Tensor, labels: torch.Tensor) -> None:
        """class_logits [B, K], labels int64 [B]"""
        self._metrics.update(class_logits.argmax(1).cpu(), labels.cpu())

    def report(self) -> ClassificationReport:
        """Every rank calls it, also one that had no samples."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The ``compute`` method of metric .* was called before the ``update``")
            values = {name: value.tolist() for name, value in self._metrics.compute().items()}
        return ClassificationReport(**values)
