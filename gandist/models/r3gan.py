"""R3GAN (Huang et al. 2024, 2501.05441): networks without any normalization, the discriminator the mirrored generator.

Stable by their initialization alone (Fix-up, Zhang et al. 2019, 1901.09321). Images leave the generator unbounded. With
classes, the logit is a projection without an unconditional term.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.errors import ConfigError
from gandist.models.layers import Block, Downsample, Trunk, Upsample, pyramid_of
from gandist.resolution import as_option

BLOCKS = 2  # residual blocks at a resolution
SLOPE = 0.2  # of the leaky ReLUs
EXPANSION = 2  # of the channels within a residual block


def stage_widths(model: ModelConfig, data: DataConfig, width: int) -> list[int]:
    """Channels from 4 pixels up; width: at every resolution, unless model.widths says it. Raises ConfigError."""
    stages = pyramid_of(model, data).doublings + 1
    widths = list(model.widths or [width] * stages)
    if len(widths) != stages:
        raise ConfigError(
            f"model.widths={widths}: images of {as_option(data.resolution)} pixels want {stages} of them, for the resolutions "
            "from 4 up"
        )
    if wrong := [width for width in widths if EXPANSION * width % model.group_size]:
        raise ConfigError(
            f"model.group_size={model.group_size} does not divide {EXPANSION} × {wrong[0]}, the channels of a grouped "
            "convolution: choose other widths, or another group size"
        )
    return widths


def scaled(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """The layer, its weights drawn from N(0, gain²/fan_in). An embedding is a linear layer of one-hot labels."""
    fan_in = layer.num_embeddings if isinstance(layer, nn.Embedding) else layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
    return layer


class ResidualBlock(Block):
    """blocks: how many there are in the network"""

    def __init__(self, width: int, group_size: int, blocks: int):
        super().__init__()
        wide = EXPANSION * width
        gain = math.sqrt(2 / (1 + SLOPE**2)) * blocks**-0.25
        self.expand = scaled(nn.Conv2d(width, wide, 1), gain)
        self.mix = scaled(nn.Conv2d(wide, wide, 3, padding=1, groups=wide // group_size), gain)
        self.contract = scaled(nn.Conv2d(wide, width, 1, bias=False), 0.0)
        nn.init.zeros_(self.expand.bias)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → the same shape"""
        h = F.leaky_relu(self.expand(x), SLOPE)
        h = F.leaky_relu(self.mix(h), SLOPE)
        return x + self.contract(h)


def stage(width: int, model: ModelConfig, stages: int) -> list[nn.Module]:
    """The residual blocks of one resolution."""
    return [ResidualBlock(width, model.group_size, BLOCKS * stages) for _ in range(BLOCKS)]


def change_width(before: int, after: int) -> list[nn.Module]:
    return [scaled(nn.Conv2d(before, after, 1, bias=False))] if before != after else []


class R3GANGenerator(nn.Module):
    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        widths = stage_widths(model, data, model.generator_width)
        self.embedding = scaled(nn.Embedding(data.num_classes, model.latent_dim)) if data.num_classes else None
        inputs = model.latent_dim * (2 if data.num_classes else 1)
        self.project = scaled(nn.Linear(inputs, widths[0], bias=False))
        self.basis = nn.Parameter(torch.randn(widths[0], *pyramid_of(model, data).first))
        blocks = stage(widths[0], model, len(widths))
        for before, after in pairwise(widths):
            blocks += [*change_width(before, after), Upsample(), *stage(after, model, len(widths))]
        self.blocks = nn.Sequential(*blocks)
        self.to_image = scaled(nn.Conv2d(widths[-1], data.channels, 1, bias=False))

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W]"""
        if self.embedding is not None:
            latents = torch.cat([latents, self.embedding(labels)], 1)
        return self.to_image(self.blocks(self.basis * self.project(latents)[:, :, None, None]))


class R3GANTrunk(Trunk):
    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        widths = stage_widths(model, data, model.discriminator_width)[::-1]
        self.from_image = scaled(nn.Conv2d(data.channels, widths[0], 1, bias=False))
        blocks = stage(widths[0], model, len(widths))
        for before, after in pairwise(widths):
            blocks += [Downsample(), *change_width(before, after), *stage(after, model, len(widths))]
        self.blocks = nn.Sequential(*blocks)
        self.features = widths[-1]
        last = pyramid_of(model, data).first
        self.gather = scaled(nn.Conv2d(self.features, self.features, last, groups=self.features, bias=False))

    @staticmethod
    def layer(module: nn.Module) -> nn.Module:
        """Linear layers of heads have no bias."""
        module.bias = None
        return scaled(module)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] → features [B, F]"""
        return self.gather(self.blocks(self.from_image(images))).flatten(1)
