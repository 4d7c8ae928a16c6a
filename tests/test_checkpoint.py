"""Checkpoints: whole or not at all, verified, pruned; a damaged one is set aside, another run's is refused."""

import json
import math
import os
import pickle
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp

from gandist import checkpoint
from gandist.checkpoint import retention, saving
from gandist.checkpoint.__main__ import main as command
from gandist.checkpoint.tensors import flatten, share
from gandist.config import CheckpointConfig, Config, load_config
from gandist.distributed import World, join_world
from gandist.errors import CheckpointError, ConfigError, GandistError
from gandist.models import build_generator
from gandist.train import train
from gandist.trainer import Trainer
from tests.ranks import run_ranks
from tests.test_promises import final_state
from tests.test_remote import _mount_small_disk

KEEP_TWO = CheckpointConfig(keep=2)


def state(value: float) -> dict:
    return {"generator": {"network": {"weight": torch.full((1000,), value)}}}


def save(run_dir: Path, step: int, world: World, config: CheckpointConfig = KEEP_TWO, **meta: Any) -> Path:
    return checkpoint.save(run_dir, step, state(step), {"step": step, **meta}, world, config)


def steps(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.complete_steps(run_dir)]


@pytest.fixture
def run_dir(tmp_path: Path, world: World) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path, step, world)
    return tmp_path


def load(run_dir: Path, world: World) -> tuple[int, float]:
    path = checkpoint.newest(run_dir, world)
    tensors = state(0.0)
    checkpoint.load(path, tensors, world)
    return checkpoint.read_meta(path)["step"], tensors["generator"]["network"]["weight"].mean().item()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_round_trip_and_pruning(run_dir: Path, world: World) -> None:
    assert load(run_dir, world) == (2, 2.0)
    save(run_dir, 10, world)
    assert [path.name for path in checkpoint.complete_steps(run_dir)] == ["step-00000002", "step-00000010"]
    assert checkpoint.newest(run_dir / "nothing", world) is None


def test_the_manifest_can_be_checked_by_hand(run_dir: Path) -> None:
    for path in checkpoint.complete_steps(run_dir):
        result = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True, check=True)
        assert result.stdout.count(": OK") == len(list(path.iterdir())) - 1


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "meta.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_set_aside(run_dir: Path, world: World, capsys, file: str, damage: str) -> None:
    victim = run_dir / "checkpoints" / "step-00000002" / file
    if damage == "flipped":
        flip_a_byte(victim)
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        victim.unlink()
    assert load(run_dir, world) == (1, 1.0)
    assert "step-00000002" in capsys.readouterr().out
    assert (run_dir / "checkpoints" / "step-00000002.damaged").is_dir()
    save(run_dir, 2, world)  # its place is free again
    assert load(run_dir, world) == (2, 2.0)


def test_an_empty_manifest_is_damage(run_dir: Path, world: World) -> None:
    (run_dir / "checkpoints" / "step-00000002" / "SHA256SUMS").write_text("")
    assert load(run_dir, world) == (1, 1.0)


def test_all_damaged_is_an_error_now_and_later(run_dir: Path, world: World) -> None:
    for path in checkpoint.complete_steps(run_dir):
        flip_a_byte(path / "__0_0.distcp")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .*--fresh"):
            checkpoint.newest(run_dir, world)


def test_an_unfinished_save_is_no_checkpoint(run_dir: Path, world: World) -> None:
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / ".tmp-step-00000003")
    shutil.copytree(folder / "step-00000002", folder / "step-00000004")
    (folder / "step-00000004" / "SHA256SUMS").unlink()
    assert load(run_dir, world) == (2, 2.0)
    save(run_dir, 5, world)
    assert not list(folder.glob(".tmp-*"))


def test_a_save_that_fails_leaves_the_others(run_dir: Path, world: World) -> None:
    broken = {"generator": {"network": {"weight": torch.zeros(7, device="meta")}}}  # cannot be written
    with pytest.raises(CheckpointError, match=r"cannot save .*step-00000003: .*\. The checkpoints before it are intact"):
        checkpoint.save(run_dir, 3, broken, {"step": 3}, world)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert load(run_dir, world) == (2, 2.0)


def test_tensors_that_do_not_fit_are_refused(run_dir: Path, world: World) -> None:
    path = checkpoint.newest(run_dir, world)
    for tensors in ({"generator": {"network": {"weight": torch.zeros(7)}}}, {"discriminator": torch.zeros(7)}):
        with pytest.raises(CheckpointError, match="does not fit this configuration"):
            checkpoint.load(path, tensors, world)


def test_meta_is_json(run_dir: Path) -> None:
    assert json.loads((run_dir / "checkpoints" / "step-00000002" / "meta.json").read_text()) == {"step": 2}
