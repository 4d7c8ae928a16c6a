"""Spectral norm (Miyato et al. 2018, 1802.05957), whose forward changes nothing.

`torch.nn.utils.parametrizations.spectral_norm` runs its power iteration in every forward pass in training mode: twice an
update and more, on a frozen discriminator too, and again where a pass is recomputed, then with another result.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

FIRST_ITERATIONS = 15


class SpectralNorm(nn.Module):
    """Divides a weight, as a matrix of [out, everything else], by its largest singular value σ ≈ uᵀWv."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        weight = weight.detach()
        self.register_buffer("u", F.normalize(weight.new_empty(weight.size(0)).normal_(), dim=0))
        self.register_buffer("v", F.normalize(weight.new_empty(weight[0].numel()).normal_(), dim=0))
        self.iterate(weight, FIRST_ITERATIONS)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight / torch.dot(self.u, weight.flatten(1) @ self.v)

    @torch.no_grad()
    def iterate(self, weight: torch.Tensor, count: int = 1) -> None:
        """Brings u and v closer to the singular vectors of σ."""
        matrix = weight.flatten(1)
        for _ in range(count):
            self.u.copy_(F.normalize(matrix @ self.v, dim=0))
            self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))


def spectral_norm(module: nn.Module) -> nn.Module:
    """The module, its weight under spectral norm."""
    parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))
    return module


def power_iteration(network: nn.Module, count: int = 1) -> None:
    """For every spectral norm of the network: one step is to be made before each update of its weights."""
    for module in network.modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], SpectralNorm):
            module[0].iterate(module.original, count)
