"""Tells whether this node, or all nodes of a job, can train: `torchrun --nproc_per_node=N -m gandist.doctor`."""

import argparse
import signal
import socket
import sys
import time
from collections.abc import Sequence

import torch

from gandist.arguments import add_config
from gandist.config_file import load_config
from gandist.distributed import choose_device, connect, run
from gandist.doctor.exchange import Seen, check_all_reduce, share, sharing_gpus
from gandist.doctor.finding import ERROR, OK, WARNING, Check, Finding, Findings, Place, Report, differing, examine
from gandist.doctor.gpu import check_gpu, check_precision, check_step, gpu_identity
from gandist.doctor.node import (
    check_cache_dir,
    check_compiling,
    check_open_files,
    check_packages,
    check_run_dir,
    check_shared_memory,
    check_versions,
    check_wandb,
)
from gandist.errors import GandistError
from gandist.launcher import Launch, read_launch
from gandist.rendezvous import by_host, join_timeout, meet

EXCHANGE_MINUTES = 1.0
OF_EVERY_NODE = {
    "versions": check_versions,
    "packages": check_packages,
    "compiler": check_compiling,
    "shm": check_shared_memory,
    "files": check_open_files,
    "run_dir": check_run_dir,
    "cache_dir": check_cache_dir,
}
OF_RANK_0 = {"wandb": check_wandb}
OF_EVERY_RANK = {"gpu": check_gpu, "precision": check_precision, "step": check_step}
EXAMPLES = """\
examples:
  python -m gandist.doctor
      looks at this node
  srun --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 python -m gandist.doctor --config my.yaml run_dir=/shared/runs/a
      looks at every node, and at the network between them, for this run

The exit status is 1 if there is an error, 0 if there are warnings or none.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc_per_node=N -m gandist.doctor",
        description="Check GPUs, software, disks and network before the first job, with the arguments of gandist.train.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser)
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    launch = read_launch()
    report = Report(prints=launch.rank == 0)
    findings: Findings = {}

    def look(checks: dict[str, Check], place: Place) -> None:
        for name, check in checks.items():
            findings[name] = examine(check, place)
            report.add(name, findings[name])

    # What rank 0 finds by itself is said before the ranks meet: perhaps they never do.
    report.say(f"rank 0 of {launch.size}, on {socket.gethostname()}")
    place = Place(config, launch)
    if launch.local_rank == 0:
        look(OF_EVERY_NODE, place)
    if launch.rank == 0:
        look(OF_RANK_0, place)
    place = place._replace(device=usable_device(launch))
    look(OF_EVERY_RANK, place)
    if launch.size > 1:
        meet_and_exchange(report, findings, place)
    errors, warnings = report.counts[ERROR], report.counts[WARNING]
    report.say(f"{errors} error(s), {warnings} warning(s)")
    if errors and launch.rank == 0:
        sys.exit(1)


def usable_device(launch: Launch) -> torch.device:
    """That of this rank. Raises GandistError."""
    try:
        return choose_device(launch)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        problem = f"the GPU of process {launch.local_rank} of {socket.gethostname()} cannot be used ({reason})"
        raise GandistError(f"{problem}: `nvidia-smi` shows its state and who uses it") from error


def meet_and_exchange(report: Report, findings: Findings, place: Place) -> None:
    """Adds what other ranks found, and what can only be seen together. Raises GandistError."""
    launch, device, start = place.launch, place.device, time.monotonic()
    store = meet(launch, join_timeout())
    met = f"met after {time.monotonic() - start:.1f} s"
    everyone = share(store, launch, Seen(socket.gethostname(), gpu_identity(device), findings), join_timeout())
    if launch.rank == 0:
        report.say("all ranks")
        report.add("ranks", Finding(OK, f"{launch.size}: {by_host(store, list(everyone))}", figures=met))
        others = {rank: seen.findings for rank, seen in everyone.items() if rank}
        for name, finding, ranks in differing(findings, others):
            report.add(name, finding, by_host(store, ranks))
        for ranks in sharing_gpus(everyone):
            advice = "start one rank a GPU; with srun, --gpus-per-task=1 or --gpus-per-node"
            report.add("gpu", Finding(ERROR, "the same GPU", advice), by_host(store, ranks))
    start = time.monotonic()
    with connect(launch, device, store, EXCHANGE_MINUTES) as world:
        connected = f"connected after {time.monotonic() - start:.1f} s"
        finding = check_all_reduce(world)
    report.add("all-reduce", finding._replace(figures=", ".join(filter(None, [finding.figures, connected]))))


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once: there is nothing to tidy up
    main()


if __name__ == "__main__":
    run(_start)
