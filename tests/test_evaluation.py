"""Distances against closed forms and SciPy, accuracy against scikit-learn, and each metric's blind spots."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gandist.config import Config, DataConfig, load_config
from gandist.data import open_dataset, to_uint8
from gandist.distributed import World, join_world
from gandist.errors import GandistError
from gandist.evaluation import features
from gandist.evaluation.classification import Classification
from gandist.evaluation.evaluator import Evaluator, proportional_labels
from gandist.evaluation.frechet import Moments, frechet_distance
from gandist.evaluation.judge import top1, train_judge
from gandist.models import build_discriminator, build_generator
from tests.ranks import run_ranks


def moments_of(samples: np.ndarray, batches: int = 1) -> Moments:
    moments = Moments(samples.shape[1])
    for part in np.array_split(samples, batches):
        moments.update(torch.from_numpy(part))
    return moments


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    moments = Moments(len(mean))
    moments.count, moments.mean = 2, torch.from_numpy(mean)
    moments.scatter = torch.from_numpy(covariance)
    return moments


def test_frechet_closed_forms() -> None:
    zero, one = np.zeros(64), np.eye(64)
    assert frechet_distance(gaussian(zero, one), gaussian(zero, one)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(gaussian(zero, one), gaussian(zero + 1.5, one)) == pytest.approx(144)
    assert frechet_distance(gaussian(zero, 9 * one), gaussian(zero, 25 * one)) == pytest.approx(256)
    a, b = np.array([[2, 1], [1, 3.0]]), np.array([[1, -0.5], [-0.5, 4]])
    cross = np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b))
    expected = np.trace(a) + np.trace(b) - 2 * np.sqrt(cross)  # tr √M of a 2×2 matrix
    assert frechet_distance(gaussian(np.zeros(2), a), gaussian(np.zeros(2), b)) == pytest.approx(expected)
    assert frechet_distance(gaussian(zero, one), gaussian(zero, 0 * one)) == pytest.approx(64)  # a point mass


@given(st.integers(0, 10**6), st.sampled_from([3, 20, 60]), st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=25, deadline=None)
def test_frechet_agrees_with_scipy(seed: int, count: int, scale: float) -> None:
    """Also where the covariance is singular: fewer samples than dimensions."""
    random = np.random.default_rng(seed)
    a = random.normal(size=(count, 24)) @ random.normal(size=(24, 24)) * scale + 5 * scale
    b = random.normal(size=(count, 24)) * scale
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    mine = frechet_distance(moments_of(a, 2), moments_of(b, 3))
    assert mine == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(moments_of(b), moments_of(a)) == pytest.approx(mine, rel=1e-6)


def test_moments_survive_a_large_mean() -> None:
    samples = np.random.default_rng(0).normal(size=(1000, 8)) + 1e7
    moments = moments_of(samples, 17)
    torch.testing.assert_close(moments.covariance, torch.from_numpy(np.cov(samples.T)), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moments.mean, torch.from_numpy(samples.mean(0)), rtol=1e-14, atol=0)


def _measure_on_rank(samples: np.ndarray, logits: torch.Tensor, labels: torch.Tensor) -> tuple:
    """The last of the ranks gets nothing, if there are several."""
    with join_world() as world:
        mine = [i for i in range(len(samples)) if i % max(1, world.size - 1) == world.rank]
        moments = Moments(samples.shape[1])
        classification = Classification(logits.shape[1], world)
        for part in np.array_split(mine, 3) if mine else []:
            moments.update(torch.from_numpy(samples[part]))
            classification.update(logits[part], labels[part])
        together = moments.over_ranks(world)
        return together.count, together.mean.numpy(), together.covariance.numpy(), classification.report()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_measure_what_one_process_would(world_size: int) -> None:
    samples = np.random.default_rng(0).normal(size=(101, 6)) + 30
    logits = torch.randn(101, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(101) % 5
    for count, mean, covariance, report in run_ranks(world_size, _measure_on_rank, samples, logits, labels):
        assert count == 101
        np.testing.assert_allclose(mean, samples.mean(0), rtol=1e-13)
        np.testing.assert_allclose(covariance, np.cov(samples.T), rtol=1e-10)
        predictions = logits.argmax(1)
        expected = sklearn.metrics.precision_recall_fscore_support(labels, predictions)
        np.testing.assert_allclose([report.precision, report.recall, report.f1], expected[:3], rtol=1e-6)
        assert report.top1 == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions))
        assert report.confusion == sklearn.metrics.confusion_matrix(labels, predictions).tolist()


def _evaluate_on_rank(cache_dir: Path) -> list[dict]:
    with join_world() as world:
        config = load_config(None, [f"data.cache_dir={cache_dir}", "evaluation.num_images=333", "evaluation.batch_size=50"])
        torch.manual_seed(1)
        generator = build_generator(config.model, config.data)
        discriminator = build_discriminator(config.model, config.data)
        evaluator = Evaluator(config, open_dataset(config.data.train, config.data, world), world)
        evaluation = evaluator(generator, discriminator, step=7, kimg=0.5)
        assert generator.training
        assert discriminator.training
        return [record.to_dict() for record in evaluation.records]


def test_evaluation_does_not_depend_on_the_ranks(cache_dir: Path) -> None:
    (alone,) = run_ranks(1, _evaluate_on_rank, cache_dir)
    assert {record["metric"] for record in alone} == {
        "eval/gan_test",
        "eval/fd_classifier",
        "eval/fd_classifier_held_out",
        "classification/test_top1",
    }
    made = next(record for record in alone if record["metric"] == "eval/fd_classifier")
    assert (made["n_fake"], made["n_real"], made["ema"], made["step"]) == (333, 1437, True, 7)
    assert made["weights_sha256"] == features.weights_sha256(made["extractor"])
    for world_size in (2, 3):
        for records in run_ranks(world_size, _evaluate_on_rank, cache_dir):
            for record, expected in zip(records, alone, strict=True):
                assert record["metric"] == expected["metric"]
                assert record["value"] == pytest.approx(expected["value"], rel=1e-8)


class Copies(torch.nn.Module):
    """A 'generator' that gives prepared images for the labels of the training set, in the order they are asked for."""

    def __init__(self, images: torch.Tensor):
        super().__init__()
        self.images = images
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.given = 0

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        start, self.given = self.given, self.given + len(labels)
        return self.images[start : self.given].float() / 127.5 - 1


def test_each_metric_sees_what_it_must_and_is_blind_as_known(cache_dir: Path, world: World) -> None:
    config = Config(data=DataConfig(cache_dir=cache_dir))
    train_set = open_dataset(config.data.train, config.data, world)
    evaluator = Evaluator(config, train_set, world)
    batches = list(train_set.evaluation_batches(256))
    labels = torch.cat([batch.labels for batch in batches])
    # In the order of their labels, as fakes are asked for.
    images = torch.cat([batch.images for batch in batches])[labels.argsort(stable=True)]
    labels = labels.sort(stable=True).values

    def score(fakes: torch.Tensor) -> tuple[float, float]:
        discriminator = build_discriminator(config.model, config.data)
        records = evaluator(Copies(fakes), discriminator, step=1, kimg=1).records
        values = {record.metric: record.value for record in records}
        return values["eval/fd_classifier"], values["eval/gan_test"]

    held_out = evaluator.held_out_distance
    distance, accuracy = score(images)
    assert distance == pytest.approx(0, abs=1e-4)
    assert accuracy > 0.99

    distance, accuracy = score(images[torch.randperm(len(images))])  # wrong labels: only GAN-test sees it
    assert distance < 1e-4
    assert accuracy < 0.2

    first = torch.stack([images[(labels == label).nonzero()[0, 0]] for label in labels])
    distance, accuracy = score(first)  # one image a class: only the distance sees it
    assert distance > 10 * held_out
    assert accuracy == 1

    blurred = torch.nn.functional.avg_pool2d(images.float(), 5, stride=1, padding=2)
    noisy = (images + 60 * torch.randn(images.shape)).clamp(0, 255)
    for fakes in (blurred, noisy):
        distance, _ = score(fakes)
        assert distance > 10 * held_out


def test_fakes_have_the_training_sets_classes() -> None:
    counts = np.array([5, 0, 2, 13])
    for size, expected in ((20, counts), (40, counts * 2), (10, [2, 0, 1, 7])):
        assert np.bincount(proportional_labels(counts, size), minlength=4).tolist() == list(expected)
    assert proportional_labels(counts[:0], 3).tolist() == [-1, -1, -1]


def test_rounding_to_levels() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-1.1, 1.1])).tolist() == [0, 255]


def test_the_judge_that_ships(cache_dir: Path, world: World) -> None:
    judge = features.load_digits_judge(torch.device("cpu"))
    assert sum(p.numel() for p in judge.parameters()) == 65_834
    assert top1(judge, DataConfig(cache_dir=cache_dir), world) > 0.99
    values = judge(torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8))
    assert [value.shape for value in values] == [(3, 64), (3, 10)]


def test_a_judge_can_be_trained(cache_dir: Path, world: World) -> None:
    data = DataConfig(cache_dir=cache_dir, num_workers=0)
    assert top1(train_judge(data, world, epochs=4), data, world) > 0.95


def test_a_changed_judge_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(features._WEIGHTS, features.DIGITS_JUDGE, ("digits_judge.pt", "0" * 64))
    with pytest.raises(GandistError, match="is not the file that was released"):
        features.load_digits_judge(torch.device("cpu"))
