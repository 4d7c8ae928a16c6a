"""Whether objectives are compiled, how, and where the code is kept."""

import os
import shutil
import sysconfig
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from gandist.config import TrainConfig
from gandist.distributed import World

COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # names the folder of torch.compile's code


def choose_compile(train: TrainConfig, device: torch.device) -> bool:
    """`auto` compiles on GPUs where torch.compile has what it needs."""
    if train.compile == "auto":
        return device.type == "cuda" and not missing_for_compiling() and not train.activation_checkpointing
    return train.compile


def missing_for_compiling() -> list[str]:
    """What torch.compile needs on this node and does not find."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "cc", "clang"]
    found = {
        "a C compiler": any(map(shutil.which, compilers)),
        "Python.h": Path(sysconfig.get_path("include"), "Python.h").is_file(),
    }
    return [name for name, is_there in found.items() if not is_there]


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


def _processor() -> str:
    """A short name for the instructions that this node's processor has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sha256(instructions.encode()).hexdigest()[:8]
