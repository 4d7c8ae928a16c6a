"""Spectral norm (Miyato et al. 2018, 1802.05957), whose forward changes nothing.

`torch.nn.utils.parametrizations.spectral_norm` runs its power iteration in every forward pass in training mode: twice an
update and more, on a frozen discriminator too, and again where a pass is recomputed, then with another result.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

FIRST_ITERATIONS = 15
EPS = 1e-12  # the least norm of a vector


class SpectralNorm(nn.Module):
    """Divides a weight, as a matrix of [out, everything else], by its largest singular value σ ≈ uᵀWv."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        weight = weight.detach()
        self.register_buffer("u", F.normalize(weight.new_empty(weight.size(0)).normal_(), dim=0))
        self.register_buffer("v", F.normalize(weight.new_empty(weight[0].numel()).normal_(), dim=0))
        _iterate([self], [weight], FIRST_ITERATIONS)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight / torch.dot(self.u, weight.flatten(1) @ self.v)


def spectral_norm(module: nn.Module) -> nn.Module:
    """The module, its weight under spectral norm."""
    parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))
    return module


def power_iteration(network: nn.Module, count: int = 1) -> None:
    """For every spectral norm of the network: one step is to be made before each update of its weights."""
    lists = [module for module in network.modules() if isinstance(module, parametrize.ParametrizationList)]
    normed = [each for each in lists if isinstance(each[0], SpectralNorm)]
    if normed:
        _iterate([each[0] for each in normed], [each.original for each in normed], count)


@torch.no_grad()
def _iterate(norms: list[SpectralNorm], weights: list[torch.Tensor], count: int) -> None:
    """Brings u and v of each closer to the singular vectors of σ."""
    matrices = [weight.flatten(1) for weight in weights]
    us, vs = [norm.u for norm in norms], [norm.v for norm in norms]
    for _ in range(count):
        _set_normalized(us, [matrix @ v for matrix, v in zip(matrices, vs, strict=True)])
        _set_normalized(vs, [u @ matrix for matrix, u in zip(matrices, us, strict=True)])


def _set_normalized(vectors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    norms = torch._foreach_norm(values)
    torch._foreach_clamp_min_(norms, EPS)
    torch._foreach_div_(values, norms)
    torch._foreach_copy_(vectors, values)
