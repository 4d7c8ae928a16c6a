"""Gradient penalties on the discriminator. They take second derivatives, so it may have no batch norm."""

from collections.abc import Callable
from typing import TypeVar

import torch

Aux = TypeVar("Aux")


def r1_penalty(
    discriminate: Callable[[torch.Tensor], tuple[torch.Tensor, Aux]], real: torch.Tensor
) -> tuple[torch.Tensor, Aux]:
    """R1 = ½ E‖∇ₓ D(x)‖² on real images (Mescheder et al. 2018, 1801.04406, equation 9), to be multiplied by gamma.

    discriminate: real [B, …] → (their logits [B], whatever else came of the same pass)
    Returns the penalty [] and what else came, both differentiable with respect to the parameters. Summing the logits
    gives each sample's own gradient, as samples do not interact. `torch.func.vjp` rather than `autograd.grad`: the
    caller's module can be compiled, and DDP sees a single backward pass.
    """
    logits, pull_back, aux = torch.func.vjp(discriminate, real, has_aux=True)
    (gradient,) = pull_back(torch.ones_like(logits))
    return gradient.square().flatten(1).sum(1).mean() / 2, aux
