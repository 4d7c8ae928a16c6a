"""DCGAN (Radford et al. 2016, 1511.06434), class-conditional, for square images of 4·2ⁿ pixels.

The generator has conditional batch norm; the discriminator has spectral norm (Miyato et al. 2018, 1802.05957) and no
batch norm, so that gradient penalties are allowed.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.errors import ConfigError
from gandist.models.layers import Block, ConditionalBatchNorm
from gandist.models.spectral_norm import spectral_norm

SMALLEST = 4  # pixels of the first feature map of G and the last of D
SLOPE = 0.1  # of the leaky ReLUs, as in SNGAN


def stage_widths(width: int, resolution: int) -> list[int]:
    """Channels from the full resolution down to 4 pixels. Raises ConfigError for other resolutions than 8, 16, 32, …"""
    stages = (resolution // SMALLEST).bit_length() - 1
    if stages < 1 or resolution != SMALLEST << stages:
        raise ConfigError(f"data.resolution={resolution}: dcgan makes images of 8, 16, 32, 64, … pixels")
    return [width << stage for stage in range(stages + 1)]


class UpBlock(Block):
    """Twice the resolution."""

    def __init__(self, before: int, after: int, num_classes: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False)
        self.norm = ConditionalBatchNorm(after, num_classes)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.upsample(x), labels))


class DownBlock(Block):
    """Half the resolution."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.downsample = spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.downsample(x), SLOPE)


class DCGANGenerator(nn.Module):
    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        widths = stage_widths(model.generator_width, data.resolution)[::-1]
        self.project = nn.Linear(model.latent_dim, widths[0] * SMALLEST**2, bias=False)
        self.norm = ConditionalBatchNorm(widths[0], data.num_classes)
        self.blocks = nn.ModuleList(UpBlock(before, after, data.num_classes) for before, after in pairwise(widths))
        self.to_image = nn.Conv2d(widths[-1], data.channels, 3, padding=1)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1]"""
        x = self.project(latents).unflatten(1, (-1, SMALLEST, SMALLEST))
        x = F.relu(self.norm(x, labels))
        for block in self.blocks:
            x = block(x, labels)
        return torch.tanh(self.to_image(x))


class DCGANTrunk(nn.Module):
    """Images → features, the sum over the last feature map."""

    layer = staticmethod(spectral_norm)

    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        widths = stage_widths(model.discriminator_width, data.resolution)
        self.from_image = spectral_norm(nn.Conv2d(data.channels, widths[0], 3, padding=1))
        self.blocks = nn.ModuleList(DownBlock(before, after) for before, after in pairwise(widths))
        self.features = widths[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] → features [B, F]"""
        x = F.leaky_relu(self.from_image(images), SLOPE)
        for block in self.blocks:
            x = block(x)
        return x.sum(dim=(2, 3))
