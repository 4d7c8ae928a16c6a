"""A training step on a GPU, in every setting: no tensor is on the wrong device, and the host never waits."""

import os
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
import torch

from benchmarks.throughput import QUIET, random_batch
from gandist.checkpoint import flatten
from gandist.config_file import load_config
from gandist.data import DeviceBatch
from gandist.distributed import World, join_world
from gandist.trainer import Trainer
from tests.gpu import needs_two
from tests.null_gpu import counts, reset
from tests.ranks import ROOT, run_ranks

PUBLISHED = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("digits"))
STYLES = ["model.family=stylegan2", "model.mapping_layers=2", "model.max_width=8", "loss.adversarial=non_saturating"]
SETTINGS = {
    "mlp": ["model.family=mlp"],
    "resnet, layer norm": [
        "model.family=resnet",
        "data.resolution=32",
        "model.discriminator_norm=layer",
        "loss.wgan_gp_lambda=10",
    ],
    "biggan_deep": ["model.family=biggan_deep", "data.resolution=32", "model.attention=[8]"],
    "translation": [f"--config={ROOT / 'configs/digits-translate.yaml'}"],
    "few labels": [f"--config={ROOT / 'configs/digits-10pct.yaml'}"],
    **{f"{name} head": [f"model.conditioning={name}"] for name in ("auxiliary", "twin_auxiliary", "adc", "contrastive")},
    **{f"{name} head": [f"model.conditioning={name}"] for name in ("d2d_ce", "multi_hinge", "k_plus_one")},
    **{
        loss: [f"loss.adversarial={loss}"]
        for loss in ("non_saturating", "saturating", "least_squares", "wasserstein", "relativistic")
    },
    "R1 and R2": ["loss.r1_gamma={start: 1, end: 0.1, kimg: 1}", "loss.r2_gamma=1", "loss.penalty_every=2"],
    "WGAN-GP": ["loss.wgan_gp_lambda=10", "loss.adversarial=wasserstein"],
    "DRAGAN": ["loss.dragan_lambda=10"],
    "LeCam": ["loss.lecam_weight=0.1"],
    "orthogonal": ["loss.orthogonal_weight=1e-4"],
    "feature matching": ["loss.feature_matching_weight=0.1"],
    "top k": ["loss.top_k={start: 1, end: 0.5, kimg: 0.1}"],
    "consistency": ["consistency={real_weight: 1, fake_weight: 1, latent_weight: 1, latent_diversity_weight: 0.1}"],
    "path length": [*STYLES, "loss.path_length_weight=2", "loss.path_length_every=2"],
    **{f"{pipe} pipe": [f"augmentation.pipe={pipe}", "augmentation.xflip=true"] for pipe in ("translation", "diffaugment")},
    **{f"{pipe} pipe": [f"augmentation.pipe={pipe}", "augmentation.target=0.6"] for pipe in ("ada", "r3gan")},
    "float16": ["train.precision=float16", "optimizer.clip_norm=1"],
    "float64": ["train.precision=float64"],
    "tf32, deterministic": ["train.precision=tf32", "train.deterministic=true"],
    "accumulation": ["train.accumulation=2", "train.discriminator_updates=2"],
    "recomputed activations": ["train.activation_checkpointing=true"],
    "DeepSpeed": ["engine=deepspeed"],
}


def shrunk(name: str) -> list[str]:
    """A published configuration with few channels, whose lazy penalties come every second time."""
    path = f"--config={ROOT / 'configs' / f'{name}.yaml'}"
    model, loss = (getattr(load_config(Path(path.partition("=")[2]), []), section) for section in ("model", "loss"))
    width = [
        f"model.{player}_width={model.group_size if model.family == 'r3gan' else 8}"
        for player in ("generator", "discriminator")
    ]
    if model.family == "stylegan2":
        width += ["model.max_width=16", "model.mapping_layers=2", "model.minibatch_std=4"]
    if model.widths:
        width += [f"model.widths={[model.group_size] * len(model.widths)}"]
    lazy = [f"loss.{key}=2" for key in ("penalty_every", "path_length_every") if getattr(loss, key) > 1]
    return [path, *width, *lazy]


def build(world: World, run_dir: Path, overrides: list[str], *, batch_size: int = 8) -> Trainer:
    paths = [each.partition("=")[2] for each in overrides if each.startswith("--config")]
    settings = [each for each in overrides if not each.startswith("--config")]
    few = ["model.generator_width=4", "model.discriminator_width=4"] if not paths else []
    common = [*QUIET, *few, f"train.batch_size={batch_size}", "train.compile=false", f"run_dir={run_dir}"]
    return Trainer(load_config(Path(paths[0]) if paths else None, [*common, *settings]), world)


FIRST = 11  # steps: in as many DistributedDataParallel waits, to see how long it takes


def assert_never_waits(trainer: Trainer, batches: Iterator[DeviceBatch], steps: int = 2) -> None:
    """In these steps, after the first ones. torch names the line that waits."""
    for _ in range(FIRST):
        trainer.train_step(batches)
    null = "NULL_GPU_COUNT" in os.environ
    if null:
        reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            trainer.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if null:
        found = counts()
        assert found.launches
        assert (found.syncs, found.pageable_copies) == (0, 0)


@pytest.mark.parametrize("name", [*PUBLISHED, *SETTINGS])
def test_a_step_never_waits_for_the_device(world: World, tmp_path: Path, name: str) -> None:
    trainer = build(world, tmp_path, SETTINGS[name] if name in SETTINGS else shrunk(name))
    assert_never_waits(trainer, repeat(random_batch(trainer.config, 8, world.device)))
    elsewhere = [".".join(path) for path, tensor in flatten(trainer.state_dict()).items() if not tensor.is_cuda]
    assert not elsewhere, "of the state, on the CPU"


@pytest.mark.parametrize("held", ["memory", "shards"])
def test_nor_do_the_batches_of_the_trainer(world: World, tmp_path: Path, held: str) -> None:
    trainer = build(world, tmp_path, [f"data.in_memory={'1GB' if held == 'memory' else 0}"], batch_size=64)
    batches = trainer._open_batches()
    assert_never_waits(trainer, batches, steps=5)
    batches.close()


def steps_together(run_dir: Path, overrides: list[str]) -> int:
    """Collectives of a step on this rank."""
    with join_world() as world:
        trainer = build(world, run_dir, overrides)
        batches = repeat(random_batch(trainer.config, 8 // world.size, world.device))
        assert_never_waits(trainer, batches)
        reset()
        trainer.train_step(batches)
        return counts().collectives


@needs_two
@pytest.mark.parametrize(
    "overrides",
    [["loss.lecam_weight=1"], ["train.accumulation=2", "model.conditioning=d2d_ce"], ["engine=deepspeed", "zero_stage=2"]],
    ids=["ddp", "accumulated", "deepspeed"],
)
def test_ranks_do_not_wait_for_the_device_together(tmp_path: Path, overrides: list[str]) -> None:
    first, second = run_ranks(2, steps_together, tmp_path, overrides)
    assert first == second > 0
