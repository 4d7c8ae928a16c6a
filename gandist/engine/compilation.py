"""Whether objectives are compiled, how, and where the code is kept."""

import os
import shutil
import socket
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from gandist.config import TrainConfig
from gandist.distributed import World
from gandist.engine.player import Player
from gandist.errors import ConfigError
from gandist.watchdog import Watchdog

PATIENCE = 6  # times as long as anything else a compilation may take: minutes, where many ranks share few cores
PACKAGES = {"C compiler": "gcc", "C++ compiler": "g++", "Python.h": "python3-dev"}  # names as in Debian
COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # names the folder of torch.compile's code


def choose_compile(train: TrainConfig, world: World) -> bool:
    """Whether steps are compiled; `auto`: on GPUs, where every node has what that takes, and else with a warning.

    Every rank calls it, and all get the same answer. Raises ConfigError where compilation is asked for and cannot be.
    """
    on_gpu = world.device.type == "cuda"
    wanted = on_gpu and not train.activation_checkpointing if train.compile == "auto" else train.compile
    if not wanted:
        return False
    lacking = dict(found for found in world.gather((socket.gethostname(), missing_to_compile(on_gpu))) if found[1])
    if not lacking:
        return True
    where = "; ".join(f"{host} has no {' and no '.join(missing)}" for host, missing in lacking.items())
    advice = f"install {' and '.join(dict.fromkeys(PACKAGES[each] for missing in lacking.values() for each in missing))}"
    if train.compile != "auto":
        raise ConfigError(f"train.compile=true: {where}, which torch.compile needs: {advice}, or say train.compile=false")
    if world.is_main:
        print(f"warning: steps are not compiled, which would make them faster: {where}: {advice}", flush=True)
    return False


def missing_to_compile(on_gpu: bool) -> list[str]:
    """What torch.compile, or Triton on a GPU, will not find on this node, of PACKAGES."""
    language, chosen, usual = ("C", "CC", ["gcc", "clang"]) if on_gpu else ("C++", "CXX", ["g++"])
    compilers = [os.environ[chosen]] if os.environ.get(chosen) else usual
    variables = ("CPATH", "C_INCLUDE_PATH" if on_gpu else "CPLUS_INCLUDE_PATH")
    folders = [sysconfig.get_path("include", "posix_prefix")]
    folders += [folder for name in variables for folder in os.environ.get(name, "").split(os.pathsep)]
    found = {
        f"{language} compiler": any(map(shutil.which, compilers)),
        "Python.h": any((Path(folder) / "Python.h").is_file() for folder in folders),
    }
    return [name for name in found if not found[name]]


def compile_player(player: Player) -> None:
    """Its objective, forward and backward, and its power iteration become generated code, at their first call."""
    import torch._dynamo  # slow, and seldom needed
    import torch._functorch.config

    # Graphs with sums over ranks are kept, too.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    # DDP would have the graph cut at the bounds of its buckets, and a cut through a penalty's derivative cannot be compiled.
    torch._dynamo.config.optimize_ddp = False
    player.objective.compile()
    player.power_iteration.compile()


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
