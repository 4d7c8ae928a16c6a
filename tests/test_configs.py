"""Every configuration: its header, its networks, its data, and that it trains."""

import hashlib
import json
import math
import pickle
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10

from gandist.config import Config, Section
from gandist.config_file import load_config
from gandist.data import open_dataset
from gandist.data.pack import main as pack
from gandist.distributed import World
from gandist.models import build_discriminator, build_generator
from gandist.schedule import scheduled
from tests.ranks import ROOT, launch

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
PUBLISHED = [name for name in NAMES if not name.startswith("digits")]
every_config = pytest.mark.parametrize("name", NAMES)
every_published = pytest.mark.parametrize("name", PUBLISHED)

FIELDS = ["Command", "Data", "Published", "Expected", "Reproduced", "Differs"]
SIZES = {  # millions of parameters of both networks, without the class head, as their authors, or others who count, give them
    "cifar10-sngan": (4.30, 1.06),
    "cifar10-biggan": (9.42, 2.42),
    "cifar10-adcgan": (9.42, None),
    "cifar10-reacgan": (9.42, None),
    "cifar10-r3gan": (20.78, 21.28),
    "ffhq64-r3gan": (22.43, 22.38),
    "ffhq256-r3gan": (23.06, 23.01),
    "imagenet32-r3gan": (82.91, 86.55),
    "imagenet64-r3gan": (103.57, 107.21),
    "imagenet128-biggan": (70.43, 87.98),
    "imagenet128-biggan-256": (70.43, 87.98),
    "imagenet128-reacgan-256": (70.43, None),
    "ffhq256-stylegan2": (24.77, 24.00),
    "ffhq256-stylegan2-ada": (24.77, 24.00),
}


class Length(NamedTuple):
    """As StudioGAN counts it."""

    generator_steps: int
    decay: float  # of the averaged generator, a step


LENGTHS = {
    "cifar10-dcgan": Length(200_000, 0.0),
    "cifar10-sngan": Length(100_000, 0.0),
    "cifar10-sagan": Length(100_000, 0.0),
    "cifar10-biggan": Length(100_000, 0.9999),
    "cifar10-reacgan": Length(100_000, 0.9999),
    "cifar10-adcgan": Length(100_000, 0.9999),
    "baby-imagenet64-biggan": Length(100_000, 0.9999),
    "baby-imagenet64-reacgan": Length(100_000, 0.9999),
    "imagenet128-biggan": Length(200_000, 0.9999),
    "imagenet128-biggan-256": Length(200_000, 0.9999),
    "imagenet128-reacgan-256": Length(500_000, 0.9999),
}


def path_of(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"


def header_of(name: str) -> dict[str, str]:
    """The fields, and under "" what comes before them."""
    fields, field = {"": ""}, ""
    for line in path_of(name).read_text().splitlines():
        if not line.startswith("#"):
            break
        if begun := re.match(r"# ([A-Z][a-z]+):\s+", line):
            field, line = begun[1], line[begun.end() :]
            fields[field] = ""
        fields[field] = f"{fields[field]} {line.removeprefix('#').strip()}".strip()
    return fields


def gpus_of(name: str) -> int:
    """Of the header's command."""
    command = header_of(name)["Command"]
    if nodes := re.search(r"--nodes=(\d+) --gpus-per-node=(\d+)", command):
        return int(nodes[1]) * int(nodes[2])
    return int(re.search(r"--nproc_per_node=(\d+)", command)[1])


def row_of(name: str) -> list[str]:
    """Of the table in docs/configs.md."""
    table = (ROOT / "docs" / "configs.md").read_text()
    (row,) = re.findall(rf"^\| \[`{name}`\]\(\.\./configs/{name}\.yaml\) \|(.*)\|$", table, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def build(config: Config) -> tuple[nn.Module, nn.Module]:
    return build_generator(config.model, config.data), build_discriminator(config.model, config.data)


def millions(network: nn.Module) -> float:
    """Of parameters without those of the class head."""
    return round(sum(p.numel() for name, p in network.named_parameters() if "classifier" not in name) / 1e6, 2)


@every_config
def test_header(name: str) -> None:
    fields = header_of(name)
    assert list(fields) == ["", *FIELDS]
    assert all(fields.values())
    assert fields["Command"].endswith(f"--config configs/{name}.yaml")
    assert load_config(path_of(name)).run_dir == Path("runs") / name
    assert fields["Reproduced"].startswith(("yes, ", "no, not yet run"))


@every_published
def test_what_is_measured_is_what_is_published(name: str) -> None:
    fields, config = header_of(name), load_config(path_of(name))
    assert re.search(r"\d{4}\.\d{5}", fields[""])
    figures = dict(re.findall(r"\b(FID|IS) (\d+\.\d+)", fields["Published"]))
    expected = dict(re.findall(r"eval/(\w+) (\d+\.\d+)", fields["Expected"]))
    assert expected == {{"FID": "fid50k_full", "IS": "is50k"}[figure]: value for figure, value in figures.items()}
    assert {*expected, "fid50k_full"} <= {*config.evaluation.metrics}
    assert ("accuracy" in config.evaluation.metrics) == bool(config.data.num_classes)
    assert row_of(name)[1:3] == [figures.get("FID", "–"), figures.get("IS", "–")]


@every_published
def test_only_what_differs_from_the_defaults_is_said(name: str) -> None:
    given = yaml.safe_load(path_of(name).read_text())
    assert [*repeated(given, load_config(path_of(name)), Config())] == []
    order = [key for key in Config.model_fields if key in given]
    assert [*given] == order
    for section in order:
        if isinstance(given[section], dict):
            keys = type(getattr(Config(), section)).model_fields
            assert [*given[section]] == [key for key in keys if key in given[section]]


def repeated(given: dict, section: Section, default: Section, prefix: str = "") -> Iterator[str]:
    """Keys with the default's value, but for `model.family`, which says what the others are of."""
    for key, value in given.items():
        if isinstance(getattr(default, key), Section):
            yield from repeated(value, getattr(section, key), getattr(default, key), f"{key}.")
        elif getattr(section, key) == getattr(default, key) and prefix + key != "model.family":
            yield prefix + key


@every_config
@pytest.mark.usefixtures("shapes_alone")
def test_networks(name: str) -> None:
    config = load_config(path_of(name))
    data = config.data
    generator, discriminator = (network.eval() for network in build(config))
    labels = torch.zeros(2, dtype=torch.int64) - (data.num_classes == 0)
    images = generator(torch.zeros(2, config.model.latent_dim), labels)
    assert images.shape == (2, data.channels, data.resolution, data.resolution)
    output = discriminator(images, labels)
    assert (output.logits.shape, output.class_logits.shape) == ((2,), (2, data.num_classes))
    found = millions(generator), millions(discriminator)
    for size, published in zip(found, SIZES.get(name, ()), strict=False):
        assert published in (size, None)
    assert row_of(name)[3] == "{:.2f} / {:.2f}".format(*found)


@every_config
def test_batches_fit_the_gpus(name: str) -> None:
    config, gpus = load_config(path_of(name)), gpus_of(name)
    train = config.train
    micro_batch, rest = divmod(train.batch_size, gpus * train.accumulation_on(gpus))
    assert rest == 0
    if config.model.family == "stylegan2":
        assert micro_batch % config.model.minibatch_std == 0
    assert row_of(name)[4:6] == [f"{train.kimg:,.0f}", str(gpus)]


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_are_the_published_ones(name: str) -> None:
    config, (steps, decay) = load_config(path_of(name)), LENGTHS[name]
    images_a_step = config.train.batch_size * config.train.discriminator_updates
    assert config.train.kimg * 1000 == steps * images_a_step
    half_life = images_a_step * math.log(0.5) / math.log(decay) / 1000 if decay else 0
    assert config.ema.half_life_kimg == pytest.approx(half_life, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("r3gan")])
def test_r3gans_schedules_end_together_within_the_run(name: str) -> None:
    config = load_config(path_of(name))
    cosines = dict(scheduled(config))
    assert len(cosines) == 7
    assert len({cosine.kimg for cosine in cosines.values()}) == 1
    assert cosines["loss.r1_gamma"] == cosines["loss.r2_gamma"]
    assert cosines["optimizer.betas"].kimg <= config.train.kimg


def test_readme_leads_to_the_table() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "](docs/configs.md)" in readme
    assert [name for name in re.findall(r"configs/([\w-]+)\.yaml", readme) if name not in NAMES] == []


def test_what_the_table_adds_to_biggan_is_valid() -> None:
    added = re.findall(r"`(run_dir=runs/[^`]+)`", (ROOT / "docs" / "configs.md").read_text())
    assert len(added) == 3
    for overrides in added:
        load_config(path_of("cifar10-biggan"), overrides.split())


# Data.


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the commands in the headers pack, of a few random images."""
    folder = tmp_path_factory.mktemp("datasets")
    random = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        make_cifar10(folder, random, patch)
        for name in ("imagenet", "baby-imagenet"):
            for split in ("train", "val"):
                for number in range(4):
                    save(random, folder / name / split / f"n{number % 2}" / f"{split}{number}.jpg", 40)
        for number in range(4):
            save(random, folder / "ffhq" / "images1024x1024" / f"{number // 2 * 1000:05d}" / f"{number:05d}.png", 40)
        yield folder


def make_cifar10(folder: Path, random: np.random.Generator, patch: pytest.MonkeyPatch) -> None:
    """Twelve images to train on and ten to test, in the files that CIFAR-10 is distributed in."""
    batches = folder / CIFAR10.base_folder
    batches.mkdir()

    def write(name: str, content: dict) -> str:
        (batches / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((batches / name).read_bytes()).hexdigest()

    def batch(labels: list[int]) -> dict:
        return {"data": random.integers(0, 256, (len(labels), 3072), np.uint8), "labels": labels}

    names = [name for name, _ in CIFAR10.train_list]
    labels = [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9], [0, 1]]
    train = [[name, write(name, batch(each))] for name, each in zip(names, labels, strict=True)]
    patch.setattr(CIFAR10, "train_list", train)
    patch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch([*range(10)]))]])
    classes = write("batches.meta", {"label_names": [f"class {number}" for number in range(10)]})
    patch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": classes})


def save(random: np.random.Generator, path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).save(path)


def pack_data(name: str, collections: Path) -> Path:
    """Runs the header's command, once for all configurations that have it, and gives the folder in place of `data`."""
    packed = collections.parent / f"{collections.name}-packed"
    command = header_of(name)["Data"].partition(";")[0]
    python, dash, module, *arguments = shlex.split(command)
    assert (python, dash, module) == ("python", "-m", "gandist.data.pack")
    arguments = [re.sub("^~/datasets", str(collections), re.sub("^data/", f"{packed}/", each)) for each in arguments]
    if not any(Path(each).is_dir() for each in arguments if each.startswith(f"{packed}/")):
        pack([*arguments, "--workers", "1"])
    return packed


def moved(shards: Path | str | None, packed: Path) -> str | None:
    return shards and re.sub("^data", str(packed), str(shards))


@every_published
def test_the_command_in_the_header_makes_the_data(name: str, collections: Path, world: World, tmp_path: Path) -> None:
    data = load_config(path_of(name)).data
    packed = pack_data(name, collections)
    info = json.loads((Path(moved(data.train, packed)) / "_info.json").read_text())
    assert (info["resolution"], info["channels"]) == (data.resolution, data.channels)
    data = data.model_copy(update={"cache_dir": tmp_path, "num_workers": 0})
    counts = {"train": len(open_dataset(moved(data.train, packed), data, world))}
    if data.test:
        counts["test"] = len(open_dataset(moved(data.test, packed), data, world, split="test"))
    expected = {"cifar10": (12, 10), "ffhq": (4,), "imagenet": (4, 4), "baby": (4, 4)}
    (count,) = (each for beginning, each in expected.items() if name.startswith(beginning))
    assert tuple(counts.values()) == count[: len(counts)]


# Training.


TINY = {
    "dcgan": ["model.generator_width=4", "model.discriminator_width=4"],
    "resnet": ["model.generator_width=8", "model.discriminator_width=8"],
    "biggan": ["model.generator_width=2", "model.discriminator_width=2"],
    "stylegan2": ["model.generator_width=4", "model.discriminator_width=4", "model.max_width=8", "model.minibatch_std=2"],
    "r3gan": ["model.generator_width=16", "model.discriminator_width=16"],
}


@pytest.mark.parametrize(
    "name", ["cifar10-dcgan", "cifar10-reacgan", "cifar10-stylegan2-ada", "cifar10-r3gan"]
)  # unlike each other
def test_training(name: str, collections: Path, tmp_path: Path) -> None:
    """Two steps of small networks on a dozen images, with everything else as the configuration has it."""
    config = load_config(path_of(name))
    packed = pack_data(name, collections)
    classes = config.data.num_classes
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        f"data.train={moved(config.data.train, packed)}",
        f"data.test={moved(config.data.test, packed) or 'null'}",
        f"data.cache_dir={tmp_path}",
        "data.num_workers=0",
        "model.latent_dim=16",
        *TINY[config.model.family],
        "train.batch_size=4",
        f"train.kimg={2 * 4 * config.train.discriminator_updates / 1000}",
        f"evaluation.metrics=[{'accuracy' if classes else ''}]",
        "checkpoint.best=null",
        "tracking.every_kimg=0.001",
        "tracking.wandb=off",
    ]
    result = launch(1, "gandist.train", "--config", str(path_of(name)), *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    assert (tmp_path / "run" / "evaluations.jsonl").exists() == bool(classes)
