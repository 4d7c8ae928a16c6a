"""The arithmetic of a run: its number formats, and whether it is deterministic."""

import os
from dataclasses import dataclass
from functools import partial

import torch

from gandist.objective import Autocast

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """name: as in `train.precision`; dtype: of parameters, images and losses; autocast: for the networks' forwards"""

    name: str
    dtype: torch.dtype
    autocast: Autocast


def choose_precision(name: str, device: torch.device) -> Precision:
    """`auto` is bfloat16 on a GPU that computes in it, else float32. Sets whether float32 may use TF32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    dtype = torch.float64 if name == "float64" else torch.float32
    autocast = partial(torch.autocast, device.type, AUTOCAST.get(name, torch.bfloat16), enabled=name in AUTOCAST)
    return Precision(name, dtype, autocast)


def set_determinism(enabled: bool) -> None:
    """Whether only algorithms that give the same bits each time are used; without, cuDNN tries which is fastest.

    To be called before the first matrix product on a GPU.
    """
    if enabled:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # https://docs.nvidia.com/cuda/cublas, "results reproducibility"
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.benchmark = not enabled
