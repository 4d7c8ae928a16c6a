"""Players under DistributedDataParallel."""

import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gandist.config import Config, Cosine
from gandist.distributed import World
from gandist.engine.player import AdamState, Player, adam_state
from gandist.engine.precision import Precision

# Buffers are equal on all ranks already: norms are synchronized. The option was renamed in torch 2.13.
_renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFER_SYNC = {"forward_sync_buffers" if _renamed else "broadcast_buffers": False}

# DDP says so where a weight has a dimension of size 1, whose stride means nothing, and then copies the few numbers.
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


class _Exchanged(nn.Module):
    """What DDP wraps: the objective. Called with None, a sum over its parameters whose gradient is zero."""

    def __init__(self, objective: nn.Module):
        super().__init__()
        self.objective = objective

    def forward(self, *inputs: Any) -> Any:
        if inputs[0] is None:
            return sum((0.0 * parameter).sum() for parameter in self.parameters() if parameter.requires_grad)
        return self.objective(*inputs)


class DDPPlayer(Player):
    """DDP around the objective, compiled where asked, with fused Adam and, in float16, a loss scale."""

    def __init__(
        self, name: str, objective: nn.Module, config: Config, world: World, precision: Precision, *, lr: float | Cosine
    ):
        super().__init__(name, objective, config, world, precision, lr)
        self.optimizer = torch.optim.Adam(self.parameters.values(), **self.rates(0), eps=config.optimizer.eps, fused=True)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision.name == "float16")
        self._loss_scale = torch.tensor([self.scaler.get_scale(), 0.0], device=world.device)
        self.parallel = DistributedDataParallel(
            _Exchanged(objective),
            device_ids=[world.device] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **NO_BUFFER_SYNC,
        )
        self._fix_buckets()

    def _fix_buckets(self) -> None:
        """Fixes the order in which gradients are exchanged.

        After its first backward pass, DDP rebuilds its buckets in the order in which gradients became ready, once. Over 3 or
        more ranks, the order changes how sums are rounded, so a resumed process would differ from one that goes on. Here the
        first backward pass is the same in every process: gradients of zero, from the last parameter to the first.
        """
        self.parallel(None).backward()
        self.optimizer.zero_grad()

    def exchanging(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.parallel.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, step: int) -> torch.Tensor:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.parameters.values()])
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip_norm, norm)
        self.optimizer.found_inf = self.guard.watch(norm, step)  # fused Adam does nothing where it is 1
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def state_dict(self) -> dict:
        """The live tensors: what is written into them is loaded, but for the loss scale."""
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            self._loss_scale.copy_(torch.tensor([state["scale"], state["_growth_tracker"]]))
        return super().state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.scaler.is_enabled():
            scale, tracker = state["loss_scale"].tolist()
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(tracker)})

    def _adam_state(self) -> AdamState:
        states = adam_state(self.optimizer)
        return {name: states[parameter] for name, parameter in self.parameters.items()}
