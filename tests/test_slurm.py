"""The batch scripts, on a Slurm that is started for these tests. Its nodes are all this one."""

import ast
import json
import re
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.ranks import ROOT, run_command
from tests.slurm_cluster import Cluster, missing_programs, until

pytestmark = [
    pytest.mark.skipif(bool(missing_programs()), reason=f"without Slurm's programs {', '.join(missing_programs())}"),
    pytest.mark.usefixtures("lives"),  # they begin with the first test
]
QUIET = ["evaluation.metrics=[]", "tracking.wandb=off", "tracking.every_kimg=0.1", "checkpoint.every_kimg=1"]
ONE = {"NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}

# In place of the launcher: says what it was started with, and does as its last arguments tell.
STAND_IN = """\
import os, signal, sys, time
from pathlib import Path
asked = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    print(f"{number.name} was {signal.signal(number, lambda *_: asked.append(1)).name}")
names = "SLURM_NODEID NODE_RANK NNODES NPROC_PER_NODE MASTER_ADDR MODULE LAUNCHER SRUN_CPUS_PER_TASK SET_UP GANDIST_SECRET"
print("started", sys.argv[1:], {name: os.environ.get(name) for name in names.split()})
hosts = os.environ.get("HOSTFILE")
print("hosts", Path(hosts).read_text().split() if hosts else None, flush=True)
*_, deed, step = sys.argv
while (deed == "stop" and not asked) or (deed == "fail" and not Path(step).exists()):
    time.sleep(0.05)
if deed in ("stop", "at-once", "finish") and os.environ["NODE_RANK"] == "0":
    time.sleep(0.5)
    Path(os.environ["GANDIST_OUTCOME"]).write_text(f"{'finished' if deed == 'finish' else 'stopped'} {step}\\n")
sys.exit(deed == "fail")
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "project").mkdir()
    for name in ("slurm", "launch", "gandist", "configs"):
        (folder / "project" / name).symlink_to(ROOT / name)
    (folder / "project" / "stand_in.py").write_text(STAND_IN)
    (folder / "project" / "setup.sh").write_text(f'export SET_UP=yes\nset -- {shlex.quote(sys.executable)} stand_in.py "$@"\n')
    cluster = Cluster(folder / "cluster", folder / "project")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Run:
    """A training in the cluster."""

    def __init__(self, cluster: Cluster, cache_dir: Path, name: str):
        self.cluster = cluster
        self.folder = cluster.work / "runs" / name
        self.config = cluster.work / f"{name}.yaml"
        self.arguments = ["--config", self.config.name, *QUIET, f"data.cache_dir={cache_dir}", f"run_dir=runs/{name}"]
        self.plan_steps(100_000)

    def plan_steps(self, number: int) -> None:
        """From its next start on, it ends after so many steps."""
        self.config.write_text(yaml.safe_dump({"train": {"kimg": (number - 0.5) * 0.064}}))

    def submit(self, *options: str, **environment: str) -> str:
        return self.cluster.submit(*options, "slurm/train.sbatch", *self.arguments, **ONE | environment)

    @property
    def rows(self) -> list[int]:
        """The steps of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def saved(self) -> int:
        return max((int(path.name[5:]) for path in (self.folder / "checkpoints").glob("step-????????")), default=0)

    def await_steps(self, number: int) -> None:
        until(lambda: max(self.rows, default=0) >= number)


@pytest.fixture(scope="module")
def lives(cluster: Cluster, cache_dir: Path) -> Iterator[dict[str, Future]]:
    """What befalls some trainings, side by side: they wait more than they compute."""
    pool = ThreadPoolExecutor(3)
    yield {
        life.__name__: pool.submit(life, Run(cluster, cache_dir, life.__name__))
        for life in (time_limit_and_node_failure, preemption_and_cancel, chain, array_and_evaluation, deepspeed)
    }
    pool.shutdown(wait=False, cancel_futures=True)


def time_limit_and_node_failure(run: Run) -> dict:
    seen = {}
    # With a minute to live, the signal comes while the ranks start, or soon after.
    job = run.submit("--partition=frail", "--nodes=2", "--time=1")
    run.cluster.await_job(job, Restarts="1")
    seen["limit"] = run.rows[-1], run.saved
    run.cluster.start_now(job, "TimeLimit=60")
    until(lambda: run.saved > seen["limit"][0])
    run.cluster.kill_node("n4")
    run.cluster.await_job(job, Restarts="2")
    seen["failure"] = run.rows[-1], run.saved
    run.cluster.start_node("n4")
    run.plan_steps(seen["failure"][0] + 5)
    run.cluster.start_now(job)
    seen["job"] = run.cluster.await_job(job, JobState="COMPLETED")
    return seen | {"steps": run.rows, "saved": run.saved, "log": run.cluster.log(job)}


def preemption_and_cancel(run: Run) -> dict:
    seen = {}
    job = run.submit("--partition=patient")
    run.await_steps(10)
    urgent = run.cluster.submit("--partition=urgent", "--exclusive", "--wrap=sleep 1")
    run.cluster.await_job(job, Restarts="1")
    seen["preempted"] = run.rows[-1], run.saved
    run.cluster.await_job(urgent, JobState="COMPLETED")
    run.cluster.start_now(job)
    run.await_steps(seen["preempted"][0] + 10)
    run.cluster.run("scancel", job)
    seen["job"] = run.cluster.await_job(job, JobState="CANCELLED")
    return seen | {"steps": run.rows, "saved": run.saved, "log": run.cluster.log(job)}


def chain(run: Run) -> dict:
    command = ["bash", "slurm/chain.sh", "3", f"--output={run.cluster.folder}/%A-%a.log", "slurm/train.sbatch", *run.arguments]
    jobs = run.cluster.run(*command, **ONE).split()
    run.await_steps(10)
    run.plan_steps(run.rows[-1] + 20)
    run.cluster.run("scancel", "--batch", "--signal=USR2", jobs[0])  # what Slurm does before the time limit
    ended = [run.cluster.await_job(job, JobState="COMPLETED") for job in jobs]
    return {"jobs": ended, "steps": run.rows, "saved": run.saved, "logs": [run.cluster.log(job) for job in jobs]}


def array_and_evaluation(run: Run) -> dict:
    run.plan_steps(3)
    sweep = run.cluster.work / "sweep.txt"
    sweep.write_text("'train.batch_size=32' seed=1\ntrain.batch_siez=32\n")
    job = run.cluster.submit("--array=1-2", "slurm/sweep.sbatch", sweep.name, *run.arguments, **ONE)
    tasks = [run.cluster.await_job(f"{job}_1", JobState="COMPLETED"), run.cluster.await_job(f"{job}_2", JobState="FAILED")]
    arguments = [f"runs/{run.folder.name}/1", "evaluation.metrics=[accuracy]"]
    evaluation = run.cluster.submit("slurm/evaluate.sbatch", *arguments, **ONE)
    run.cluster.await_job(evaluation, JobState="COMPLETED")
    logs = [run.cluster.log(job, task) for task in ("1", "2")]
    return {"tasks": tasks, "folder": run.folder, "logs": logs, "evaluation": run.cluster.log(evaluation)}


def deepspeed(run: Run) -> dict:
    job = run.submit("--nodes=2", LAUNCHER="deepspeed")
    run.await_steps(5)
    run.cluster.run("scancel", "--batch", "--signal=USR2", job)
    run.cluster.await_job(job, JobState="PENDING", Restarts="1")
    return {"steps": run.rows, "saved": run.saved, "log": run.cluster.log(job)}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_what_the_launcher_is_started_with(cluster: Cluster, launcher: str) -> None:
    sizes = ["--nodes=2", "--gpus-per-node=8", "--cpus-per-task=12"]
    command = [*sizes, "slurm/train.sbatch", "a=b c", "finish", "7"]
    job = cluster.submit(*command, GANDIST_ENV_SETUP="setup.sh", LAUNCHER=launcher)
    cluster.await_job(job, JobState="COMPLETED")
    log = cluster.log(job)
    nodes = re.findall(r"started (\[.*\]) (\{.*\})", log)
    assert len(nodes) == 2, log
    secrets = set()
    for arguments, variables in nodes:
        assert ast.literal_eval(arguments) == ["bash", f"launch/{launcher}.sh", "a=b c", "finish", "7"]
        values = ast.literal_eval(variables)
        assert values["NODE_RANK"] == values.pop("SLURM_NODEID")
        secrets.add(values.pop("GANDIST_SECRET"))
        assert values | {"NODE_RANK": ""} == {
            "NODE_RANK": "",
            "NNODES": "2",
            "NPROC_PER_NODE": "8",
            "MASTER_ADDR": "127.0.0.1",
            "MODULE": "gandist.train",
            "LAUNCHER": launcher,
            "SRUN_CPUS_PER_TASK": "12",
            "SET_UP": "yes",
        }
    assert len(secrets) == 1
    assert re.fullmatch("[0-9a-f]{32}", secrets.pop())
    hosts = {"torchrun": "None", "deepspeed": "['n1', 'slots=8', 'n2', 'slots=8']"}
    assert log.count(f"hosts {hosts[launcher]}") == 2
    assert log.count("SIGTERM was SIG_IGN") == log.count("SIGUSR2 was SIG_IGN") == 2
    assert not list(cluster.work.glob("slurm-*"))


SIGNALS = {
    "USR2 to the script": ["--batch", "--signal=USR2"],
    "TERM to the script": ["--batch", "--signal=TERM"],
    "USR2 to the processes": ["--signal=USR2"],
    "TERM to the processes": ["--signal=TERM"],
    "USR2 to all of them": ["--full", "--signal=USR2"],
}


@pytest.fixture(scope="module")
def stopped(cluster: Cluster) -> dict[str, dict[str, str]]:
    """Jobs of two nodes after signals while they run."""
    started = [cluster.submit("--nodes=2", "slurm/train.sbatch", "stop", "5", GANDIST_ENV_SETUP="setup.sh") for _ in SIGNALS]
    jobs = dict(zip(SIGNALS, started, strict=True))
    for name, job in jobs.items():
        until(lambda job=job: cluster.log(job).count("hosts") == 2)
        cluster.run("scancel", *SIGNALS[name], job)

    def is_pending(job: dict[str, str]) -> bool:
        return job["JobState"] == "PENDING" and job["Reason"] != "None"  # which it is until the scheduler has looked at it

    until(lambda: all(is_pending(cluster.job(job)) for job in jobs.values()))
    return {name: cluster.job(job) | {"log": cluster.log(job)} for name, job in jobs.items()}


@pytest.mark.parametrize("name", SIGNALS)
def test_a_stopped_job_requeues_itself(stopped, name: str) -> None:
    assert stopped[name]["Restarts"] == "1"
    assert stopped[name]["Reason"] == "BeginTime"
    assert "\ntrain.sbatch: saved at step 5; requeues itself\n" in stopped[name]["log"]


def test_a_job_that_gets_no_further_is_not_requeued_again(cluster: Cluster) -> None:
    job = cluster.submit("slurm/train.sbatch", "at-once", "5", GANDIST_ENV_SETUP="setup.sh")
    cluster.await_job(job, JobState="PENDING", Restarts="1")
    cluster.start_now(job)
    cluster.await_job(job, JobState="FAILED")
    assert "saved at step 5, no further than before the last requeue: not requeued again" in cluster.log(job)


def test_a_job_that_must_not_be_requeued(cluster: Cluster) -> None:
    job = cluster.submit("--no-requeue", "slurm/train.sbatch", "at-once", "5", GANDIST_ENV_SETUP="setup.sh")
    cluster.await_job(job, JobState="FAILED")
    assert "Slurm refuses to requeue this job; submit it again to go on" in cluster.log(job)


def test_a_job_that_fails_while_a_node_is_silent_waits_for_its_requeue(cluster: Cluster) -> None:
    command = ["--partition=silent", "--nodes=2", "slurm/train.sbatch", "fail", "failure"]
    job = cluster.submit(*command, GANDIST_ENV_SETUP="setup.sh")
    until(lambda: cluster.log(job).count("hosts") == 2)
    cluster.silence_node("n6")
    (cluster.work / "failure").touch()
    cluster.await_job(job, Restarts="1")
    until(lambda: "Node failure on n6" in cluster.log(job))


def test_a_chain_ends_where_a_job_of_it_fails(cluster: Cluster) -> None:
    command = ["bash", "slurm/chain.sh", "3", f"--output={cluster.folder}/%A-%a.log", "slurm/train.sbatch", "fail", "."]
    first, *others = cluster.run(*command, GANDIST_ENV_SETUP="setup.sh").split()
    cluster.await_job(first, JobState="FAILED")
    until(lambda: all(cluster.job(job)["JobState"] == "CANCELLED" for job in others))
    assert cluster.job(first)["Restarts"] == "0"
    assert [cluster.log(job) for job in others] == ["", ""]


def test_the_doctor_looks_at_two_nodes(cluster: Cluster, cache_dir: Path) -> None:
    sizes = ["--nodes=2", "--ntasks-per-node=1"]
    options = ["tracking.wandb=off", "run_dir=runs/new", f"data.cache_dir={cache_dir}"]
    said = cluster.run("srun", *sizes, sys.executable, "-m", "gandist.doctor", *options, OMP_NUM_THREADS="1")
    assert re.search(r"^ok +ranks +2: 0-1 on \S+, met after ", said, re.MULTILINE), said
    assert re.search(r"^ok +all-reduce +gloo sums \d+ MiB in ", said, re.MULTILINE), said
    assert "\n0 error(s), " in said


COMMANDS = [
    (path.name, command)
    for path in (ROOT / "README.md", ROOT / "docs" / "slurm.md")
    for command in re.findall(
        r"^((?:sbatch|bash slurm/chain.sh) .*?)(?: +#.*)?$", path.read_text().replace("\\\n", ""), re.MULTILINE
    )
]


@pytest.mark.parametrize(("file", "command"), COMMANDS)
def test_slurm_would_take_the_documented_commands(cluster: Cluster, file: str, command: str) -> None:
    options = re.sub(r"^(sbatch|bash slurm/chain.sh \d+)", "", command)
    assert "to start at" in cluster.run("sbatch", "--test-only", *shlex.split(options))


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate.sbatch", "sweep.sbatch"])
def test_slurm_would_take_every_script_as_it_is(cluster: Cluster, script: str) -> None:
    options = ["--array=1-2"] if script == "sweep.sbatch" else []
    assert "to start at" in cluster.run("sbatch", "--test-only", *options, f"slurm/{script}")


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate.sbatch", "sweep.sbatch", "chain.sh"])
def test_help(script: str) -> None:
    result = run_command("bash", f"slurm/{script}", "--help")
    assert result.returncode == 0
    assert f" slurm/{'train.sbatch' if script == 'chain.sh' else script} " in result.stdout
    assert "#" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "problem"),
    [
        (["train.sbatch"], {}, "SLURM_JOB_ID: submit this with sbatch"),
        (["train.sbatch", "--fresh"], {"SLURM_JOB_ID": "1"}, "--fresh would start over at every requeue"),
        (["nodes.sh"], {"LAUNCHER": "mpi"}, "LAUNCHER=mpi is neither torchrun nor deepspeed"),
        (["nodes.sh"], {"GANDIST_ENV_SETUP": "no-such.sh"}, "cannot read GANDIST_ENV_SETUP=no-such.sh"),
        (["sweep.sbatch", "no-such.txt"], {}, "cannot read 'no-such.txt'"),
        (["sweep.sbatch", "constraints.txt"], {}, "submit this with sbatch --array=1-"),
        (["sweep.sbatch", "constraints.txt"], {"SLURM_ARRAY_TASK_ID": "9999"}, "constraints.txt has no line 9999"),
    ],
)
def test_what_a_script_misses(monkeypatch, arguments: list[str], variables: dict[str, str], problem: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run_command("bash", f"slurm/{arguments[0]}", *arguments[1:])
    assert result.returncode == 1
    assert problem in result.stderr


def test_a_script_misses_the_end_of_a_quote(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sweep.txt").write_text("a=1\na=it's b=2\n")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    result = run_command("bash", "slurm/sweep.sbatch", str(tmp_path / "sweep.txt"))
    assert result.returncode == 1
    assert result.stderr == f"sweep.sbatch: {tmp_path}/sweep.txt, line 2: a quote is not closed: a=it's b=2\n"


def test_a_script_misses_the_outcome(tmp_path: Path, monkeypatch) -> None:
    """It is empty, before the run and after; with a stand-in for what starts the ranks."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "nodes.sh").write_text('echo trained\n: >"$GANDIST_OUTCOME"\n')
    (tmp_path / "slurm-1.outcome").touch()
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho ' JobState=COMPLETING '\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.setenv(name, "1")
    result = run_command("bash", str(ROOT / "slurm" / "train.sbatch"), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "trained\n")
    assert result.stderr == f"train.sbatch: gandist.train did not say in {tmp_path}/slurm-1.outcome how it ended\n"


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate.sbatch", "sweep.sbatch"])
def test_another_folder_is_refused(tmp_path: Path, monkeypatch, script: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    result = run_command("bash", str(ROOT / "slurm" / script), str(ROOT / "README.md"), cwd=tmp_path)
    assert result.returncode == 1
    assert "is not the project's folder: submit from there, or with sbatch --chdir=FOLDER" in result.stderr


def test_time_limit_and_node_failure(lives) -> None:
    life = lives["time_limit_and_node_failure"].result()
    step, saved = life["limit"]
    assert saved == step
    assert f"\ntrain.sbatch: saved at step {step}; requeues itself\n" in life["log"]
    assert f"/step-{step:08d}\n" in life["log"].partition("resumed from ")[2]
    step, saved = life["failure"]
    assert saved > life["limit"][0], "a checkpoint after the first requeue"
    assert life["log"].count("\nresumed from ") == 2
    assert f"\nresumed from {Path('runs') / 'time_limit_and_node_failure'}/checkpoints/step-{saved:08d}\n" in life["log"]
    assert "\nfinished: " in life["log"]
    assert (life["job"]["Restarts"], life["job"]["ExitCode"]) == ("2", "0:0")
    assert life["steps"] == sorted(set(life["steps"]))
    assert life["saved"] == life["steps"][-1] == step + 5


def test_preemption_and_cancel(lives) -> None:
    life = lives["preemption_and_cancel"].result()
    step, saved = life["preempted"]
    assert saved == step
    assert f"\nresumed from runs/preemption_and_cancel/checkpoints/step-{step:08d}\n" in life["log"]
    assert f"train.sbatch: saved at step {life['saved']} while Slurm ends this job" in life["log"]
    assert life["saved"] == life["steps"][-1] > step
    assert life["steps"] == sorted(set(life["steps"]))
    assert life["job"]["Restarts"] == "1"


def test_chain(lives) -> None:
    life = lives["chain"].result()
    first, second, third = life["logs"]
    assert "\nstopped by a signal at kimg " in first
    assert "\nresumed from " in second
    assert "\nfinished: " in second
    assert " is finished: " in third
    assert [(job["ExitCode"], job["Restarts"]) for job in life["jobs"]] == [("0:0", "0")] * 3
    assert life["saved"] == life["steps"][-1]
    assert life["steps"] == sorted(set(life["steps"]))


def test_array(lives) -> None:
    life = lives["array_and_evaluation"].result()
    config = yaml.safe_load((life["folder"] / "1" / "config.yaml").read_text())
    assert (config["seed"], config["train"]["batch_size"]) == (1, 32)
    assert ["\nfinished: " in log for log in life["logs"]] == [True, False]
    assert "train.batch_siez" in life["logs"][1]
    assert [job["Restarts"] for job in life["tasks"]] == ["0"] * 2


def test_evaluation(lives) -> None:
    evaluation = lives["array_and_evaluation"].result()["evaluation"]
    assert "/step-00000005\n" in evaluation
    assert "\nclassification/test_top1 " in evaluation


def test_deepspeed(lives) -> None:
    life = lives["deepspeed"].result()
    assert ": 2 rank(s) on cpu" in life["log"]
    assert f"\ntrain.sbatch: saved at step {life['saved']}; requeues itself\n" in life["log"]
    assert life["saved"] == life["steps"][-1]
