"""Whether a run looks healthy: warnings of what seldom ends well, each with the section of docs/health.md that explains it."""

from collections.abc import Callable

from gandist.config import Config
from gandist.tracking.meter import Scalars
from gandist.tracking.tracker import Samples, Tracker

EARLY = 0.2  # of the run, in which nothing is to be expected yet
SATURATED = 0.99  # of the discriminator's verdicts that are right
COLLAPSED = 0.3  # of the real images' diversity
CHANCE = 1.5  # times as often right as by guessing
WAITING = 0.5  # of the time
INTERVALS, PICTURES = 10, 2  # in a row, until there is a warning


class Health(Tracker):
    """Prints a warning where a sign of trouble has been there for long, and again when it comes back after it was gone."""

    def __init__(self, config: Config):
        self.total_kimg = config.train.kimg
        self.num_classes = config.data.num_classes
        self.classifies = config.classification.weight > 0
        self._in_a_row: dict[str, int] = {}

    def scalars(self, progress: dict, values: Scalars) -> None:
        right = [values.get(f"logits/{kind}_accuracy", 0.0) for kind in ("real", "fake")]
        self._watch(
            "saturated",
            min(right) > SATURATED,
            lambda: f"the discriminator has been right of {right[0]:.1%} of real and {right[1]:.1%} of generated images",
        )
        top1 = values.get("classification/train_top1", 1.0)
        self._watch(
            "class-head-at-chance",
            self._is_late(progress) and self.classifies and top1 < CHANCE / max(self.num_classes, 1),
            lambda: f"the class head is right of {top1:.1%} of the training images, and guessing of {1 / self.num_classes:.1%}",
        )
        wait = values["throughput/data_wait"]
        self._watch("waiting-for-data", wait > WAITING, lambda: f"training waits for data {wait:.0%} of the time")

    def samples(self, progress: dict, samples: Samples) -> None:
        diversity = 1.0 if samples.diversity is None else samples.diversity
        self._watch(
            "collapse",
            self._is_late(progress) and diversity < COLLAPSED,
            lambda: f"generated images of a class differ from each other by {diversity:.0%} of what real ones do",
            patience=PICTURES,
        )

    def _is_late(self, progress: dict) -> bool:
        return progress["kimg"] > EARLY * self.total_kimg

    def _watch(self, sign: str, seen: bool, describe: Callable[[], str], patience: int = INTERVALS) -> None:
        self._in_a_row[sign] = count = self._in_a_row.get(sign, 0) + 1 if seen else 0
        if count == patience:
            print(f"warning: {describe()} ({count} times in a row): see docs/health.md#{sign}", flush=True)
