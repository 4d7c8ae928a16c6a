"""`python -m gandist.doctor`: healthy nodes, and each kind of trouble that it is to name."""

import importlib.metadata
import io
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import pytest
import torch

from gandist.config import Config
from gandist.doctor import gpu, node
from gandist.doctor.__main__ import OF_EVERY_NODE, OF_EVERY_RANK, OF_RANK_0, main, usable_device
from gandist.doctor.exchange import Seen, sharing_gpus
from gandist.doctor.finding import ERROR, OK, WARNING, Finding, Place, differing, examine
from gandist.errors import GandistError
from gandist.launcher import Launch
from tests.ranks import ROOT, launch, run_command, run_ranks
from tests.small_disk import mount_small_disk
from tests.wandb_server import KEY, Server

ALONE = Launch(rank=0, size=1, local_rank=0, local_size=1)
GPU = torch.device("cuda", 0)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Arguments: nothing of this machine's own."""
    return [f"run_dir={tmp_path / 'runs' / 'a'}", f"data.cache_dir={tmp_path / 'cache'}", "tracking.wandb=off"]


def doctor(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess:
    return launch(ranks, "gandist.doctor.__main__", *arguments)


def lines(output: str) -> dict[str, list[str]]:
    """By the check: the rest of each of its lines, with the status before it."""
    found: dict[str, list[str]] = {}
    for status, check, text in re.findall(r"^(ok|warning|error) +(\S+) +(.*)$", output, re.MULTILINE):
        found.setdefault(check, []).append(f"{status} {text}")
    return found


def start_rank(rank: int, size: int, port: int, *arguments: str, **variables: str) -> subprocess.Popen:
    """As on a node of its own."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gandist.doctor", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | place | store | variables, stdout=-1, stderr=-1, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --------------------------------------------------------------------------------------------------------- healthy


def test_one_rank_leaves_nothing_behind(folders, tmp_path: Path) -> None:
    result = run_command(sys.executable, "-m", "gandist.doctor", *folders)
    assert (result.returncode, result.stderr) == (0, "")
    found = lines(result.stdout)
    assert list(found) == [*OF_EVERY_NODE, *OF_RANK_0, *OF_EVERY_RANK]
    assert found["gpu"] == ["warning none, so training is on the CPU: on a cluster, ask for GPUs (--gpus-per-node)"]
    assert found["step"] == ["ok not compared with the CPU: no GPU"]
    assert re.search(r" run_dir=\S+/runs/a\b.*, [\d.,]+ GB free, writes [\d,]+ MB/s", found["run_dir"][0])
    assert re.search(r"\n0 error\(s\), \d+ warning\(s\)\n$", result.stdout)
    assert not list(tmp_path.iterdir())


def test_two_ranks_print_once(folders) -> None:
    start = time.monotonic()
    result = doctor(*folders, ranks=2)
    assert time.monotonic() - start < 60
    assert (result.returncode, result.stderr) == (0, "")
    found = lines(result.stdout)
    assert list(found) == [*OF_EVERY_NODE, *OF_RANK_0, *OF_EVERY_RANK, "ranks", "all-reduce"]
    assert [len(each) for each in found.values()] == [1] * len(found)
    assert re.match(rf"ok 2: 0-1 on {socket.gethostname()}, met after \d+\.\d s", found["ranks"][0])
    pattern = r"ok gloo sums (\d+) MiB in ([\d.]+) ms, algorithm bandwidth ([\d.]+) GB/s, bus bandwidth ([\d.]+) GB/s; .*"
    size, milliseconds, algorithm, bus = map(float, re.fullmatch(pattern, found["all-reduce"][0]).groups())
    assert float(algorithm) == pytest.approx(size * 2**20 / 1e6 / milliseconds, abs=0.02)
    assert algorithm == bus, "of two ranks"


def test_the_numbers_of_a_step_are_compared() -> None:
    numbers = gpu._step(torch.device("cpu"))
    assert len(numbers) == 4
    assert all(each.isfinite().all() and each.norm() > 0 for each in numbers.values())


def test_arguments_are_those_of_training() -> None:
    result = doctor("train.kimgs=1")
    assert result.returncode == 1
    assert "train.kimgs: unknown key, did you mean 'train.kimg'?" in result.stderr


# --------------------------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize("key", ["run_dir", "data.cache_dir"])
def test_a_folder_that_cannot_be_made(folders, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").touch()
    result = doctor(*folders, f"{key}={tmp_path / 'file' / 'a'}")
    assert result.returncode == 1
    (line,) = lines(result.stdout)[key.removeprefix("data.")]
    assert line.startswith(f"error {key}={tmp_path}/file/a: {tmp_path}/file cannot be written to (Not a directory): ")
    assert line.endswith(f"choose another folder: {key}=FOLDER")
    assert re.search(r"\n1 error\(s\), \d+ warning\(s\)\n$", result.stdout)


def test_a_folder_whose_name_is_of_another_node(folders) -> None:
    result = doctor(*folders, "data.cache_dir=$NO_SUCH_VARIABLE/cache")
    assert result.returncode == 1
    assert "the variable is not set on this node" in lines(result.stdout)["cache_dir"][0]


def test_a_full_disk(folders, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    ((status, output, left),) = run_ranks(1, _examine_small_disk, folders, tmp_path / "disk")
    assert status == 1
    assert lines(output)["run_dir"] == [
        f"error run_dir={tmp_path}/disk/a: {tmp_path}/disk cannot be written to (No space left on device): make room, or "
        "choose another folder: run_dir=FOLDER"
    ]
    assert not left


def _examine_small_disk(folders: list[str], disk: Path) -> tuple[int, str, list[Path]]:
    mount_small_disk(disk, 2**20)
    with redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
        main([*folders, f"run_dir={disk / 'a'}"])
    return ended.value.code, output.getvalue(), list(disk.iterdir())


def test_few_open_files(folders) -> None:
    result = run_command("bash", "-c", f"ulimit -n 64; exec {sys.executable} -m gandist.doctor {' '.join(folders)}")
    assert result.returncode == 0, result.stderr
    assert lines(result.stdout)["files"][0].startswith("warning a process may open 64 files at most: ulimit -Hn 1024")


def test_little_shared_memory(folders) -> None:
    result = doctor(*folders, "data.num_workers=1000000", "train.batch_size=16384")
    assert result.returncode == 0, result.stderr
    assert re.match(r"warning /dev/shm is smaller than the .*: in a container, docker run", lines(result.stdout)["shm"][0])


@pytest.mark.parametrize("variables", [{"PATH": ""}, {"CXX": "no-such-compiler"}], ids=str)
def test_no_compiler(folders, monkeypatch, variables: dict[str, str]) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (line,) = lines(doctor(*folders).stdout)["compiler"]
    assert line.startswith("warning no C++ compiler: install g++, or load modules")
    result = doctor(*folders, "train.compile=true")
    assert result.returncode == 1
    assert lines(result.stdout)["compiler"][0].startswith("error no C++ compiler: ")


def test_no_python_h(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path))
    found = node.check_compiling(Place(Config(), ALONE))
    assert found.text == "no Python.h"
    assert found.advice.startswith("install python3-dev")


def test_optional_packages_are_missing(folders) -> None:
    script = f"""
import importlib.metadata, runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("wandb", "deepspeed", "plotly"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
version = importlib.metadata.version
def without(name):
    if name in ("wandb", "deepspeed", "plotly"):
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = without
sys.argv = ["gandist.doctor", *{folders[:2]!r}]
runpy.run_module("gandist.doctor", run_name="__main__")
"""
    result = run_command(sys.executable, "-c", script)
    assert (result.returncode, result.stderr) == (0, "")
    found = lines(result.stdout)
    named = "deepspeed is missing, for engine=deepspeed; wandb is missing, for tracking.wandb other than off; plotly is missing"
    assert found["packages"][0].startswith(f"warning {named}, for gandist.report: pip install")
    assert found["wandb"][0].startswith("warning wandb cannot be used (")


def test_a_package_is_too_old(monkeypatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(node, "version", lambda name: "2.10.1+cu128" if name == "torch" else version(name))
    status, text, advice, _ = node.check_packages(Place(Config(), ALONE))
    assert (status, text) == (ERROR, "torch 2.10.1+cu128 is not >=2.11")
    assert "pip install" in advice


# ----------------------------------------------------------------------------------------------------------- W&B


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("no_key")
def test_wandb_with_a_key_and_without(monkeypatch) -> None:
    place = Place(Config(), ALONE)
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        status, text, advice, _ = node.check_wandb(place)
        assert (status, text) == (WARNING, f"{server.url} can be reached, but there is no key")
        assert advice.startswith("`wandb login` stores one")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert node.check_wandb(place) == Finding(OK, f"{server.url} can be reached, and there is a key")


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize("server", ["swallows", "is silent", "refuses", "has no name", "is no URL"])
def test_a_wandb_server_that_does_not_answer(folders, monkeypatch, server: str) -> None:
    with ExitStack() as open_sockets:
        listener = open_sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = "{}:{}".format(*listener.getsockname())
        for _ in range(3 if server == "swallows" else 0):
            client = open_sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        if server == "refuses":
            listener.close()
        url = {"has no name": "http://no-such-host.invalid", "is no URL": "http://[::"}.get(server, f"http://{address}")
        monkeypatch.setenv("WANDB_BASE_URL", url)
        start = time.monotonic()
        result = doctor(*folders, "tracking.wandb=auto")
        assert time.monotonic() - start < 45
    (line,) = lines(result.stdout)["wandb"]
    assert (result.returncode, result.stderr) == (0, ""), line
    assert line.startswith("warning wandb cannot be used" if server == "is no URL" else f"warning {url} cannot be reached: ")


# ---------------------------------------------------------------------------------------------------------- ranks


def test_a_rank_that_does_not_come_is_named_after_what_was_found(folders) -> None:
    rank = start_rank(0, 2, free_port(), *folders, GANDIST_JOIN_TIMEOUT="2")
    output, errors = rank.communicate(timeout=60)
    assert rank.returncode == 1
    assert list(lines(output)) == [*OF_EVERY_NODE, *OF_RANK_0, *OF_EVERY_RANK]
    assert "error (rank 0): rank 1 has not joined within 2 s" in errors
    assert "Traceback" not in errors


def test_nodes_that_differ_are_named(folders, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    port = free_port()
    others = [f"run_dir={tmp_path / 'file' / 'a'}"]
    ranks = [start_rank(0, 2, port, *folders), start_rank(1, 2, port, *folders, *others, PATH="")]
    (output, errors), other = [rank.communicate(timeout=90) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 0], errors
    assert other == ("", "")
    found = lines(output)
    assert {"compiler", "run_dir"} <= {name for name, each in found.items() if len(each) == 2}
    where = f"rank 1 on {socket.gethostname()}"
    assert found["compiler"][1].startswith(f"warning {where}: no C++ compiler")
    assert found["run_dir"][1].startswith(f"error {where}: run_dir={tmp_path}/file/a: ")


def test_what_differs_but_for_figures() -> None:
    slow, fast = (Finding(OK, "disk", figures=each) for each in ("1 MB/s", "9 MB/s"))
    full = Finding(ERROR, "disk is full")
    others = {1: {"disk": fast}, 2: {"disk": full}, 3: {}, 4: {"disk": full}}
    assert differing({"disk": slow}, others) == [("disk", full, [2, 4])]
    assert differing({}, {1: {"disk": fast}, 2: {"disk": slow}}) == [("disk", fast, [1, 2])]


def test_ranks_that_share_a_gpu() -> None:
    seen = [Seen("a", "0", {}), Seen("a", "1", {}), Seen("b", "0", {}), Seen("a", "0", {})]
    assert sharing_gpus(dict(enumerate(seen))) == [[0, 3]]
    assert not sharing_gpus({0: Seen("a", "", {}), 1: Seen("a", "", {})})


# ----------------------------------------------------------------------------------------------- checks that fail


def test_a_check_that_fails_or_hangs_is_a_finding() -> None:
    place = Place(Config(), ALONE)
    assert examine(lambda place: place.no_such, place).text.startswith("the check failed (AttributeError: ")
    assert examine(lambda place: time.sleep(60), place, seconds=0.05).text == "no answer after 0.05 s"


def test_a_gpu_that_is_taken(monkeypatch) -> None:
    def set_device(device: torch.device) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be …")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(GandistError, match=r"GPU of process 0 of .* busy or unavailable\): `nvidia-smi` shows"):
        usable_device(ALONE)


@pytest.mark.parametrize(
    ("driver", "build", "line"),
    [
        (None, "13.2", "none, so training is on the CPU"),
        ("570.86.10", None, "driver 570.86.10 is there, but torch is built for CPUs"),
        ("570.86.10", "13.2", f"driver 570.86.10 is there, but torch {torch.__version__} sees no GPU"),
    ],
)
def test_a_gpu_that_torch_does_not_see(monkeypatch, tmp_path: Path, driver: str | None, build: str | None, line: str) -> None:
    if driver:
        (tmp_path / "version").write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build")
    monkeypatch.setattr(gpu, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", build)
    finding = gpu.check_gpu(Place(Config(), ALONE))
    assert (finding.status, finding.text) == (ERROR if driver else WARNING, line)


@pytest.mark.parametrize("change", [0.0, 1e-5, 0.1, float("nan")])
def test_a_gpu_that_computes_something_else(monkeypatch, change: float) -> None:
    expected = {"the loss": torch.ones(()), "the gradient": torch.tensor([1.0, 2.0])}
    found = expected | {"the gradient": torch.tensor([1.0, 2.0 + change])}
    monkeypatch.setattr(gpu, "_step", lambda device: found if device.type == "cuda" else expected)
    finding = gpu.check_step(Place(Config(), ALONE, GPU))
    if change in (0.0, 1e-5):
        assert finding.status == OK
    else:
        assert (finding.status, finding.text) == (ERROR, "the gradient of a small GAN is not what it is on the CPU")


# ------------------------------------------------------------------------------------------------ a stranger's ways


def test_a_rank_without_an_address(folders, monkeypatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    result = run_command(sys.executable, "-m", "gandist.doctor", *folders)
    assert result.returncode == 1
    assert "error (rank 0): in the environment, MASTER_ADDR is missing: start the ranks with torchrun" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_goes(folders) -> None:
    command = f"set -o pipefail; {sys.executable} -m gandist.doctor {' '.join(folders)} | head -1"
    result = run_command("bash", "-c", command)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("rank 0 of 1, on ")


def test_ctrl_c_while_it_waits(folders, tmp_path: Path) -> None:
    rank = start_rank(0, 2, free_port(), *folders)
    while not rank.stdout.readline().startswith("ok       step"):
        assert rank.poll() is None
    time.sleep(0.5)
    rank.send_signal(signal.SIGINT)
    _, errors = rank.communicate(timeout=10)
    assert (rank.returncode, errors) == (-signal.SIGINT, "")
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_there_could_be(folders) -> None:
    rank = start_rank(0, 100_000, free_port(), *folders, GANDIST_JOIN_TIMEOUT="2")
    _, errors = rank.communicate(timeout=90)
    assert rank.returncode == 1
    assert "error (rank 0): ranks 1-99999 have not joined within 2 s" in errors
