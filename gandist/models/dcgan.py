"""DCGAN (Radford et al. 2016, 1511.06434), class-conditional, for images with a side of 4·2ⁿ pixels.

The generator has conditional batch norm. The discriminator has spectral norm (Miyato et al. 2018, 1802.05957) and no batch
norm, so that gradient penalties are allowed; with `model.discriminator_norm: batch` it has the paper's batch norm, in all but
its first layer.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.models.layers import NORMS, Block, ConditionalBatchNorm, Layer, SyncBatchNorm, Trunk, plain, pyramid_of
from gandist.models.spectral_norm import spectral_norm
from gandist.resolution import Pyramid

SLOPE = 0.1  # of the leaky ReLUs, as in SNGAN


def stage_widths(width: int, pyramid: Pyramid) -> list[int]:
    """Channels from the full resolution down to 4 pixels."""
    return [width << stage for stage in range(pyramid.doublings + 1)]


class UpBlock(Block):
    """Twice the resolution."""

    def __init__(self, before: int, after: int, num_classes: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False)
        self.norm = ConditionalBatchNorm(after, num_classes)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.upsample(x), labels))


class DownBlock(Block):
    """Half the resolution.

    norm: channels → a module of the feature map
    """

    def __init__(self, before: int, after: int, layer: Layer, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm = norm(after)
        # Batch norm would take a bias before it away again.
        bias = not isinstance(self.norm, SyncBatchNorm)
        self.downsample = layer(nn.Conv2d(before, after, 4, stride=2, padding=1, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.norm(self.downsample(x)), SLOPE)


class DCGANGenerator(nn.Module):
    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        pyramid = pyramid_of(model, data)
        widths = stage_widths(model.generator_width, pyramid)[::-1]
        self.first = pyramid.first
        self.project = nn.Linear(model.latent_dim, widths[0] * math.prod(self.first), bias=False)
        self.norm = ConditionalBatchNorm(widths[0], data.num_classes)
        self.blocks = nn.ModuleList(UpBlock(before, after, data.num_classes) for before, after in pairwise(widths))
        self.to_image = nn.Conv2d(widths[-1], data.channels, 3, padding=1)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1]"""
        x = self.project(latents).unflatten(1, (-1, *self.first))
        x = F.relu(self.norm(x, labels))
        for block in self.blocks:
            x = block(x, labels)
        return torch.tanh(self.to_image(x))


class DCGANTrunk(Trunk):
    """The features are the sum over the last feature map, without spectral norm its mean."""

    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        widths = stage_widths(model.discriminator_width, pyramid_of(model, data))
        norm = NORMS[model.discriminator_norm]
        self.layer = spectral_norm if model.discriminator_norm == "spectral" else plain
        self.pool = torch.sum if model.discriminator_norm == "spectral" else torch.mean
        self.couples_images = model.discriminator_norm == "batch"
        self.from_image = self.layer(nn.Conv2d(data.channels, widths[0], 3, padding=1))
        self.blocks = nn.ModuleList(DownBlock(before, after, self.layer, norm) for before, after in pairwise(widths))
        self.features = widths[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] → features [B, F]"""
        x = F.leaky_relu(self.from_image(images), SLOPE)
        for block in self.blocks:
            x = block(x)
        return self.pool(x, dim=(2, 3))
