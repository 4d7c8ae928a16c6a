"""Runs functions and commands on real process groups."""

import importlib
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gandist.distributed import run

ROOT = Path(__file__).parent.parent

# The server has all that ranks import loaded and has computed nothing: forking them from it is quick and safe.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["gandist.train", "gandist.evaluate", "pytest", "torchmetrics", "tests.ranks"])


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """`function(*arguments)` in every rank of a gloo world, with the environment torchrun gives. Returns all results."""
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(rank) for rank in range(world_size)]
        ranks = start_ranks(world_size, lambda rank: (_rank, results[rank], function, arguments))
        for rank in ranks:
            rank.join(timeout)
        hanging = end_ranks(ranks)
        codes = [rank.exitcode for rank in ranks]
        assert not hanging, f"ranks hang after {timeout} s: {codes}"
        assert codes == [0] * world_size, f"exit codes {codes}"
        return [pickle.loads(result.read_bytes()) for result in results]


def run_and_kill(world_size: int, seconds: float, function: Callable[..., Any], *arguments: Any) -> None:
    """`function(*arguments)` in every rank, all of which are killed after so long."""
    ranks = start_ranks(world_size, lambda rank: (function, *arguments))
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    end_ranks(ranks)


def launch(world_size: int, module: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """As `torchrun`, which takes 10 s longer: the module's command in every rank; when one fails the others are ended."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(world_size)]
        ranks = start_ranks(world_size, lambda rank: (run_module, *outputs[rank], module, arguments))
        deadline = time.monotonic() + timeout
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            assert time.monotonic() < deadline or not end_ranks(ranks), f"ranks hang after {timeout} s"
            time.sleep(0.02)
        code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        end_ranks(ranks)
        out, err = ("".join(path.read_text() for path in each) for each in zip(*outputs, strict=True))
        return subprocess.CompletedProcess([module, *arguments], code, out, err)


def start_ranks(world_size: int, work: Callable[[int], tuple]) -> list[Any]:
    """A process for each rank, which runs `work(rank)`: a function and its arguments."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        for rank in range(world_size)
    ]
    ranks = [_context.Process(target=_in_rank, args=(os.environ | place, *work(rank))) for rank, place in enumerate(places)]
    for rank in ranks:
        rank.start()
    return ranks


def end_ranks(ranks: list[Any]) -> list[Any]:
    """Ends those that still run, and returns them."""
    hanging = [rank for rank in ranks if rank.is_alive()]
    for rank in hanging:
        rank.kill()
    for rank in hanging:
        rank.join()
    return hanging


def _in_rank(environment: dict[str, str], work: Callable[..., None], *arguments: Any) -> None:
    os.environ.clear()  # that of the server, which is older than what a test may have changed
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of decoding workers, as in a process that torchrun starts
    work(*arguments)


def _rank(result: Path, function: Callable[..., Any], arguments: tuple) -> None:
    result.write_bytes(pickle.dumps(function(*arguments)))


def run_module(out: Path, err: Path, module: str, arguments: tuple[str, ...]) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    run(partial(importlib.import_module(module).main, arguments))


def torchrun(world_size: int, module: str, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess:
    """The command users type."""
    command = ["torchrun", "--standalone", f"--nproc_per_node={world_size}", "-m", module, *arguments]
    return run_command(sys.executable, "-m", "torch.distributed.run", *command[1:], timeout=timeout)


def run_command(*command: str, timeout: float = 180, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
