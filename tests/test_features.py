"""Extractors: Inception's features against torch-fidelity's own, DINOv2's against their definition, and weights that are
checked before they are read."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from gandist import evaluate
from gandist.config import Config, DataConfig, EvaluationConfig
from gandist.distributed import World
from gandist.errors import ConfigError, DataError
from gandist.evaluation import features
from gandist.evaluation.features import DINOv2Features, open_extractor
from gandist.evaluation.weights import Published, load_weights
from tests.ranks import run_ranks
from tests.web import Web


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """A file as the released one, but of random weights."""
    path = tmp_path_factory.mktemp("weights") / "weights-inception-2015-12-05.pth"
    torch.manual_seed(0)
    module = "torch_fidelity.feature_extractor_inceptionv3"
    with (
        patch(f"{module}.load_state_dict_from_url", lambda *given, **options: {}),
        patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None),
    ):
        network = FeatureExtractorInceptionV3("random", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def published(inception_file: Path, monkeypatch) -> None:
    """As if that file were the released one."""
    monkeypatch.setattr(features, "INCEPTION", features.INCEPTION._replace(sha256=sha256(inception_file)[:8]))


def test_features_are_those_of_torch_fidelity(inception_file: Path, published, world: World) -> None:
    config = Config(evaluation=EvaluationConfig(inception_weights=inception_file))
    extractor = open_extractor("inception", config, world)
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    generator = torch.Generator().manual_seed(0)
    for size in (32, 64, 256, 299, 512):
        images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
        for mine, expected in zip(extractor(images), theirs(images), strict=True):
            assert torch.equal(mine, expected)
    grey = images[:, :1]
    assert torch.equal(extractor(grey)[0], extractor(grey.repeat(1, 3, 1, 1))[0])
    torch.testing.assert_close(extractor(images[:1])[0], extractor(images)[0][:1], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = extractor(images)[0]
    assert torch.equal(found, theirs(images)[0])
    assert extractor.weights_sha256 == sha256(inception_file)
    with pytest.raises(TypeError, match="uint8"):
        extractor(images.float())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two of them, of 7 and 10 PNG files."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for name, count, darkest in (("a", 7, 0), ("b", 10, 90)):
        made.append(tmp_path_factory.mktemp(name))
        for number in range(count):
            pixels = torch.randint(darkest, 256, (9, 9, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).resize((48, 48), Image.Resampling.BICUBIC).save(made[-1] / f"{number:03d}.png")
    return made


def _compare(inception_file: Path, folders: list[Path], cache_dir: Path, json_file: Path) -> None:
    expected = features.INCEPTION._replace(sha256=sha256(inception_file))
    metrics = "metrics=[fid,kid]"
    options = [f"inception_weights={inception_file}", f"data.cache_dir={cache_dir}", "batch_size=4", metrics]
    with patch.object(features, "INCEPTION", expected):
        evaluate.main(["images", *map(str, folders), *options, "--json", str(json_file)])


@pytest.fixture(scope="module")
def torch_fidelitys(inception_file: Path, folders: list[Path]) -> dict[str, float]:
    """Its own values."""
    settings = {"cuda": False, "verbose": False, "cache": False, "save_cpu_ram": True, "batch_size": 4}
    return torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        kid=True,
        kid_subset_size=7,
        feature_extractor_weights_path=str(inception_file),
        **settings,
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_images_are_scored_as_torch_fidelity_does(
    inception_file: Path, folders: list[Path], torch_fidelitys: dict[str, float], tmp_path: Path, world_size: int
) -> None:
    run_ranks(world_size, _compare, inception_file, folders, tmp_path / "cache", tmp_path / "found.json")
    records = {each["metric"]: each for each in json.loads((tmp_path / "found.json").read_text())["records"]}
    fid = records["eval/fid"]
    assert fid["value"] == pytest.approx(torch_fidelitys["frechet_inception_distance"], rel=1e-4)
    assert records["eval/kid"]["value"] == pytest.approx(torch_fidelitys["kernel_inception_distance_mean"], rel=1e-4)
    assert (fid["n_fake"], fid["n_real"], fid["extractor"]) == (7, 10, "inception-2015-12-05")
    assert fid["weights_sha256"] == sha256(inception_file)


def test_other_weights_are_refused(inception_file: Path, tmp_path: Path, world: World) -> None:
    """Before anything of them is unpickled."""
    for path, message in (
        (inception_file, r"is not the file that was published: its SHA-256 is \w{64}, not 6726825d…; get it from https"),
        (tmp_path / "none.pth", "No such file"),
    ):
        config = Config(evaluation=EvaluationConfig(inception_weights=path))
        with patch("torch.load") as load, pytest.raises(ConfigError, match=message):
            open_extractor("inception", config, world)
        assert not load.called


def test_weights_are_downloaded_once(tmp_path: Path) -> None:
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    with Web(tmp_path / "site") as web:
        data = DataConfig(cache_dir=tmp_path / "cache")
        published = Published(web.put("weights.pth", content), hashlib.sha256(content).hexdigest(), "evaluation.judge")
        for _ in range(2):
            state, digest = load_weights(published, None, data)
            assert state["weight"].tolist() == [0, 1, 2]
            assert digest == published.sha256
        assert web.asked("weights.pth") == 1
        other = Published(web.put("other.pth", content), "0" * 64, "evaluation.judge")
        with pytest.raises(
            DataError, match=r"has the SHA-256 \w{64}, not 0{64}; or name a copy of the file in evaluation.judge"
        ):
            load_weights(other, None, data)
        with pytest.raises(DataError, match="404"):
            load_weights(published._replace(url=f"{web.url}/none.pth"), None, data)


@pytest.fixture
def small_dinov2(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A file as the released one, of a smaller network with random weights."""
    monkeypatch.setattr(features, "DINOV2_ARCHITECTURE", "vit_small_patch14_dinov2")
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0)
    path = tmp_path / "dinov2.pth"
    torch.save(network.state_dict() | {"mask_token": torch.zeros(1, 384)}, path)
    monkeypatch.setattr(features, "DINOV2", features.DINOV2._replace(sha256=sha256(path)))
    return path


def test_dinov2(small_dinov2: Path, world: World) -> None:
    """The class token of what is defined: bicubic antialiased resizing, ImageNet's normalization."""
    extractor = open_extractor("dinov2", Config(evaluation=EvaluationConfig(dinov2_weights=small_dinov2)), world)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, _ = extractor(images)
    assert found.shape == (2, extractor.num_features) == (2, 384)
    resized = torch.nn.functional.interpolate(images.double(), (224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    tokens = extractor.network.vit.forward_features(((resized / 255 - mean) / std).float())
    torch.testing.assert_close(found, tokens[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extractor(images[:1])[0], found[:1], rtol=1e-4, atol=1e-4)


def test_positions_are_scaled_as_dinov2_does() -> None:
    """Sampled on the grid (x + 0.5) · 37 / 16.1 - 0.5 of the old one. Bicubic interpolation keeps a linear ramp."""
    ramp = torch.arange(37.0).repeat(37, 1).reshape(1, 37 * 37, 1)
    resized = DINOv2Features._resize_positions(torch.cat([torch.full((1, 1, 1), 5.0), ramp], 1), 16)
    assert resized[0, 0, 0] == 5
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(resized[0, 1:, 0].view(16, 16)[7, 2:-2], expected[2:-2], rtol=0, atol=0.08)


def test_random_features_are_always_the_same(world: World) -> None:
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, second = (open_extractor("random", Config(), world)(images)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.std(0).mean() > 1e-3
