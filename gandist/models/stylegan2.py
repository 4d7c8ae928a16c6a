"""StyleGAN2 (Karras et al. 2020, 1912.04958), its config F, for images with a side of 4·2ⁿ pixels.

Classes enter as in StyleGAN2-ADA (Karras et al. 2020, 2006.06676). Noise and style mixing are functions of the latents, not
random: an image depends on its latents and label alone. Images leave the generator unbounded.
"""

import math
from contextlib import AbstractContextManager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from gandist.config import DataConfig, ModelConfig
from gandist.errors import ConfigError
from gandist.models.heads import Head
from gandist.models.layers import Block, Downsample, Layer, LowPass, Trunk, Upsample, pyramid_of, track
from gandist.models.noise import hashed_normal, hashed_uniform

EPS = 1e-8  # keeps roots and divisions finite
MAPPING_RATE = 0.01  # learning rate of mapping networks, as a multiple
LABEL_LAYERS = 8  # of the discriminator's mapping network
W_MOMENTUM = 0.002  # of the mean of w
STD_MOMENTUM = 0.1  # of the mean of the minibatch standard deviation
SECOND_LATENTS, CROSSOVER = -1, -2  # salts; layers have their numbers


def stage_widths(model: ModelConfig, data: DataConfig, width: int) -> list[int]:
    """Channels from the full resolution down to 4 pixels. Raises ConfigError."""
    return [min(width << stage, model.max_width) for stage in range(pyramid_of(model, data).doublings + 1)]


class Gain(nn.Module):
    """Multiplies a parameter at run time."""

    def __init__(self, gain: float):
        super().__init__()
        self.gain = gain

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return self.gain * parameter


def equalized(layer: nn.Module, *, rate: float = 1.0, bias: float = 0.0) -> nn.Module:
    """The layer, its weights drawn from N(0, 1) and divided by √fan_in at run time, so that all learn equally fast (Karras et
    al. 2018, 1710.10196, section 4.1). An embedding is a linear layer of one-hot labels.

    rate: its learning rate, as a multiple; bias: its first value
    """
    outputs = layer.weight.size(1 if isinstance(layer, nn.Embedding) else 0)
    nn.init.normal_(layer.weight, std=1 / rate)
    parametrize.register_parametrization(layer, "weight", Gain(rate / math.sqrt(layer.weight.numel() / outputs)))
    if getattr(layer, "bias", None) is not None:
        nn.init.constant_(layer.bias, bias / rate)
        parametrize.register_parametrization(layer, "bias", Gain(rate))
    return layer


def activate(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU that keeps the second moment of a centred normal variable, nearly."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False)


class MappingNetwork(nn.Module):
    """Latents, labels or both → w. Computed without autocast.

    latent_dim: 0 for labels alone
    """

    def __init__(self, latent_dim: int, num_classes: int, width: int, layers: int):
        super().__init__()
        self.embedding = equalized(nn.Linear(num_classes, width)) if num_classes else None
        self.num_classes = num_classes
        widths = [latent_dim + (width if num_classes else 0), *[width] * layers]
        self.layers = nn.ModuleList(equalized(nn.Linear(*each), rate=MAPPING_RATE) for each in pairwise(widths))

    def forward(self, latents: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → w [B, W]"""
        with without_autocast(labels):
            parts = [] if latents is None else [latents]
            if self.embedding is not None:
                one_hot = labels[:, None] == torch.arange(self.num_classes, device=labels.device)
                parts.append(self.embedding(one_hot.to(self.embedding.weight.dtype)))
            w = torch.cat([part * torch.rsqrt(part.square().mean(1, keepdim=True) + EPS) for part in parts], 1)
            for layer in self.layers:
                w = activate(layer(w))
        return w


class Modulated(nn.Module):
    """A convolution without bias, whose weight is scaled for each image and each of its input channels by a style.

    It is the feature map that is scaled, which gives the same, so that all images of a batch share one weight. Styles are
    computed without autocast.
    """

    def __init__(self, before: int, after: int, latent_dim: int, size: int):
        super().__init__()
        self.style = equalized(nn.Linear(latent_dim, before), bias=1.0)
        self.weight = nn.Parameter(torch.randn(after, before, size, size))
        self.gain = 1 / math.sqrt(before * size**2)
        self.bias = nn.Parameter(torch.zeros(after))

    def modulate(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, C, H, W], w [B, Z] → the feature map scaled, the weight [C', C, size, size], the style [B, C]"""
        with without_autocast(x):
            style = self.style(w)
        return x * _as_map(style, x), self.gain * self.weight, style


class StyledConvolution(Modulated):
    """A 3×3 convolution, modulated and demodulated (equations 1 and 3), noise, bias, leaky ReLU.

    number: of the layer, for its noise; up: doubles the resolution first, with the low-pass filter behind the convolution
    """

    def __init__(self, before: int, after: int, latent_dim: int, *, number: int, up: bool = False):
        super().__init__(before, after, latent_dim, 3)
        self.low_pass = LowPass(padding=1, gain=4.0) if up else None
        self.noise_strength = nn.Parameter(torch.zeros(1))  # DeepSpeed refuses a scalar
        self.number = number

    def forward(self, x: torch.Tensor, w: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], w [B, Z], latents [B, Z] → [B, C', H, W] or [B, C', 2H, 2W]"""
        x, weight, style = self.modulate(x, w)
        if self.low_pass is None:
            x = F.conv2d(x, weight, padding=1)
        else:
            x = self.low_pass(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        with without_autocast(x):
            norm = torch.rsqrt(style.square() @ weight.square().sum((2, 3)).T + EPS)  # [B, C']
            noise = hashed_normal(latents, (1, *x.shape[2:]), self.number) * self.noise_strength
        return activate(x * _as_map(norm, x) + noise.to(x.dtype) + self.bias.to(x.dtype)[:, None, None])


class ToImage(Modulated):
    """A 1×1 convolution, modulated, not demodulated; its result leaves autocast."""

    def __init__(self, before: int, channels: int, latent_dim: int):
        super().__init__(before, channels, latent_dim, 1)

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], w [B, Z] → [B, channels, H, W]"""
        x, weight, _ = self.modulate(x, w)
        return F.conv2d(x, weight, self.bias).to(weight.dtype)


class UpBlock(Block):
    """Twice the resolution, of the feature map and of the image that grows beside it.

    number: of its first layer
    """

    def __init__(self, before: int, after: int, channels: int, latent_dim: int, number: int):
        super().__init__()
        self.conv1 = StyledConvolution(before, after, latent_dim, number=number, up=True)
        self.conv2 = StyledConvolution(after, after, latent_dim, number=number + 1)
        self.to_image = ToImage(after, channels, latent_dim)
        self.upsample = Upsample()

    def forward(
        self, x: torch.Tensor, image: torch.Tensor, ws: torch.Tensor, latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, C, H, W], image [B, channels, H, W], ws [B, 3, Z], latents [B, Z] → both at twice the resolution"""
        first, second, third = ws.unbind(1)
        x = self.conv2(self.conv1(x, first, latents), second, latents)
        with without_autocast(image):
            image = self.upsample(image)
        return x, image + self.to_image(x, third)


class StyleGAN2Generator(nn.Module):
    """w has as many numbers as the latents.

    truncation: ψ; in evaluation mode each w keeps this share of its way from the mean w (section 3.2 of Karras et al. 2019,
                1812.04948); None: all of it
    """

    truncation: float | None = None

    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        widths = stage_widths(model, data, model.generator_width)[::-1]
        latent_dim = model.latent_dim
        self.style_mixing = model.style_mixing
        self.mapping = MappingNetwork(latent_dim, data.num_classes, latent_dim, model.mapping_layers)
        self.constant = nn.Parameter(torch.randn(widths[0], *pyramid_of(model, data).first))
        self.conv = StyledConvolution(widths[0], widths[0], latent_dim, number=0)
        self.to_image = ToImage(widths[0], data.channels, latent_dim)
        self.blocks = nn.ModuleList(
            UpBlock(before, after, data.channels, latent_dim, number=2 * stage + 1)
            for stage, (before, after) in enumerate(pairwise(widths))
        )
        self.num_styles = 2 * len(widths)
        self.register_buffer("w_average", torch.zeros(latent_dim))

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W], in [-1, 1] but for some"""
        return self.synthesize(self.styles(latents, labels), latents)

    def styles(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → ws [B, L, Z], one for each convolution and the last layer: w, in training mode
        mixed, in evaluation mode truncated"""
        w = self.mapping(latents, labels)
        if self.training:
            track(self.w_average, w.mean(0), W_MOMENTUM)
        elif self.truncation is not None:
            w = torch.lerp(self.w_average, w, self.truncation)
        ws = w[:, None].expand(-1, self.num_styles, -1)
        return self._mix(ws, latents, labels) if self.training and self.style_mixing else ws

    def synthesize(self, ws: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """ws [B, L, Z], latents [B, Z], which the noise comes from → images [B, C, H, W]"""
        x = self.conv(self.constant.expand(ws.size(0), -1, -1, -1), ws[:, 0], latents)
        image = self.to_image(x, ws[:, 1])
        for stage, block in enumerate(self.blocks):
            x, image = block(x, image, ws[:, 2 * stage + 1 : 2 * stage + 4], latents)
        return image

    def _mix(self, ws: torch.Tensor, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """In a share `style_mixing` of images, all layers after a random one have another w (1812.04948, section 3.1)."""
        others = self.mapping(hashed_normal(latents, latents.shape[1:], SECOND_LATENTS).to(latents.dtype), labels)
        chosen, place = hashed_uniform(latents, (2, 1), CROSSOVER).unbind(1)
        layers = torch.arange(self.num_styles, device=ws.device)
        mixed = (chosen < self.style_mixing) & (layers > (place * (self.num_styles - 1)).floor())
        return torch.where(mixed[:, :, None], others[:, None], ws)


class DownBlock(Block):
    """Half the resolution; residual: whether with a shortcut."""

    def __init__(self, before: int, after: int, *, residual: bool):
        super().__init__()
        self.conv1 = equalized(nn.Conv2d(before, before, 3, padding=1))
        self.low_pass = LowPass(padding=2)
        self.conv2 = equalized(nn.Conv2d(before, after, 3, stride=2))
        shortcut = Downsample(), equalized(nn.Conv2d(before, after, 1, bias=False))
        self.shortcut = nn.Sequential(*shortcut) if residual else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C', H/2, W/2]"""
        h = activate(self.conv1(x))
        h = activate(self.conv2(self.low_pass(h)))
        return h if self.shortcut is None else (h + self.shortcut(x)) / math.sqrt(2)


class MinibatchStandardDeviation(nn.Module):
    """One more channel: how much the images of a group differ (Karras et al. 2018, 1710.10196, section 3).

    A group's members are as far apart in the batch as can be, so that groups are the same on any number of ranks. In
    evaluation mode, where each image is judged alone, it is the running mean.
    """

    def __init__(self, group_size: int):
        super().__init__()
        self.group_size = group_size
        self.register_buffer("running_std", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C + 1, H, W]; the group size must divide B in training mode"""
        if self.training:
            std = self._of_groups(x)
            track(self.running_std, std.mean(), STD_MOMENTUM)
            std = std.repeat(self.group_size)
        else:
            std = self.running_std.expand(x.size(0))
        return torch.cat([x, _as_map(std[:, None], x).expand(-1, -1, *x.shape[2:])], 1)

    def _of_groups(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B / group_size]; image i is in group i modulo their number"""
        if len(x) % self.group_size:
            raise ConfigError(
                f"model.minibatch_std={self.group_size} does not divide the {len(x)} images of one rank's micro-batch: choose "
                "another group size, batch size, accumulation or number of ranks, or say model.minibatch_std=0"
            )
        with without_autocast(x):
            groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (self.group_size, -1))
            return (groups.var(0, correction=0) + EPS).sqrt().mean((1, 2, 3))


class StyleGAN2Trunk(Trunk):
    """couples_images: whether features depend on the other images of the batch, in training mode"""

    layer = staticmethod(equalized)

    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        widths = stage_widths(model, data, model.discriminator_width)
        residual = model.discriminator_architecture == "resnet"
        self.from_image = equalized(nn.Conv2d(data.channels, widths[0], 1))
        self.blocks = nn.ModuleList(DownBlock(before, after, residual=residual) for before, after in pairwise(widths))
        self.couples_images = model.minibatch_std > 0
        self.compare = MinibatchStandardDeviation(model.minibatch_std) if self.couples_images else nn.Identity()
        self.features = widths[-1]
        self.conv = equalized(nn.Conv2d(self.features + self.couples_images, self.features, 3, padding=1))
        self.gather = equalized(nn.Linear(self.features * math.prod(pyramid_of(model, data).first), self.features))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] → features [B, F]"""
        x = activate(self.from_image(images))
        for block in self.blocks:
            x = block(x)
        x = activate(self.conv(self.compare(x)))
        return activate(self.gather(x.flatten(1)))


class MappedProjectionHead(Head):
    """The logit is the match of image and label, which has a mapping network of its own, and nothing else (2006.06676)."""

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.project = layer(nn.Linear(features, features))
        self.mapping = MappingNetwork(0, num_classes, features, LABEL_LAYERS)
        self.classifier = nn.Linear(features, num_classes)

    def judge(self, features: torch.Tensor, labels: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
        return (self.project(features) * self.mapping(None, labels)).sum(1) / math.sqrt(features.size(1))


def _as_map(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B, C] → [B, C, 1, 1], of the number format of the feature map x"""
    return values.to(x.dtype)[:, :, None, None]
