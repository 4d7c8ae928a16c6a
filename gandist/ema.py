"""The exponential moving average of the generator, which is what is evaluated, sampled and shipped."""

import copy

import torch
from torch import nn

from gandist.config import EmaConfig
from gandist.schedule import number_at


class ExponentialMovingAverage:
    """Parameters are averaged; buffers, which average already, are copied (Karras et al. 2018, 1710.10196, section 5)."""

    def __init__(self, module: nn.Module, config: EmaConfig):
        self.source = module
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.config = config

    def half_life(self, seen: int) -> float:
        """In images: after so many, a weight counts half. seen: images before this step"""
        half_life = 1000 * number_at(self.config.half_life_kimg, seen)
        return half_life if self.config.ramp_up is None else min(half_life, seen * self.config.ramp_up)

    @torch.no_grad()
    def update(self, images: int, seen: int) -> None:
        """After a step of `images` images, before which there were `seen`."""
        half_life = self.half_life(seen)
        new_weight = 1 - 0.5 ** (images / half_life) if half_life else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(self.source.parameters()), new_weight)
        if buffers := list(self.module.buffers()):
            torch._foreach_copy_(buffers, list(self.source.buffers()))

    @torch.no_grad()
    def distance(self) -> torch.Tensor:
        """How far the average is from what it follows, ‖θ − θ_ema‖ / ‖θ‖, []."""
        average, source = list(self.module.parameters()), list(self.source.parameters())
        return nn.utils.get_total_norm(torch._foreach_sub(average, source)) / nn.utils.get_total_norm(source)
