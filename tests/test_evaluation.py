"""Distances against closed forms, SciPy, torchmetrics and torch-fidelity; accuracy against scikit-learn; what each metric sees
and what it is blind to; and values that do not depend on the ranks."""

import json
import re
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from gandist import checkpoint
from gandist.config import MEASURES, Config, DataConfig, EvaluationConfig, Metric
from gandist.config_file import load_config
from gandist.data import open_dataset, to_uint8
from gandist.distributed import World, join_world
from gandist.errors import ConfigError, GandistError
from gandist.evaluation import cas, judge, reference
from gandist.evaluation.classification import Classification
from gandist.evaluation.evaluator import Evaluator
from gandist.evaluation.features import open_extractor
from gandist.evaluation.frechet import Moments, frechet_distance
from gandist.evaluation.judge import Judge, load_judge, top1, train_judge
from gandist.evaluation.manifold import density_coverage, precision_recall
from gandist.evaluation.metrics import METRICS, kernel_distance
from gandist.evaluation.sampling import FakeImages, proportional_labels
from gandist.evaluation.statistics import Statistics, Wanted, collect
from gandist.models import build_discriminator, build_generator
from gandist.randomness import Purpose, draw_latents, random_stream
from tests.ranks import launch, run_ranks


def moments_of(samples: np.ndarray, batches: int = 1) -> Moments:
    moments = Moments.empty(samples.shape[1])
    for part in np.array_split(samples, batches):
        moments.update(torch.from_numpy(part))
    return moments


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(2, torch.from_numpy(mean), torch.from_numpy(covariance))


def test_frechet_closed_forms() -> None:
    zero, one = np.zeros(64), np.eye(64)
    assert frechet_distance(gaussian(zero, one), gaussian(zero, one)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(gaussian(zero, one), gaussian(zero + 1.5, one)) == pytest.approx(144, rel=1e-14)
    assert frechet_distance(gaussian(zero, 9 * one), gaussian(zero, 25 * one)) == pytest.approx(256, rel=1e-14)
    a, b = np.array([[2, 1], [1, 3.0]]), np.array([[1, -0.5], [-0.5, 4]])
    cross = np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b))
    expected = np.trace(a) + np.trace(b) - 2 * np.sqrt(cross)  # tr √M of a 2×2 matrix
    assert frechet_distance(gaussian(np.zeros(2), a), gaussian(np.zeros(2), b)) == pytest.approx(expected, rel=1e-13)
    assert frechet_distance(gaussian(zero, one), gaussian(zero, 0 * one)) == pytest.approx(64)  # a point mass


def test_frechet_of_commuting_covariances() -> None:
    random = np.random.default_rng(0)
    rotation = scipy.stats.ortho_group.rvs(64, random_state=0)
    first, second = random.uniform(0, 2, (2, 64))
    expected = ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    sets = [gaussian(np.zeros(64), rotation * values @ rotation.T) for values in (first, second)]
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_fewer_samples_than_features() -> None:
    """The trace of the root is the nuclear norm of one centred set times the other's transpose."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(24, 64)), random.normal(size=(24, 64)) * 2 + 1
    centred = [each - each.mean(0) for each in (a, b)]
    cross = np.linalg.svd(centred[0] @ centred[1].T / 23, compute_uv=False).sum()
    traces = sum((each**2).sum() / 23 for each in centred)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * cross
    assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(expected, abs=1e-5 * traces)
    assert frechet_distance(moments_of(a), moments_of(a)) == pytest.approx(0, abs=1e-5 * traces)


samples_of = st.tuples(st.integers(0, 10**6), st.sampled_from([3, 20, 60]), st.sampled_from([1e-3, 1.0, 1e3]))


@given(samples_of)
@settings(max_examples=25)
def test_frechet_agrees_with_others(samples: tuple[int, int, float]) -> None:
    """Also where the covariance is singular: fewer samples than dimensions."""
    a, b = pair(*samples)
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    mine = frechet_distance(moments_of(a, 2), moments_of(b, 3))
    assert mine == pytest.approx(expected, rel=1e-5)
    described = [{"mu": each.mean(0), "sigma": np.cov(each.T)} for each in (a, b)]
    assert mine == pytest.approx(fid_statistics_to_metric(*described, verbose=False)[KEY_METRIC_FID], rel=1e-5)


class Given(torch.nn.Module):
    """An extractor of torchmetrics that is given the features."""

    num_features = 24

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.flatten(1)


def test_frechet_agrees_with_torchmetrics() -> None:
    a, b = pair(1, 60, 1.0)
    metric = FrechetInceptionDistance(Given(), normalize=False, input_img_size=(1, 1, 24)).set_dtype(torch.float64)
    for samples, real in ((a, True), (b, False)):
        metric.update(torch.from_numpy(samples)[:, None, None], real=real)
    assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(metric.compute().item(), rel=1e-6)


@given(samples_of, st.integers(0, 100))
@settings(max_examples=15)
def test_frechet_is_a_distance(samples: tuple[int, int, float], seed: int) -> None:
    a, b = pair(*samples)
    scale = samples[2]
    distance = frechet_distance(moments_of(a), moments_of(b))
    near = {"rel": 1e-6, "abs": 1e-6 * scale**2}
    assert frechet_distance(moments_of(b), moments_of(a)) == pytest.approx(distance, **near)
    rotation = scipy.stats.ortho_group.rvs(24, random_state=seed)
    assert frechet_distance(moments_of(a @ rotation), moments_of(b @ rotation)) == pytest.approx(distance, **near)
    assert frechet_distance(moments_of(a + 7), moments_of(b + 7)) == pytest.approx(distance, **near)
    assert frechet_distance(moments_of(a * 3), moments_of(b * 3)) == pytest.approx(9 * distance, **near)
    assert frechet_distance(moments_of(a[::-1].copy(), 5), moments_of(b)) == pytest.approx(distance, **near)


def pair(seed: int, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    a = random.normal(size=(count, 24)) @ random.normal(size=(24, 24)) * scale + 5 * scale
    return a, random.normal(size=(count, 24)) * scale


def test_moments_survive_a_large_mean() -> None:
    samples = np.random.default_rng(0).normal(size=(1000, 8)) + 1e7
    moments = moments_of(samples, 17)
    torch.testing.assert_close(moments.covariance, torch.from_numpy(np.cov(samples.T)), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moments.mean, torch.from_numpy(samples.mean(0)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("block", [4096, 64])
def test_coverage_of_manifolds(block: int) -> None:
    """Against torch-fidelity and scikit-learn's neighbours."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(301, 6, generator=generator)
    fake = torch.randn(257, 6, generator=generator) * 0.7 + 0.5
    with patch("gandist.evaluation.manifold.BLOCK", block):
        precision, recall = precision_recall(real, fake)
        density, coverage = density_coverage(real, fake)
    expected = prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True, verbose=False)
    assert (precision, recall) == pytest.approx((expected["precision"], expected["recall"]))
    reach = NearestNeighbors(n_neighbors=6).fit(real).kneighbors(real)[0][:, -1]
    inside = scipy.spatial.distance.cdist(fake, real) <= reach
    assert density == pytest.approx(inside.sum(1).mean() / 5)
    assert coverage == pytest.approx(inside.any(0).mean())


def test_kernel_distance_of_a_known_case() -> None:
    """Of all images at once, it is the unbiased estimate of the squared maximum mean discrepancy."""
    random = np.random.default_rng(0)
    real, fake = random.normal(size=(40, 8)), random.normal(size=(40, 8)) + 0.5
    kernel = lambda a, b: (a @ b.T / 8 + 1) ** 3  # noqa: E731
    apart = [(kernel(each, each).sum() - kernel(each, each).trace()) / (40 * 39) for each in (real, fake)]
    expected = sum(apart) - 2 * kernel(real, fake).mean()
    (value,) = kernel_distance(*(Statistics(features=torch.from_numpy(each)) for each in (real, fake)))
    assert value.value == pytest.approx(expected)
    assert value.spread == pytest.approx(0, abs=1e-12)


def test_inception_score_of_known_logits() -> None:
    certain = torch.eye(10).repeat(1000, 1) * 1000
    fake = Statistics(class_logits=certain)
    (value,) = METRICS["is50k"].compute(Statistics(), fake)
    assert value.value == pytest.approx(10, rel=0.01)  # of ten splits, whose classes are nearly even
    (value,) = METRICS["is50k"].compute(Statistics(), Statistics(class_logits=torch.zeros(1000, 10)))
    assert value.value == pytest.approx(1)


def test_the_registry_has_what_the_configuration_names() -> None:
    apart = {"accuracy", "cas", "reconstruction"}  # which compare no statistics
    assert METRICS.keys() == {*get_args(Metric)} - apart
    values = {f"eval/{value}": name for name, metric in METRICS.items() for value in metric.values}
    assert values == {name: measure.of for name, measure in MEASURES.items() if measure.of not in apart}
    assert all(metric.extractor == "inception" for name, metric in METRICS.items() if name.startswith(("fid", "kid")))


def _measure_on_rank(samples: np.ndarray, logits: torch.Tensor, labels: torch.Tensor) -> tuple:
    """The last of the ranks gets nothing, if there are several."""
    with join_world() as world:
        mine = [i for i in range(len(samples)) if i % max(1, world.size - 1) == world.rank]
        moments = Moments.empty(samples.shape[1])
        classification = Classification(logits.shape[1], world)
        for part in np.array_split(mine, 3) if mine else []:
            moments.update(torch.from_numpy(samples[part]))
            classification.update(logits[part], labels[part])
        together = moments.over_ranks(world)
        return together.count, together.mean.numpy(), together.covariance.numpy(), classification.report()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_measure_what_one_process_would(world_size: int) -> None:
    samples = np.random.default_rng(0).normal(size=(101, 6)) + 30
    logits = torch.randn(101, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(101) % 6 - 1  # some have none, and one class has no images
    for count, mean, covariance, report in run_ranks(world_size, _measure_on_rank, samples, logits, labels):
        assert count == 101
        np.testing.assert_allclose(mean, samples.mean(0), rtol=1e-13)
        np.testing.assert_allclose(covariance, np.cov(samples.T), rtol=1e-10)
        known, scores = labels[labels >= 0], logits[labels >= 0]
        predictions = scores.argmax(1)
        classes = {"labels": range(7), "zero_division": 0}
        expected = sklearn.metrics.precision_recall_fscore_support(known, predictions, **classes)
        np.testing.assert_allclose([report.precision, report.recall, report.f1], expected[:3], rtol=1e-6)
        assert report.top1 == pytest.approx(sklearn.metrics.accuracy_score(known, predictions))
        top5 = sklearn.metrics.top_k_accuracy_score(known, scores, k=5, labels=range(7))
        assert report.top5 == pytest.approx(top5)
        with pytest.warns(UserWarning, match="not in y_true"):
            balanced = sklearn.metrics.balanced_accuracy_score(known, predictions)
        assert report.balanced_accuracy == pytest.approx(balanced)
        assert report.confusion == sklearn.metrics.confusion_matrix(known, predictions, labels=range(7)).tolist()


def _collect_on_rank(images: torch.Tensor, labels: torch.Tensor) -> Statistics:
    with join_world() as world:
        extractor = open_extractor("judge", Config(), world)
        parts = frozenset(("moments", "class_moments", "features", "class_logits", "verdicts"))
        batches = list(zip(images.split(32), labels.split(32), strict=True))[world.rank :: world.size]
        return collect(batches, {"": Wanted(extractor, parts, 10)}, world)[""]


def test_statistics_do_not_depend_on_the_ranks() -> None:
    """Two batches, the second a short one; of three ranks, one has none."""
    images = torch.randint(0, 256, (50, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 10
    (alone,) = run_ranks(1, _collect_on_rank, images, labels)
    assert alone.moments.count == 50
    assert [moments.count for moments in alone.class_moments] == [5] * 10
    for world_size in (2, 3):
        for found in run_ranks(world_size, _collect_on_rank, images, labels):
            assert torch.equal(found.features, alone.features)
            assert torch.equal(found.class_logits, alone.class_logits)
            assert found.verdicts == alone.verdicts
            for mine, one in zip([found.moments, *found.class_moments], [alone.moments, *alone.class_moments], strict=True):
                torch.testing.assert_close(mine.scatter, one.scatter, rtol=1e-10, atol=1e-10)


ALL = (
    "[accuracy, fd_classifier, fd_per_class, kd_classifier, precision_recall_classifier, density_coverage_classifier, gan_test]"
)


def _evaluate_on_rank(cache_dir: Path, settings: list[str]) -> list[dict]:
    with join_world() as world:
        few = ["evaluation.num_images=333", "evaluation.batch_size=48", f"evaluation.metrics={ALL}"]
        config = load_config(None, [f"data.cache_dir={cache_dir}", *few, *settings])
        torch.manual_seed(1)
        generator = build_generator(config.model, config.data)
        discriminator = build_discriminator(config.model, config.data)
        if config.evaluation.standing_stats:  # which are sums over ranks, too, of what the generator computes
            generator.double()
        evaluator = Evaluator(config, open_dataset(config.data.train, config.data, world), world)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), _tensors(generator)
        evaluation = evaluator(generator, discriminator, step=7, kimg=0.5)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
        assert all(map(torch.equal, _tensors(generator), before[2]))
        assert generator.training
        assert discriminator.training
        return [record.to_dict() for record in evaluation.records]


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


TRANSLATION = ["model.family=stargan", "model.conditioning=auxiliary", "model.generator_width=4"]
MODES = {
    "": [],
    "modes": ["evaluation.standing_stats=3", "evaluation.truncation=0.8"],
    "translated": [*TRANSLATION, f"evaluation.metrics={ALL[:-1]}, reconstruction]"],
}


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
def test_evaluation_does_not_depend_on_the_ranks(cache_dir: Path, settings: list[str]) -> None:
    (alone,) = run_ranks(1, _evaluate_on_rank, cache_dir, settings)
    made = {record["metric"]: record for record in alone}
    assert made.keys() >= {name for name, measure in MEASURES.items() if measure.of in ALL.strip("[]").split(", ")}
    fd = made["eval/fd_classifier"]
    assert (fd["n_fake"], fd["n_real"], fd["ema"], fd["step"], fd["seed"]) == (333, 1437, True, 7, 0)
    assert fd.get("sources") == ("test" if TRANSLATION[0] in settings else None)
    assert ("eval/reconstruction_l1" in made) == (TRANSLATION[0] in settings)
    assert fd["weights_sha256"] == judge.DIGITS_SHA256
    for world_size in (2, 3) if TRANSLATION[0] not in settings else (3,):
        for records in run_ranks(world_size, _evaluate_on_rank, cache_dir, settings):
            for record, expected in zip(records, alone, strict=True):
                assert record["metric"] == expected["metric"]
                assert record["value"] == pytest.approx(expected["value"], rel=1e-8, abs=1e-9)


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


@pytest.fixture(scope="module")
def digits(cache_dir: Path, world: World) -> tuple[Config, torch.Tensor, torch.Tensor]:
    """The training images and their labels, in the order of the labels, as fakes are asked for."""
    config = Config(data=DataConfig(cache_dir=cache_dir))
    batches = list(open_dataset(config.data.train, config.data, world).evaluation_batches(256))
    labels = torch.cat([batch.labels for batch in batches])
    order = labels.argsort(stable=True)
    return config, torch.cat([batch.images for batch in batches])[order], labels[order]


def score(config: Config, fakes: torch.Tensor, world: World, metrics: tuple[str, ...]) -> dict[str, float]:
    config = config.model_copy(update={"evaluation": EvaluationConfig(metrics=metrics)})
    evaluator = Evaluator(config, open_dataset(config.data.train, config.data, world), world)
    records = evaluator(Copies(fakes), build_discriminator(config.model, config.data), step=1, kimg=1).records
    return {record.metric.removeprefix("eval/").removesuffix("_classifier"): record.value for record in records}


def test_each_metric_sees_what_it_must_and_is_blind_as_known(digits, world: World) -> None:
    config, images, labels = digits
    compared = tuple(ALL.strip("[]").split(", "))[1:]

    def measure(fakes: torch.Tensor) -> dict[str, float]:
        return score(config, fakes, world, compared)

    copies = measure(images)
    held_out = copies["fd_classifier_held_out"]
    assert copies["fd"] == pytest.approx(0, abs=1e-4)
    assert copies["fd_per_class"] == pytest.approx(0, abs=1e-3)
    assert copies["gan_test"] > 0.99
    assert min(copies["precision"], copies["recall"], copies["coverage"]) > 0.999
    assert copies["kd"] < 1e-3

    permuted = measure(images[torch.randperm(len(images))])  # wrong labels: only what looks at labels sees it
    assert permuted["fd"] < 1e-4
    assert min(permuted["precision"], permuted["recall"], permuted["coverage"]) > 0.999
    assert permuted["gan_test"] < 0.2
    assert permuted["fd_per_class"] > 100 * held_out

    first = torch.stack([images[(labels == label).nonzero()[0, 0]] for label in labels])
    collapsed = measure(first)  # one image a class: what looks at single images does not see it
    assert collapsed["gan_test"] == collapsed["precision"] == 1
    assert collapsed["fd"] > 10 * held_out
    assert collapsed["fd_per_class"] > 10 * held_out
    assert collapsed["recall"] < 0.02
    assert collapsed["coverage"] < 0.2

    without = measure(torch.where((labels == 8)[:, None, None, None], images.roll(200, 0), images))  # no 8
    assert without["fd"] > 5 * held_out
    assert without["gan_test"] < 0.93
    assert without["coverage"] < 0.95
    assert without["precision"] > 0.99

    blurred = torch.nn.functional.avg_pool2d(images.float(), 5, stride=1, padding=2).to(torch.uint8)
    noisy = (images + 60 * torch.randn(images.shape)).clamp(0, 255).to(torch.uint8)
    for fakes in (blurred, noisy):
        found = measure(fakes)
        assert found["fd"] > 10 * held_out
        assert found["kd"] > 100 * abs(copies["kd"])
        assert found["precision"] < 0.9


class Negative(torch.nn.Linear):
    """A 'generator' that makes the negative of an image, of whatever class, in a lower contrast."""

    contrast = 1.0

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -self.contrast * images


@pytest.mark.parametrize("split", ["test", "train"])
def test_translations_are_of_held_out_images_each_once(digits, world: World, split: str) -> None:
    """And back again."""
    test = [] if split == "test" else ["data.test=null"]
    metrics = "evaluation.metrics=[gan_test, reconstruction]"
    config = load_config(None, [f"data.cache_dir={digits[0].data.cache_dir}", *TRANSLATION, *test, metrics])
    train_set = open_dataset(config.data.train, config.data, world)
    sources = open_dataset(f"digits:{split}", config.data, world, split=split)
    (images, labels, _), *more = sources.evaluation_batches(len(sources))
    assert not more
    settings = config.evaluation.model_copy(update={"num_images": len(sources)})
    evaluator = Evaluator(config.model_copy(update={"evaluation": settings}), train_set, world)
    discriminator, generator = build_discriminator(config.model, config.data), Negative(1, 1)
    fakes = FakeImages(evaluator.config, train_set.class_counts, world, seed=5, sources=evaluator.sources)
    made, targets = (torch.cat(each) for each in zip(*fakes.batches(generator, len(sources)), strict=True))
    assert targets.tolist() == proportional_labels(train_set.class_counts, len(sources)).tolist()
    assert sorted(made.flatten(1).tolist()) == sorted((255 - images).flatten(1).tolist())
    (given,) = torch.cat([labels for _, labels, _ in fakes.translated(generator, len(sources))])[None]
    assert len(set(zip(given.tolist(), targets.tolist(), strict=True))) > 90  # of 100 pairs of classes
    for contrast in (1.0, 0.5):
        generator.contrast = contrast
        values = {record.metric: record.value for record in evaluator(generator, discriminator, step=1, kimg=1).records}
        expected = (1 - contrast**2) * (images.double() / 127.5 - 1).abs().mean().item()
        assert values["eval/reconstruction_l1"] == pytest.approx(expected, rel=1e-6, abs=1e-7)
        if contrast == 1:
            right = (load_judge(None)[0](images)[1].argmax(1) == labels).double().mean().item()
            assert values["eval/reconstruction_accuracy"] == pytest.approx(right)
            assert right > 0.95
            assert values["eval/gan_test"] < 0.3


def test_classification_accuracy_score(digits, world: World, monkeypatch) -> None:
    """It sees wrong labels and a lack of diversity, as nothing else does both."""
    monkeypatch.setattr(cas, "EPOCHS", 8)
    config, images, labels = digits
    first = torch.stack([images[(labels == label).nonzero()[0, 0]] for label in labels])
    wrong = images[torch.randperm(len(images))]
    values = [score(config, fakes, world, ("cas",))["cas"] for fakes in (images, first, wrong)]
    assert values[0] > 0.95
    assert values[1] < 0.9
    assert values[2] < 0.3


def test_statistics_of_real_images_are_kept(digits, world: World, tmp_path: Path) -> None:
    """Measured once: the next evaluator finds them, and other data, extractors or numbers do not."""
    config, images, _ = digits
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": tmp_path})})
    with patch.object(reference, "collect", wraps=collect) as collected:
        first = score(config, images, world, ("fd_classifier", "fd_per_class"))
        count = collected.call_count
        assert score(config, images, world, ("fd_classifier", "fd_per_class")) == first
        assert collected.call_count == count
        score(config, images, world, ("fd_random",))
        assert collected.call_count == count + 1
    for path in (tmp_path / "statistics").iterdir():
        made = json.loads(str(np.load(path)["made"]))
        assert made["extractor"] in ("digits-judge", "random")


def test_a_reference_file(digits, world: World, tmp_path: Path) -> None:
    """Moments that were measured elsewhere stand in for the real images."""
    config, images, _ = digits
    cache = f"data.cache_dir={config.data.cache_dir}"
    path = tmp_path / "digits.npz"
    made = launch(2, "gandist.evaluate", "reference", "digits:train", str(path), "--extractor", "judge", cache)
    assert made.returncode == 0, made.stderr
    noisy = (images + 60 * torch.randn(images.shape)).clamp(0, 255).to(torch.uint8)
    expected = score(config, noisy, world, ("fd_classifier",))
    given = load_config(None, [cache, f"evaluation.reference={path}", "evaluation.metrics=[fd_classifier]"])
    evaluator = Evaluator(given, open_dataset(given.data.train, given.data, world), world)
    with patch.object(reference, "collect") as collected:
        (record, _) = evaluator(Copies(noisy), build_discriminator(given.model, given.data), step=1, kimg=1).records
        assert not collected.called
    assert record.value == pytest.approx(expected["fd"], rel=1e-9)
    assert record.n_real == 1437

    with np.load(path) as arrays:
        np.savez(tmp_path / "other.npz", mu=arrays["mu"], sigma=arrays["sigma"])  # as others make them, for Inception
    (tmp_path / "broken.npz").write_bytes(b"moments")
    for name, message in (("other", "no metric of evaluation.metrics uses"), ("broken", "cannot be read as moments")):
        changed = given.evaluation.model_copy(update={"reference": tmp_path / f"{name}.npz"})
        with pytest.raises(ConfigError, match=message):
            Evaluator(given.model_copy(update={"evaluation": changed}), evaluator.train_set, world)


def test_fakes_have_the_training_sets_classes() -> None:
    counts = np.array([5, 0, 2, 13])
    for size, expected in ((20, counts), (40, counts * 2), (10, [2, 0, 1, 7])):
        assert np.bincount(proportional_labels(counts, size), minlength=4).tolist() == list(expected)
    assert proportional_labels(counts[:0], 3).tolist() == [-1, -1, -1]


def test_fakes_of_each_mode(world: World) -> None:
    def fakes(**changes) -> FakeImages:
        config = Config(evaluation=EvaluationConfig(batch_size=40, **changes))
        return FakeImages(config, np.array([90, 10]), world, seed=0)

    class Echo(torch.nn.Linear):
        def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return latents[:, None, None, :] / 2

    def made(**changes) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = zip(*fakes(**changes).batches(Echo(1, 1), 100), strict=True)
        return torch.cat(images), torch.cat(labels)

    images, labels = made()
    assert labels.bincount().tolist() == [90, 10]
    assert made(labels="balanced")[1].bincount().tolist() == [50, 50]
    assert images.min() == 0
    truncated, _ = made(truncation=0.5)
    assert truncated.min() >= 95
    assert truncated.max() <= 160


def test_a_generator_that_truncates_takes_whole_latents(world: World) -> None:
    class Echo(torch.nn.Linear):
        truncation: float | None = None

        def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return latents[:, None, None, :] * (self.truncation or 0.25)

    config, generator = Config(evaluation=EvaluationConfig(batch_size=40, truncation=0.5)), Echo(1, 1)
    fakes = FakeImages(config, np.array([90, 10]), world, seed=0)
    images = torch.cat([images for images, _ in fakes.batches(generator, 100)])
    assert generator.truncation is None
    stream = random_stream(0, Purpose.EVALUATION, 0)
    assert torch.equal(images[:40], to_uint8(draw_latents(stream, 40, 64)[:, None, None, :] * 0.5))


def test_truncated_latents_have_the_truncated_normal_distribution() -> None:
    latents = draw_latents(random_stream(0, Purpose.EVALUATION), 1000, 10, 0.7).flatten().numpy()
    assert abs(latents).max() <= 0.7
    assert scipy.stats.kstest(latents, scipy.stats.truncnorm(-0.7, 0.7).cdf).pvalue > 0.01


def test_standing_statistics(world: World) -> None:
    """Those of many batches, in a copy: the mean of each batch's own."""
    config = Config(evaluation=EvaluationConfig(batch_size=64, standing_stats=20))
    torch.manual_seed(0)
    generator = build_generator(config.model, config.data).eval()
    counts = np.ones(10, int)
    prepared = FakeImages(config, counts, world, seed=0).prepare(generator)
    name = next(name for name, buffer in generator.named_buffers() if name.endswith("running_mean"))
    assert not generator.get_buffer(name).any()
    first = FakeImages(config, counts, world, seed=0)
    with torch.no_grad():  # of the first layer with batch norm, by hand
        inputs = []
        layer = prepared.get_submodule(name.rpartition(".")[0])
        hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        list(first.batches(prepared, 64 * 40))
        hook.remove()
    expected = torch.cat(inputs).mean((0, 2, 3))
    torch.testing.assert_close(prepared.get_buffer(name), expected, rtol=0.1, atol=0.02)


def test_rounding_to_levels() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-1.1, 1.1])).tolist() == [0, 255]


def test_few_images_are_warned_of(digits, world: World, capsys) -> None:
    config, images, _ = digits
    few = EvaluationConfig(metrics=("fd_classifier",), num_images=64)
    evaluator = Evaluator(
        config.model_copy(update={"evaluation": few}), open_dataset(config.data.train, config.data, world), world
    )
    for _ in range(2):
        evaluator(Copies(images), build_discriminator(config.model, config.data), step=1, kimg=1)
    assert capsys.readouterr().out == (
        "warning: fd_classifier compares 64 images in 64 dimensions: with so few, most of its value is bias\n"
    )


def test_the_judge_that_ships(cache_dir: Path, world: World) -> None:
    judge, digest = load_judge(None)
    assert sum(p.numel() for p in judge.parameters()) == 65_834
    assert len(digest) == 64
    assert top1(judge, DataConfig(cache_dir=cache_dir), world) > 0.99
    values = judge(torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8))
    assert [value.shape for value in values] == [(3, 64), (3, 10)]


def test_a_judge_of_ones_own(cache_dir: Path, tmp_path: Path) -> None:
    """Trained by its command, and then used."""
    path = tmp_path / "judge.pt"
    data = [f"data.cache_dir={cache_dir}", "data.num_workers=0"]
    trained = launch(1, "gandist.evaluation.judge", str(path), "--epochs", "4", *data)
    assert trained.returncode == 0, trained.stderr
    accuracy, digest = trained.stdout.splitlines()
    assert float(accuracy.split()[-1]) > 0.95
    options = [f"evaluation.judge={path}", "metrics=[fd_classifier,gan_test]", "--json", str(tmp_path / "a.json")]
    command = ["images", "digits:test", "digits:train", *data, "data.num_classes=10", *options]
    found = launch(1, "gandist.evaluate", *command)
    assert found.returncode == 0, found.stderr
    distance, verdicts = json.loads((tmp_path / "a.json").read_text())["records"]
    assert verdicts["value"] == pytest.approx(float(accuracy.split()[-1]), abs=1e-4)
    assert distance["extractor"] == "judge judge.pt"
    assert digest.startswith(distance["weights_sha256"])


def test_judges_that_do_not_fit(tmp_path: Path, world: World) -> None:
    Judge(32, 3, 7).save(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("judge")
    config = Config()
    for name, message in (
        ("other.pt", "wants data.channels=3 and data.num_classes=7"),
        ("text.pt", "is not a judge"),
        ("none.pt", "No such file"),
    ):
        changed = config.model_copy(update={"evaluation": EvaluationConfig(judge=tmp_path / name)})
        with pytest.raises(ConfigError, match=message):
            open_extractor("judge", changed, world)


def test_sizes_of_judges() -> None:
    for resolution, layers, features in ((8, 4, 64), (16, 4, 64), (32, 6, 256), (64, 8, 256), (256, 12, 256)):
        judge = Judge(resolution, 3, 5)
        assert (len(judge.convolutions), judge.num_features) == (layers, features)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    batches = iter(lambda: (images, torch.tensor([1, -1])), None)
    assert torch.isfinite(train_judge(Judge(32, 3, 5), batches, 64, epochs=2)(images)[1]).all()


def test_a_judge_of_images_that_are_not_square(world: World, tmp_path: Path, monkeypatch) -> None:
    """It has the longer side, sees the images stretched, and is trained by its command and for CAS."""
    path, data = tmp_path / "judge.pt", ["data.resolution=[8,16]", f"data.cache_dir={tmp_path}", "data.num_workers=0"]
    trained = launch(1, "gandist.evaluation.judge", str(path), "--epochs", "3", *data)
    assert trained.returncode == 0, trained.stderr
    assert float(trained.stdout.split()[3]) > 0.9
    found, _ = load_judge(path)
    config = load_config(None, data)
    images, labels = open_dataset("digits:test", config.data, world, split="test").some(200)
    assert (found.resolution, images.shape) == (16, (200, 1, 8, 16))
    stretched = torch.nn.functional.interpolate(images.float(), size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(found(images), found(stretched))
    monkeypatch.setattr(cas, "EPOCHS", 20)
    assert cas.classification_accuracy_score([(images, labels)], [(images, labels)], config, world) > 0.9


def test_folders_of_images_that_are_not_square(tmp_path: Path) -> None:
    """They keep the size of the first one, as squares do."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 6, 10, 3), np.uint8)):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    options = ["metrics=[fd_random]", f"data.cache_dir={tmp_path}/cache"]
    found = launch(1, "gandist.evaluate", "images", str(tmp_path / "a"), str(tmp_path / "b"), *options)
    assert found.returncode == 0, found.stderr
    assert re.search(r"fd_random +-?0\.0000", found.stdout)
    reference = [str(tmp_path / "a"), str(tmp_path / "a.npz"), "--extractor", "random"]
    made = launch(1, "gandist.evaluate", "reference", *reference, options[1])
    assert made.returncode == 0, made.stderr
    with np.load(tmp_path / "a.npz") as arrays:
        assert json.loads(str(arrays["made"]))["resolution"] == [6, 10]


def test_a_changed_judge_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(judge, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(GandistError, match="is not the file that was released"):
        load_judge(None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluation.metrics=[fid50k]"], "compares with 50,000 real images, and data.train has 1,437"),
        (["evaluation.metrics=[kd_classifier]", "evaluation.num_images=5"], "wants more than 5 images"),
    ],
)
def test_what_cannot_be_measured(digits, world: World, monkeypatch, settings: list[str], message: str) -> None:
    config = load_config(None, [f"data.cache_dir={digits[0].data.cache_dir}", *settings])
    monkeypatch.setattr("gandist.evaluation.features.load_weights", lambda *given: ({}, ""))
    monkeypatch.setattr("gandist.evaluation.features.InceptionFeatures", lambda weights: torch.nn.Identity())

    def measure() -> None:
        evaluator = Evaluator(config, open_dataset(config.data.train, config.data, world), world)
        evaluator(Copies(digits[1]), build_discriminator(config.model, config.data), step=1, kimg=1)

    with pytest.raises(ConfigError, match=message):
        measure()


def test_the_best_is_measured_again(cache_dir: Path, tmp_path: Path) -> None:
    """With other latents, when the run has ended; and whenever one asks."""
    short = ["train.kimg=0.512", "evaluation.every_kimg=0.128", "evaluation.num_images=200", "tracking.wandb=off"]
    run = [f"run_dir={tmp_path}", f"data.cache_dir={cache_dir}", "checkpoint.best=eval/fd_classifier", *short]
    result = launch(2, "gandist.train", *run)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    best = min((row for row in rows if row["metric"] == "eval/fd_classifier"), key=lambda row: row["value"])
    (again,) = (row for row in rows if row["metric"] == "best/fd_classifier")
    assert (again["step"], again["seed"]) == (best["step"], best["seed"] + 1)
    assert again["value"] != best["value"]

    found = launch(1, "gandist.evaluate", str(tmp_path), "--best", "seed=1", "--json", str(tmp_path / "best.json"))
    assert found.returncode == 0, found.stderr
    records = {each["metric"]: each for each in json.loads((tmp_path / "best.json").read_text())["records"]}
    assert records["eval/fd_classifier"]["value"] == pytest.approx(again["value"], rel=1e-8)

    step = checkpoint.complete_steps(tmp_path)[-1]
    values = []
    for chosen in (
        [str(step)],
        [str(tmp_path), "--step", str(int(step.name.removeprefix("step-")))],
        [str(tmp_path), "ema=false"],
    ):
        found = launch(1, "gandist.evaluate", *chosen, "metrics=[fd_classifier]")
        assert found.returncode == 0, found.stderr
        assert found.stdout.startswith(f"{step}\n")
        values.append(found.stdout.splitlines()[1])
    assert values[0] == values[1] != values[2]


def test_mistakes_in_commands(cache_dir: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["images", "digits:test"], "gandist.evaluate images wants A B"),
        (["images", "digits:test", "digits:train", "metrics=[fid10k]"], "which measure a run"),
        (["reference", "digits:test", "file.pt"], "a reference is a file.npz"),
        (["images", str(tmp_path / "none"), "digits:train"], "none"),
        ([str(tmp_path), "--best"], "cannot read the configuration"),
        (["images", "digits:test", "digits:train", "metrics=[fidd]"], "did you mean 'fid'"),
    ):
        result = launch(1, "gandist.evaluate", *arguments)
        assert result.returncode == 1, arguments
        assert message in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) < 4, result.stderr
    cas_run = launch(2, "gandist.train", f"run_dir={tmp_path}/r", f"data.cache_dir={cache_dir}", "evaluation.metrics=[cas]")
    assert cas_run.returncode == 1
    assert "measure it when the run has ended" in cas_run.stderr
