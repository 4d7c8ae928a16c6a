"""Who this process is among the ranks, and how they find each other, or say who is missing."""

import os
import re
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gandist.distributed import choose_device, run
from gandist.errors import ConfigError
from gandist.launcher import Launch, read_address, read_launch
from gandist.rendezvous import _Round, meet
from tests.ranks import ROOT, end_ranks, run_module, start_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "b", "MASTER_PORT": "29500"}
SBATCH = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "7"}
SRUN = SBATCH | {
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "6",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "n[4-6,9]",
}
OTHER_NODE = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
ALONE = Launch(rank=0, size=1, local_rank=0, local_size=1)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch) -> None:
    for name in os.environ:
        if re.match(r"SLURM_|TORCHELASTIC_|MASTER_|(LOCAL_)?(RANK|WORLD_SIZE|SIZE)$", name):
            monkeypatch.delenv(name)


def set_environment(monkeypatch, *parts: dict[str, str]) -> None:
    for part in parts:
        for name, value in part.items():
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("parts", "expected"),
    {
        "nothing": ([], ALONE),
        "torchrun": ([TORCHRUN], Launch(rank=5, size=8, local_rank=1, local_size=4)),
        "torchrun's agent": (
            [TORCHRUN, {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}],
            Launch(rank=5, size=8, local_rank=1, local_size=4, attempt=2, agent_store=True),
        ),
        "deepspeed": ([DEEPSPEED], Launch(rank=5, size=6, local_rank=1, local_size=2)),
        "srun": ([SRUN], Launch(rank=6, size=7, local_rank=0, local_size=1, slurm=True)),
        "srun, another node": ([SRUN, OTHER_NODE], Launch(rank=3, size=7, local_rank=1, local_size=2, slurm=True)),
        "srun, one task": ([SRUN, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}], ALONE),
        "torchrun, one node": (
            [TORCHRUN, {"LOCAL_WORLD_SIZE": "8"}],
            Launch(rank=5, size=8, local_rank=1, local_size=8, one_node=True),
        ),
        "srun, one node": (
            [SRUN, {"SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}],
            Launch(rank=6, size=7, local_rank=0, local_size=7, one_node=True, slurm=True),
        ),
        "by hand, as Kubernetes does": (
            [{"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"}],
            Launch(rank=1, size=2, local_rank=0, local_size=2),
        ),
        "torchrun beneath srun": ([SRUN, TORCHRUN], Launch(rank=5, size=8, local_rank=1, local_size=4)),
        "sbatch without srun": ([SBATCH], ALONE),
        "the shell of salloc": ([SBATCH, {"SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NUM_TASKS": "7"}], ALONE),
    }.values(),
)
def test_who_this_is(monkeypatch, parts: list[dict[str, str]], expected: Launch) -> None:
    set_environment(monkeypatch, *parts)
    assert read_launch() == expected


def test_srun_of_equal_nodes(monkeypatch) -> None:
    set_environment(monkeypatch, SRUN, OTHER_NODE, {"SLURM_NTASKS_PER_NODE": "2"})
    monkeypatch.delenv("SLURM_STEP_TASKS_PER_NODE")
    assert read_launch().local_size == 2
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert read_launch().size == 7


def test_where_to_meet(monkeypatch, tmp_path: Path) -> None:
    set_environment(monkeypatch, TORCHRUN)
    assert read_address(read_launch()) == ("a", 7)
    monkeypatch.delenv("RANK")
    set_environment(monkeypatch, SRUN)
    assert read_address(read_launch()) == ("a", 7)
    monkeypatch.delenv("MASTER_PORT")
    ports = set()
    for job, step in (("12", "3"), ("12", "4"), ("13", "3")):
        set_environment(monkeypatch, {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
        host, port = read_address(read_launch())
        ports.add(port)
        assert host == "a"
        assert 20000 <= port < 32000
    assert len(ports) == 3
    # The first node's address, as Slurm has it
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"scontrol does not tell the address of the first of the nodes 'n\[4-6,9\]'"):
        read_address(read_launch())
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("""#!/bin/sh
        test "$*" = "show hostnames n[4-6,9]" && printf 'n4\\nn5\\nn6\\nn9\\n'
        test "$*" = "--oneliner show node n4" && echo "NodeName=n4 NodeAddr=10.0.0.4 NodeHostName=n4"
        true""")
    scontrol.chmod(0o755)
    assert read_address(read_launch())[0] == "10.0.0.4"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is missing"),
        ({"RANK": "two"}, "RANK is 'two', not a number"),
        ({"RANK": "8"}, "rank 8 cannot be one of 8"),
    ],
)
def test_an_environment_that_makes_no_sense(monkeypatch, capsys, changes: dict[str, str], problem: str) -> None:
    set_environment(monkeypatch, TORCHRUN, changes)
    with pytest.raises(SystemExit):
        run(read_launch)
    assert capsys.readouterr().err.startswith(f"error: in the environment, {problem}: start the ranks with torchrun")


@pytest.mark.parametrize("chosen", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_of_a_gpu_expands_its_segments(monkeypatch, chosen: str | None) -> None:
    """Before CUDA starts, and unless the user has said something else by either name."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "backend:native")
        if name != chosen:
            monkeypatch.delenv(name)
    settings = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: settings.append(dict(os.environ)))
    assert choose_device(ALONE) == torch.device("cuda", 0)
    (environment,) = settings
    if chosen:
        assert environment[chosen] == "backend:native"
        assert len({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys()) == 1
    else:
        assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_only_one_module_reads_launchers() -> None:
    names = re.compile(r"[\"']((LOCAL_|GROUP_)?(RANK|WORLD_SIZE|SIZE)|MASTER_\w+|SLURM_\w+|TORCHELASTIC_\w+)[\"']")
    readers = [path.name for path in (ROOT / "gandist").rglob("*.py") if names.search(path.read_text())]
    assert readers == ["launcher.py"]


NOBODY = ("SIGTERM", "none", "")
LOST = r"on \S+ joined, but does not answer in the first exchange \(.+\): look at its log"
# Who stops, and how and where; what is special in the environment of each rank; what is said of it.
CASES: dict[str, tuple[tuple[str, str, str], list[dict[str, str]], str]] = {
    "two never come": (
        NOBODY,
        [{"WORLD_SIZE": "4"}] * 2,
        r"ranks 2-3 have not joined within 6 s \(joined: 0-1 on \S+\): look at .+; GANDIST_JOIN_TIMEOUT=600 waits longer",
    ),
    "the first never comes": (
        NOBODY,
        [{"RANK": "1", "WORLD_SIZE": "2"}],
        r"rank 0 cannot be reached from \S+ within 6 s at 127.0.0.1:\d+ \(Connection refused\): see in its log",
    ),
    "another number of ranks": (
        NOBODY,
        [{}, {"WORLD_SIZE": "3"}],
        r"rank \d was started as one of \d ranks, but rank \d as one of \d: start every node with the same",
    ),
    "one rank twice": (
        NOBODY,
        [{"TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "1"}] * 2,
        r"rank 1 was started twice, on \S+ \(process \d+\) and on \S+ \(process \d+\): each node needs a number",
    ),
    "another secret": (
        NOBODY,
        [{"LOCAL_WORLD_SIZE": "1", "GANDIST_SECRET": secret} for secret in ("a", "b")],
        r"the place of rank [01] has been taken by a process that does not know GANDIST_SECRET \([01] on \S+\): another",
    ),
    "a name that is not known": (
        NOBODY,
        [{"MASTER_ADDR": "no-such-host.invalid", "WORLD_SIZE": "2"}],
        r"MASTER_ADDR=no-such-host.invalid is not known on \S+, which it should be: ",
    ),
    "a port that is taken": (
        NOBODY,
        [{}] * 2,
        r"(port \d+ of \S+ is taken, probably by another run: set MASTER_PORT|127.0.0.1:\d+ does not answer as the store)",
    ),
    "one stops before the first exchange": (("SIGSTOP", "1", "init_process_group"), [{}] * 3, "rank 1 " + LOST),
    "one stops in the first exchange": (("SIGSTOP", "2", "all_reduce"), [{}] * 3, "rank 2 " + LOST),
    "one dies in the first exchange": (("SIGKILL", "1", "new_group"), [{}] * 3, "rank 1 " + LOST),
    "the first one, which has the store, stops": (
        ("SIGSTOP", "0", "init_process_group"),
        [{}] * 3,
        r"(rank 0, or the launcher on its node, does not answer: look|127.0.0.1:\d+ does not answer .+: rank 0 hangs)",
    ),
}


@pytest.fixture(scope="module")
def ends() -> dict[str, list[tuple[int | None, str]]]:
    """Exit status and errors of every rank in each of the cases. No launcher ends them. Several at once: they mostly wait."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ports = {"a port that is taken": other.getsockname()[1], "one rank twice": agent.port}
        with ThreadPoolExecutor(len(CASES) // 2) as pool:
            return dict(zip(CASES, pool.map(lambda case: see_the_end(*CASES[case][:2], ports.get(case)), CASES), strict=True))


def see_the_end(
    stop: tuple[str, str, str], environments: list[dict[str, str]], port: int | None
) -> list[tuple[int | None, str]]:
    common = {"GANDIST_JOIN_TIMEOUT": "6"} | ({"MASTER_PORT": str(port)} if port else {})
    changes = [[f"{name}={value}" for name, value in (common | own).items()] for own in environments]
    with tempfile.TemporaryDirectory() as folder:
        errors = [Path(folder) / str(rank) for rank in range(len(changes))]
        command = lambda rank: (run_module, Path(os.devnull), errors[rank], "tests.joins", (*stop, *changes[rank]))  # noqa: E731
        ranks = start_ranks(len(changes), command)
        deadline = time.monotonic() + 40
        staying = int(stop[0] == "SIGSTOP")
        while sum(rank.exitcode is None for rank in ranks) > staying and time.monotonic() < deadline:
            time.sleep(0.1)
        codes = [rank.exitcode for rank in ranks]
        end_ranks(ranks)
        return [(code, error.read_text()) for code, error in zip(codes, errors, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_what_keeps_ranks_apart_is_named_and_all_of_them_exit(ends, case: str) -> None:
    (name, lost, _), _, expected = CASES[case]
    said = []
    for rank, (code, text) in enumerate(ends[case]):
        assert code == (1 if str(rank) != lost else None if name == "SIGSTOP" else -9), text
        assert "Traceback" not in text
        said += re.findall(r"^error.*", text, re.MULTILINE)
    assert said
    for error in said:
        assert re.match(r"error( \(rank \d\))?: " + expected, error), error


def test_rounds(monkeypatch) -> None:
    """Ranks that are started anew meet in another round of the same store, whatever each launcher's count of attempts."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    set_environment(monkeypatch, {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)})

    def rank(number: int, attempt: int) -> Launch:
        return Launch(number, 3, number, 3, attempt=attempt, agent_store=True)

    with ThreadPoolExecutor() as pool:
        for number, this_round in enumerate(list(pool.map(lambda number: meet(rank(number, 0), 10), range(3)))):
            this_round.set(f"address {number}", "of a rank that dies")
        # Rank 1 comes again, and waits; rank 0 comes again, and dies before the last one comes.
        waiting = pool.submit(meet, rank(1, 1), 10)
        while store.get("round") != b"1":
            time.sleep(0.01)
        assert _Round(store, 1, rank(0, 1)).join()
        time.sleep(0.2)
        assert not waiting.done()
        others = [pool.submit(meet, rank(0, 2), 10), pool.submit(meet, rank(2, 1), 10)]
        stores = [future.result() for future in (waiting, *others)]
    stores[0].set("address 0", "new")
    assert [each.get("address 0") for each in stores] == [b"new"] * 3
    assert not stores[1].check(["address 1"]), "the dead rank's address is out of sight"


SEGMENT = "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)"
IN_NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, "
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \nLast error:\n"
STOPPED_RANKS = [  # as torch 2.15 has it
    (dist.DistBackendError, f"{IN_NCCL}remote process exited or there was a network error\n{REMOTE}", "was lost"),
    (dist.DistBackendError, f"{IN_NCCL}unhandled system error\n{SYSTEM}recv failed : Connection reset by peer", "was lost"),
    (RuntimeError, "NCCL AllReduce failed: remote process exited or there was a network error \nNCCL Last Error: ", "was lost"),
    (dist.DistBackendError, "NCCL communicator was aborted on rank 1. ", "was lost"),
    (
        dist.DistNetworkError,
        "recvValue failed on SocketImpl(fd=3): Failed to recv, got 0 bytes. Connection was likely closed. Did the remote "
        "server shutdown or crash?",
        "was lost",
    ),
    (
        dist.DistBackendError,
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600000 "
        "milliseconds before timing out.",
        "does not answer",
    ),
    (dist.DistStoreError, "wait timeout after 600000ms, keys: /default_pg/0//cuda//0/1", "does not answer"),
    (dist.DistNetworkError, "Socket Timeout", "does not answer"),
    *(
        (dist.DistBackendError, said, rf"NCCL failed on .*: {re.escape(SEGMENT)}: often /dev/shm is")
        for said in (
            f"{IN_NCCL}unhandled system error\n{SYSTEM}{SEGMENT}",
            f"NCCL AllReduce failed: unhandled system error (run with NCCL_DEBUG=INFO …) \nNCCL Last Error: {SEGMENT}",
        )
    ),
]


@pytest.mark.parametrize(("kind", "said", "expected"), STOPPED_RANKS)
def test_what_nccl_says_of_other_ranks_is_understood(capsys, kind: type, said: str, expected: str) -> None:
    def fail() -> None:
        raise kind(said)

    with pytest.raises(SystemExit):
        run(fail)
    error = capsys.readouterr().err
    assert re.match(f"error: .*{expected}", error), error
    assert error.count("\n") == 1
