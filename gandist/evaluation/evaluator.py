"""Measures a generator and a discriminator: all ranks share the work, and results do not depend on how many they are."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from gandist.config import Config
from gandist.data import Dataset, normalize, open_dataset, to_uint8
from gandist.distributed import World
from gandist.errors import ConfigError
from gandist.evaluation.classification import Classification, ClassificationReport
from gandist.evaluation.features import DIGITS_JUDGE, DigitsJudge, load_digits_judge, weights_sha256
from gandist.evaluation.frechet import Moments, frechet_distance
from gandist.randomness import Purpose, draw_latents, random_stream

Item = TypeVar("Item")


@dataclass(frozen=True)
class Record:
    """One measured value and how it was made."""

    metric: str
    value: float
    step: int
    kimg: float
    seed: int
    split: str  # of the real images
    n_real: int
    n_fake: int | None = None
    extractor: str | None = None
    weights_sha256: str | None = None
    ema: bool | None = None  # whether the fakes come from the averaged generator

    def to_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Evaluation:
    """records: the values; report: of the class head on `data.test`, where that was asked for"""

    records: list[Record]
    report: ClassificationReport | None


class Evaluator:
    """Every rank makes one and calls it; all return the same.

    Images are made and read in batches of fixed size and content, dealt to the ranks in turn, in evaluation mode, in
    float32 without autocast. Classes are as frequent among the generated images as in the training set.
    """

    def __init__(self, config: Config, train_set: Dataset, world: World):
        self.config = config
        self.world = world
        self.train_set = train_set
        self.settings = config.evaluation
        self.num_fakes = self.settings.num_images or len(train_set)
        self.test_set = config.data.test and open_dataset(config.data.test, config.data, world, split="test")
        if self.test_set and (shared := {*self.test_set.shards.shards} & {*train_set.shards.shards}):
            raise ConfigError(
                f"data.test names {min(map(str, shared))}, which data.train names too: name images that are not trained on, "
                "or say data.test=null"
            )
        self._between_batches: Callable[[], None] = lambda: None
        self.judge: DigitsJudge | None = None
        if {"fd_classifier", "gan_test"} & set(self.settings.metrics):
            self._open_judge()

    @torch.no_grad()
    def __call__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        step: int,
        kimg: float,
        between_batches: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """generator: the averaged one; both networks keep their modes.

        between_batches: called equally often on every rank; what it raises on all of them ends the evaluation
        """
        self._between_batches = between_batches
        made = {"step": step, "kimg": kimg, "seed": self.config.seed}
        records, report = [], None
        with _full_float32(), _evaluating(generator), _evaluating(discriminator):
            if self.judge is not None:
                records += self._judge_fakes(generator, made)
            if "accuracy" in self.settings.metrics:
                report = self._classify_test_set(discriminator)
                held_out = {"split": "test", "n_real": len(self.test_set)}
                records.append(Record("classification/test_top1", report.top1, **made, **held_out))
        return Evaluation(records, report)

    def _open_judge(self) -> None:
        data = self.config.data
        if data.channels != DigitsJudge.channels or data.num_classes not in (0, DigitsJudge.num_classes):
            raise ConfigError("the judge of fd_classifier and gan_test wants data.channels=1 and data.num_classes=10")
        self.judge = load_digits_judge(self.world.device)
        self.judged_by = {"extractor": DIGITS_JUDGE, "weights_sha256": weights_sha256(DIGITS_JUDGE)}
        with torch.no_grad(), _full_float32():
            self.real_moments = self._judge_moments(self.train_set)
            self.held_out_distance = self.test_set and frechet_distance(self.real_moments, self._judge_moments(self.test_set))

    def _judge_moments(self, dataset: Dataset) -> Moments:
        moments = Moments(self.judge.num_features)
        for images, *_ in self._share(dataset.evaluation_batches(self.settings.batch_size), len(dataset)):
            moments.update(self.judge(images)[0])
        return moments.over_ranks(self.world)

    def _judge_fakes(self, generator: nn.Module, made: dict) -> list[Record]:
        moments = Moments(self.judge.num_features)
        verdicts = Classification(DigitsJudge.num_classes, self.world)
        for images, labels in self._share(self._fake_batches(generator), self.num_fakes):
            features, class_logits = self.judge(images)
            moments.update(features)
            if "gan_test" in self.settings.metrics:
                verdicts.update(class_logits, labels)
        made = made | self.judged_by | {"split": "train", "n_real": len(self.train_set)}
        fakes = {"n_fake": self.num_fakes, "ema": True}
        records = []
        if "gan_test" in self.settings.metrics:
            records.append(Record("eval/gan_test", verdicts.report().top1, **made, **fakes))
        if "fd_classifier" in self.settings.metrics:
            distance = frechet_distance(self.real_moments, moments.over_ranks(self.world))
            records.append(Record("eval/fd_classifier", distance, **made, **fakes))
            if self.held_out_distance is not None:  # what real images score: the yardstick
                records.append(Record("eval/fd_classifier_held_out", self.held_out_distance, **made))
        return records

    def _classify_test_set(self, discriminator: nn.Module) -> ClassificationReport:
        predictions = Classification(self.config.data.num_classes, self.world)
        dtype = next(discriminator.parameters()).dtype
        for images, labels, _ in self._share(self.test_set.evaluation_batches(self.settings.batch_size), len(self.test_set)):
            output = discriminator(normalize(images, dtype), labels)
            predictions.update(output.class_logits[labels >= 0], labels[labels >= 0])
        return predictions.report()

    def _share(self, batches: Iterator[Item], total: int) -> Iterator[Item]:
        """This rank's batches of `total` images that all ranks share."""
        for _ in range(math.ceil(total / self.settings.batch_size / self.world.size)):
            self._between_batches()
            if batch := next(batches, None):
                yield batch
        next(batches, None)  # so that its end is reached

    def _fake_batches(self, generator: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Generated images uint8 [B, C, H, W] and labels [B] of this rank's share; batch n is a function of the seed and n."""
        size = self.settings.batch_size
        dtype = next(generator.parameters()).dtype
        all_labels = torch.from_numpy(proportional_labels(self.train_set.class_counts, self.num_fakes))
        starts = range(0, self.num_fakes, size)
        for start in starts[self.world.rank :: self.world.size]:
            count = min(size, self.num_fakes - start)
            stream = random_stream(self.config.seed, Purpose.EVALUATION, start // size)
            latents = draw_latents(stream, count, self.config.model.latent_dim)
            labels = all_labels[start : start + count].to(self.world.device)
            yield to_uint8(generator(latents.to(self.world.device, dtype), labels)), labels


def proportional_labels(class_counts: np.ndarray, size: int) -> np.ndarray:
    """`size` labels, int64, in proportion to these counts and sorted; −1 where there are no classes."""
    if not len(class_counts):
        return np.full(size, -1)
    places = (2 * np.arange(size) + 1) * class_counts.sum() // (2 * size)
    return np.searchsorted(np.cumsum(class_counts), places, "right")


@contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32: its rounding would depend on the device."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
