"""A Slurm of its own for the tests: a controller and seven nodes, all on loopback, for any user and without munge."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
NODES = tuple(f"n{number}" for number in range(1, 8))

# The processes of a preempted job have GraceTime seconds, those of a cancelled one KillWait.
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
MinJobAge=600
SlurmdTimeout=5
MessageTimeout=3
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
GresTypes=gpu
NodeName=DEFAULT CPUs=128 Gres=gpu:8
{nodes}
PartitionName=main Nodes=n[1-2] Default=YES
PartitionName=frail Nodes=n[3-4]
PartitionName=silent Nodes=n[5-6]
PartitionName=patient Nodes=n7 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n7 PriorityTier=10 PreemptMode=OFF
"""


ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
PATIENCE = 120  # s


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if not _which(program)]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {PATIENCE} s"
        time.sleep(0.1)


class Cluster:
    """`work` is where its commands run; `folder` holds configuration, logs and state of the daemons."""

    def __init__(self, folder: Path, work: Path):
        self.folder = folder
        self.work = work
        outside = {name: value for name, value in os.environ.items() if not re.match("SLURM_|SBATCH_|SRUN_", name)}
        path = f"{Path(sys.executable).parent}:{outside.get('PATH', '')}"
        activated = {"VIRTUAL_ENV": sys.prefix, "PATH": path}  # the environment of Python that these tests run in
        self._environment = outside | activated | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        port, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            for name, port in zip(NODES, ports, strict=True)
        )
        values = {"host": host, "port": port, "nodes": nodes, "user": getpass.getuser(), "folder": self.folder}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-7]\n")
        # Ends the cluster even when this process is killed.
        command = [sys.executable, __file__, self._environment["SLURM_CONF"]]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE)
        self._start_daemon("slurmctld", "slurmctld", "-c", "-i")
        for node in NODES:
            self.start_node(node)
        self.await_nodes()

    def stop(self) -> None:
        self._guard.communicate(b"stop\n", timeout=30)
        for daemon in self._daemons.values():
            daemon.wait(timeout=30)

    def start_node(self, node: str) -> None:
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._start_daemon(node, "slurmd", "-N", node)

    def await_nodes(self) -> None:
        until(lambda: self.run("sinfo", "--noheader", "--Node", "--format=%N %t").count(" idle") >= len(NODES))

    def kill_node(self, node: str) -> None:
        """As if its power failed: its daemon, that of each step and then the processes of jobs die without a word."""
        daemon = self._daemons.pop(node)
        tasks = [
            pid for pid, variables in _processes(self._environment["SLURM_CONF"]) if f"SLURMD_NODENAME={node}" in variables
        ]
        for pid in [daemon.pid, *{step for task in tasks if (step := _parent(task)) not in tasks}, *tasks]:
            _kill(pid)
        daemon.wait()

    def silence_node(self, node: str) -> None:
        """Its daemon answers no more, but the jobs on it go on."""
        self._daemons[node].send_signal(signal.SIGSTOP)

    def processes(self, variable: str) -> list[int]:
        """Those of jobs that have `variable`, NAME=VALUE, in their environment."""
        return [pid for pid, variables in _processes(self._environment["SLURM_CONF"]) if variable in variables]

    def run(self, *command: str, **environment: str) -> str:
        options = {"env": self._environment | environment, "cwd": self.work, "capture_output": True, "text": True}
        result = subprocess.run(command, timeout=60, check=False, **options)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout + result.stderr

    def submit(self, *arguments: str, **environment: str) -> str:
        """The number of the job; what it prints goes to `log`."""
        return self.run("sbatch", "--parsable", f"--output={self.folder}/%A-%a.log", *arguments, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", number)))

    def await_job(self, number: str, **values: str) -> dict[str, str]:
        """Waits until the job has these values, and returns all of them."""

        def has_come() -> bool:
            job = self.job(number)
            assert job["JobState"] not in ENDED or job["JobState"] == values.get("JobState"), f"{job}\n{self.log(number)}"
            return values.items() <= job.items()

        until(has_come)
        return self.job(number)

    def start_now(self, number: str, *changes: str) -> None:
        """What was requeued would wait for two minutes, in which all that is left of its last start dies."""
        self.await_job(number, JobState="PENDING")
        until(lambda: not self.processes(f"SLURM_JOB_ID={number}"))
        time.sleep(2)  # within the second of its end, nodes still refuse a job of this number
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now", *changes)

    def log(self, number: str, task: str = "4294967294") -> str:
        path = self.folder / f"{number}-{task}.log"
        return path.read_text() if path.exists() else ""

    def _start_daemon(self, name: str, program: str, *options: str) -> None:
        assert self._guard.poll() is None, "the cluster has been stopped"
        with (self.folder / f"{name}.log").open("a") as log:
            command = [_which(program), "-D", *options]
            self._daemons[name] = subprocess.Popen(command, env=self._environment, stdin=-3, stdout=log, stderr=log)


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _processes(configuration: str) -> Iterator[tuple[int, list[str]]]:
    """Those of one cluster, daemons, jobs and all, with their environment."""
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            variables = entry.read_bytes().decode(errors="replace").split("\0")
            if f"SLURM_CONF={configuration}" in variables and int(entry.parent.name) != os.getpid():
                yield int(entry.parent.name), variables


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _guard(configuration: str) -> None:
    """Waits for a line or the end of its input, then ends all processes of a cluster."""
    sys.stdin.readline()
    while processes := list(_processes(configuration)):
        for pid, _ in processes:
            _kill(pid)
        time.sleep(0.1)


if __name__ == "__main__":
    _guard(sys.argv[1])
