"""How well class logits agree with labels, counted over all ranks."""

import warnings
from dataclasses import dataclass

import torch

from gandist.distributed import World


@dataclass(frozen=True)
class ClassificationReport:
    """top1, top5 (None of five classes or fewer) and balanced_accuracy in [0, 1]; precision, recall and f1 float [K] per class;
    confusion int64 [K, K]: rows are labels, columns predictions.

    balanced_accuracy: the mean recall of the classes that there are
    """

    top1: float
    top5: float | None
    balanced_accuracy: float
    precision: list[float]
    recall: list[float]
    f1: list[float]
    confusion: list[list[int]]

    @property
    def accuracies(self) -> dict[str, float]:
        """Those of top1, top5 and balanced_accuracy that there are."""
        values = {"top1": self.top1, "top5": self.top5, "balanced_accuracy": self.balanced_accuracy}
        return {name: value for name, value in values.items() if value is not None}


class Classification:
    """Collects predictions of this rank and reports over all."""

    def __init__(self, num_classes: int, world: World):
        # Not above: it takes a second to import, which the first step need not wait for.
        from torchmetrics import MetricCollection, classification

        options = {"num_classes": num_classes, "process_group": world.control}
        metrics = {
            "top1": classification.MulticlassAccuracy(average="micro", **options),
            "precision": classification.MulticlassPrecision(average=None, **options),
            "recall": classification.MulticlassRecall(average=None, **options),
            "f1": classification.MulticlassF1Score(average=None, **options),
            "confusion": classification.MulticlassConfusionMatrix(**options),
        }
        if num_classes > 5:
            metrics["top5"] = classification.MulticlassAccuracy(average="micro", top_k=5, **options)
        # Groups form at the first update, and a rank may have none.
        self._metrics = MetricCollection(metrics, compute_groups=False)

    def update(self, class_logits: torch.Tensor, labels: torch.Tensor) -> None:
        """class_logits [B, K], labels int64 [B]; those of −1 do not count"""
        class_logits, labels = class_logits.float().cpu(), labels.cpu()
        labelled = labels >= 0
        if labelled.any():
            self._metrics.update(class_logits[labelled], labels[labelled])

    def report(self) -> ClassificationReport:
        """Every rank calls it, also one that had no samples."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The ``compute`` method of metric .* was called before the ``update``")
            values = {name: value.tolist() for name, value in self._metrics.compute().items()}
        recalls = [recall for recall, row in zip(values["recall"], values["confusion"], strict=True) if any(row)]
        balanced_accuracy = sum(recalls) / max(len(recalls), 1)  # of the classes that there are
        return ClassificationReport(**{"top5": None, "balanced_accuracy": balanced_accuracy} | values)
