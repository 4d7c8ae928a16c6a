"""StarGAN (Choi et al. 2018, 1711.09020): image-to-image translation among classes, for images with a side of 4·2ⁿ pixels.

Layers, first weights (torch's) and slopes are those of the published networks. Instance norm always goes by the statistics of
the image at hand.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.models.heads import Head
from gandist.models.layers import Block, Trunk, plain, pyramid_of

SLOPE = 0.01  # of the discriminator's leaky ReLUs
HALVINGS = 2  # in the generator, of images of 16 pixels or more
RESIDUAL_BLOCKS = 6


class NormedConvolution(Block):
    """A convolution of the same size, half or twice the size, instance norm (Ulyanov et al. 2016, 1607.08022), and ReLU.

    convolution: without a bias, which the norm would take away again
    """

    def __init__(self, convolution: nn.Conv2d | nn.ConvTranspose2d):
        super().__init__()
        self.convolution = convolution
        self.norm = nn.InstanceNorm2d(convolution.out_channels, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.convolution(x)))


class ResidualBlock(Block):
    def __init__(self, width: int):
        super().__init__()
        self.first = NormedConvolution(nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm2d(width, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.convolution(self.first(x)))


class StarGANGenerator(nn.Module):
    """The target class joins the image as constant maps, one for each class."""

    translates = True

    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        halvings = min(HALVINGS, pyramid_of(model, data).doublings)
        widths = [model.generator_width << stage for stage in range(halvings + 1)]
        outer = {"kernel_size": 7, "padding": 3, "bias": False}
        resampling = {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False}
        self.num_classes = data.num_classes
        self.blocks = nn.Sequential(
            NormedConvolution(nn.Conv2d(data.channels + data.num_classes, widths[0], **outer)),
            *(NormedConvolution(nn.Conv2d(*pair, **resampling)) for pair in pairwise(widths)),
            *(ResidualBlock(widths[-1]) for _ in range(RESIDUAL_BLOCKS)),
            *(NormedConvolution(nn.ConvTranspose2d(*pair, **resampling)) for pair in pairwise(widths[::-1])),
        )
        self.to_image = nn.Conv2d(widths[0], data.channels, **outer)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1], the classes that they shall have int64 [B] → images [B, C, H, W] in [-1, 1]"""
        # Not by `F.one_hot`, which looks at the labels' values.
        classes = labels[:, None] == torch.arange(self.num_classes, device=labels.device)
        maps = classes.to(images.dtype)[:, :, None, None].expand(-1, -1, *images.shape[2:])
        return torch.tanh(self.to_image(self.blocks(torch.cat([images, maps], 1))))


class StridedConvolution(Block):
    """Half the size."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.convolution = nn.Conv2d(before, after, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.convolution(x), SLOPE)


class StarGANTrunk(Trunk):
    """The features are the last map, whose shorter side has 2 pixels, flattened.

    map_shape: of the map, (channels, height, width)
    """

    layer = staticmethod(plain)

    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        _, doublings, first = pyramid_of(model, data)
        layers = doublings + (min(first) > 1)  # a map of 4×1 cannot be halved again
        widths = [data.channels, *(model.discriminator_width << layer for layer in range(layers))]
        self.blocks = nn.Sequential(*(StridedConvolution(*pair) for pair in pairwise(widths)))
        height, width = first if layers == doublings else (side // 2 for side in first)
        self.map_shape = widths[-1], height, width
        self.features = widths[-1] * height * width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] → features [B, F]"""
        return self.blocks(images).flatten(1)


class PatchHead(Head):
    """Patches are judged each for itself, and the logit is the mean of their logits (PatchGAN, Isola et al. 2017,
    1611.07004); the classifier sees the whole map. The generator answers to both."""

    guides_generator = True

    def __init__(self, map_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        self.map_shape = map_shape
        channels, *size = map_shape
        self.adversarial = nn.Conv2d(channels, 1, 3, padding=1, bias=False)
        self.classifier = nn.Conv2d(channels, num_classes, size, bias=False)

    @classmethod
    def on(cls, trunk: StarGANTrunk, num_classes: int) -> "PatchHead":
        return cls(trunk.map_shape, num_classes)

    def judge(self, features: torch.Tensor, labels: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
        return self.adversarial(features.unflatten(1, self.map_shape)).mean((1, 2, 3))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return super().classify(features.unflatten(1, self.map_shape)).flatten(1)
