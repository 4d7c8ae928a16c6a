"""What an extractor finds in a set of images, collected over batches and ranks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gandist.distributed import World
from gandist.evaluation.classification import Classification, ClassificationReport
from gandist.evaluation.features import Extractor
from gandist.evaluation.frechet import Moments


@dataclass(frozen=True)
class Statistics:
    """Of all ranks' images together; what was not asked for is None.

    moments:       of the features
    class_moments: of each class
    features:      float32 [N, D], in the order of the images
    class_logits:  float32 [N, K], in the order of the images
    verdicts:      of the extractor's own class logits, against the images' labels
    """

    moments: Moments | None = None
    class_moments: list[Moments] | None = None
    features: torch.Tensor | None = None
    class_logits: torch.Tensor | None = None
    verdicts: ClassificationReport | None = None


class Wanted(NamedTuple):
    """parts: names of Statistics' fields"""

    extractor: Extractor
    parts: frozenset[str]
    num_classes: int


def collect(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], wanted: dict[str, Wanted], world: World
) -> dict[str, Statistics]:
    """Extracts what is wanted, in one pass: of this rank's batches of uint8 images [B, C, H, W] and labels [B], −1 for none.

    Batches are those that are dealt to the ranks in turn. Every rank calls it; all get the same.
    """
    collectors = {
        name: {part: _COLLECTORS[part](extractor, num_classes, world) for part in sorted(parts)}
        for name, (extractor, parts, num_classes) in wanted.items()
    }
    for images, labels in batches:
        for name, (extractor, _, _) in wanted.items():
            features, class_logits = extractor(images)
            for collector in collectors[name].values():
                collector.update(features, class_logits, labels)
    return {
        name: Statistics(**{part: collector.over_ranks() for part, collector in parts.items()})
        for name, parts in collectors.items()
    }


class _Collector:
    def __init__(self, extractor: Extractor, num_classes: int, world: World):
        self.world = world

    def update(self, features: torch.Tensor, class_logits: torch.Tensor | None, labels: torch.Tensor) -> None:
        """Of one batch."""
        raise NotImplementedError

    def over_ranks(self) -> object:
        """The field of Statistics."""
        raise NotImplementedError


class _Moments(_Collector):
    def __init__(self, extractor: Extractor, num_classes: int, world: World):
        super().__init__(extractor, num_classes, world)
        self.moments = Moments.empty(extractor.num_features, world.device)

    def update(self, features: torch.Tensor, class_logits: torch.Tensor | None, labels: torch.Tensor) -> None:
        self.moments.update(features)

    def over_ranks(self) -> Moments:
        return self.moments.over_ranks(self.world)


class _ClassMoments(_Collector):
    def __init__(self, extractor: Extractor, num_classes: int, world: World):
        super().__init__(extractor, num_classes, world)
        self.of_class = [Moments.empty(extractor.num_features, world.device) for _ in range(num_classes)]

    def update(self, features: torch.Tensor, class_logits: torch.Tensor | None, labels: torch.Tensor) -> None:
        for label in labels.unique().tolist():
            if label >= 0:
                self.of_class[label].update(features[labels == label])

    def over_ranks(self) -> list[Moments]:
        return [moments.over_ranks(self.world) for moments in self.of_class]


class _Rows(_Collector):
    """Keeps a tensor of each batch."""

    def __init__(self, extractor: Extractor, num_classes: int, world: World):
        super().__init__(extractor, num_classes, world)
        self.batches: list[torch.Tensor] = []

    def over_ranks(self) -> torch.Tensor:
        of_ranks = self.world.gather(self.batches)
        # Batch n was dealt to rank n % world_size.
        return torch.cat([part[turn] for turn in range(len(of_ranks[0])) for part in of_ranks if turn < len(part)])


class _Features(_Rows):
    def update(self, features: torch.Tensor, class_logits: torch.Tensor | None, labels: torch.Tensor) -> None:
        self.batches.append(features.cpu())


class _ClassLogits(_Rows):
    def update(self, features: torch.Tensor, class_logits: torch.Tensor | None, labels: torch.Tensor) -> None:
        self.batches.append(class_logits.cpu())


class _Verdicts(_Collector):
    def __init__(self, extractor: Extractor, num_classes: int, world: World):
        super().__init__(extractor, num_classes, world)
        self.classification = Classification(num_classes, world)

    def update(self, features: torch.Tensor, class_logits: torch.Tensor | None, labels: torch.Tensor) -> None:
        self.classification.update(class_logits, labels)

    def over_ranks(self) -> ClassificationReport:
        return self.classification.report()


_COLLECTORS = {
    "moments": _Moments,
    "class_moments": _ClassMoments,
    "features": _Features,
    "class_logits": _ClassLogits,
    "verdicts": _Verdicts,
}
