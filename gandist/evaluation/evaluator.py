"""Measures a generator and a discriminator: all ranks share the work, and results do not depend on how many they are."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gandist import checkpoint
from gandist.config import Config
from gandist.data import Dataset, normalize, open_dataset, to_uint8
from gandist.distributed import World
from gandist.errors import ConfigError
from gandist.evaluation.cas import classification_accuracy_score
from gandist.evaluation.classification import Classification, ClassificationReport
from gandist.evaluation.comparison import Comparison, Sharing
from gandist.evaluation.features import open_extractor
from gandist.evaluation.metrics import Metric, Value
from gandist.evaluation.sampling import FakeImages
from gandist.evaluation.statistics import Wanted, collect
from gandist.models import build_discriminator, build_generator, evaluating, full_float32

HELD_OUT = "eval/fd_classifier_held_out"
BEST = "best"  # group of the values of the best checkpoint, measured again


@dataclass(frozen=True)
class Record:
    """One measured value and how it was made.

    spread:  standard deviation of the estimate, where the metric has one
    split:   of the real images
    n_real:  how many; None: none were needed, or the reference does not say
    ema:     whether the fakes come from the averaged generator
    sources: the split of the images that the fakes are translations of
    """

    metric: str
    value: float
    spread: float | None = None
    step: int | None = None
    kimg: float | None = None
    seed: int | None = None
    split: str | None = None
    n_real: int | None = None
    n_fake: int | None = None
    extractor: str | None = None
    weights_sha256: str | None = None
    resize: str | None = None
    ema: bool | None = None
    labels: str | None = None
    truncation: float | None = None
    sources: str | None = None
    standing_stats: int | None = None

    def to_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Evaluation:
    """records: the values; report: of the class head on `data.test`, where that was asked for; per_class: float [K] each"""

    records: list[Record]
    report: ClassificationReport | None = None
    per_class: dict[str, list[float]] = field(default_factory=dict)

    def renamed(self, group: str) -> "Evaluation":
        """The records with this in place of what stands before the `/` of their names."""
        records = [replace(each, metric=_in_group(group, each.metric)) for each in self.records]
        return replace(self, records=records, per_class={_in_group(group, name): each for name, each in self.per_class.items()})

    @property
    def report_group(self) -> str:
        """What the report on the class head is named by, as its values are."""
        return BEST if self.records and self.records[0].metric.startswith(f"{BEST}/") else "classification"

    def to_dict(self) -> dict:
        described = {"records": [record.to_dict() for record in self.records], "per_class": self.per_class}
        return described | ({"class_head": asdict(self.report)} if self.report else {})


def record_values(
    found: Iterable[tuple[str, Value, dict]], sampled: dict[str, Any]
) -> tuple[list[Record], dict[str, list[float]]]:
    """What `Comparison.compare` has found, and of each class; sampled: fields of Record about the images that were measured."""
    records, per_class = [], {}
    for name, value, made in found:
        records.append(Record(name, value.value, value.spread, **sampled, **made))
        if value.per_class:
            per_class[name] = value.per_class
    return records, per_class


def _in_group(group: str, metric: str) -> str:
    return f"{group}/{metric.partition('/')[2]}"


class Evaluator:
    """Every rank makes one and calls it; all return the same.

    Images are made and read in batches of fixed size and content, dealt to the ranks in turn, in evaluation mode, in
    float32 without autocast. What `evaluation` asks for is opened at once, so that a mistake shows before training.
    """

    def __init__(self, config: Config, train_set: Dataset, world: World, *, show_progress: bool = False):
        self.config = config
        self.settings = settings = config.evaluation
        self.world = world
        self.train_set = train_set
        self.test_set = config.data.test and open_dataset(config.data.test, config.data, world, split="test")
        if self.test_set and (shared := {*self.test_set.shards.shards} & {*train_set.shards.shards}):
            raise ConfigError(
                f"data.test names {min(map(str, shared))}, which data.train names too: name images that are not trained on, "
                "or say data.test=null"
            )
        if "cas" in settings.metrics and world.size > 1:
            raise ConfigError("evaluation.metrics has cas, whose classifier one process trains: use python, not torchrun")
        self.share = Sharing(settings.batch_size, world, show_progress=show_progress)
        self.comparison = Comparison(config, world, self.share)
        for name, metric in self.comparison.metrics.items():
            if metric.num_reals and not metric.at_most and len(train_set) < metric.num_reals:
                raise ConfigError(
                    f"evaluation.metrics has {name}, which compares with {metric.num_reals:,} real images, and data.train has "
                    f"{len(train_set):,}: fid50k_full compares with all there are"
                )
        if settings.standing_stats and settings.batch_size % world.size:
            raise ConfigError(
                f"evaluation.standing_stats: evaluation.batch_size={settings.batch_size} cannot be split evenly over "
                f"{world.size} ranks: use another number of ranks"
            )
        self.seed = config.seed if settings.seed is None else settings.seed
        if "reconstruction" in settings.metrics:
            self.judge = self.comparison.extractors.get("judge") or open_extractor("judge", config, world)

    @property
    def sources(self) -> Dataset:
        """The images that are translated."""
        return self.test_set or self.train_set

    @torch.no_grad()
    def __call__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        step: int,
        kimg: float,
        seed: int | None = None,
        between_batches: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """generator: the one to measure; both networks keep their modes.

        seed:            in place of `evaluation.seed`
        between_batches: called equally often on every rank; what it raises on all of them ends the evaluation
        """
        self.share.between_batches = between_batches
        seed = self.seed if seed is None else seed
        sources = self.sources if self.config.model.translates else None
        fakes = FakeImages(self.config, self.train_set.class_counts, self.world, seed=seed, sources=sources)
        settings = self.settings
        progress = {"step": step, "kimg": kimg}
        sampled = {"seed": seed, "ema": settings.ema, "labels": settings.labels, "truncation": settings.truncation}
        sampled |= progress | ({"standing_stats": settings.standing_stats} if settings.standing_stats else {})
        sampled |= {"sources": "test" if self.test_set else "train"} if sources else {}
        report = None
        with full_float32(), evaluating(generator), evaluating(discriminator):
            if self.comparison.metrics or "cas" in settings.metrics:
                generator = fakes.prepare(generator)
            batches_of = partial(fakes.batches, generator)
            found = self.comparison.compare(batches_of, self._number_of_fakes, self.train_set, self.train_set.num_classes)
            records, per_class = record_values(found, sampled)
            if "fd_classifier" in settings.metrics and self.test_set:  # what real images score: the yardstick
                held_out = self.comparison.distance_of("judge", self.test_set, self.train_set)
                made = self.comparison.extractors["judge"].identity | {"split": "train", "n_real": len(self.train_set)}
                records.append(Record(HELD_OUT, held_out, **progress, **made))
            if "cas" in settings.metrics:
                value = self._cas(batches_of)
                made = {"split": "test", "n_real": len(self.test_set), "n_fake": self._num_images}
                records.append(Record("eval/cas", value, **sampled, **made))
            if "reconstruction" in settings.metrics:
                values = self._reconstruct(fakes, generator)
                made = {"n_fake": self._num_images, **self.judge.identity}
                records += [Record(f"eval/reconstruction_{name}", value, **sampled, **made) for name, value in values.items()]
            if "accuracy" in settings.metrics:
                report = self._classify_test_set(discriminator)
                made = progress | {"split": "test", "n_real": len(self.test_set)}
                records += [Record(f"classification/test_{name}", value, **made) for name, value in report.accuracies.items()]
        return Evaluation(records, report, per_class)

    def measure_checkpoint(self, path: Path, **options: Any) -> Evaluation:
        """Of a verified checkpoint; options: as of a call."""
        config, device = self.config, self.world.device
        generator = build_generator(config.model, config.data)
        discriminator = build_discriminator(config.model, config.data)
        weights = generator.state_dict()
        state = {"generator_ema": weights} if self.settings.ema else {"generator": {"network": weights}}
        checkpoint.load(path, state | {"discriminator": {"network": discriminator.state_dict()}}, self.world)
        meta = checkpoint.read_meta(path)
        return self(generator.to(device), discriminator.to(device), step=meta["step"], kimg=meta["kimg"], **options)

    @property
    def _num_images(self) -> int:
        return self.settings.num_images or len(self.train_set)

    def _number_of_fakes(self, metric: Metric) -> int:
        if metric.num_fakes is None:
            return self._num_images
        return min(metric.num_fakes, self._num_images) if metric.at_most else metric.num_fakes

    def _classify_test_set(self, discriminator: nn.Module) -> ClassificationReport:
        predictions = Classification(self.config.data.num_classes, self.world)
        dtype = next(discriminator.parameters()).dtype
        batches = self.test_set.evaluation_batches(self.settings.batch_size)
        for images, labels, _ in self.share(batches, len(self.test_set), "held-out images"):
            predictions.update(discriminator(normalize(images, dtype), labels).class_logits, labels)
        return predictions.report()

    def _reconstruct(self, fakes: FakeImages, generator: nn.Module) -> dict[str, float]:
        """Of the images that are translated, translated back: the mean distance of a pixel in [-1, 1] to what it was, and how
        often the judge sees the class that it was of."""
        distance = torch.zeros((), dtype=torch.float64, device=self.world.device)

        def reconstructions() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            translated = fakes.translated(generator, self._num_images)
            for images, labels, targets in self.share(translated, self._num_images, "reconstructions"):
                back = generator(generator(images, targets), labels)
                distance.add_((back - images).abs().double().mean((1, 2, 3)).sum())
                yield to_uint8(back), labels

        wanted = {"judge": Wanted(self.judge, frozenset(("verdicts",)), self.train_set.num_classes)}
        found = collect(reconstructions(), wanted, self.world)["judge"]
        return {"l1": self.world.sum(distance).item() / self._num_images, "accuracy": found.verdicts.top1}

    def _cas(self, batches_of: Callable[[int], Iterator]) -> float:
        made: Iterable = self.share(batches_of(self._num_images), self._num_images, "generated images")
        held_out = self.test_set.evaluation_batches(self.settings.batch_size)
        return classification_accuracy_score(made, held_out, self.config, self.world)
