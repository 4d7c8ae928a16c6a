"""Whether objectives are compiled, how, and where the code is kept."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from gandist.config import TrainConfig
from gandist.distributed import World
from gandist.watchdog import Watchdog

PATIENCE = 6  # times as long as anything else a compilation may take: minutes, where many ranks share few cores
COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # names the folder of torch.compile's code


def choose_compile(train: TrainConfig, device: torch.device) -> bool:
    """`auto` compiles on GPUs where a C compiler is at hand, which torch.compile needs."""
    if train.compile == "auto":
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
        return device.type == "cuda" and compiler is not None and not train.activation_checkpointing
    return train.compile


def compile_objective(objective: nn.Module) -> None:
    """Its forward and backward become generated code, at the first call."""
    import torch._dynamo  # slow, and seldom needed
    import torch._functorch.config

    # Graphs with sums over ranks are kept, too.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    # DDP would have the graph cut at the bounds of its buckets, and a cut through a penalty's derivative cannot be compiled.
    torch._dynamo.config.optimize_ddp = False
    objective.compile()


def keep_compiled(folder: Path, world: World) -> None:
    """Has torch.compile keep its code, Triton's kernels with it, in `folder`, where a resumed run finds it on whatever nodes,
    unless TORCHINDUCTOR_CACHE_DIR names another place.

    Each node has a part of its own, as nodes that replace each other's files disturb each other on a network's disk; and each
    kind of processor, for which C++ is compiled.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow, too

    if os.environ.get(COMPILED, default_cache_dir()) == default_cache_dir():  # to which torch itself sets it
        os.environ[COMPILED] = str(folder / f"node-{world.rank // world.local_size}-{_processor()}")


class Compilations:
    """The first update of each kind, in which torch.compile makes its code: it is announced, and given more time.

    An exchange within it may wait for a rank that still compiles, so it is given as much.
    """

    def __init__(self, world: World, watchdog: Watchdog):
        self._world = world
        self._watchdog = watchdog
        self._compiled: set[str] = set()

    @contextmanager
    def of(self, update: str) -> Iterator[None]:
        """Around every update, on every rank. update: what kind it is, as in "discriminator's update"."""
        if update in self._compiled:
            yield
            return
        self._compiled.add(update)
        start = time.perf_counter()
        self._say(f"compiling the {update} …")
        self._watchdog.doing(f"compiling the {update}", patience=PATIENCE)
        with self._world.patient(PATIENCE):
            yield
        self._watchdog.doing("computing, or waiting for other ranks")
        self._say(f"compiled the {update} in {time.perf_counter() - start:.0f} s")

    def _say(self, text: str) -> None:
        if self._world.is_main:
            print(text, flush=True)


def _processor() -> str:
    """A short name for the instructions that this node's processor has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sha256(instructions.encode()).hexdigest()[:8]
