"""The metrics that compare statistics of generated and of real images: one function each, in one registry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gandist.evaluation.frechet import frechet_distance
from gandist.evaluation.manifold import density_coverage, precision_recall
from gandist.evaluation.statistics import Statistics

STORED = 10_000  # images of which features are held, at most
KID_SUBSET = 1000  # images


class Value(NamedTuple):
    """spread: standard deviation of the estimate, where the metric's own protocol has one; per_class: [K]"""

    value: float
    spread: float | None = None
    per_class: list[float] | None = None


@dataclass(frozen=True)
class Metric:
    """How one entry of `evaluation.metrics` is measured.

    compute:   statistics of real and of generated images → one Value for each of `values`
    values:    their names
    extractor: a key of EXTRACTORS
    fakes:     what is collected of the generated images: fields of Statistics
    reals:     of the training images; nothing: they are not needed
    num_fakes: None: evaluation.num_images. at_most: as many, or num_fakes where that is fewer
    num_reals: None: all of the training set, or num_reals of it
    """

    compute: Callable[[Statistics, Statistics], Sequence[Value]]
    values: tuple[str, ...]
    extractor: str
    fakes: tuple[str, ...]
    reals: tuple[str, ...]
    num_fakes: int | None
    num_reals: int | None
    at_most: bool


METRICS: dict[str, Metric] = {}

Compute = Callable[[Statistics, Statistics], Sequence[Value]]


def metric(
    name: str,
    extractor: str,
    fakes: str,
    *,
    values: Sequence[str] = (),
    reals: str | None = None,
    num_fakes: int | None = None,
    num_reals: int | None = None,
    at_most: bool = False,
) -> Callable[[Compute], Compute]:
    """Registers a function as the metric `name`; reals: None: the same as of the fakes."""

    def register(compute: Compute) -> Compute:
        collected = fakes if reals is None else reals
        METRICS[name] = Metric(
            compute,
            tuple(values) or (name,),
            extractor,
            tuple(fakes.split()),
            tuple(collected.split()),
            num_fakes,
            num_reals,
            at_most,
        )
        return compute

    return register


@metric("fid", "inception", "moments")
@metric("fid50k_full", "inception", "moments", num_fakes=50_000)
@metric("fid50k", "inception", "moments", num_fakes=50_000, num_reals=50_000)
@metric("fid10k", "inception", "moments", num_fakes=10_000)
@metric("fd_dinov2", "dinov2", "moments", num_fakes=50_000)
@metric("fd_classifier", "judge", "moments")
@metric("fd_random", "random", "moments")
def frechet(real: Statistics, fake: Statistics) -> list[Value]:
    """Heusel et al. 2017 (1706.08500); with DINOv2, Stein et al. 2023 (2306.04675)."""
    return [Value(frechet_distance(real.moments, fake.moments))]


@metric("fd_per_class", "judge", "class_moments")
def frechet_per_class(real: Statistics, fake: Statistics) -> list[Value]:
    """The mean of the classes' own distances, which sees wrong labels. Classes of fewer than two images do not count."""
    distances = [
        frechet_distance(reals, fakes) if min(reals.count, fakes.count) > 1 else float("nan")
        for reals, fakes in zip(real.class_moments, fake.class_moments, strict=True)
    ]
    known = [distance for distance in distances if distance == distance]
    return [Value(sum(known) / max(len(known), 1), per_class=distances)]


@metric("kid", "inception", "features", num_fakes=STORED, num_reals=STORED, at_most=True)
@metric("kd_dinov2", "dinov2", "features", num_fakes=STORED, num_reals=STORED, at_most=True)
@metric("kd_classifier", "judge", "features", num_fakes=STORED, num_reals=STORED, at_most=True)
def kernel_distance(real: Statistics, fake: Statistics) -> list[Value]:
    """The kernel distance of Bińkowski et al. 2018 (1801.01401), of Inception features the KID: the mean and the standard
    deviation over 100 random subsets; unbiased, and so a little below 0 at times."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET, len(real.features), len(fake.features))
    found = kid_features_to_metric(fake.features, real.features, kid_subset_size=size, verbose=False)
    return [Value(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD])]


def _covering(name: str, *values: str) -> Callable[[Compute], Compute]:
    """Registers it for each extractor."""

    def register(compute: Compute) -> Compute:
        for extractor, suffix in (("inception", ""), ("dinov2", "_dinov2"), ("judge", "_classifier")):
            named = [value + suffix for value in values]
            options = {"num_fakes": STORED, "num_reals": STORED, "at_most": True}
            metric(name + suffix, extractor, "features", values=named, **options)(compute)
        return compute

    return register


@_covering("precision_recall", "precision", "recall")
def improved_precision_recall(real: Statistics, fake: Statistics) -> list[Value]:
    """Kynkäänniemi et al. 2019 (1904.06991), k = 3."""
    return [Value(value) for value in precision_recall(real.features, fake.features)]


@_covering("density_coverage", "density", "coverage")
def fidelity_diversity(real: Statistics, fake: Statistics) -> list[Value]:
    """Naeem et al. 2020 (2002.09797), k = 5."""
    return [Value(value) for value in density_coverage(real.features, fake.features)]


@metric("is50k", "inception", "class_logits", reals="", num_fakes=50_000)
def inception_score(real: Statistics, fake: Statistics) -> list[Value]:
    """Salimans et al. 2016 (1606.03498): the mean and the standard deviation over ten splits, shuffled."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(fake.class_logits)
    return [Value(found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD])]


@metric("gan_test", "judge", "verdicts", reals="")
def gan_test(real: Statistics, fake: Statistics) -> list[Value]:
    """How often a judge that was trained on real images sees the class that was asked for (Shmelkov et al. 2018, 1807.09499);
    blind to a lack of diversity."""
    return [Value(fake.verdicts.top1, per_class=fake.verdicts.recall)]
