"""The exponential moving average of the generator, which is what is evaluated, sampled and shipped."""

import copy

import torch
from torch import nn


class ExponentialMovingAverage:
    """Parameters are averaged; buffers, which average already, are copied (Karras et al. 2018, 1710.10196, section 5).

    half_life: in images; after so many, a weight counts half
    """

    def __init__(self, module: nn.Module, half_life: float):
        self.source = module
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.half_life = half_life

    @torch.no_grad()
    def update(self, images: int) -> None:
        """After a step of `images` images."""
        new_weight = 1 - 0.5 ** (images / self.half_life)
        torch._foreach_lerp_(list(self.module.parameters()), list(self.source.parameters()), new_weight)
        if buffers := list(self.module.buffers()):
            torch._foreach_copy_(buffers, list(self.source.buffers()))

    @torch.no_grad()
    def distance(self) -> torch.Tensor:
        """How far the average is from what it follows, ‖θ − θ_ema‖ / ‖θ‖, []."""
        average, source = list(self.module.parameters()), list(self.source.parameters())
        return nn.utils.get_total_norm(torch._foreach_sub(average, source)) / nn.utils.get_total_norm(source)
