"""Compiled steps on a GPU: Triton's kernels for all of them, few graphs, and nothing compiled again later."""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.throughput import random_batch
from gandist.distributed import World
from tests.gpu.test_steps import STYLES, assert_never_waits, build
from tests.ranks import ROOT

LAZY = ["loss.r1_gamma={start: 1, end: 0.1, kimg: 1}", "loss.penalty_every=2"]
SETTINGS = {  # and how many graphs they have: of `generate`, of D with and without its penalty, and of G
    "dcgan, accumulated": ([*LAZY, "train.accumulation=2", "augmentation.xflip=true"], 4),
    "stylegan2": (
        [
            *STYLES,
            *LAZY,
            "loss.path_length_weight=2",
            "loss.path_length_every=2",
            "augmentation.pipe=ada",
            "augmentation.target=0.6",
        ],
        5,
    ),
    "r3gan": ([f"--config={ROOT / 'configs/cifar10-r3gan.yaml'}", "model.widths=[16, 16, 16, 16]", "model.group_size=16"], 3),
    "biggan": (
        [f"--config={ROOT / 'configs/cifar10-biggan.yaml'}", "model.generator_width=4", "model.discriminator_width=4"],
        3,
    ),
}


@pytest.fixture(autouse=True)
def _compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_compiled_once_and_whole(world: World, tmp_path: Path, name: str) -> None:
    overrides, expected = SETTINGS[name]
    trainer = build(world, tmp_path / "run", [*overrides, "train.compile=true"])
    batches = repeat(random_batch(trainer.config, 8, world.device))
    for _ in range(2):
        trainer.train_step(batches)
    assert graphs() == expected
    assert_never_waits(trainer, batches)
    assert graphs() == expected, "compiled again"
    assert not counters["graph_break"]
