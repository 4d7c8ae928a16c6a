"""The networks by name. A new family or head is one file or class, and one entry here."""

from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.models.dcgan import DCGANGenerator, DCGANTrunk
from gandist.models.heads import (
    AuxiliaryClassifierHead,
    ContrastiveHead,
    D2DCEHead,
    Discriminator,
    DiscriminatorOutput,
    ProjectionHead,
    UnconditionalHead,
)

__all__ = ["Discriminator", "DiscriminatorOutput", "build_discriminator", "build_generator", "recompute_activations"]
from gandist.models.layers import Block

FAMILIES = {"dcgan": (DCGANGenerator, DCGANTrunk)}
HEADS = {
    "projection": ProjectionHead,
    "auxiliary": AuxiliaryClassifierHead,
    "contrastive": ContrastiveHead,
    "d2d_ce": D2DCEHead,
    "none": UnconditionalHead,
}


def build_generator(model: ModelConfig, data: DataConfig) -> nn.Module:
    """A module latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1]. Raises ConfigError."""
    generator, _ = FAMILIES[model.family]
    return generator(
        latent_dim=model.latent_dim,
        num_classes=data.num_classes,
        resolution=data.resolution,
        channels=data.channels,
        width=model.generator_width,
    )


def build_discriminator(model: ModelConfig, data: DataConfig) -> Discriminator:
    """A module images [B, C, H, W] in [-1, 1], labels int64 [B] → DiscriminatorOutput. Raises ConfigError."""
    _, trunk_of_family = FAMILIES[model.family]
    trunk = trunk_of_family(resolution=data.resolution, channels=data.channels, width=model.discriminator_width)
    return Discriminator(trunk, HEADS[model.conditioning](trunk.features, data.num_classes))


def recompute_activations(network: nn.Module) -> None:
    """The activations inside the network's blocks are no longer kept for the backward pass, but made again there."""
    for module in network.modules():
        if isinstance(module, Block):
            module.recompute = True
