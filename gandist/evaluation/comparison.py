"""Generated images, or any, compared with real ones by the metrics that are asked for; the ranks share the work."""

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

from tqdm import tqdm

from gandist.config import Config
from gandist.distributed import World
from gandist.errors import ConfigError
from gandist.evaluation.features import Extractor, open_extractor
from gandist.evaluation.frechet import frechet_distance
from gandist.evaluation.metrics import METRICS, Metric, Value
from gandist.evaluation.reference import Images, RealStatistics, load_reference
from gandist.evaluation.statistics import Statistics, Wanted, collect

Item = TypeVar("Item")
FEWEST = 5  # images, of which each has so many neighbours
MOMENTS = frozenset({"moments"})


class Sharing:
    """The ranks' turns at batches that are dealt to them.

    between_batches: called equally often on every rank; what it raises on all of them ends the evaluation
    show_progress:   a bar for each pass, on rank 0
    """

    def __init__(self, batch_size: int, world: World, *, show_progress: bool = False):
        self.batch_size = batch_size
        self.world = world
        self.show_progress = show_progress
        self.between_batches: Callable[[], None] = lambda: None

    def __call__(self, batches: Iterator[Item], total: int, what: str) -> Iterator[Item]:
        """This rank's batches of `total` images that all ranks share."""
        turns = math.ceil(total / self.batch_size / self.world.size)  # of the rank that has most
        silent = None if self.show_progress and self.world.is_main else True  # None: unless it is no terminal
        for _ in tqdm(range(turns), what, disable=silent, leave=False, unit="batch"):
            self.between_batches()
            if batch := next(batches, None):
                yield batch
        next(batches, None)  # so that its end is reached


class Comparison:
    """Compares images with real ones by the metrics of METRICS that `evaluation.metrics` names."""

    def __init__(self, config: Config, world: World, share: Sharing):
        self.world = world
        self.share = share
        settings = config.evaluation
        self.metrics: dict[str, Metric] = {name: METRICS[name] for name in settings.metrics if name in METRICS}
        kinds = dict.fromkeys(metric.extractor for metric in self.metrics.values())
        self.extractors: dict[str, Extractor] = {kind: open_extractor(kind, config, world) for kind in kinds}
        self.reals = RealStatistics(config.data.cache_folder / "statistics", settings.batch_size, share, world)
        self.reference = {}  # of an extractor
        if settings.reference:
            with world.together():
                found = {kind: load_reference(settings.reference, each) for kind, each in self.extractors.items()}
            self.reference = {kind: moments for kind, moments in found.items() if moments is not None}
            if not self.reference:
                raise ConfigError(
                    f"evaluation.reference={settings.reference} is of an extractor, or of weights, that no metric of "
                    "evaluation.metrics uses"
                )
        self._warned: set[str] = set()

    def compare(
        self,
        batches_of: Callable[[int], Iterator],
        count_of: Callable[[Metric], int],
        reals: Images,
        num_classes: int,
    ) -> Iterator[tuple[str, Value, dict]]:
        """Of each value: its name, itself, and what its record says of how it was made.

        batches_of: this rank's share of so many of the images to be measured
        count_of:   how many are measured for a metric
        """
        counts = {name: count_of(metric) for name, metric in self.metrics.items()}
        for count in dict.fromkeys(counts.values()):
            names = [name for name in counts if counts[name] == count]
            parts: dict[str, frozenset[str]] = {}
            for metric in (self.metrics[name] for name in names):
                parts[metric.extractor] = parts.get(metric.extractor, frozenset()) | set(metric.fakes)
            wanted = {kind: Wanted(self.extractors[kind], each, num_classes) for kind, each in parts.items()}
            found = collect(self.share(batches_of(count), count, "generated images"), wanted, self.world)
            for name in names:
                yield from self._values(name, found[self.metrics[name].extractor], count, reals)

    def distance_of(self, kind: str, images: Images, reals: Images) -> float:
        """The Fréchet distance of two sets of real images."""
        extractor = self.extractors[kind]
        sets = [self._real(kind, reals, MOMENTS, None), self.reals.measure(images, "held-out images", extractor, MOMENTS, None)]
        return self.world.broadcast(frechet_distance(*(each.moments for each in sets)) if self.world.is_main else None)

    def _values(self, name: str, fake: Statistics, count: int, reals: Images) -> Iterator[tuple[str, Value, dict]]:
        metric = self.metrics[name]
        extractor = self.extractors[metric.extractor]
        real, made = Statistics(), {"n_fake": count, **extractor.identity}
        if metric.reals:
            real = self._real(metric.extractor, reals, self._parts_of_reals(metric), metric.num_reals)
            made |= {"split": "train", "n_real": min(len(reals), metric.num_reals or len(reals))}
            if (given := self.reference.get(metric.extractor)) and metric.reals == ("moments",):
                made["n_real"] = given.count or None
        if "features" in metric.fakes and min(count, made["n_real"]) <= FEWEST:
            raise ConfigError(f"evaluation.metrics has {name}, which wants more than {FEWEST} images of either kind")
        if "moments" in metric.fakes:
            self._warn_of_few(name, min(count, made["n_real"] or count), extractor.num_features)
        values = self.world.broadcast([tuple(value) for value in metric.compute(real, fake)] if self.world.is_main else None)
        for each, value in zip(metric.values, values, strict=True):
            yield f"eval/{each}", Value(*value), made

    def _parts_of_reals(self, metric: Metric) -> frozenset[str]:
        """All that metrics want of the same images, so that one pass serves them."""
        alike = (
            each
            for each in self.metrics.values()
            if (each.extractor, each.num_reals) == (metric.extractor, metric.num_reals)
            and not (each.extractor in self.reference and each.reals == ("moments",))
        )
        return frozenset(part for each in alike for part in each.reals) | set(metric.reals)

    def _real(self, kind: str, reals: Images, parts: frozenset[str], limit: int | None) -> Statistics:
        if kind in self.reference and parts == MOMENTS:
            return Statistics(moments=self.reference[kind])
        return self.reals.measure(reals, "real images", self.extractors[kind], parts, limit)

    def _warn_of_few(self, name: str, count: int, num_features: int) -> None:
        if count <= num_features and name not in self._warned and self.world.is_main:
            print(
                f"warning: {name} compares {count} images in {num_features} dimensions: with so few, most of its value is bias",
                flush=True,
            )
        self._warned.add(name)
