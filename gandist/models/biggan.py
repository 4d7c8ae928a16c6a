"""BigGAN (Brock et al. 2019, 1809.11096), in the widths of its appendix B and, at 32 and 64 pixels, of its authors' code.

The latent is split: the first chunk makes the first feature map, each other one, together with an embedding of the class
that all blocks share, the gains and biases of one block's batch norms. Both networks have spectral norm and orthogonal
weights at first. The paper has self-attention at 64 pixels: `model.attention: [64]`.
"""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.errors import ConfigError
from gandist.models.layers import SyncBatchNorm, modulate
from gandist.models.residual import Layout, ResidualTrunk, ResidualUpBlock, attention_layers, find_layout
from gandist.models.spectral_norm import spectral_norm
from gandist.resolution import SMALLEST, as_option

EMBEDDING = 128  # numbers in the shared embedding of a class
LAYOUTS = {
    32: Layout((4, 4, 4, 4), (4, 4, 4, 4), halvings=2),
    64: Layout((16, 16, 8, 4, 2), (1, 2, 4, 8, 16), halvings=4),
    128: Layout((16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16), halvings=5),
    256: Layout((16, 16, 8, 8, 4, 2, 1), (1, 2, 4, 8, 8, 16, 16), halvings=6),
    512: Layout((16, 16, 8, 8, 4, 2, 1, 1), (1, 1, 2, 4, 8, 8, 16, 16), halvings=7),
}


def orthogonal(layer: nn.Module) -> nn.Module:
    """The layer, initialized (Saxe et al. 2014, 1312.6120)."""
    nn.init.orthogonal_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return layer


def normalized(layer: nn.Module) -> nn.Module:
    return spectral_norm(orthogonal(layer))


class LinearlyConditionedBatchNorm(nn.Module):
    """Batch norm whose gain and bias are linear in a vector."""

    def __init__(self, channels: int, condition_dim: int):
        super().__init__()
        self.norm = SyncBatchNorm(channels, affine=False)
        self.gain = normalized(nn.Linear(condition_dim, channels, bias=False))
        self.bias = normalized(nn.Linear(condition_dim, channels, bias=False))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], condition [B, D] → [B, C, H, W]"""
        return modulate(self.norm(x), 1 + self.gain(condition), self.bias(condition))


class BigGANGenerator(nn.Module):
    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        layout, pyramid = find_layout(LAYOUTS, model, data)
        widths = [model.generator_width * multiple for multiple in layout.generator]
        chunks = len(widths)
        if model.latent_dim % chunks:
            raise ConfigError(
                f"model.latent_dim={model.latent_dim}: biggan splits it into {chunks} equal parts at "
                f"{as_option(data.resolution)} pixels: choose a multiple of {chunks}, such as {20 * chunks}"
            )
        self.chunk = model.latent_dim // chunks
        self.embedding = orthogonal(nn.Embedding(data.num_classes, EMBEDDING)) if data.num_classes else None
        condition_dim = self.chunk + (EMBEDDING if data.num_classes else 0)
        norm = partial(LinearlyConditionedBatchNorm, condition_dim=condition_dim)
        self.first = pyramid.first
        self.project = normalized(nn.Linear(self.chunk, widths[0] * math.prod(self.first)))
        self.blocks = nn.ModuleList(ResidualUpBlock(before, after, norm, normalized) for before, after in pairwise(widths))
        resolutions = [SMALLEST << number for number in range(1, len(widths))]
        self.attention = nn.ModuleList(attention_layers(resolutions, widths[1:], model, normalized))
        self.norm = SyncBatchNorm(widths[-1])
        self.to_image = normalized(nn.Conv2d(widths[-1], data.channels, 3, padding=1))

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1]"""
        first, *others = latents.split(self.chunk, dim=1)
        if self.embedding is not None:
            embedding = self.embedding(labels)
            others = [torch.cat([chunk, embedding], 1) for chunk in others]
        x = self.project(first).unflatten(1, (-1, *self.first))
        for block, attend, condition in zip(self.blocks, self.attention, others, strict=True):
            x = attend(block(x, condition))
        return torch.tanh(self.to_image(F.relu(self.norm(x))))


class BigGANTrunk(ResidualTrunk):
    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__(LAYOUTS, model, data, wide=True, layer=normalized)
