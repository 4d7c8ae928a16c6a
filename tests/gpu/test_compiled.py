"""Compiled steps on a GPU have few graphs, and nothing is compiled again later."""

from collections.abc import Iterator
from functools import partial
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
SETTINGS = {  # and how many graphs they have: of `generate`, of D with and without its penalty, of G, of power iterations
    "dcgan, accumulated": ([*LAZY, "train.accumulation=2", "augmentation.xflip=true"], 5),
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
        5,
    ),
}


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_compiled_once_and_whole(world: World, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over changing schedules, too. Of the graphs tests/gpu/test_runs.py makes kernels: for all of these it takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    overrides, expected = SETTINGS[name]
    trainer = build(world, tmp_path / "run", [*overrides, "train.compile=true"])
    batches = repeat(random_batch(trainer.config, 8, world.device))
    for _ in range(2):
        trainer.train_step(batches)
    assert counters["stats"]["unique_graphs"] == expected
    assert_never_waits(trainer, batches)
    assert counters["stats"]["unique_graphs"] == expected, "compiled again"
    assert not counters["graph_break"]
