"""Promises 1 and 2 of a whole run: it does not depend on the number of ranks, and a resume is exact."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gandist import checkpoint
from gandist.train import main
from tests.ranks import ROOT, run_ranks

BATCH_SIZE = 12  # which 1, 2, 3, 4 and 6 ranks divide
STEPS = 12
KIMG = BATCH_SIZE * STEPS / 1000
LOSSES = ("loss/", "penalty/", "consistency/", "logits/", "classification/", "augmentation/", "schedule/", "lr/")


def train(run_dir: Path, cache_dir: Path, world_size: int, *overrides: str) -> None:
    """A short run in float64 with everything that couples ranks: synchronized batch norm, R1, both players, the EMA."""
    arguments = [
        f"run_dir={run_dir}",
        f"data.cache_dir={cache_dir}",
        f"train.kimg={KIMG}",
        f"train.batch_size={BATCH_SIZE}",
        "train.precision=float64",
        "loss.r1_gamma=1.0",
        "model.generator_width=4",
        "model.discriminator_width=4",
        f"tracking.every_kimg={BATCH_SIZE / 1000}",
        f"checkpoint.every_kimg={KIMG / 2}",
        "evaluation.num_images=300",
        "tracking.wandb=off",
    ]
    run_ranks(world_size, main, [*arguments, *overrides], timeout=280)


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, by name."""
    files = checkpoint.complete_steps(run_dir)[-1].glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def rows(run_dir: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / file).read_text().splitlines()]


def logged_losses(run_dir: Path) -> list[list[float]]:
    """One row a step."""
    logged = rows(run_dir, "metrics.jsonl")
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    return [[value for name, value in row.items() if name.startswith(LOSSES)] for row in logged]


def evaluations(run_dir: Path) -> list[float]:
    return [row["value"] for row in rows(run_dir, "evaluations.jsonl") if "n_real" in row and row["step"] == STEPS]


def assert_same_run(a: Path, b: Path, tolerance: float) -> None:
    state_a, state_b = final_state(a), final_state(b)
    assert state_a.keys() == state_b.keys()
    assert {name.split("/")[0] for name in state_a} == {"generator", "discriminator", "generator_ema"}
    for name, tensor in state_a.items():
        difference = (tensor - state_b[name]).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"
    torch.testing.assert_close(logged_losses(a), logged_losses(b), rtol=0, atol=tolerance)
    torch.testing.assert_close(evaluations(a), evaluations(b), rtol=0, atol=max(tolerance, 0))


SETTINGS = {
    "projection": ("model.conditioning=projection", "loss.adversarial=hinge"),
    "paired": ("model.conditioning=d2d_ce", "loss.adversarial=relativistic", "classification.detach=true"),
    "styles": (
        "model.family=stylegan2",
        "model.mapping_layers=2",
        "model.max_width=8",
        "model.minibatch_std=3",
        "loss.adversarial=non_saturating",
        "loss.penalty_every=3",
        "loss.path_length_weight=2",
        "loss.path_length_every=4",
        "augmentation.xflip=true",
        "augmentation.pipe=ada",
        "augmentation.target=-1",  # always below: the probability rises
        "augmentation.speed_kimg=0.5",
        "ema.ramp_up=0.5",
        "optimizer.betas=[0.0, {start: 0.9, end: 0.99, kimg: 0.1}]",
    ),
    "consistent": (
        "data.labelled=0.3",
        "loss.feature_matching_weight=0.1",
        "loss.adversarial=non_saturating",
        "loss.dragan_lambda=1",
        "loss.lecam_weight=0.1",
        "loss.orthogonal_weight=1e-4",
        "loss.top_k={start: 1, end: 0.5, kimg: 0.1}",
        "consistency={real_weight: 1, fake_weight: 1, latent_weight: 1, latent_diversity_weight: 0.1}",
        "augmentation.pipe=diffaugment",
        "optimizer.generator_lr={start: 3e-3, end: 1e-3, kimg: 0.1}",
    ),
    "translated": (
        "model.family=stargan",
        "model.conditioning=auxiliary",
        "loss.adversarial=non_saturating",
        "loss.reconstruction_weight=10",
        "augmentation.xflip=true",
        "evaluation.metrics=[accuracy]",
    ),
    "accumulated": ("train.accumulation=2", "train.discriminator_updates=2", f"train.kimg={2 * KIMG}"),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_any_number_of_ranks_learns_the_same(tmp_path: Path, cache_dir: Path, settings: str) -> None:
    others = {"projection": (2, 4), "styles": (2, 4), "accumulated": (3,)}.get(settings, (4,))
    for world_size in (1, *others):
        train(tmp_path / str(world_size), cache_dir, world_size, *SETTINGS[settings])
    for world_size in others:
        assert_same_run(tmp_path / "1", tmp_path / str(world_size), 1e-9)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (3, 2), (4, 1), (6, 1)])
def test_resume_is_exact(tmp_path: Path, cache_dir: Path, world_size: int, accumulation: int) -> None:
    """To the bit, on any number of ranks, in float32; the discriminator has several of DDP's buckets."""
    settings = [
        "train.precision=float32",
        f"train.accumulation={accumulation}",
        "model.discriminator_width=32",
        "evaluation.metrics=[accuracy]",
    ]
    train(tmp_path / "straight", cache_dir, world_size, *settings)
    train(tmp_path / "resumed", cache_dir, world_size, *settings, f"train.kimg={KIMG / 2}")
    train(tmp_path / "resumed", cache_dir, world_size, *settings)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed", 0)


def test_resume_on_another_number_of_ranks(tmp_path: Path, cache_dir: Path) -> None:
    straight, halfway = tmp_path / "straight", tmp_path / "halfway"
    train(straight, cache_dir, 2)
    train(halfway, cache_dir, 2, f"train.kimg={KIMG / 2}")
    for world_size in (1, 4):
        resumed = shutil.copytree(halfway, tmp_path / f"then-{world_size}")
        train(resumed, cache_dir, world_size)
        assert_same_run(straight, resumed, 1e-9)
    one_life = shutil.copytree(halfway, tmp_path / "2-1-4")
    for world_size, length in ((1, 0.75), (4, 1)):
        train(one_life, cache_dir, world_size, f"train.kimg={KIMG * length}")
    assert_same_run(straight, one_life, 1e-9)


@pytest.mark.parametrize(
    "settings",
    [["loss.adversarial=relativistic"], SETTINGS["translated"], [f"--config={ROOT / 'configs/digits-10pct.yaml'}"]],
    ids=["pairs", "translated", "few labels"],
)
def test_resume_is_exact_where_the_generator_takes_real_images_too(
    tmp_path: Path, cache_dir: Path, settings: list[str]
) -> None:
    train(tmp_path / "straight", cache_dir, 2, *settings)
    train(tmp_path / "resumed", cache_dir, 2, *settings, f"train.kimg={KIMG / 2}")
    train(tmp_path / "resumed", cache_dir, 2, *settings)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed", 0)


def test_resume_forgets_nothing_that_objectives_keep(tmp_path: Path, cache_dir: Path) -> None:
    """The probability of augmentation, the mean path length, schedules, lazy penalties."""
    train(tmp_path / "straight", cache_dir, 2, *SETTINGS["styles"])
    train(tmp_path / "halfway", cache_dir, 2, *SETTINGS["styles"], f"train.kimg={KIMG / 2}")
    for world_size in (2, 1):
        resumed = shutil.copytree(tmp_path / "halfway", tmp_path / f"then-{world_size}")
        train(resumed, cache_dir, world_size, *SETTINGS["styles"])
        assert_same_run(tmp_path / "straight", resumed, 0 if world_size == 2 else 1e-9)
    kept = final_state(tmp_path / "straight")
    assert kept["discriminator/objective/augmentation.adaptive.probability"] > 0
    assert kept["generator/objective/path_length.mean"] > 0


def test_a_run_may_go_on_with_other_losses(tmp_path: Path, cache_dir: Path) -> None:
    """What they keep begins anew, or is left behind."""
    train(tmp_path, cache_dir, 2, f"train.kimg={KIMG / 4}")
    train(tmp_path, cache_dir, 2, f"train.kimg={KIMG / 2}", "loss.lecam_weight=0.1")
    assert final_state(tmp_path)["discriminator/objective/lecam.updates"] == STEPS / 4
    train(tmp_path, cache_dir, 2)
    assert not any("objective" in name for name in final_state(tmp_path))
    assert len(logged_losses(tmp_path)) == STEPS


PENALIZED = (
    "loss.r2_gamma=0.5",
    "loss.wgan_gp_lambda=2.0",
    "loss.adversarial=wasserstein",
    "train.accumulation=2",
    "model.discriminator_width=32",  # more than the first of DDP's buckets
)


def test_how_it_is_computed_does_not_matter(tmp_path: Path, cache_dir: Path) -> None:
    """Activations made twice, or the whole objectives compiled, penalties with them, on two ranks against one. A resume
    compiles nothing again."""
    train(tmp_path / "plain", cache_dir, 1, *PENALIZED, "train.compile=false")
    train(tmp_path / "twice", cache_dir, 2, *PENALIZED, "train.activation_checkpointing=true")
    assert_same_run(tmp_path / "plain", tmp_path / "twice", 1e-9)
    train(tmp_path / "compiled", cache_dir, 2, *PENALIZED, "train.compile=true", f"train.kimg={KIMG / 2}")
    code = set((tmp_path / "compiled" / "compiled").rglob("*"))
    assert code
    assert not (tmp_path / "twice" / "compiled").exists()
    train(tmp_path / "compiled", cache_dir, 2, *PENALIZED, "train.compile=true")
    assert code == set((tmp_path / "compiled" / "compiled").rglob("*"))
    assert_same_run(tmp_path / "plain", tmp_path / "compiled", 1e-9)


def deterministic_run(run_dir: Path, cache_dir: Path) -> tuple[bool, str | None]:
    arguments = [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", "train.kimg=1", "train.deterministic=true"]
    main([*arguments, "evaluation.metrics=[]", "tracking.wandb=off", "tracking.every_kimg=0.064"])
    return torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_a_deterministic_run_gives_the_same_bits_again(tmp_path: Path, cache_dir: Path) -> None:
    for name in ("a", "b"):
        assert run_ranks(2, deterministic_run, tmp_path / name, cache_dir) == [(True, ":4096:8")] * 2
    a, b = (final_state(tmp_path / name) for name in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_weights_have_moved_and_the_seed_matters(tmp_path: Path, cache_dir: Path) -> None:
    """The comparisons above can fail."""
    train(tmp_path / "a", cache_dir, 1)
    train(tmp_path / "b", cache_dir, 1, "seed=1")
    with pytest.raises(AssertionError, match="differs"):
        assert_same_run(tmp_path / "a", tmp_path / "b", 1e-3)
