"""The networks by name. A new family or head is one file or class, and one entry here."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.errors import ConfigError
from gandist.models.biggan import BigGANGenerator, BigGANTrunk
from gandist.models.biggan_deep import BigGANDeepGenerator, BigGANDeepTrunk
from gandist.models.dcgan import DCGANGenerator, DCGANTrunk
from gandist.models.heads import (
    AuxiliaryClassifierHead,
    ContrastiveHead,
    D2DCEHead,
    DiscriminativeClassifierHead,
    Discriminator,
    DiscriminatorOutput,
    KPlusOneHead,
    MultiHingeHead,
    ProjectionHead,
    PureProjectionHead,
    TwinAuxiliaryHead,
    UnconditionalHead,
)
from gandist.models.layers import Block, Trunk
from gandist.models.mlp import MLPGenerator, MLPTrunk
from gandist.models.r3gan import R3GANGenerator, R3GANTrunk
from gandist.models.resnet import ResNetGenerator, ResNetTrunk
from gandist.models.stargan import PatchHead, StarGANGenerator, StarGANTrunk
from gandist.models.stylegan2 import MappedProjectionHead, StyleGAN2Generator, StyleGAN2Trunk

__all__ = [
    "Discriminator",
    "DiscriminatorOutput",
    "build_discriminator",
    "build_generator",
    "evaluating",
    "freeze",
    "full_float32",
    "recompute_activations",
    "truncates",
    "truncating",
]


class Family(NamedTuple):
    """Networks are built of (ModelConfig, DataConfig).

    heads: of its own, in place of those in HEADS
    """

    generator: Callable[[ModelConfig, DataConfig], nn.Module]
    trunk: Callable[[ModelConfig, DataConfig], Trunk]
    heads: Mapping[str, type[nn.Module]] = {}


FAMILIES = {
    "mlp": Family(MLPGenerator, MLPTrunk),
    "dcgan": Family(DCGANGenerator, DCGANTrunk),
    "resnet": Family(ResNetGenerator, ResNetTrunk),
    "biggan": Family(BigGANGenerator, BigGANTrunk),
    "biggan_deep": Family(BigGANDeepGenerator, BigGANDeepTrunk),
    "r3gan": Family(R3GANGenerator, R3GANTrunk, {"projection": PureProjectionHead}),
    "stylegan2": Family(StyleGAN2Generator, StyleGAN2Trunk, {"projection": MappedProjectionHead}),
    "stargan": Family(StarGANGenerator, StarGANTrunk, {"auxiliary": PatchHead}),
}
HEADS = {
    "projection": ProjectionHead,
    "auxiliary": AuxiliaryClassifierHead,
    "twin_auxiliary": TwinAuxiliaryHead,
    "adc": DiscriminativeClassifierHead,
    "contrastive": ContrastiveHead,
    "d2d_ce": D2DCEHead,
    "multi_hinge": MultiHingeHead,
    "k_plus_one": KPlusOneHead,
    "none": UnconditionalHead,
}


def build_generator(model: ModelConfig, data: DataConfig) -> nn.Module:
    """A module latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1]. Raises ConfigError.

    Where `model.translates`, images [B, C, H, W] in [-1, 1] stand in place of the latents.
    """
    return FAMILIES[model.family].generator(model, data)


def build_discriminator(model: ModelConfig, data: DataConfig) -> Discriminator:
    """A module images [B, C, H, W] in [-1, 1], labels int64 [B] → DiscriminatorOutput. Raises ConfigError."""
    family = FAMILIES[model.family]
    trunk = family.trunk(model, data)
    head = (HEADS | family.heads)[model.conditioning]
    return Discriminator(trunk, head.on(trunk, data.num_classes))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network is in evaluation mode, and then in the mode that it was in."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32: its rounding would depend on the device."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def truncates(generator: nn.Module) -> bool:
    """Whether the generator has a truncation of its own, in place of that of its latents."""
    return hasattr(generator, "truncation")


@contextmanager
def truncating(generator: nn.Module, truncation: float | None) -> Iterator[None]:
    """A generator that truncates does so by this much in evaluation mode, and then as before."""
    if not truncates(generator):
        yield
        return
    before, generator.truncation = generator.truncation, truncation
    try:
        yield
    finally:
        generator.truncation = before


def freeze(discriminator: Discriminator, stages: int) -> None:
    """So many parts of the trunk, from the image on, keep their weights (Mo et al. 2020, 2002.10964). Raises ConfigError."""
    parts = discriminator.trunk.stages()
    if stages > len(parts):
        raise ConfigError(f"train.freeze_d={stages}: the discriminator has {len(parts)} parts that can be frozen")
    for part in parts[:stages]:
        part.requires_grad_(False)


def recompute_activations(network: nn.Module) -> None:
    """The activations inside the network's blocks are no longer kept for the backward pass, but made again there."""
    for module in network.modules():
        if isinstance(module, Block):
            module.recompute = True
