"""SNGAN's residual networks (Miyato et al. 2018, 1802.05957; conditional: Miyato & Koyama 2018, 1802.05637).

At 32 pixels those of table 4, at 128 those of table 5, at 64 those of the authors' code. The generator has conditional batch
norm, the discriminator spectral norm, unless `model.discriminator_norm` says otherwise: with none, and 128 channels, they are
those of WGAN-GP (Gulrajani et al. 2017, 1704.00028). SAGAN (Zhang et al. 2018, 1805.08318) has self-attention,
`model.attention`, and spectral norm in the generator, too, `model.generator_spectral_norm`.
"""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.models.layers import ConditionalBatchNorm, SyncBatchNorm
from gandist.models.residual import Layout, ResidualTrunk, ResidualUpBlock, attention_layers, find_layout
from gandist.models.spectral_norm import spectral_norm
from gandist.resolution import SMALLEST

LAYOUTS = {
    32: Layout((1, 1, 1, 1), (1, 1, 1, 1), halvings=2),
    64: Layout((16, 8, 4, 2, 1), (1, 2, 4, 8, 16), halvings=5),
    128: Layout((16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16), halvings=5),
}


def xavier(layer: nn.Module) -> nn.Module:
    """The layer, initialized (Glorot & Bengio 2010); a 3×3 convolution with the gain √2 of the ReLU before it."""
    gain = math.sqrt(2) if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) else 1.0
    nn.init.xavier_uniform_(layer.weight, gain)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return layer


def normalized(layer: nn.Module) -> nn.Module:
    return spectral_norm(xavier(layer))


class ResNetGenerator(nn.Module):
    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        layout, pyramid = find_layout(LAYOUTS, model, data)
        widths = [model.generator_width * multiple for multiple in layout.generator]
        layer = normalized if model.generator_spectral_norm else xavier
        norm = partial(ConditionalBatchNorm, num_classes=data.num_classes)
        self.first = pyramid.first
        self.project = layer(nn.Linear(model.latent_dim, widths[0] * math.prod(self.first)))
        self.blocks = nn.ModuleList(ResidualUpBlock(before, after, norm, layer) for before, after in pairwise(widths))
        resolutions = [SMALLEST << number for number in range(1, len(widths))]
        self.attention = nn.ModuleList(attention_layers(resolutions, widths[1:], model, layer))
        self.norm = SyncBatchNorm(widths[-1])
        self.to_image = layer(nn.Conv2d(widths[-1], data.channels, 3, padding=1))

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1]"""
        x = self.project(latents).unflatten(1, (-1, *self.first))
        for block, attend in zip(self.blocks, self.attention, strict=True):
            x = attend(block(x, labels))
        return torch.tanh(self.to_image(F.relu(self.norm(x))))


class ResNetTrunk(ResidualTrunk):
    def __init__(self, model: ModelConfig, data: DataConfig):
        layer = normalized if model.discriminator_norm == "spectral" else xavier
        super().__init__(LAYOUTS, model, data, wide=False, layer=layer)
