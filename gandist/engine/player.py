"""A player of the game: an objective with its optimizer, updated on the whole group of ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from gandist.config import Config, Cosine
from gandist.distributed import World
from gandist.engine.guard import NumericalGuard
from gandist.engine.precision import Precision
from gandist.models.spectral_norm import PowerIteration
from gandist.objective import Statistics
from gandist.schedule import number_at

AdamState = dict[str, dict[str, torch.Tensor]]  # parameter name → "step", "exp_avg", "exp_avg_sq"


class Player(ABC):
    """What both engines share: one optimizer step on the mean loss of equal micro-batches of every rank.

    The objective's forward is the whole loss, so that the engine sees a single backward pass for each micro-batch.
    """

    def __init__(self, name: str, objective: nn.Module, config: Config, world: World, precision: Precision, lr: float | Cosine):
        self.name = name
        self.lr = lr
        self.betas = config.optimizer.betas
        self.objective = objective
        self.network: nn.Module = objective.network
        self.parameters = {name: each for name, each in self.network.named_parameters() if each.requires_grad}
        self.power_iteration = PowerIteration(self.network)
        self.clip_norm = config.optimizer.clip_norm
        # In float16 the loss scale is found by overflowing.
        stops = config.train.non_finite == "stop" and precision.name != "float16"
        self.guard = NumericalGuard(name, world.device, stops=stops)

    def rates(self, seen: int) -> dict:
        """Adam's learning rate and betas after so many images."""
        first, second = self.betas
        return {"lr": number_at(self.lr, seen), "betas": (first, number_at(second, seen))}

    def update(self, micro_batches: Iterable[tuple], count: int, step: int, seen: int) -> list[Statistics]:
        """One optimizer step, in the run's step number `step`, on `count` micro-batches: inputs of the objective.

        seen: images before the step, which rates may follow
        Gradients are exchanged once. Returns this rank's statistics of each micro-batch and of the step, on the device.
        """
        rates = self.rates(seen)
        for group in self.optimizer.param_groups:
            group.update(rates)
        collected = []
        for number, inputs in enumerate(micro_batches, start=1):
            with self.exchanging(number == count):
                loss, statistics = self.parallel(*inputs)
                # A loss that is not finite on one rank makes the gradient so on all.
                self.backward(loss / count * torch.where(loss.isfinite(), 1.0, torch.nan))
            collected.append(statistics)
        norm = self.step(step)
        self.power_iteration()
        return [*collected, {f"grad/{self.name}_norm": norm}]

    def state_dict(self) -> dict:
        """The tensors of the network, of the objective beside it, and of Adam, by parameter name; equal on all ranks."""
        return {
            "network": self.network.state_dict(),
            "objective": self.objective_state(),
            "optimizer": self._adam_state(),
            "loss_scale": self._loss_scale,
        }

    def objective_state(self) -> dict[str, torch.Tensor]:
        """The live tensors that the objective itself keeps: running means, the probability of augmentation."""
        return {name: value for name, value in self.objective.state_dict().items() if not name.startswith("network.")}

    # What an engine brings.

    parallel: Callable[..., tuple[torch.Tensor, Statistics]]  # the objective, wrapped
    optimizer: torch.optim.Adam
    _loss_scale: torch.Tensor  # and the steps since it last grew, [2]

    @abstractmethod
    def exchanging(self, last: bool) -> AbstractContextManager:
        """Around one micro-batch; the gradient is exchanged in the last."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None: ...

    @abstractmethod
    def step(self, step: int) -> torch.Tensor:
        """Clips, updates the parameters unless the guard objects, clears the gradients. Returns their norm [] before."""

    @abstractmethod
    def _adam_state(self) -> AdamState: ...

    @abstractmethod
    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` returned, after its tensors were written to."""


def adam_state(optimizer: torch.optim.Adam) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """Its live state of each of its parameters, made if there was no step yet."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:  # as Adam itself does at the first step
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
    return optimizer.state


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module takes part in gradients."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
