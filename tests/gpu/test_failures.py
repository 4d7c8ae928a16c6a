"""What fails on GPUs is said in one line, and ends every rank."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gandist.distributed import join_world, run
from tests.gpu import needs_two
from tests.gpu.test_runs import options
from tests.ranks import end_ranks, launch, run_module, run_ranks, start_ranks

LOST = "error (rank 0): the connection to another rank was lost: it failed first, see its own message\n"
SILENT = "error (rank 0): another rank does not answer", "error (rank 0): no progress for"  # gloo is first, or the watchdog


@needs_two
@pytest.mark.parametrize(("name", "said"), [(signal.SIGKILL, (LOST,)), (signal.SIGSTOP, SILENT)], ids=["lost", "silent"])
def test_a_rank_that_is_gone_ends_the_others(tmp_path: Path, cache_dir: Path, name: signal.Signals, said: tuple) -> None:
    arguments = options(
        tmp_path / "run", cache_dir, 10_000, "train.compile=false", "evaluation.metrics=[]", "train.timeout_minutes=0.05"
    )
    first, second = start_ranks(2, lambda rank: (run_module, tmp_path / "out", tmp_path / "err", "gandist.train", arguments))
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(second.pid, name)
    first.join(60)
    assert first.exitcode == 1
    end_ranks([first, second])
    error = (tmp_path / "err").read_text()
    assert error.startswith(said)
    assert "Traceback" not in error


def lose_a_peer(errors: Path) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())

    def exchange() -> None:
        with join_world() as world:
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(1, device=world.device))
            torch.cuda.synchronize()

    run(exchange)


@needs_two
def test_a_rank_that_is_lost_in_an_exchange_of_nccl(tmp_path: Path) -> None:
    first, second = start_ranks(2, lambda rank: (lose_a_peer, tmp_path / "errors"))
    first.join(60)
    end_ranks([first, second])
    assert first.exitcode == 1
    assert (tmp_path / "errors").read_text() == LOST


def test_steps_are_eager_without_a_compiler(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    few = options(tmp_path / "run", cache_dir, 2, "evaluation.metrics=[]")
    result = launch(1, "gandist.train", *few)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("warning: steps are not compiled") == 1
    result = launch(1, "gandist.train", *few, "train.compile=true")
    assert result.returncode == 1
    assert result.stderr.startswith("error: train.compile=true: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("chosen", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}], ids=["default", "user's"])
def test_memory_segments_expand_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name in chosen:
        monkeypatch.setenv(name, chosen[name])
    assert run_ranks(1, segments_expand) == [not chosen]


def segments_expand() -> bool:
    with join_world() as world:
        torch.ones(1, device=world.device)
        return torch.cuda.memory_snapshot()[0]["is_expandable"]
