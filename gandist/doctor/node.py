"""Checks of a node: software, memory that processes share, files, disks, and the way to Weights & Biases."""

import math
import os
import platform
import resource
import shutil
import tempfile
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import requests
import torch
from packaging.requirements import Requirement

from gandist.doctor.finding import ERROR, OK, WARNING, Finding, Place
from gandist.engine.compilation import PACKAGES as PACKAGES_TO_COMPILE
from gandist.engine.compilation import missing_to_compile
from gandist.environment import PACKAGES
from gandist.network import is_reachable

SHARED_MEMORY = Path("/dev/shm")
NCCL_SHARED = 10**9  # bytes, as NCCL's documentation advises for containers
OPEN_FILES = 1024  # a quarter of them are for shards
FREE = 10**9  # bytes
WRITTEN, CHUNK = 2**26, 2**22  # bytes
WRITING_TIME = 3.0  # s
SLOW = 50.0  # MB/s
OPTIONAL = {"deepspeed": "engine=deepspeed", "plotly": "gandist.report", "wandb": "tracking.wandb other than off"}


def check_versions(place: Place) -> Finding:
    cuda = f", CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if torch.version.cuda else ""
    return Finding(OK, f"Python {platform.python_version()}, torch {torch.__version__}{cuda}")


def check_packages(place: Place) -> Finding:
    try:
        wanted = [Requirement(text) for text in requires("gandist") or []]
    except PackageNotFoundError:
        return Finding(WARNING, "gandist is not installed, so versions are not checked", "pip install -e . in its folder")
    wanted = [each for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})]
    missing, unfit = [], []
    for each in wanted:
        try:
            if not each.specifier.contains(version(each.name), prereleases=True):
                unfit.append(f"{each.name} {version(each.name)} is not {each.specifier}")
        except PackageNotFoundError:
            missing.append(each.name)
    if unfit or missing:
        optional = not unfit and OPTIONAL.keys() >= set(missing)
        named = [*unfit, *(f"{name} is missing{f', for {OPTIONAL[name]}' * (name in OPTIONAL)}" for name in missing)]
        return Finding(WARNING if optional else ERROR, "; ".join(named), "pip install -e . in gandist's folder")
    main = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return Finding(OK, f"{len(wanted)} at supported versions, among them {main}")


def check_compiling(place: Place) -> Finding:
    if missing := missing_to_compile(torch.cuda.is_available()):
        status = ERROR if place.config.train.compile is True else WARNING
        packages = " and ".join(PACKAGES_TO_COMPILE[each] for each in missing)
        advice = f"install {packages}, or load modules that have them; else steps run slower, without torch.compile"
        return Finding(status, f"no {' and no '.join(missing)}", advice)
    return Finding(OK, "a compiler and Python.h, for torch.compile")


def check_shared_memory(place: Place) -> Finding:
    from gandist.data.loader import SHARED_BATCHES  # slow

    data, launch = place.config.data, place.launch
    batch = math.ceil(place.config.train.batch_size / launch.size) * math.prod(data.size) * data.channels
    wanted = launch.local_size * data.num_workers * SHARED_BATCHES * batch
    if torch.cuda.is_available() and launch.local_size > 1:
        wanted += NCCL_SHARED
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < wanted:
        advice = "in a container, docker run --ipc=host or --shm-size; or fewer data.num_workers"
        text = f"{SHARED_MEMORY} is smaller than the {_size(wanted)} that batches and NCCL may take"
        return Finding(WARNING, text, advice, f"{_size(free)} free")
    return Finding(OK, str(SHARED_MEMORY), figures=f"{_size(free)} free")


def check_open_files(place: Place) -> Finding:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < OPEN_FILES:
        advice = f"ulimit -Hn {OPEN_FILES} or more, which is an administrator's to allow (limits.conf, Slurm's LimitNOFILE)"
        return Finding(WARNING, f"a process may open {most} files at most", advice)
    return Finding(OK, f"a process may open {'any number' if most == resource.RLIM_INFINITY else most}")


def check_run_dir(place: Place) -> Finding:
    return _check_folder("run_dir", place.config.run_dir)


def check_cache_dir(place: Place) -> Finding:
    return _check_folder("data.cache_dir", place.config.data.cache_folder)


def check_wandb(place: Place) -> Finding:
    mode = place.config.tracking.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "auto")
    if mode in ("off", "disabled", "offline"):
        return Finding(OK, mode)
    try:
        import wandb  # slow

        url = wandb.setup().settings.base_url
    except Exception as error:  # not installed, or settings that it refuses
        reason = " ".join(str(error).split())
        return Finding(WARNING, f"wandb cannot be used ({reason})", "mend that, or train with tracking.wandb=off")
    offline = "runs are kept in run_dir/wandb, and `wandb sync` sends them later"
    if not is_reachable(url):
        return Finding(WARNING, f"{url} cannot be reached", offline)
    if not (os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(url)):
        return Finding(WARNING, f"{url} can be reached, but there is no key", f"`wandb login` stores one; without, {offline}")
    return Finding(OK, f"{url} can be reached, and there is a key")


def _check_folder(key: str, folder: Path) -> Finding:
    """Whether the folder can be written to, or made, and how fast. Nothing is left behind."""
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        free = shutil.disk_usage(existing).free
        speed = _write_speed(existing)
    except OSError as error:
        advice = f"make room, or choose another folder: {key}=FOLDER"
        return Finding(ERROR, f"{key}={folder}: {existing} cannot be written to ({error.strerror})", advice)
    text, figures = f"{key}={folder}", f"{_size(free)} free, writes {speed:,.0f} MB/s"
    if free < FREE:
        return Finding(WARNING, f"{text} is almost full", f"make room, or choose another folder: {key}=FOLDER", figures)
    if speed < SLOW:
        return Finding(WARNING, f"{text} is slow to write to", f"a faster file system shortens waits: {key}=FOLDER", figures)
    return Finding(OK, text, figures=figures)


def _write_speed(folder: Path) -> float:
    """MB/s to the disk itself, not into memory. The file has no name that could stay behind."""
    chunk, written, start = os.urandom(CHUNK), 0, time.monotonic()
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        while written < WRITTEN and time.monotonic() - start < WRITING_TIME:
            written += file.write(chunk)
        os.fsync(file.fileno())
    return written / 1e6 / (time.monotonic() - start)


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"
