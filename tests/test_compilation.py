"""What users see of compilation, and the time that it is given."""

import io
import sysconfig
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from gandist.config import TrainConfig
from gandist.config_file import load_config
from gandist.distributed import World, join_world
from gandist.engine import Compilations, choose_compile
from gandist.errors import ConfigError
from gandist.trainer import Trainer
from gandist.watchdog import Watchdog
from tests.ranks import run_ranks

TIMEOUT = 2.0  # s, of an exchange


def one_rank_compiles_for_long() -> tuple[str, str]:
    """What is printed of a compilation in which rank 1 is late, and what happens when it is late afterwards."""
    with join_world(TIMEOUT / 60) as world:
        compilations = Compilations(world, Watchdog(TIMEOUT))
        printed = io.StringIO()
        with redirect_stdout(printed):
            for late in (2.5 * TIMEOUT, 0):
                with compilations.of("generator's update"):
                    time.sleep(late * world.rank)
                    dist.all_reduce(torch.ones(()))
                    world.gather(None)
        try:
            time.sleep(2.5 * TIMEOUT * world.rank)
            world.gather(None)
        except RuntimeError as error:
            return printed.getvalue(), str(error)
        return printed.getvalue(), ""


def test_other_ranks_wait_for_one_that_compiles_but_not_later() -> None:
    (printed, error), (nothing, _) = run_ranks(2, one_rank_compiles_for_long)
    assert printed.splitlines() == ["compiling the generator's update …", "compiled the generator's update in 5 s"]
    assert nothing == ""
    assert "Timed out waiting" in error


@pytest.mark.parametrize("compiled", [True, False])
def test_each_kind_of_update_is_announced_once(tmp_path: Path, cache_dir: Path, world, compiled: bool) -> None:
    overrides = [f"run_dir={tmp_path}", f"data.cache_dir={cache_dir}", "evaluation.metrics=[]"]
    lazy = ["loss.r1_gamma=1", "loss.penalty_every=2", f"train.compile={compiled}"]
    with patch("gandist.trainer.compile_player"), patch("torch.compile", lambda function: function):
        trainer = Trainer(load_config(None, [*overrides, *lazy]), world)
    batches = trainer.train_set.training_batches(seed=0, batch_size=64, start=0)
    printed = io.StringIO()
    with redirect_stdout(printed):
        for _ in range(4):
            trainer.train_step(batches)
    announced = [line for line in printed.getvalue().splitlines() if line.startswith("compiling")]
    expected = ["discriminator's penalized update", "generator's update", "discriminator's update"]
    assert announced == [f"compiling the {update} …" for update in expected if compiled]


@pytest.fixture
def gpu_world(world: World) -> World:
    return replace(world, device=torch.device("cuda", 0))


@pytest.fixture
def bare_node(monkeypatch, tmp_path: Path):
    """A node with a compiler, with Python.h, or without, as the test says."""

    def has(*names: str) -> None:
        for variable in ("CC", "CXX", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
            monkeypatch.delenv(variable, raising=False)
        for name in names:
            (tmp_path / name).touch(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path))

    return has


@pytest.mark.parametrize(
    ("has", "problem"),
    [
        (["gcc"], "has no Python.h: install python3-dev"),
        (["Python.h"], "has no C compiler: install gcc"),
        ([], "has no C compiler and no Python.h: install gcc and python3-dev"),
    ],
)
def test_steps_are_eager_where_a_compiler_or_its_headers_are_missing(
    gpu_world: World, bare_node, capsys, has: list[str], problem: str
) -> None:
    bare_node(*has)
    assert not choose_compile(TrainConfig(), gpu_world)
    said = capsys.readouterr().out
    assert said.startswith("warning: steps are not compiled")
    assert said.endswith(f"{problem}\n")
    assert said.count("\n") == 1
    with pytest.raises(ConfigError, match=problem.replace(":", ", which torch.compile needs:")):
        choose_compile(TrainConfig(compile=True), gpu_world)


def test_steps_are_compiled_where_both_are_there(gpu_world: World, world: World, bare_node, capsys) -> None:
    bare_node("gcc", "Python.h")
    assert choose_compile(TrainConfig(), gpu_world)
    assert not choose_compile(TrainConfig(), world), "a CPU"
    assert not choose_compile(TrainConfig(compile=False), gpu_world)
    assert not choose_compile(TrainConfig(activation_checkpointing=True), gpu_world)
    with pytest.raises(ConfigError, match=r"has no C\+\+ compiler"):
        choose_compile(TrainConfig(compile=True), world)
    assert capsys.readouterr().out == ""


def choice_of_a_rank() -> tuple[bool, str]:
    """Where only rank 0's node can compile."""
    with join_world() as world, redirect_stdout(io.StringIO()) as printed:
        found = [] if world.rank == 0 else ["Python.h"]
        with (
            patch("gandist.engine.compilation.missing_to_compile", return_value=found),
            patch("socket.gethostname", return_value=f"node{world.rank}"),
        ):
            return choose_compile(TrainConfig(), replace(world, device=torch.device("cuda", 0))), printed.getvalue()


def test_all_ranks_agree() -> None:
    (first, said), second = run_ranks(2, choice_of_a_rank)
    assert not first
    assert "node1 has no Python.h: install python3-dev" in said
    assert second == (False, "")
