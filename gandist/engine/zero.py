"""Players under DeepSpeed, which shards Adam's state and the gradients over the ranks (ZeRO, Rajbhandari et al. 2020,
1910.02054)."""

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import ModuleType

import torch
import torch.distributed as dist
from torch import nn

from gandist.config import Config, Cosine
from gandist.distributed import World
from gandist.engine.player import AdamState, Player, adam_state
from gandist.engine.precision import Precision
from gandist.launcher import tell_libraries

BUCKET_SIZE = 2**24  # numbers exchanged at once; DeepSpeed's default holds a buffer of 2 GB for each player
MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedPlayer(Player):
    """A DeepSpeed engine around the objective, with fused Adam.

    With ZeRO each rank has its part of the weights, end to end in one flat tensor, with Adam's state for it and their
    averaged gradient; after the step the ranks gather each other's weights. Stage 0 keeps all of it on every rank.
    """

    def __init__(
        self, name: str, objective: nn.Module, config: Config, world: World, precision: Precision, *, lr: float | Cosine
    ):
        super().__init__(name, objective, config, world, precision, lr)
        deepspeed = _import_deepspeed(world)
        objective.to(memory_format=torch.contiguous_format)  # DeepSpeed broadcasts weights as bytes, of whole rows
        self.sharded = config.stage > 0
        adam = torch.optim.Adam(self.parameters.values(), **self.rates(0), eps=config.optimizer.eps, fused=True)
        adam.register_step_pre_hook(self._before_adam)
        self.optimizer = adam
        self._loss_scale = torch.tensor([1.0, 0.0], device=world.device)  # none: for checkpoints that other engines read
        with _bounded_groups(world):
            self.parallel, *_ = deepspeed.initialize(model=objective, optimizer=adam, config=_deepspeed_config(config, world))
        world.add_group(self.parallel.data_parallel_group)

    def exchanging(self, last: bool) -> AbstractContextManager:
        return nullcontext()  # DeepSpeed exchanges in its step, and with stage 2 at each backward

    def backward(self, loss: torch.Tensor) -> None:
        self.parallel.backward(loss)

    def step(self, step: int) -> torch.Tensor:
        self._step = step
        self.parallel.step()
        return self._norm

    @torch.no_grad()
    def _before_adam(self, adam: torch.optim.Adam, *_: object) -> None:
        """DeepSpeed is about to call Adam on this rank's part of the averaged gradient: measures the whole, and clips."""
        parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.sharded:
            square = norm.double().square()
            dist.all_reduce(square)
            norm = square.sqrt().to(norm.dtype)
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        adam.found_inf = self.guard.watch(norm, self._step)  # fused Adam does nothing where it is 1
        self._norm = norm

    def load_state_dict(self, state: dict) -> None:
        if not self.sharded:
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        self.parallel.optimizer.refresh_fp32_params()  # the flat weights from the network's
        (flat,) = adam_state(self.optimizer).values()
        for name, parameter in self.parameters.items():
            saved = state["optimizer"][name]
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, saved[moment], moment)
            flat["step"].copy_(saved["step"])

    def _adam_state(self) -> AdamState:
        """Gathered, not live: `load_state_dict` takes over what is written into it."""
        states = adam_state(self.optimizer)
        if not self.sharded:
            return {name: states[parameter] for name, parameter in self.parameters.items()}
        from deepspeed.utils import safe_get_full_optimizer_state

        self.parallel.optimizer._lazy_init_hp_params_optimizer_state()  # as after its first step
        (flat,) = states.values()
        return {
            name: {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            | {"step": flat["step"].clone()}
            for name, parameter in self.parameters.items()
        }


def _deepspeed_config(config: Config, world: World) -> dict:
    zero = {"stage": config.stage, "reduce_bucket_size": BUCKET_SIZE, "allgather_bucket_size": BUCKET_SIZE}
    if config.stage:
        zero["compute_grad_norm"] = False  # it would wait for the device, at every step
    return {
        "train_micro_batch_size_per_gpu": config.train.batch_size // (world.size * config.train.accumulation_on(world.size)),
        "managed_gradient_accumulation": False,  # any number of backward passes, then a step
        "gradient_clipping": 0.0,  # its default is 1; ours is done with the norm that the guard needs
        "zero_optimization": zero,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # they wait for the device, too
    }


@contextmanager
def _bounded_groups(world: World) -> Iterator[None]:
    """DeepSpeed names no timeout for the groups that it makes, and torch's own would wait half an hour for a rank that died."""
    new_group = dist.new_group
    dist.new_group = partial(new_group, timeout=world.timeout)
    try:
        yield
    finally:
        dist.new_group = new_group


def _import_deepspeed(world: World) -> ModuleType:
    """DeepSpeed, on the process group that there is."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # else it warns that it had to guess
    tell_libraries(world.local_rank)
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    # On CPUs it would compile a shared-memory exchange that training does not use, for minutes.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed()
    return deepspeed


@atexit.register
def _let_go_of_groups() -> None:
    """A process group that outlives the interpreter can abort the process: its threads meet what is gone already."""
    if dist.is_initialized():
        return  # a failed rank shall leave at once, without waiting for what its groups still do
    from deepspeed.utils import groups

    groups._release_process_group_references()
    gc.collect()  # engines, which hold one as well, and themselves
