"""DCGAN (Radford et al. 2016, 1511.06434), class-conditional, for square images of 4·2ⁿ pixels.

The generator has conditional batch norm; the discriminator has spectral norm (Miyato et al. 2018, 1802.05957) and no
batch norm, so that gradient penalties are allowed.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from gandist.errors import ConfigError
from gandist.models.layers import ConditionalBatchNorm

SMALLEST = 4  # pixels of the first feature map of G and the last of D
SLOPE = 0.1  # of the leaky ReLUs, as in SNGAN


def stage_widths(width: int, resolution: int) -> list[int]:
    """Channels from the full resolution down to 4 pixels. Raises ConfigError for other resolutions than 8, 16, 32, …"""
    stages = (resolution // SMALLEST).bit_length() - 1
    if stages < 1 or resolution != SMALLEST << stages:
        raise ConfigError(f"data.resolution={resolution}: dcgan makes images of 8, 16, 32, 64, … pixels")
    return [width << stage for stage in range(stages + 1)]


class DCGANGenerator(nn.Module):
    """width: channels at full resolution, doubled at each halving."""

    def __init__(self, *, latent_dim: int, num_classes: int, resolution: int, channels: int, width: int):
        super().__init__()
        first, *others = reversed(stage_widths(width, resolution))
        self.project = nn.Linear(latent_dim, first * SMALLEST**2, bias=False)
        self.norms = nn.ModuleList([ConditionalBatchNorm(first, num_classes)])
        self.upsamplings = nn.ModuleList()
        before = first
        for after in others:
            self.upsamplings.append(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False))
            self.norms.append(ConditionalBatchNorm(after, num_classes))
            before = after
        self.to_image = nn.Conv2d(before, channels, 3, padding=1)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1]"""
        x = self.project(latents).unflatten(1, (-1, SMALLEST, SMALLEST))
        x = F.relu(self.norms[0](x, labels))
        for upsample, norm in zip(self.upsamplings, self.norms[1:], strict=True):
            x = F.relu(norm(upsample(x), labels))
        return torch.tanh(self.to_image(x))


class DCGANTrunk(nn.Module):
    """Images → features, the sum over the last feature map. `features`: their number."""

    def __init__(self, *, resolution: int, channels: int, width: int):
        super().__init__()
        widths = stage_widths(width, resolution)
        self.from_image = spectral_norm(nn.Conv2d(channels, widths[0], 3, padding=1))
        self.downsamplings = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)) for before, after in pairwise(widths)
        )
        self.features = widths[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] → features [B, F]"""
        x = F.leaky_relu(self.from_image(images), SLOPE)
        for downsample in self.downsamplings:
            x = F.leaky_relu(downsample(x), SLOPE)
        return x.sum(dim=(2, 3))
