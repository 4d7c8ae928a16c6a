"""What the machine has that a run on a GPU depends on: `python -m benchmarks.machine`."""

import argparse
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.report import header, record

COLUMNS = ["machine", ""]
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit", "temperature.gpu")


def facts() -> dict[str, str]:
    """Name → value; "none" for what is not there."""
    found = {}
    for ask in (_gpu, _software, _compiler, _host):
        try:
            found |= ask()
        except Exception as error:  # such as a driver that does not fit: what else there is is wanted all the more
            found[ask.__name__.strip("_")] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return found


def _gpu() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"GPU": "none"}
    of = torch.cuda.get_device_properties(0)
    clocks = _nvidia_smi(CLOCKS)
    return {
        "GPU": f"{torch.cuda.device_count()} × {of.name}",
        "memory": f"{of.total_memory / 2**30:.0f} GiB, {of.multi_processor_count} multiprocessors, sm_{of.major}{of.minor}",
        "driver": (_nvidia_smi(["driver_version"]) or ["none"])[0],
        "clocks": ", ".join(f"{name} {value}" for name, value in zip(CLOCKS, clocks, strict=True)) if clocks else "none",
    }


def _nvidia_smi(names: Sequence[str]) -> list[str]:
    """Values of the first GPU; none without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in told.split(",")]


def _software() -> dict[str, str]:
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else ()
    found = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, nccl)),
        "triton": _version("triton"),
        "Python": platform.python_version(),
    }
    return {name: str(value or "none") for name, value in found.items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _compiler() -> dict[str, str]:
    """What torch.compile needs."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    compiler = shutil.which("gcc") or shutil.which("cc")
    return {"C compiler": compiler or "none", "Python.h": str(header) if header.exists() else "none"}


def _host() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = shutil.disk_usage("/dev/shm").total
    return {"host": f"{len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB, /dev/shm {shared / 2**30:.0f} GiB"}


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__).parse_args(arguments)
    print(header())
    for name, value in facts().items():
        record("machine", COLUMNS, [name, value])
        print(f"{name + ':':<12}{value}", flush=True)


if __name__ == "__main__":
    main()
