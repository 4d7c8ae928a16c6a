"""BigGAN-deep (Brock et al. 2019, 1809.11096, appendix B): four times as deep as BigGAN, of bottlenecks, and smaller.

Each stage is a residual block that keeps the resolution and one that changes it. The whole latent, together with an embedding
of the class that all blocks share, makes the first feature map and the gains and biases of all batch norms. Shortcuts pass
channels on as they are. The widths are BigGAN's, those at 32 and 64 pixels, where the paper has none, too. The paper has
self-attention at 64 pixels: `model.attention: [64]`.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.models.biggan import EMBEDDING, LAYOUTS, LinearlyConditionedBatchNorm, normalized, orthogonal
from gandist.models.layers import Block, SyncBatchNorm, Trunk, UpConv2d
from gandist.models.residual import attention_layers, find_layout, upsample
from gandist.resolution import SMALLEST

BOTTLENECK = 4  # so many times narrower is the inside of a block


class BottleneckUpBlock(Block):
    """The shortcut drops the last channels.

    double: whether the resolution
    norm:   channels → a module of the feature map and the condition
    """

    def __init__(self, before: int, after: int, *, double: bool, norm: Callable[[int], nn.Module]):
        super().__init__()
        inside = max(before // BOTTLENECK, 1)
        self.norm1 = norm(before)
        self.conv1 = normalized(nn.Conv2d(before, inside, 1))
        self.norm2 = norm(inside)
        self.conv2 = normalized((UpConv2d if double else nn.Conv2d)(inside, inside, 3, padding=1))
        self.norm3 = norm(inside)
        self.conv3 = normalized(nn.Conv2d(inside, inside, 3, padding=1))
        self.norm4 = norm(inside)
        self.conv4 = normalized(nn.Conv2d(inside, after, 1))
        self.after = after
        self.upsample = upsample if double else nn.Identity()

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], condition [B, D] → [B, C', 2H, 2W], or of the same size"""
        h = self.conv1(F.relu(self.norm1(x, condition)))
        h = self.conv2(F.relu(self.norm2(h, condition)))
        h = self.conv3(F.relu(self.norm3(h, condition)))
        h = self.conv4(F.relu(self.norm4(h, condition)))
        return h + self.upsample(x[:, : self.after])


class BottleneckDownBlock(Block):
    """The shortcut keeps all channels and makes the missing ones of them.

    halve: whether the resolution
    """

    def __init__(self, before: int, after: int, *, halve: bool):
        super().__init__()
        inside = max(after // BOTTLENECK, 1)
        self.conv1 = normalized(nn.Conv2d(before, inside, 1))
        self.conv2 = normalized(nn.Conv2d(inside, inside, 3, padding=1))
        self.conv3 = normalized(nn.Conv2d(inside, inside, 3, padding=1))
        self.conv4 = normalized(nn.Conv2d(inside, after, 1))
        self.widen = normalized(nn.Conv2d(before, after - before, 1)) if before != after else None
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C', H/2, W/2], or of the same size"""
        h = self.conv1(F.relu(x))
        h = self.conv2(F.relu(h))
        h = self.conv3(F.relu(h))
        h = self.conv4(self.pool(F.relu(h)))
        x = self.pool(x)
        return h + (x if self.widen is None else torch.cat([x, self.widen(x)], 1))


class BigGANDeepGenerator(nn.Module):
    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        layout, pyramid = find_layout(LAYOUTS, model, data)
        widths = [model.generator_width * multiple for multiple in layout.generator]
        self.embedding = orthogonal(nn.Embedding(data.num_classes, EMBEDDING)) if data.num_classes else None
        condition_dim = model.latent_dim + (EMBEDDING if data.num_classes else 0)
        block = partial(BottleneckUpBlock, norm=partial(LinearlyConditionedBatchNorm, condition_dim=condition_dim))
        self.first = pyramid.first
        self.project = normalized(nn.Linear(condition_dim, widths[0] * math.prod(self.first)))
        self.blocks = nn.ModuleList(block(width, width, double=False) for width in widths[:-1])
        self.up_blocks = nn.ModuleList(block(before, after, double=True) for before, after in pairwise(widths))
        resolutions = [SMALLEST << number for number in range(1, len(widths))]
        self.attention = nn.ModuleList(attention_layers(resolutions, widths[1:], model, normalized))
        self.norm = SyncBatchNorm(widths[-1])
        self.to_image = normalized(nn.Conv2d(widths[-1], data.channels, 3, padding=1))

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1]"""
        condition = latents if self.embedding is None else torch.cat([latents, self.embedding(labels)], 1)
        x = self.project(condition).unflatten(1, (-1, *self.first))
        for block, up_block, attend in zip(self.blocks, self.up_blocks, self.attention, strict=True):
            x = attend(up_block(block(x, condition), condition))
        return torch.tanh(self.to_image(F.relu(self.norm(x))))


class BigGANDeepTrunk(Trunk):
    """The features are the sum over the last feature map."""

    layer = staticmethod(normalized)

    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        layout, pyramid = find_layout(LAYOUTS, model, data)
        widths = [model.discriminator_width * multiple for multiple in layout.discriminator]
        self.from_image = normalized(nn.Conv2d(data.channels, widths[0], 3, padding=1))
        self.down_blocks = nn.ModuleList(
            BottleneckDownBlock(before, after, halve=number < layout.halvings)
            for number, (before, after) in enumerate(pairwise(widths))
        )
        self.blocks = nn.ModuleList(BottleneckDownBlock(width, width, halve=False) for width in widths[1:])
        resolutions = [pyramid.side >> number for number in range(1, layout.halvings + 1)]
        halved = widths[1 : layout.halvings + 1]
        self.attention = nn.ModuleList(attention_layers(resolutions, halved, model, normalized))
        self.attention.extend(nn.Identity() for _ in range(len(self.blocks) - layout.halvings))
        self.features = widths[-1]

    def stages(self) -> list[nn.Module]:
        """Two blocks with the attention behind them are one."""
        blocks = zip(self.down_blocks, self.blocks, self.attention, strict=True)
        return [self.from_image, *map(nn.ModuleList, blocks)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] → features [B, F]"""
        x = self.from_image(images)
        for down_block, block, attend in zip(self.down_blocks, self.blocks, self.attention, strict=True):
            x = attend(block(down_block(x)))
        return F.relu(x).sum(dim=(2, 3))
