"""What residual families share: blocks, self-attention, and the discriminator's trunk."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.errors import ConfigError
from gandist.models.layers import NORMS, Block, DownConv2d, Layer, SyncBatchNorm, Trunk, UpConv2d, pyramid_of
from gandist.resolution import SMALLEST, Pyramid, as_option


class Layout(NamedTuple):
    """The channels of both networks for images of one side, as multiples of the width.

    generator:     of its feature maps, from 4 pixels up
    discriminator: after each of its blocks
    halvings:      so many of these, the first, halve the resolution
    """

    generator: Sequence[int]
    discriminator: Sequence[int]
    halvings: int


def find_layout(layouts: Mapping[int, Layout], model: ModelConfig, data: DataConfig) -> tuple[Layout, Pyramid]:
    """Raises ConfigError where there is none for the resolution, or self-attention is asked for where no feature map is."""
    pyramid = pyramid_of(model, data, layouts)
    layout = layouts[pyramid.side]
    possible = [pyramid.side >> halvings for halvings in range(layout.halvings, 0, -1)]
    possible = [resolution for resolution in possible if resolution > SMALLEST]
    if set(model.attention) - set(possible):
        raise ConfigError(
            f"model.attention={list(model.attention)}: for images of {as_option(data.resolution)} pixels both networks have "
            f"feature maps of {', '.join(map(str, possible))} pixels: choose among these"
        )
    return layout, pyramid


class ResidualUpBlock(Block):
    """Twice the resolution. The 1×1 convolution of the shortcut comes before the upsampling, with which it commutes.

    norm: channels → a module of the feature map and the condition
    """

    def __init__(self, before: int, after: int, norm: Callable[[int], nn.Module], layer: Layer):
        super().__init__()
        self.norm1 = norm(before)
        self.conv1 = layer(UpConv2d(before, after, 3, padding=1))
        self.norm2 = norm(after)
        self.conv2 = layer(nn.Conv2d(after, after, 3, padding=1))
        self.shortcut = layer(nn.Conv2d(before, after, 1))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W] → [B, C', 2H, 2W]; condition: as the norms take it"""
        h = self.conv1(F.relu(self.norm1(x, condition)))
        h = self.conv2(F.relu(self.norm2(h, condition)))
        return h + upsample(self.shortcut(x))


class ResidualDownBlock(Block):
    """The 1×1 convolution of the shortcut comes after the average pooling, with which it commutes.

    hidden: channels between the convolutions; halve: whether the resolution; preactivate: not for images, which are spared
    norms, too; norm: channels → a module of the feature map
    """

    def __init__(
        self,
        before: int,
        hidden: int,
        after: int,
        *,
        halve: bool,
        preactivate: bool,
        layer: Layer,
        norm: Callable[[int], nn.Module] = nn.Identity,
    ):
        super().__init__()
        self.norm1 = norm(before) if preactivate else nn.Identity()
        self.norm2 = norm(hidden) if preactivate else nn.Identity()
        # Batch norm would take a bias before it away again.
        self.conv1 = layer(nn.Conv2d(before, hidden, 3, padding=1, bias=not isinstance(self.norm2, SyncBatchNorm)))
        self.conv2 = layer((DownConv2d if halve else nn.Conv2d)(hidden, after, 3, padding=1))
        self.shortcut = layer(nn.Conv2d(before, after, 1)) if halve or before != after else nn.Identity()
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.preactivate = preactivate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C', H/2, W/2], or of the same size"""
        h = self.conv1(F.relu(self.norm1(x)) if self.preactivate else x)
        h = self.conv2(F.relu(self.norm2(h)))
        return h + self.shortcut(self.pool(x))


class SelfAttention(Block):
    """Each place sees all others (SAGAN, Zhang et al. 2018, 1805.08318, section 3).

    In the sizes of its authors' code: queries and keys of C/8 channels, values of C/2, keys and values at half the
    resolution. At first it does nothing.
    """

    def __init__(self, channels: int, layer: Layer):
        super().__init__()
        narrow, half = max(channels // 8, 1), max(channels // 2, 1)
        self.query = layer(nn.Conv2d(channels, narrow, 1, bias=False))
        self.key = layer(nn.Conv2d(channels, narrow, 1, bias=False))
        self.value = layer(nn.Conv2d(channels, half, 1, bias=False))
        self.output = layer(nn.Conv2d(half, channels, 1, bias=False))
        self.gain = nn.Parameter(torch.zeros(1))  # DeepSpeed refuses a scalar

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → the same shape"""
        query = self.query(x).flatten(2)  # [B, C/8, HW]
        key = F.max_pool2d(self.key(x), 2).flatten(2)  # [B, C/8, HW/4]
        value = F.max_pool2d(self.value(x), 2).flatten(2)  # [B, C/2, HW/4]
        attention = F.softmax(query.transpose(1, 2) @ key, dim=2)  # [B, HW, HW/4]
        seen = (value @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gain[0] * self.output(seen)


def attention_layers(
    resolutions: Sequence[int], widths: Sequence[int], model: ModelConfig, layer: Layer
) -> Iterator[nn.Module]:
    """Self-attention for the feature maps of the wanted resolutions, nothing for the others."""
    for resolution, width in zip(resolutions, widths, strict=True):
        yield SelfAttention(width, layer) if resolution in model.attention else nn.Identity()


class ResidualTrunk(Trunk):
    """The features are the sum over the last feature map, without spectral norm its mean, as in WGAN-GP (1704.00028).

    wide: whether a block widens in its first convolution, not in its second
    """

    def __init__(self, layouts: Mapping[int, Layout], model: ModelConfig, data: DataConfig, *, wide: bool, layer: Layer):
        super().__init__()
        layout, pyramid = find_layout(layouts, model, data)
        self.layer = layer
        self.pool = torch.sum if model.discriminator_norm == "spectral" else torch.mean
        self.couples_images = model.discriminator_norm == "batch"
        widths = [model.discriminator_width * multiple for multiple in layout.discriminator]
        self.blocks = nn.ModuleList(
            ResidualDownBlock(
                before,
                after if wide or number == 0 else before,
                after,
                halve=number < layout.halvings,
                preactivate=number > 0,
                layer=layer,
                norm=NORMS[model.discriminator_norm],
            )
            for number, (before, after) in enumerate(pairwise([data.channels, *widths]))
        )
        resolutions = [pyramid.side >> number for number in range(1, layout.halvings + 1)]
        self.attention = nn.ModuleList(attention_layers(resolutions, widths[: layout.halvings], model, layer))
        self.features = widths[-1]

    def stages(self) -> list[nn.Module]:
        """A block with the attention behind it is one."""
        return [nn.ModuleList(pair) for pair in zip_longest(self.blocks, self.attention)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] → features [B, F]"""
        x = images
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number < len(self.attention):
                x = self.attention[number](x)
        return self.pool(F.relu(x), dim=(2, 3))


def upsample(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
