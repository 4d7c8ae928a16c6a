"""Gradient penalties on the discriminator. They take second derivatives, and want each image to have a gradient of its own."""

from collections.abc import Callable
from typing import TypeVar

import torch

Aux = TypeVar("Aux")


def input_gradient(
    discriminate: Callable[[torch.Tensor], tuple[torch.Tensor, Aux]], images: torch.Tensor
) -> tuple[torch.Tensor, Aux]:
    """∇ₓ D(x) for each image, [B, C, H, W], differentiable with respect to the parameters; and what else came.

    discriminate: images [B, …] → (their logits [B], whatever else came of the same pass)

    Summing the logits gives each image's own gradient, as images do not interact. `autograd.grad` cannot be compiled
    (pytorch#91469), and `torch.func.vjp` refuses activation checkpointing: so each where the other cannot be.
    """
    if torch.compiler.is_compiling():
        logits, pull_back, aux = torch.func.vjp(discriminate, images, has_aux=True)
        (gradient,) = pull_back(torch.ones_like(logits))
    else:
        images = images.detach().requires_grad_()
        logits, aux = discriminate(images)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient, aux


def zero_centered(gradient: torch.Tensor) -> torch.Tensor:
    """½ E‖∇D‖², to be multiplied by gamma: R1 on real images, R2 on generated ones (Mescheder et al. 2018, 1801.04406,
    equation 9)."""
    return gradient.square().flatten(1).sum(1).mean() / 2


def one_centered(gradient: torch.Tensor) -> torch.Tensor:
    """E(‖∇D‖ − 1)², to be multiplied by lambda: WGAN-GP on interpolates (Gulrajani et al. 2017, 1704.00028, equation 3)."""
    return (torch.linalg.vector_norm(gradient.flatten(1), dim=1) - 1).square().mean()


def interpolate(real: torch.Tensor, fake: torch.Tensor, mixing: torch.Tensor) -> torch.Tensor:
    """Images between real and fake [B, C, H, W]; mixing [B] in [0, 1]: the share of the real one."""
    return torch.lerp(fake, real, mixing[:, None, None, None])
