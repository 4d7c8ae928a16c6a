"""What users see of compilation, and the time that it is given."""

import io
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from gandist.config_file import load_config
from gandist.distributed import join_world
from gandist.engine import Compilations
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
    with patch("gandist.trainer.compile_objective"), patch("torch.compile", lambda function: function):
        trainer = Trainer(load_config(None, [*overrides, *lazy]), world)
    batches = trainer.train_set.training_batches(seed=0, batch_size=64, start=0)
    printed = io.StringIO()
    with redirect_stdout(printed):
        for _ in range(4):
            trainer.train_step(batches)
    announced = [line for line in printed.getvalue().splitlines() if line.startswith("compiling")]
    expected = ["discriminator's penalized update", "generator's update", "discriminator's update"]
    assert announced == [f"compiling the {update} …" for update in expected if compiled]
