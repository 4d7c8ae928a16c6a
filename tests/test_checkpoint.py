"""Checkpoints: whole or not at all, verified, pruned; a damaged one is set aside, another run's is refused."""

import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import gandist
from gandist import checkpoint
from gandist.checkpoint import retention, saving
from gandist.checkpoint.__main__ import main as command
from gandist.checkpoint.tensors import assign, flatten
from gandist.config import CheckpointConfig, Config, DataConfig, ModelConfig
from gandist.config_file import load_config
from gandist.distributed import World, join_world
from gandist.errors import CheckpointError, ConfigError, DataError, GandistError
from gandist.models import build_generator
from gandist.train import train
from gandist.trainer import Trainer
from tests.ranks import launch, run_ranks, start_ranks
from tests.small_disk import mount_small_disk
from tests.test_promises import final_state

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


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "index.json", "meta.json"])
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
        flip_a_byte(path / "rank-00000.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .*--fresh"):
            checkpoint.newest(run_dir, world)


def test_an_unfinished_save_is_no_checkpoint(run_dir: Path, world: World) -> None:
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / ".tmp-step-00000003")
    assert load(run_dir, world) == (2, 2.0)
    save(run_dir, 5, world)
    assert not list(folder.glob(".tmp-*"))


def test_a_checkpoint_without_sums_is_named_and_set_aside(run_dir: Path, world: World, capsys) -> None:
    for step, left in ((2, (1, 1.0)), (1, None)):
        path = run_dir / "checkpoints" / f"step-{step:08d}"
        (path / "SHA256SUMS").unlink()
        if left:
            assert load(run_dir, world) == left
        else:
            with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
                checkpoint.newest(run_dir, world)
        assert f"warning: {path} is not whole: no SHA256SUMS; set aside as {path.name}.damaged" in capsys.readouterr().out


def test_what_cannot_be_read_is_not_damaged(run_dir: Path, world: World) -> None:
    """As where permissions are wrong, or a network's disk does not answer."""
    sums = run_dir / "checkpoints" / "step-00000002" / "SHA256SUMS"
    kept = sums.rename(sums.with_name("kept"))
    sums.symlink_to(sums)
    with pytest.raises(GandistError, match=f"{re.escape(str(sums))}: Too many levels of symbolic links"):
        checkpoint.newest(run_dir, world)
    sums.unlink()
    kept.rename(sums)
    assert load(run_dir, world) == (2, 2.0)


def test_a_sum_may_name_files_of_the_checkpoint_only(run_dir: Path, world: World) -> None:
    for name in ("/dev/zero", "../step-00000001/meta.json", "zero"):
        path = run_dir / "checkpoints" / "step-00000002"
        (path / "zero").unlink(missing_ok=True)
        (path / "zero").symlink_to("/dev/zero")
        sums = (path / "SHA256SUMS").read_text()
        (path / "SHA256SUMS").write_text(f"{sums}{'0' * 64}  {name}\n")
        assert checkpoint.verify(path, world) == f"{path} is not whole: no {name}"
        (path / "SHA256SUMS").write_text(sums)


def _save_again_and_die(run_dir: Path, count: int) -> None:
    """Saves step 2 again, and is killed before the count-th change of a name."""
    changes = iter(range(count))

    def die(event: str, arguments: tuple) -> None:
        if event in ("os.rename", "shutil.rmtree") and next(changes, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    with join_world() as world:
        sys.addaudithook(die)
        save(run_dir, 2, world)
    os._exit(0)


def test_saving_a_step_again_never_leaves_a_moment_without_it(tmp_path: Path, world: World) -> None:
    for count in range(9):
        run_dir = tmp_path / str(count)
        save(run_dir, 2, world)
        (rank,) = start_ranks(1, lambda rank, arguments=(run_dir, count): (_save_again_and_die, *arguments))
        rank.join(60)
        assert load(run_dir, world) == (2, 2.0), f"killed before change {count}"
        if rank.exitcode == 0:
            break
    assert count > 2


def test_a_save_that_fails_leaves_the_others(run_dir: Path, world: World) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, most[1]))  # bytes of a file
    try:
        with pytest.raises(CheckpointError, match=r"step-00000003: .*rank-00000.*File too large.*before it are intact"):
            save(run_dir, 3, world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert load(run_dir, world) == (2, 2.0)


def test_tensors_that_do_not_fit_are_refused(run_dir: Path, world: World) -> None:
    path = checkpoint.newest(run_dir, world)
    for tensors in ({"generator": {"network": {"weight": torch.zeros(7)}}}, {"discriminator": torch.zeros(7)}):
        with pytest.raises(CheckpointError, match="does not fit this configuration"):
            checkpoint.load(path, tensors, world)


def test_meta_is_json(run_dir: Path) -> None:
    assert json.loads((run_dir / "checkpoints" / "step-00000002" / "meta.json").read_text()) == {"step": 2}


# ---------------------------------------------------------------------------------------------------------- two ranks


def test_ranks_share_the_tensors() -> None:
    tensors = flatten({"a": {str(size): torch.zeros(size) for size in (5000, 3000, 2000, 10)}, "b": {"one": torch.zeros(())}})
    for size in (1, 2, 3, 8):
        writers = assign(tensors, size)
        assert writers.keys() == tensors.keys()
        assert {*writers.values()} <= {*range(size)}
    writers = assign(tensors, 2)
    shares = [sum(tensors[path].nbytes for path, writer in writers.items() if writer == rank) for rank in range(2)]
    assert max(shares) < 1.1 * min(shares)


def few(value: float) -> dict:
    return {"a": {"weight": torch.full((5000,), value), "bias": torch.full((10,), value)}, "b": {"one": torch.tensor(value)}}


def _save_few(run_dir: Path) -> None:
    with join_world() as world:
        for step in (1, 2):
            checkpoint.save(run_dir, step, few(step), {"step": step}, world)


def _load_few(run_dir: Path) -> tuple[str, list[float], str]:
    """The newest checkpoint, what is in it, and what was said."""
    with join_world() as world, redirect_stdout(StringIO()) as said:
        path = checkpoint.newest(run_dir, world)
        tensors = few(0.0)
        checkpoint.load(path, tensors, world, entire=True)
        values = {value for tensor in flatten(tensors).values() for value in tensor.flatten().tolist()}
        return path.name, sorted(values), said.getvalue()


def test_a_missing_rank_file_is_found(tmp_path: Path) -> None:
    """Saved by four ranks, of which one has nothing to write, and loaded by others."""
    run_ranks(4, _save_few, tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000002"
    assert run_ranks(3, _load_few, tmp_path) == [("step-00000002", [2.0], "")] * 3
    (newest / "rank-00001.safetensors").unlink()
    said = f"warning: {newest} is not whole: no rank-00001.safetensors; set aside as step-00000002.damaged\n"
    assert run_ranks(2, _load_few, tmp_path) == [("step-00000001", [1.0], said), ("step-00000001", [1.0], "")]


def _save_apart(run_dir: Path) -> str:
    with join_world() as world:
        try:
            checkpoint.save(run_dir / f"node-{world.rank}", 1, few(1), {"step": 1}, world)
        except CheckpointError as error:
            return str(error)


def test_nodes_that_share_no_disk_are_found_before_anything_counts_as_saved(tmp_path: Path) -> None:
    for message in run_ranks(2, _save_apart, tmp_path):
        assert re.search(r"/node-1/.* is not there on rank 1: all nodes must share run_dir", message)
    assert not list(tmp_path.glob("*/checkpoints/step-*"))


# ----------------------------------------------------------------------------------------------------------- unpickled


class Trap:
    """Touches a file where it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.file,)


def resum(path: Path) -> None:
    """Makes SHA256SUMS fit whatever the files are now."""
    names = sorted(file.name for file in path.iterdir() if file.name != "SHA256SUMS")
    (path / "SHA256SUMS").write_text("".join(f"{checkpoint.folder.sha256(path / name)}  {name}\n" for name in names))


@pytest.mark.parametrize("file", ["index.json", "rank-00000.safetensors", "meta.json", ".metadata"])
def test_nothing_of_a_checkpoint_is_unpickled(copied: Path, world: World, tmp_path: Path, file: str) -> None:
    """Also where whoever wrote it wrote the checksums as well; .metadata is what older versions unpickled."""
    for path in checkpoint.complete_steps(copied):
        (path / file).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
        if file == ".metadata":
            (path / "index.json").unlink()
        resum(path)
    path = copied / "checkpoints" / "step-00000006"
    attempts = [
        lambda: command(["consolidate", "--all", str(copied)]),
        lambda: command(["verify", str(copied)]),
        lambda: command(["ls", str(copied)]),
        lambda: gandist.load(copied),
        lambda: checkpoint.load(path, state(0.0), world),
        lambda: checkpoint.newest(copied, world),
    ]
    for attempt in attempts:
        with suppress(GandistError, SystemExit, ValueError, FileNotFoundError):
            attempt()
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists(), "the trap works"
    if file == ".metadata":
        assert path.is_dir(), "not set aside as damaged"
        with pytest.raises(CheckpointError, match="saved by an older version of gandist"):
            checkpoint.newest(copied, world)


# ----------------------------------------------------------------------------------------------------------- retention


def test_the_best_by_a_measure_is_kept(tmp_path: Path, world: World) -> None:
    """Values are remembered by the checkpoints themselves, not by the process."""
    lowest = CheckpointConfig(keep=2, best="eval/fd_classifier")
    for step, value in enumerate([0.5, 0.2, math.nan, 0.2, 0.9, 0.4], start=1):
        save(tmp_path, step, world, lowest, metrics={"eval/fd_classifier": value, "eval/gan_test": value})
    assert steps(tmp_path) == [2, 5, 6], "the first of equals"
    save(tmp_path, 7, world, lowest)
    assert steps(tmp_path) == [2, 6, 7], "measured is not every one"
    save(tmp_path, 8, world, lowest, metrics={"eval/fd_classifier": 0.1})
    assert steps(tmp_path) == [7, 8]
    save(tmp_path, 9, world, lowest)
    (tmp_path / "checkpoints" / "step-00000009" / "meta.json").write_text("junk")
    save(tmp_path, 10, world, lowest)
    assert steps(tmp_path) == [8, 9, 10]

    highest = CheckpointConfig(keep=2, best="eval/gan_test")
    for step, value in enumerate([0.5, 0.9, math.nan, 0.9, 0.7, 0.8], start=1):
        save(tmp_path / "other", step, world, highest, metrics={"eval/gan_test": value})
    assert steps(tmp_path / "other") == [2, 5, 6]


def test_every_so_many_kimg_are_kept(tmp_path: Path, world: World) -> None:
    """The first at or after each multiple, which need not be one itself."""
    config = CheckpointConfig(keep=2, keep_every_kimg=0.1)
    for step in range(1, 16):
        save(tmp_path, step, world, config, images=step * 32)
    assert steps(tmp_path) == [4, 7, 10, 13, 14, 15]  # 128, 224, 320 and 416 images


def test_what_cannot_be_removed_is_a_warning(run_dir: Path, world: World, capsys) -> None:
    def fail(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with patch.object(retention.shutil, "rmtree", fail):
        save(run_dir, 3, world)
        save(run_dir, 4, world)
    assert "step-00000001 cannot be removed: Device or resource busy" in capsys.readouterr().out
    assert steps(run_dir) == [3, 4]
    save(run_dir, 5, world)
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]


# ------------------------------------------------------------------------------------------------------ in a whole run

BATCH_SIZE = 16
TINY = [
    f"train.batch_size={BATCH_SIZE}",
    "train.precision=float64",
    "model.generator_width=4",
    "model.discriminator_width=4",
    "evaluation.metrics=[]",
    "tracking.wandb=off",
    f"tracking.every_kimg={BATCH_SIZE / 1000}",
    f"checkpoint.every_kimg={2 * BATCH_SIZE / 1000}",
    f"train.kimg={6 * BATCH_SIZE / 1000}",
]


def configure(run_dir: Path, cache_dir: Path, *overrides: str) -> Config:
    """Six steps, and a checkpoint every other one."""
    return load_config(None, [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", *TINY, *overrides])


def kimg(steps: int) -> str:
    return f"train.kimg={steps * BATCH_SIZE / 1000}"


def _train(config: Config, world: World, accepted: tuple[str, ...] = ()) -> str | None:
    """What went wrong, if anything."""
    try:
        train(config, world, accepted=accepted)
    except GandistError as error:
        return str(error) if error.on_every_rank else f"one rank's: {error}"


def _train_each(configs: list[Config]) -> None:
    with join_world() as world:
        for config in configs:
            train(config, world)


def tensors_of(path: Path, target: Path) -> dict[str, torch.Tensor]:
    return final_state(Path(shutil.copytree(path, target / "checkpoints" / path.name)).parent.parent)


class Events(list):
    """What a rank does, in order: steps of training, and checkpoints from the beginning of their writing to its end.

    at_third: called after the third step
    """

    def __init__(self, at_third: Callable[[], None] = lambda: None):
        self.at_third = at_third

    def __enter__(self) -> "Events":
        step, write = Trainer.train_step, saving._write_tensors

        def train_step(trainer: Trainer, batches: Iterator) -> None:
            step(trainer, batches)
            self.append(("step", trainer.step))
            if trainer.step == 3:
                self.at_third()

        def write_slowly(file: Path, *arguments: Any) -> None:
            number = int(file.parent.name.split("-")[2])
            self.append(("begin", number))
            deadline = time.monotonic() + 1
            while ("step", number + 2) not in self and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.1)  # the next one is due
            write(file, *arguments)
            self.append(("end", number))

        self.patches = patch.object(Trainer, "train_step", train_step), patch.object(saving, "_write_tensors", write_slowly)
        for each in self.patches:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.patches:
            each.stop()


def _train_in_background(foreground: Config, background: Config) -> list[tuple[str, int]]:
    with join_world() as world:
        train(foreground, world)
        with Events() as events:
            train(background, world)
    return list(events)


def test_in_the_background_it_is_the_state_of_its_step(tmp_path: Path, cache_dir: Path) -> None:
    """Training goes on while one is written; never are two; the last is complete when training returns."""
    runs = {name: tmp_path / name for name in ("false", "true")}
    configs = [
        configure(path, cache_dir, f"checkpoint.asynchronous={name}", "checkpoint.keep=9") for name, path in runs.items()
    ]
    for events in run_ranks(2, _train_in_background, *configs):
        order = {event: place for place, event in enumerate(events)}
        assert order["begin", 2] < order["step", 3] < order["end", 2] < order["begin", 4]
        assert order["begin", 4] < order["step", 5] < order["end", 4] < order["begin", 6] < order["end", 6]
    for saved in zip(*(checkpoint.complete_steps(run_dir) for run_dir in runs.values()), strict=True):
        plain, background = (tensors_of(path, tmp_path / "compared" / path.parts[-3] / path.name) for path in saved)
        assert plain.keys() == background.keys()
        assert all(torch.equal(tensor, background[name]) for name, tensor in plain.items()), saved
    assert steps(runs["true"]) == [2, 4, 6]


def _interrupt(configs: list[Config]) -> list[list[tuple[str, int]]]:
    """A signal to one rank; an error of all."""

    def signal_one() -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    def fail() -> None:
        raise DataError("a shard is gone", on_every_rank=True)

    collected = []
    with join_world() as world:
        for config, interruption in zip(configs, (signal_one, fail), strict=True):
            with Events(interruption) as events:
                error = _train(config, world)
            assert error == ("a shard is gone" if interruption is fail else None)
            collected.append(list(events))
    return collected


def test_a_run_that_ends_early_completes_what_is_being_written(tmp_path: Path, cache_dir: Path) -> None:
    configs = [configure(tmp_path / name, cache_dir, "checkpoint.asynchronous=true", kimg(50)) for name in ("stop", "error")]
    for stopped, failed in run_ranks(2, _interrupt, configs):
        last = max(number for kind, number in stopped if kind == "step")
        assert last < 10
        assert stopped[-1] == ("end", last)
        assert steps(tmp_path / "stop")[-1] == last
        assert failed[-1] == ("end", 2)
    assert steps(tmp_path / "error") == [2]
    assert not list(tmp_path.glob("*/checkpoints/.tmp-*"))


def _fail_at(number: int, configs: list[Config]) -> list[str | None]:
    """The second rank cannot read what it wrote at that step."""
    digest = saving.sha256

    def fail(path: Path) -> str:
        if f"step-{number:08d}" in str(path) and os.environ["RANK"] == "1":
            raise OSError(5, "Input/output error", str(path))
        return digest(path)

    with join_world() as world, patch.object(saving, "sha256", fail):
        return [_train(config, world) for config in configs]


@pytest.mark.parametrize("number", [4, 6])
def test_an_error_of_one_rank_is_everyones(tmp_path: Path, cache_dir: Path, number: int) -> None:
    """In the middle of a run, and at its end, where it is an error whatever was asked for."""
    cases = [(background, then) for background in ("false", "true") for then in ("stop", "continue")]
    folders = [tmp_path / "-".join(case) for case in cases]
    overrides = [(f"checkpoint.asynchronous={background}", f"checkpoint.on_error={then}") for background, then in cases]
    configs = [configure(folder, cache_dir, *each) for folder, each in zip(folders, overrides, strict=True)]
    ranks = run_ranks(2, _fail_at, number, configs)
    assert ranks[0] == ranks[1]
    for (_, then), folder, error in zip(cases, folders, ranks[0], strict=True):
        assert not list((folder / "checkpoints").glob(".tmp-*"))
        if then == "continue" and number == 4:
            assert error is None
            assert steps(folder) == [2, 6]
        else:
            assert f"cannot save {folder / 'checkpoints' / f'step-{number:08d}'}: " in error
            assert "rank-00001.safetensors: Input/output error. The checkpoints before it are intact" in error
            assert steps(folder) == ([2] if number == 4 else [2, 4])


def _with_a_full_disk(run_dir: Path, disk: Path, configs: dict[str, Config]) -> dict[str, Any]:
    disk.mkdir(parents=True)
    mount_small_disk(disk, 3_000_000)
    filler = disk / "filler"
    seen: dict[str, Any] = {}

    def fill(but: int) -> None:
        with filler.open("ab") as file:
            file.write(bytes(shutil.disk_usage(disk).free - but))

    def save_while_another_fills(*arguments: Any, really: Callable = saving.save_file) -> None:
        fill(but=100_000)
        really(*arguments)

    def train_and_clear(trainer: Trainer, batches: Iterator, really: Callable = Trainer.train_step) -> None:
        really(trainer, batches)
        if trainer.step == 5:
            filler.unlink()

    with join_world() as world:
        large = {"weight": torch.ones(200_000)}
        checkpoint.save(run_dir, 1, large, {"step": 1}, world)
        with patch.object(saving, "save_file", save_while_another_fills), pytest.raises(CheckpointError) as full:
            checkpoint.save(run_dir, 2, large, {"step": 2}, world)
        with pytest.raises(CheckpointError) as known:
            checkpoint.save(run_dir, 2, large, {"step": 2}, world)
        seen["errors"] = str(full.value), str(known.value)
        seen["left"] = sorted(path.name for path in disk.iterdir())
        checkpoint.load(checkpoint.newest(run_dir, world), large, world)
        shutil.rmtree(disk / "step-00000001")
        for name, config in configs.items():
            fill(but=20_000)
            with patch.object(Trainer, "train_step", train_and_clear):
                seen[name] = _train(config, world), steps(run_dir)
    return seen


def test_a_full_disk(tmp_path: Path, cache_dir: Path) -> None:
    """Found before anything is written; found in the midst of it; and a run that goes on until there is room again."""
    run_dir = tmp_path / "r"
    configs = {then: configure(run_dir, cache_dir, f"checkpoint.on_error={then}") for then in ("stop", "continue")}
    disk = run_dir / "checkpoints"
    (seen,) = run_ranks(1, _with_a_full_disk, run_dir, disk, configs)
    midst, before = seen["errors"]
    for error in (midst, before):
        assert error.startswith(f"cannot save {disk / 'step-00000002'}: ")
        assert f"MB more are needed in {disk}, " in error
        assert "MB are free: make room there, lower checkpoint.keep" in error
    assert "0.8 MB more are needed" in before
    assert "0.1 MB are free" in before
    assert seen["left"] == ["filler", "step-00000001"]
    stopped, left = seen["stop"]
    assert f"cannot save {disk / 'step-00000002'}: " in stopped
    assert left == []
    assert seen["continue"] == (None, [6])


def _train_with_values(config: Config, resumed: Config, values: dict[int, float]) -> list[list[int]]:
    from gandist.evaluation.evaluator import Evaluation, Evaluator, Record

    def evaluate(evaluator: Evaluator, *_: Any, step: int, kimg: float, **options: Any) -> Evaluation:
        return Evaluation([Record("classification/test_top1", values[step], step, kimg, 0, "test", 1)], None)

    kept = []
    with join_world() as world, patch.object(Evaluator, "__call__", evaluate):
        for each in (config, resumed):
            train(each, world)
            kept.append(steps(each.run_dir))
    return kept


def test_the_best_survives_a_resume(tmp_path: Path, cache_dir: Path) -> None:
    """With checkpoint.best each evaluation is saved, whatever the interval of checkpoints."""
    often, seldom = f"evaluation.every_kimg={2 * BATCH_SIZE / 1000}", "checkpoint.every_kimg=1000"
    measured = ["evaluation.metrics=[accuracy]", "checkpoint.best=classification/test_top1", often, seldom]
    configs = [configure(tmp_path, cache_dir, *measured, kimg(steps)) for steps in (6, 12)]
    values = {2: 0.5, 4: 0.7, 6: 0.6, 8: 0.65, 10: 0.1, 12: 0.2}
    assert run_ranks(1, _train_with_values, *configs, values) == [[[4, 6], [4, 10, 12]]]
    with pytest.raises(ConfigError, match=r"best=eval/gan_test is not measured: add gan_test to evaluation\.metrics"):
        configure(tmp_path, cache_dir, "checkpoint.best=eval/gan_test")


def _record_images(configs: list[Config]) -> list[list[bytes]]:
    """The images this rank trains on, each update a list."""
    seen = []

    def next_real(trainer: Trainer, batches: Iterator, update: int, really: Callable = Trainer._next_real) -> tuple:
        images, labels = really(trainer, batches, update)
        seen.append([image.numpy().tobytes() for image in images])
        return images, labels

    with patch.object(Trainer, "_next_real", next_real):
        _train_each(configs)
    return seen


def in_order(ranks: list[list[list[bytes]]]) -> list[bytes]:
    """By position in the data: place i of a global batch is rank i modulo the number of ranks."""
    return [image for batch in zip(*ranks, strict=True) for places in zip(*batch, strict=True) for image in places]


def test_another_batch_size_goes_on_at_the_next_image(tmp_path: Path, cache_dir: Path) -> None:
    """Over the end of an epoch of 1,437 images: the same images in the same order, and the same intervals."""
    intervals = ["train.precision=float32", "tracking.every_kimg=0.192", "checkpoint.every_kimg=0.384"]
    straight = configure(tmp_path / "straight", cache_dir, *intervals, "train.kimg=1.536", "train.batch_size=48")
    changing = [
        configure(tmp_path / "changing", cache_dir, *intervals, f"train.batch_size={size}", f"train.kimg={until}")
        for size, until in ((32, 0.768), (96, 1.152), (48, 1.536))
    ]
    expected, images = (in_order(run_ranks(2, _record_images, configs)) for configs in ([straight], changing))
    assert len(set(expected[:1437])) == 1437
    assert images == expected
    rows = [json.loads(row) for row in (tmp_path / "changing" / "metrics.jsonl").read_text().splitlines()]
    assert [row["kimg"] for row in rows] == pytest.approx([0.192 * n for n in range(1, 9)])
    assert [row["step"] for row in rows] == [6, 12, 18, 24, 26, 28, 32, 36]
    assert steps(tmp_path / "changing") == [28, 36]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir: Path) -> Path:
    """A run by two ranks, with checkpoints of steps 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(2, _train_each, [configure(run_dir, cache_dir, "checkpoint.keep=3")])
    return run_dir


def _resume_each(cases: list[tuple[Config, tuple[str, ...]]]) -> list[str | None]:
    with join_world() as world:
        return [_train(config, world, accepted) for config, accepted in cases]


def test_another_run_is_resumed_only_if_asked_by_name(trained: Path, tmp_path: Path, cache_dir: Path) -> None:
    part = f"data.train={cache_dir / 'digits-16' / 'digits-train-00.tar'}"
    other_data = [part, "data.test=null"]
    asked = [
        (["seed=1"], (), r"of another run:\n  seed: 0 there, 1 now\n.*all the same with --accept seed$"),
        (["seed=1"], ("seed",), None),
        (["seed=1"], ("sead",), r"--accept: there is no 'sead' to accept; there are data_fingerprint, seed, model, data,"),
        (other_data, ("seed",), r"  data_fingerprint\.\w+: .*--accept data_fingerprint\.\w+"),
        (other_data, ("data_fingerprint",), None),
        (["model.latent_dim=32"], ("seed",), r"  model\.latent_dim: 64 there, 32 now\n"),
        (["model.latent_dim=32"], ("model.latent_dim",), r"step-00000006 does not fit this configuration: .*ize"),
        (["model.conditioning=auxiliary"], ("model",), r"does not fit this configuration: it has .*, and this .* has not"),
        (["train.precision=float32", "optimizer.generator_lr=1e-4", "loss.r1_gamma=1"], (), None),
    ]
    cases = []
    for number, (overrides, accepted, _) in enumerate(asked):
        run_dir = Path(shutil.copytree(trained, tmp_path / str(number)))
        cases.append((configure(run_dir, cache_dir, *overrides, kimg(8)), accepted))
    (errors,) = run_ranks(1, _resume_each, cases)
    for (config, _), (*_, message), error in zip(cases, asked, errors, strict=True):
        if message is None:
            assert error is None
            assert steps(config.run_dir)[-1] == 8
        else:
            assert re.search(message, error, re.DOTALL), error
            assert steps(config.run_dir) == [2, 4, 6]


def test_a_checkpoint_that_lacks_what_this_version_needs_is_one_error(trained: Path, tmp_path: Path, cache_dir: Path) -> None:
    cases = []
    for key in ("skipped", "evaluation_pending", "data_fingerprint", "config"):
        run_dir = Path(shutil.copytree(trained, tmp_path / key))
        path = run_dir / "checkpoints" / "step-00000006"
        meta = json.loads((path / "meta.json").read_text())
        del meta[key]
        (path / "meta.json").write_text(json.dumps(meta))
        resum(path)
        cases.append((configure(run_dir, cache_dir, kimg(8)), ()))
    (errors,) = run_ranks(1, _resume_each, cases)
    for (config, _), error in zip(cases, errors, strict=True):
        assert error.endswith(f"step-00000006 was saved by another version of gandist (KeyError: '{config.run_dir.name}')")


def test_a_key_newer_than_the_checkpoint_had_its_default(tmp_path: Path, world: World) -> None:
    meta = {"config": Config().model_dump(mode="json"), "data_fingerprint": {}}
    for key in ("attention", "group_size"):
        del meta["config"]["model"][key]
    for key in ("labelled", "labelled_seed"):
        del meta["config"]["data"][key]
    checkpoint.refuse_other_run(tmp_path, meta, Config(), {}, world)
    other = Config(model=ModelConfig(family="resnet", attention=(16,)))
    with pytest.raises(CheckpointError, match=r"model\.attention: \[\] there, \[16\] now"):
        checkpoint.refuse_other_run(tmp_path, meta, other, {}, world, ("model.family",))
    fewer = Config(data=DataConfig(labelled=0.1, labelled_seed=1))
    with pytest.raises(CheckpointError, match=r"data\.labelled: 1\.0 there, 0\.1 now\n  data\.labelled_seed: 0 there, 1 now"):
        checkpoint.refuse_other_run(tmp_path, meta, fewer, {}, world)


def test_what_is_accepted_is_said(trained: Path, tmp_path: Path, cache_dir: Path) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "run")
    options = [f"run_dir={run_dir}", f"data.cache_dir={cache_dir}", *TINY, kimg(8), "seed=1", "data.lanes=2"]
    result = launch(2, "gandist.train", "--accept", "seed,data", *options)
    assert result.returncode == 0, result.stderr
    assert "accepted: seed: 0 there, 1 now\naccepted: data.lanes: 1 there, 2 now\n" in result.stdout


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_has_an_exit_status_and_one_error(tmp_path: Path) -> None:
    result = launch(1, "gandist.checkpoint.__main__", "ls", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == f"error: there are no checkpoints in {tmp_path / 'checkpoints'}: name the folder of a run\n"
    assert result.stdout == ""


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_ls_and_verify(copied: Path, capsys) -> None:
    command(["ls", str(copied)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["checkpoint", "kimg", "ranks", "engine", "size", "kept", "as", "state"]
    assert re.fullmatch(r"step-00000004 +0\.064 +2 +ddp +\d\.\d MB +newest +complete", lines[2])
    command(["verify", str(copied)])
    assert capsys.readouterr().out.count(": whole, ") == 3
    folder = copied / "checkpoints"
    flip_a_byte(folder / "step-00000004" / "rank-00001.safetensors")
    (folder / "step-00000006" / "SHA256SUMS").unlink()
    (folder / "step-00000001.damaged").mkdir()
    with pytest.raises(SystemExit) as failure:
        command(["verify", str(copied)])
    assert failure.value.code == 1
    captured = capsys.readouterr()
    assert f"step-00000004: DAMAGED: {folder / 'step-00000004' / 'rank-00001.safetensors'} does not match" in captured.out
    assert f"step-00000006: DAMAGED: {folder / 'step-00000006'} is not whole: no SHA256SUMS" in captured.out
    assert captured.out.count(": whole, ") == 1
    assert captured.err.startswith("2 damaged")
    command(["ls", str(copied)])
    out = capsys.readouterr().out
    assert "is not whole: no SHA256SUMS" in out
    assert "step-00000001.damaged: was damaged and set aside" in out
    with pytest.raises(CheckpointError, match="there are no checkpoints in"):
        command(["verify", str(folder)])


def test_prune(copied: Path, capsys) -> None:
    command(["prune", str(copied)])
    assert capsys.readouterr().out == "nothing to remove\n"
    command(["prune", str(copied), "--keep", "1", "--dry-run"])
    assert re.match(r"would remove step-00000002, \d\.\d MB\nwould remove step-00000004, ", capsys.readouterr().out)
    assert steps(copied) == [2, 4, 6]
    newest = copied / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    flip_a_byte(newest)
    with pytest.raises(CheckpointError, match=r"nothing is removed, as the newest checkpoint is damaged: .*rank-00000"):
        command(["prune", str(copied), "--keep", "1"])
    flip_a_byte(newest)
    kept = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml is empty: start the run again"):
        command(["prune", str(copied)])
    (copied / "config.yaml").write_text(kept)
    command(["prune", str(copied), "--keep", "1"])
    assert "kept: step-00000006 (newest)" in capsys.readouterr().out
    assert steps(copied) == [6]


def test_consolidate(copied: Path, tmp_path: Path) -> None:
    command(["consolidate", str(copied)])
    file = copied / "generator-step-00000006.pt"
    described = json.loads(file.with_suffix(".json").read_text())
    weights = torch.load(file, weights_only=True)
    config = Config.model_validate(described["config"])
    build_generator(config.model, config.data).load_state_dict(weights)
    expected = final_state(copied)
    assert all(torch.equal(tensor, expected[f"generator_ema/{name}"]) for name, tensor in weights.items())
    assert described["step"] == 6
    assert described["sha256"] == checkpoint.folder.sha256(file)

    other = tmp_path / "all.pt"
    command(["consolidate", str(copied), "--step", "4", "--all", "--output", str(other)])
    whole = torch.load(other, weights_only=True)
    assert {"generator", "discriminator", "generator_ema"} == whole.keys()
    assert whole["discriminator"]["optimizer"]
    with pytest.raises(CheckpointError, match=r"there is no .*step-00000005; there are step-00000002, "):
        command(["consolidate", str(copied), "--step", "5"])
    flip_a_byte(copied / "checkpoints" / "step-00000006" / "rank-00000.safetensors")
    with pytest.raises(
        CheckpointError, match=r"rank-00000\.safetensors does not match SHA256SUMS: choose another one with --step"
    ):
        command(["consolidate", str(copied)])
