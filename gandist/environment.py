"""Where and how a run was started: what one needs to do it again."""

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import gandist
from gandist.distributed import World
from gandist.launcher import read_job
from gandist.redaction import redacted

PACKAGES = ("torchvision", "webdataset", "deepspeed", "wandb", "numpy")


def describe_start(world: World) -> dict[str, Any]:
    """Time, command, processes, device, versions, revision of the code, and Slurm's job."""
    job = read_job()
    versions = {"gandist": gandist.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(world),
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "git": _revision(),
        "slurm_job": job and job.id,
        "versions": versions | _versions(),
    }


def _versions() -> dict[str, str]:
    """Of those that are installed: a run without W&B and DeepSpeed needs neither."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _command(world: World) -> str:
    """As one would type it, whatever has started the processes, without secrets."""
    nodes = world.size // world.local_size
    launcher = f"torchrun --nproc_per_node={world.local_size}" if world.size > 1 else "python"
    if nodes > 1:
        launcher += f" --nnodes={nodes}"
    return f"{launcher} -m gandist.train {shlex.join(redacted(sys.argv[1:]))}".rstrip()


def _revision() -> str | None:
    """Of the repository that gandist is imported from, with a `+` where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
