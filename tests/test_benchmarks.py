"""Every benchmark runs: for a moment, on what it measures, in processes that share their imports."""

import importlib
import json
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import device
from benchmarks.studiogan import build_studiogan
from tests import null_gpu
from tests.ranks import ROOT, launch, run_ranks

DIGITS = ["data.cache_dir={cache}", "model.generator_width=2", "model.discriminator_width=2"]
HERE = 0  # ranks: in the process of the tests, whose fork server those that start processes then share
MOMENT = ["train.kimg=0.064", "evaluation.num_images=100"]
NO_MORE = [f"--{what}=0" for what in ("host-pairs", "launcher-kills", "restarts", "node-losses")]
CASES = {  # benchmark → ranks, and its arguments, in several lists if it does several things
    "agreement": (1, ["mlp"]),
    "budget": (2, ["stargan"]),
    "checkpoint": (2, ["--megabytes", "1", "--saves", "1", "--interval", "0.05"]),
    "convolution": (1, ["--images", "1", "--rounds", "1"]),
    "convolution_kinds": (1, ["--images", "1", "--pixels", "4", "--width", "16", "--seconds", "0"]),
    "crash": (HERE, [*NO_MORE, "--kind", "plain", "--kills", "1", "--ranks", "2", "--steps", "1", "--pairs", "1"]),
    "device": (HERE, ["--only", "machine", "--output", "{tmp}"]),
    "evaluation": (
        2,
        ["distance", "--features", "16", "--rounds", "1"],
        ["moments", "--features", "16", "--images", "512", "--rounds", "1"],
        ["share", *DIGITS, *MOMENT, "evaluation.every_kimg=0.064"],
    ),
    "few_labels": (1, ["alone", "gan", "--seeds", "0", "--steps", "2", *DIGITS, *MOMENT]),
    "gpu_budget": (HERE, ["--configs", "configs/cifar10-dcgan.yaml", "--images", "2", "--output", "{tmp}/tables.md"]),
    "loader": (HERE, ["--folder", "{tmp}", "--sizes", "64", "--samples", "200", "--rounds", "1", "--seconds", "0.1"]),
    "machine": (1, []),
    "methods": (HERE, ["dcgan, projection", "--ranks", "1", *DIGITS, *MOMENT]),
    "order": (HERE, ["--shards", "100", "--shard-size", "10"]),
    "regress": (1, ["--rounds", "1", "--store", "--file", "{tmp}/ratios.json"]),
    "resume": (HERE, ["--kimg", "0.128", "model.generator_width=2", "model.discriminator_width=2"]),
    "scaling": (2, ["measure", "--steps", "1", *DIGITS], ["predict", "configs/cifar10-dcgan.yaml"]),
    "startup": (HERE, ["--rounds", "1", "--launchers", "python", "--", *DIGITS]),
    "step": (1, ["sngan", "--batch-size", "2", "--rounds", "1", "--steps", "1", "--studiogan", "{studiogan}"]),
    "style": (1, ["{translator}"]),
    "throughput": (HERE, ["configs/digits.yaml", "--rungs", "bfloat16", "--rounds", "1", "--steps", "1", "--profile", *DIGITS]),
    "tracking": (1, ["--rounds", "1", "--kimg", "0.064"]),
}
STUDIOGAN = {  # as much of it as its networks are called with, and with their own parameters' names
    "utils/ops.py": """
from torch import nn

class ConditionalBatchNorm2d(nn.Module):
    def __init__(self, in_features, out_features, MODULES):
        super().__init__()

def conv2d(in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True):
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)

def linear(in_features, out_features, bias=True):
    return nn.Linear(in_features, out_features, bias)

def embedding(num_embeddings, embedding_dim):
    return nn.Embedding(num_embeddings, embedding_dim)

snconv2d, snlinear, sn_embedding = conv2d, linear, embedding
""",
    "models/resnet.py": """
import utils.misc as misc
from torch import nn

class Generator(nn.Module):
    def __init__(self, z_dim, g_shared_dim, img_size, g_conv_dim, apply_attn, attn_g_loc, g_cond_mtd, num_classes, g_init,
                 g_depth, mixed_precision, MODULES, MODEL):
        super().__init__()
        assert MODEL.info_type == "N/A" and g_cond_mtd == "cBN"
        self.img_size = img_size
        self.linear0 = MODULES.g_linear(in_features=z_dim, out_features=3 * img_size**2)
        self.bn = MODULES.g_bn(num_classes, g_conv_dim, MODULES)

    def forward(self, z, label):
        with misc.dummy_context_mgr():
            return self.linear0(z).view(-1, 3, self.img_size, self.img_size)

class Discriminator(nn.Module):
    def __init__(self, img_size, d_conv_dim, apply_d_sn, apply_attn, attn_d_loc, d_cond_mtd, aux_cls_type, d_embed_dim,
                 normalize_d_embed, num_classes, d_init, d_depth, mixed_precision, MODULES, MODEL):
        super().__init__()
        assert aux_cls_type == "W/O" and d_cond_mtd == "PD"
        self.conv = MODULES.d_conv2d(in_channels=3, out_channels=d_conv_dim, kernel_size=3, padding=1)
        self.embedding = MODULES.d_embedding(num_classes, d_conv_dim)

    def forward(self, x, label):
        return {"adv_output": (self.conv(x).sum((2, 3)) * self.embedding(label)).sum(1)}
""",
}

BARE = """
import importlib.metadata, sys

ABSENT = "wandb", "deepspeed", "plotly", "simplejpeg", "torchmetrics", "sklearn", "scikit-learn", "psutil"
sys.modules |= dict.fromkeys(ABSENT)
version = importlib.metadata.version

def version_of_those_here(name):
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = version_of_those_here
"""


@pytest.fixture(scope="module")
def studiogan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of StudioGAN with networks of next to nothing."""
    checkout = tmp_path_factory.mktemp("studiogan")
    for path, source in {**STUDIOGAN, "models/big_resnet.py": STUDIOGAN["models/resnet.py"]}.items():
        file = checkout / "src" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return checkout


@pytest.fixture
def places(tmp_path: Path, cache_dir: Path, studiogan: Path) -> dict[str, Path]:
    """What the arguments in `CASES` name."""
    return {"tmp": tmp_path, "cache": cache_dir, "studiogan": studiogan, "translator": tmp_path / "translator"}


def test_every_benchmark_is_here() -> None:
    found = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert found == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_runs(name: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, *commands = CASES[name]
    if name == "gpu_budget":
        try:
            null_gpu.environment()
        except null_gpu.Unavailable as reason:
            pytest.skip(f"no null GPU: {reason}")
    if name == "style":
        overrides = [*DIGITS, "train.kimg=0.064", "evaluation.metrics=[]", "tracking.wandb=off", "run_dir={translator}"]
        train = ["--config", "configs/digits-translate.yaml", *(each.format(**places) for each in overrides)]
        assert launch(1, "gandist.train", *train).returncode == 0
    if name == "resume":  # what a run starts with, where little is installed
        (places["tmp"] / "sitecustomize.py").write_text(BARE)
        monkeypatch.setenv("PYTHONPATH", str(places["tmp"]))
    for command in commands:
        arguments = [each.format(**places) for each in command]
        if ranks == HERE:
            importlib.import_module(f"benchmarks.{name}").main(arguments)
            printed = capsys.readouterr().out
        else:
            done = launch(ranks, f"benchmarks.{name}", *arguments)
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        assert len(printed.splitlines()) > 1, printed  # a table


@pytest.mark.parametrize("shape", ["sngan", "biggan"])
def test_studiogan(shape: str, studiogan: Path) -> None:
    assert run_ranks(1, _answers, studiogan, shape) == [((2, 3, 32, 32), (2,))]


def _answers(checkout: Path, shape: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    generator, discriminator = build_studiogan(checkout, shape)
    labels = torch.tensor([0, 1])
    images = generator(torch.randn(2, 80 if shape == "biggan" else 128), labels)
    return tuple(images.shape), tuple(discriminator(images, labels).logits.shape)


RECORD = "from benchmarks.report import record; record({!r}, {!r}, {!r}); print('recorded'); "
MACHINE = RECORD.format("machine", ["machine", ""], ["GPU", "none"])
SPEED = RECORD.format("speeds", ["what", "ms"], ["a | b", 1.5])
HANG = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
FAIL = "import sys; sys.stderr.write('a reason\\n  warnings.warn(...)\\n'); sys.exit(1)"


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codes = {"machine": MACHINE, "fails": SPEED + FAIL, "hangs": SPEED + HANG, "works": SPEED, "needs": SPEED}
    parts = [device.Part(name, 1, ["-c", code], gpu=name == "needs") for name, code in codes.items()]
    results = device.run_parts(parts, 0.2, tmp_path, tmp_path / "cache", "the command")
    assert {name: result.outcome.partition(" after")[0] for name, result in results.items()} == {
        "machine": "ok",
        "fails": "exit status 1: a reason",
        "hangs": "not done",
        "works": "ok",
        "needs": "needs a GPU",
    }
    printed = capfd.readouterr().out
    started = next(int(line) for line in printed.splitlines() if line.isdigit())
    assert not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE
    assert (tmp_path / "log.txt").read_text().count("recorded") == 4
    stored = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert stored["hangs"]["rows"] == stored["works"]["rows"] == {"speeds": [{"what": "a | b", "ms": "1.5"}]}
    page = (tmp_path / "results.md").read_text()
    assert page.startswith("`the command`, ")
    assert "| a \\| b | 1.5 |" in page
    assert "| exit status 1: a reason |" in page
