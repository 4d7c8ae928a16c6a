"""What the launcher says about this process. torchrun, deepspeed and srun say it in environment variables of their own."""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass

from gandist.errors import ConfigError
from gandist.redaction import redact

_NO_STEP = 0xFFFFFFF0  # Slurm numbers what is not a step of srun (batch script, interactive shell, …) from here


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher has started together."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this node
    one_node: bool = False  # the launcher says that all ranks are on this node
    attempt: int = 0  # how often the launcher has started this rank before
    agent_store: bool = False  # the store in which the ranks meet is torchrun's own; else rank 0 serves it
    supervised: bool = False  # a process of torchrun started this one and waits for it
    slurm: bool = False  # srun started this process itself; it may show each process one GPU only


def read_launch() -> Launch:
    """Without a launcher, this process is one on its own."""
    if "RANK" in os.environ:  # asked first: torchrun and deepspeed may have been started by srun
        size = _number("WORLD_SIZE")
        local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
        launch = Launch(
            rank=_number("RANK"),
            size=size,
            local_rank=_number("LOCAL_RANK", 0),
            local_size=_number(local_size, size),
            one_node=_number(local_size, 0) == size,
            attempt=_number("TORCHELASTIC_RESTART_COUNT", 0),
            agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            supervised="TORCHELASTIC_RUN_ID" in os.environ,
        )
    elif _is_task_of_srun():
        size = _tasks_of_step()
        local_size = _tasks_of_node(size)
        launch = Launch(
            rank=_number("SLURM_PROCID"),
            size=size,
            local_rank=_number("SLURM_LOCALID", 0),
            local_size=local_size,
            one_node=local_size == size and _number("SLURM_STEP_NUM_NODES", 0) == 1,
            slurm=True,
        )
    else:
        return Launch(rank=0, size=1, local_rank=0, local_size=1)
    if launch.rank >= launch.size:
        raise _error(f"rank {launch.rank} cannot be one of {launch.size}")
    return launch


def read_address(launch: Launch) -> tuple[str, int]:
    """Host and port of the store in which the ranks meet."""
    if not launch.slurm:
        if "MASTER_ADDR" not in os.environ:
            raise _error("MASTER_ADDR is missing")
        return os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    host = os.environ.get("MASTER_ADDR") or _address_of_first_node()
    # Another port for each step, below those that systems hand out by themselves (32768 and up).
    return host, _number("MASTER_PORT", 20000 + (_number("SLURM_JOB_ID", 0) * 7 + _number("SLURM_STEP_ID")) % 12000)


@dataclass(frozen=True)
class Job:
    """Of Slurm. array: the number of the array that it is a task of, if it is; restarts: how often it was requeued"""

    id: str
    array: str | None
    restarts: int


def read_job() -> Job | None:
    """The batch job that this process is part of, if there is one."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    return Job(os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID"), _number("SLURM_RESTART_COUNT", 0))


def tell_libraries(local_rank: int) -> None:
    """Sets the variable that some of them read, where the launcher did not or there is none."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))


def report(message: str, *, on_every_rank: bool = False) -> None:
    """Says why this process is about to exit. What all ranks know, rank 0 alone says, and first."""
    try:
        launch = read_launch()
    except ConfigError:
        launch = Launch(rank=0, size=1, local_rank=0, local_size=1)
    if on_every_rank and launch.rank:
        time.sleep(10)  # the launcher ends all ranks when the first one ends: that shall be rank 0, which speaks
        return
    where = f" (rank {launch.rank})" if launch.size > 1 and not on_every_rank else ""
    print(f"error{where}: {redact(message)}", file=sys.stderr, flush=True)


def _is_task_of_srun() -> bool:
    """Not so in the script of sbatch or the shell of salloc, where a process is one on its own, whatever the job's size."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in os.environ and step.isdecimal() and int(step) < _NO_STEP and _tasks_of_step() > 1


def _tasks_of_step() -> int:
    return _number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS", 1)


def _tasks_of_node(size: int) -> int:
    """Of this node, where the step's nodes have, say, '2(x3),1' tasks: three have 2 and the fourth has 1."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    tasks = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    node = _number("SLURM_NODEID", 0)
    return tasks[node] if node < len(tasks) else _number("SLURM_NTASKS_PER_NODE", size)


def _address_of_first_node() -> str:
    """Slurm's own address of it: the node's name need not be known to the other nodes."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        name = _scontrol("show", "hostnames", nodes).split()[0]
        found = re.search(r"\bNodeAddr=(\S+)", _scontrol("--oneliner", "show", "node", name))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise _error(f"scontrol does not tell the address of the first of the nodes {nodes!r} ({error})") from error
    return found[1] if found else name


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise _error(f"{name} is {f'{text!r}, not a number' if text else 'missing'}")
    return int(text)


def _error(problem: str) -> ConfigError:
    advice = "start the ranks with torchrun, deepspeed or srun, which set all of it, or unset RANK to run one process"
    return ConfigError(f"in the environment, {problem}: {advice}", on_every_rank=False)
