"""The launch scripts, with the launchers that they start, on one node and on two; both nodes are this one."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess

import psutil
import pytest

from tests.ranks import ROOT, launch, run_command

QUIET = ["evaluation.metrics=[]", "tracking.wandb=off"]
STOPPED = ["deepspeed"]  # runs that a signal to the script ends
ONE_NODE = {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """That of a user who has activated the environment of Python that these tests run in."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "DS_ACCELERATOR")}
    path = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    return environment | {"VIRTUAL_ENV": sys.prefix, "PATH": path}


@pytest.fixture(scope="module")
def started(tmp_path_factory, cache_dir: Path, environment: dict[str, str]) -> Iterator[dict[str, Future]]:
    """Short runs on two ranks, in the order of the tests and two at a time: launchers wait more than they compute."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")

    def run(script: str, name: str, *nodes: dict[str, str]) -> list[CompletedProcess]:
        length = "train.kimg=1000" if name in STOPPED else "train.kimg=0.2"
        command = ["bash", f"launch/{script}.sh", *QUIET, length, f"data.cache_dir={cache_dir}", f"run_dir={folder / name}"]
        processes = [
            subprocess.Popen(command, cwd=ROOT, env=environment | node, stdout=-1, stderr=-1, text=True) for node in nodes
        ]
        try:
            if name in STOPPED:
                until(lambda: (folder / name / "metrics.jsonl").exists() or processes[0].poll() is not None)
                processes[0].terminate()
            outputs = [process.communicate(timeout=150) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [CompletedProcess(command, each.returncode, *out) for each, out in zip(processes, outputs, strict=True)]

    def two_nodes(**variables: str) -> list[dict[str, str]]:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"} | variables
        return [common | {"NODE_RANK": str(rank)} for rank in range(2)]

    without_ssh = two_nodes(HOSTFILE=str(folder / "hosts"), NO_SSH="1", DS_ACCELERATOR="cpu")
    with ThreadPoolExecutor(2) as pool:
        yield {
            "torchrun": pool.submit(run, "torchrun", "torchrun", ONE_NODE),
            "deepspeed": pool.submit(run, "deepspeed", "deepspeed", ONE_NODE),
            "torchrun, two nodes": pool.submit(run, "torchrun", "two-torchrun", *two_nodes(NNODES="2", NPROC_PER_NODE="1")),
            "deepspeed, two nodes": pool.submit(run, "deepspeed", "two-deepspeed", *without_ssh),
        }


@pytest.mark.parametrize("case", ["torchrun", "torchrun, two nodes", "deepspeed, two nodes"])
def test_a_run_goes_to_its_end(started, case: str) -> None:
    nodes = started[case].result()
    assert [node.returncode for node in nodes] == [0] * len(nodes), "".join(node.stderr for node in nodes)
    assert ": 2 rank(s) on cpu" in nodes[0].stdout
    assert "\nfinished: " in nodes[0].stdout
    assert ("any program on the network can join" in nodes[0].stdout) == (len(nodes) > 1)  # without GANDIST_SECRET
    assert [node.stdout for node in nodes[1:]] == [""] * (len(nodes) - 1), "rank 0 is on the first node"
    # Of two launchers, the one that ends second may find the store of the first one gone.
    said = [line for node in nodes for line in node.stderr.splitlines() if not re.search("TCPStore|DistNetworkError", line)]
    assert not re.search(r"warn|error|INFO", "\n".join(said), re.IGNORECASE)


def test_a_signal_to_the_deepspeed_launcher_saves_and_stops(started) -> None:
    (node,) = started["deepspeed"].result()
    assert ": 2 rank(s) on cpu" in node.stdout, node.stderr
    assert "\nstopped by a signal at kimg " in node.stdout, node.stderr
    assert node.returncode == 1


def test_ctrl_c_at_the_start_ends_all_without_a_word(environment: dict[str, str], tmp_path: Path, cache_dir: Path) -> None:
    """While the ranks import torch."""
    options = [*QUIET, "train.kimg=1000", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path}"]
    for script in ("torchrun", "deepspeed"):
        command = ["bash", f"launch/{script}.sh", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd=ROOT, env=environment | ONE_NODE, start_new_session=True, text=True, **pipes) as run:
            until(lambda: len(importing_torch(run.pid)) == 2)
            started = importing_torch(run.pid)
            os.killpg(run.pid, signal.SIGINT)
            said, _ = run.communicate(timeout=30)
        assert (said, run.returncode != 0) == ("", True)
        assert not any(rank.is_running() for rank in started)


def importing_torch(launcher: int) -> list[psutil.Process]:
    """Ranks that have begun to."""
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            if "RANK" in process.environ() and "libtorch" in Path(f"/proc/{process.pid}/maps").read_text():
                found.append(process)
    return found


def test_ranks_started_anew_meet_anew(environment: dict[str, str]) -> None:
    """One dies within the first exchange; torchrun keeps the store of the ranks, with the dead one's address in it."""
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", "-m", "tests.joins", "SIGKILL", "1", "all_reduce"]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    result = subprocess.run(command, cwd=ROOT, env=environment | ONE_NODE, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert sorted(re.findall(r"rank \d of 2 joined", result.stdout)) == ["rank 0 of 2 joined", "rank 1 of 2 joined"]


def test_an_error_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", "launch/torchrun.sh", f"run_dir={tmp_path / 'r'}", "train.batch_size=63"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment | ONE_NODE, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert re.fullmatch(r"error: train\.batch_size=63 cannot be split evenly over 2 rank.*\n", result.stderr)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("script", ["torchrun", "deepspeed"])
def test_help(script: str) -> None:
    result = run_command("bash", f"launch/{script}.sh", "--help")
    assert result.returncode == 0
    assert f"bash launch/{script}.sh [--config FILE] [key=value ...]\n" in result.stdout
    read = set(re.findall(r"\$\{([A-Z_]+):[-?]", (ROOT / "launch" / f"{script}.sh").read_text()))
    for name in read - {"VIRTUAL_ENV", "CONDA_PREFIX"}:
        assert re.search(rf"\b{name}\b", result.stdout) or re.match("OMP_|NCCL_|TORCH_|DS_|PET_", name), (
            f"{name} is not explained"
        )


@pytest.mark.parametrize(
    ("script", "variables", "problem"),
    [
        ("torchrun", {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: address of node 0"),
        ("torchrun", {"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK: number of this node, from 0"),
        ("deepspeed", {"HOSTFILE": "no-such-file"}, "cannot read HOSTFILE=no-such-file"),
        ("deepspeed", {"HOSTFILE": "README.md", "NO_SSH": "1", "NODE_RANK": "0"}, "MASTER_ADDR: address of node 0"),
    ],
)
def test_what_a_script_misses(monkeypatch, script: str, variables: dict[str, str], problem: str) -> None:
    for name, value in ({"NPROC_PER_NODE": "1", "DS_ACCELERATOR": "cpu"} | variables).items():
        monkeypatch.setenv(name, value)
    result = run_command("bash", f"launch/{script}.sh")
    assert result.returncode == 1
    assert problem in result.stderr


def test_a_port_that_is_taken_is_one_line(environment: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        first = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        command = ["bash", "launch/torchrun.sh", "--print-config"]
        result = subprocess.run(
            command, cwd=ROOT, env=environment | ONE_NODE | first, capture_output=True, text=True, timeout=60, check=False
        )
    assert result.returncode == 1
    assert re.fullmatch(
        r"error: torchrun on \S+: .* port: \d+, .*EADDRINUSE.*: set MASTER_PORT to a free one, .*\n", result.stderr
    )


@pytest.mark.parametrize("module", ["gandist.train", "gandist.evaluate"])
@pytest.mark.parametrize("option", [["--local_rank=1"], ["--local-rank", "1"]])
def test_deepspeeds_local_rank_is_ignored(module: str, option: list[str]) -> None:
    own = ["train.kimg=3", "--print-config"] if module == "gandist.train" else ["no-such-run"]
    with_it, without = (launch(1, module, *arguments) for arguments in ([*option, *own], own))
    assert (with_it.returncode, with_it.stdout, with_it.stderr) == (without.returncode, without.stdout, without.stderr)
    assert "local" not in launch(1, module, "--help").stdout


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
