"""One update of both players as research code makes it: the yardstick of `benchmarks.step` and `benchmarks.regress`.

The same networks, but spectral norm by torch, with a power iteration in every forward pass; convolutions after upsampling and
before pooling; real and generated images in a pass each; NCHW; Adam and the average one tensor after the other.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from gandist.config import Config
from gandist.models import build_discriminator, build_generator
from gandist.models.layers import DownConv2d, UpConv2d
from gandist.models.spectral_norm import SpectralNorm


class PlainStep:
    """A step on the CPU: hinge loss, and the class head, if there is one, learns beside it."""

    def __init__(self, config: Config, generator: nn.Module, discriminator: nn.Module):
        self.config = config
        self.generator, self.discriminator = generator, discriminator
        self.average = copy.deepcopy(self.generator)
        rates = {"betas": config.optimizer.betas, "eps": config.optimizer.eps, "foreach": False, "fused": False}
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=2e-4, **rates) for network in (self.generator, self.discriminator)
        ]

    def __call__(self, real: torch.Tensor, labels: torch.Tensor) -> None:
        """real [B, C, H, W] in [-1, 1], labels int64 [B]"""
        of_generator, of_discriminator = self.optimizers
        of_discriminator.zero_grad()
        self.discriminator_loss(real, labels).backward()
        of_discriminator.step()
        of_generator.zero_grad()
        self.generator_loss(labels).backward()
        of_generator.step()
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                average.copy_(parameter.lerp(average, 0.999))

    def discriminator_loss(self, real: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            fake = self.generator(self._latents(len(real)), labels)
        of_real, of_fake = self.discriminator(real, labels), self.discriminator(fake, labels)
        hinge = F.relu(1 - of_real.logits).mean() + F.relu(1 + of_fake.logits).mean()
        return hinge + (F.cross_entropy(of_real.class_logits, labels) if of_real.class_logits.size(1) else 0)

    def generator_loss(self, labels: torch.Tensor) -> torch.Tensor:
        self.discriminator.requires_grad_(False)
        loss = -self.discriminator(self.generator(self._latents(len(labels)), labels), labels).logits.mean()
        self.discriminator.requires_grad_(True)
        return loss

    def _latents(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.config.model.latent_dim)


def build_plain(config: Config) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator."""
    discriminator = build_discriminator(config.model, config.data)
    discriminator.head.detached = config.classification.detach
    return as_torch_has_it(build_generator(config.model, config.data)), as_torch_has_it(discriminator)


def as_torch_has_it(network: nn.Module) -> nn.Module:
    """The network with torch's own spectral norm and batch norm, and convolutions at the higher resolution."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            setattr(module, name, _plain(child))
    return network


def _plain(layer: nn.Module) -> nn.Module:
    normed = parametrize.is_parametrized(layer) and isinstance(layer.parametrizations.weight[0], SpectralNorm)
    if normed:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    plain = layer
    if isinstance(layer, _BatchNorm):
        plain = nn.BatchNorm2d(layer.num_features, eps=layer.eps, affine=layer.affine)
    if isinstance(layer, UpConv2d | DownConv2d):
        plain = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=layer.bias is not None)
        plain.load_state_dict(layer.state_dict())
    if normed:
        nn.utils.parametrizations.spectral_norm(plain)
    if isinstance(layer, UpConv2d):
        return nn.Sequential(nn.Upsample(scale_factor=2), plain)
    return nn.Sequential(plain, nn.AvgPool2d(2)) if isinstance(layer, DownConv2d) else plain
