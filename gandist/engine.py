"""A player of the game: an objective under DistributedDataParallel with its optimizer, precision and accumulation."""

import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gandist.objective import Autocast, Statistics

# Buffers are equal on all ranks already: norms are synchronized. The option was renamed in torch 2.13.
_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFER_SYNC = {"forward_sync_buffers" if _renamed else "broadcast_buffers": False}

# DDP says so where a weight has a dimension of size 1, whose stride means nothing, and then copies the few numbers.
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


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
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=name == "bfloat16")
    return Precision(name, dtype, autocast)


class Player:
    """Updates the network of one objective on the whole group of ranks."""

    def __init__(self, objective: nn.Module, device: torch.device, *, lr: float, betas: tuple[float, float], eps: float):
        self.objective = objective
        self.network: nn.Module = objective.network
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr, betas, eps, fused=True)
        self._parallel = DistributedDataParallel(
            objective,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **NO_BUFFER_SYNC,
        )

    def update(self, micro_batches: Iterable[tuple[torch.Tensor, ...]], count: int) -> Statistics:
        """One optimizer step on the mean loss of `count` equal micro-batches of every rank.

        Gradients are exchanged once, in the last backward pass. Returns this rank's mean statistics, on the device.
        """
        self.optimizer.zero_grad()
        totals: Statistics = {}
        for number, inputs in enumerate(micro_batches, start=1):
            with nullcontext() if number == count else self._parallel.no_sync():
                loss, statistics = self._parallel(*inputs)
                (loss / count).backward()
            for name, value in statistics.items():
                totals[name] = totals.get(name, 0) + value / count
        self.optimizer.step()
        return totals

    def state_dict(self) -> dict:
        """The live tensors of the network and of Adam, by parameter name; loading is copying into them."""
        return {"network": self.network.state_dict(), "optimizer": self._adam_state()}

    def _adam_state(self) -> dict[str, dict[str, torch.Tensor]]:
        for parameter in self.network.parameters():
            if parameter not in self.optimizer.state:  # as Adam itself does at the first step
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        return {name: self.optimizer.state[parameter] for name, parameter in self.network.named_parameters()}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module takes part in gradients."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
