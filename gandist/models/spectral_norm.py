"""Spectral norm (Miyato et al. 2018, 1802.05957), whose forward changes nothing.

`torch.nn.utils.parametrizations.spectral_norm` runs its power iteration in every forward pass in training mode: twice an
update and more, on a frozen discriminator too, and again where a pass is recomputed, then with another result. Here it is run
once for each update of the weights, which gives σ as well: normalizing is a division.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

Tensors = list[torch.Tensor]

FIRST_ITERATIONS = 15
EPS = 1e-12  # the least norm of a vector


class SpectralNorm(nn.Module):
    """Divides a weight, as a matrix of [out, everything else], by its largest singular value σ ≈ uᵀWv.

    In training σ is that of the last power iteration; in evaluation, where weights are averages, it is computed.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        matrix = _as_matrix(weight.detach())
        self.register_buffer("u", F.normalize(matrix.new_empty(matrix.size(0)).normal_(), dim=0))
        self.register_buffer("v", F.normalize(matrix.new_empty(matrix.size(1)).normal_(), dim=0))
        self.register_buffer("sigma", matrix.new_ones(()))
        for _ in range(FIRST_ITERATIONS):
            _iterate([self.u], [self.v], [self.sigma], [weight.detach()])

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.training:
            return _Normalize.apply(weight, self.sigma, self.u, self.v)
        with torch.autocast(weight.device.type, enabled=False):
            return weight / torch.dot(self.u, _as_matrix(weight) @ self.v)


class _Normalize(torch.autograd.Function):
    """W / σ, differentiated as if σ were computed as uᵀWv (1802.05957, equation 11)."""

    @staticmethod
    def forward(weight: torch.Tensor, sigma: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return weight / sigma

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normalized, sigma, u, v = ctx.saved_tensors
        column = (u * (gradient * normalized).sum()).view(-1, *[1] * (gradient.dim() - 1))
        row = v.view(1, *gradient.shape[2:], -1).movedim(-1, 1)
        return torch.addcmul(gradient, column, row, value=-1) / sigma, None, None, None


def spectral_norm(module: nn.Module) -> nn.Module:
    """The module, its weight under spectral norm."""
    parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))
    return module


class PowerIteration:
    """One step of it for every spectral norm of a network, to be made after each update of the weights."""

    def __init__(self, network: nn.Module):
        lists = [module for module in network.modules() if isinstance(module, parametrize.ParametrizationList)]
        self._normed = [each for each in lists if isinstance(each[0], SpectralNorm)]
        self._iterate = _iterate

    def compile(self) -> None:
        """It becomes generated code, at the first call."""
        self._iterate = torch.compile(_iterate, dynamic=False)

    def __call__(self) -> None:
        if self._normed:
            norms = [each[0] for each in self._normed]
            us, vs, sigmas = ([getattr(norm, name) for norm in norms] for name in ("u", "v", "sigma"))
            self._iterate(us, vs, sigmas, [each.original for each in self._normed])


def power_iteration(network: nn.Module, count: int = 1) -> None:
    """For weights that something else than a player's update has changed."""
    iteration = PowerIteration(network)
    for _ in range(count):
        iteration()


@torch.no_grad()
def _iterate(us: Tensors, vs: Tensors, sigmas: Tensors, weights: Tensors) -> None:
    """Brings u and v of each weight closer to the singular vectors of σ, and σ to that of the weight."""
    matrices = [_as_matrix(weight) for weight in weights]
    _normalize_into(us, [torch.mv(matrix, v) for matrix, v in zip(matrices, vs, strict=True)])
    torch._foreach_copy_(sigmas, _normalize_into(vs, [torch.mv(matrix.T, u) for matrix, u in zip(matrices, us, strict=True)]))


def _normalize_into(vectors: Tensors, values: Tensors) -> Tensors:
    """Returns the norms that the values had."""
    norms = torch._foreach_norm(values)
    torch._foreach_clamp_min_(norms, EPS)
    torch._foreach_div_(values, norms)
    torch._foreach_copy_(vectors, values)
    return norms


def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, …] → [out, … · in], without a copy where it is channels last."""
    return weight.movedim(1, -1).flatten(1)
