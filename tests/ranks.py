"""Runs functions and commands on real process groups."""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent

# The server has torch and gandist loaded and has computed nothing: forking ranks from it is quick and safe.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["gandist.train", "gandist.evaluate", "tests.ranks"])


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """`function(*arguments)` in every rank of a gloo world, with the environment torchrun gives. Returns all results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(rank) for rank in range(world_size)]
        shared = world_size, port, function, arguments
        ranks = [_context.Process(target=_rank, args=(result, rank, *shared)) for rank, result in enumerate(results)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout)
        hanging = [rank for rank in ranks if rank.is_alive()]
        for rank in hanging:
            rank.kill()
        codes = [rank.exitcode for rank in ranks]
        assert not hanging, f"ranks hang after {timeout} s: {codes}"
        assert codes == [0] * world_size, f"exit codes {codes}"
        return [pickle.loads(result.read_bytes()) for result in results]


def _rank(result: Path, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of decoding workers, as in a process that torchrun starts
    result.write_bytes(pickle.dumps(function(*arguments)))


def torchrun(world_size: int, module: str, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess:
    """The command users type."""
    command = ["torchrun", "--standalone", f"--nproc_per_node={world_size}", "-m", module, *arguments]
    return run_command(sys.executable, "-m", "torch.distributed.run", *command[1:], timeout=timeout)


def run_command(*command: str, timeout: float = 180, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
