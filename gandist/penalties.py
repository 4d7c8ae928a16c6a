"""What is added to the adversarial losses to keep the game in balance.

Gradient penalties take second derivatives, and want each image to have a gradient of its own.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

# Imported for what it does to torch.
import gandist.models.convolution  # noqa: F401
from gandist.models.layers import gather_over_ranks, mean_over_ranks, track
from gandist.models.noise import hashed_normal, hashed_uniform

Aux = TypeVar("Aux")


def gradient_of(function: Callable[[torch.Tensor], tuple[torch.Tensor, Aux]], inputs: torch.Tensor) -> tuple[torch.Tensor, Aux]:
    """Of each value by its own input, [B, …], itself differentiable; and what else came.

    function: inputs [B, …] → (values [B], whatever else came of the same pass)

    The sum of the values has each input's own gradient, as they do not interact. `autograd.grad` cannot be compiled
    (pytorch#91469), and `torch.func.vjp` refuses activation checkpointing: so each where the other cannot be.
    """
    if torch.compiler.is_compiling():
        values, pull_back, aux = torch.func.vjp(function, inputs, has_aux=True)
        (gradient,) = pull_back(torch.ones_like(values))
    else:
        inputs = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        values, aux = function(inputs)
        (gradient,) = torch.autograd.grad(values.sum(), inputs, create_graph=True)
    return gradient, aux


def zero_centered(gradient: torch.Tensor) -> torch.Tensor:
    """½ E‖∇D‖², to be multiplied by gamma: R1 on real images, R2 on generated ones (Mescheder et al. 2018, 1801.04406,
    equation 9)."""
    return gradient.square().flatten(1).sum(1).mean() / 2


def one_centered(gradient: torch.Tensor) -> torch.Tensor:
    """E(‖∇D‖ − 1)², to be multiplied by lambda: WGAN-GP on interpolates (Gulrajani et al. 2017, 1704.00028, equation 3), DRAGAN
    around real images (Kodali et al. 2017, 1705.07215, equation 1)."""
    return (torch.linalg.vector_norm(gradient.flatten(1), dim=1) - 1).square().mean()


def interpolate(real: torch.Tensor, fake: torch.Tensor, mixing: torch.Tensor) -> torch.Tensor:
    """Images between real and fake [B, C, H, W]; mixing [B, 1] in [0, 1]: the share of the real one."""
    return torch.lerp(fake, real, mixing[:, :, None, None].to(real.dtype))


PERTURBATION = 2  # uniform numbers that an image wants for it


def perturb(real: torch.Tensor, uniforms: torch.Tensor, *, together: bool) -> torch.Tensor:
    """Images [B, C, H, W] on the way from the real ones to noise upon them, as DRAGAN's authors make them: added is, to each
    number, up to half the standard deviation of the global batch.

    uniforms: [B, 2] in [0, 1), how far on the way, and what the noise is made of
    together: whether other ranks do the same
    """
    mean, mean_square = real.mean(), real.square().mean()
    if together:
        mean, mean_square = mean_over_ranks(torch.stack([mean, mean_square]))
    deviation = (mean_square - mean.square()).clamp(min=0).sqrt()
    noise = hashed_uniform(uniforms, real.shape[1:], salt=0).to(real.dtype)
    return real + uniforms[:, :1, None, None].to(real.dtype) * deviation / 2 * noise


def orthogonal_penalty(network: nn.Module) -> torch.Tensor:
    """Σ ‖WWᵀ ⊙ (1 − I)‖² over the weights of the network but for embeddings: their rows, the filters, shall be orthogonal, of
    any length (Brock et al. 2019, 1809.11096, equation 3)."""
    embeddings = {
        parameter for module in network.modules() if isinstance(module, nn.Embedding) for parameter in module.parameters()
    }
    penalties = []
    for parameter in network.parameters():
        if parameter.dim() > 1 and parameter not in embeddings:
            rows = parameter.flatten(1)
            products = rows @ rows.T
            penalties.append((products - torch.diag(products.diagonal())).square().sum())
    return torch.stack(penalties).sum()


class LeCam(nn.Module):
    """(D(x) − α_fake)² + (D(G(z)) − α_real)², where α are running means of the logits of all ranks (Tseng et al. 2021,
    2104.03310, equation 6). At first they are means of all so far."""

    DECAY = 0.99

    def __init__(self):
        super().__init__()
        self.register_buffer("anchors", torch.zeros(2))  # of real and of generated images
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Logits [B] of either → []"""
        if self.training:
            self._track(real.detach(), fake.detach())
        anchor_real, anchor_fake = self.anchors.to(real.dtype)
        return (real - anchor_fake).square().mean() + (fake - anchor_real).square().mean()

    @torch.no_grad()
    def _track(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        means = mean_over_ranks(torch.stack([real.mean(), fake.mean()]))
        self.updates += 1
        weight = (1 / self.updates).clamp(min=1 - self.DECAY)
        means = torch.where(means.isfinite(), means.to(self.anchors), self.anchors)
        self.anchors.copy_(torch.lerp(self.anchors, means, weight))


class PathLength(nn.Module):
    """(‖Jᵀy‖ − a)², where J is the derivative of an image by its styles, y is normal noise, and a follows the mean of these
    lengths (Karras et al. 2020, 1912.04958, section 3.2). A generator with `styles` and `synthesize` has it."""

    DECAY = 0.99

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(
        self, synthesize: Callable[[torch.Tensor], torch.Tensor], styles: torch.Tensor, latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """styles [B, L, W] and the latents [B, Z] that they come from → images [B, C, H, W], penalty []"""

        def project(styles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            images = synthesize(styles)
            noise = hashed_normal(latents, images.shape[1:], salt=-1).to(images.dtype)
            return (images * noise).flatten(1).sum(1) / (images.size(2) * images.size(3)) ** 0.5, images

        gradient, images = gradient_of(project, styles)
        lengths = gradient.square().sum(2).mean(1).sqrt()
        if self.training:
            track(self.mean, lengths.mean(), 1 - self.DECAY)
        return images, (lengths - self.mean.to(lengths.dtype)).square().mean()


def feature_distance(real: torch.Tensor, fake: torch.Tensor, *, together: bool) -> torch.Tensor:
    """‖E f(x) − E f(G(z))‖² of features [B, F], the means over the global batch: feature matching (Salimans et al. 2016,
    1606.03498, section 3.1).

    together: whether other ranks do the same
    """
    difference = real.mean(0) - fake.mean(0)
    return (mean_over_ranks(difference) if together else difference).square().sum()


def weights_of_best(logits: torch.Tensor, share: float | torch.Tensor, *, together: bool) -> torch.Tensor:
    """[B]: 0 for all but the share of the global batch with the highest logits [B], so that the others' mean over it is theirs
    (top-k training, Sinha et al. 2020, 2002.06224).

    together: whether other ranks do the same
    """
    everyone = gather_over_ranks(logits.detach()) if together else logits.detach()
    count = (share * len(everyone) * torch.ones_like(logits[0])).round().long().clamp(min=1)
    worst = everyone.sort(descending=True).values.gather(0, count.reshape(1) - 1)
    kept = everyone >= worst
    return (logits.detach() >= worst).to(logits.dtype) * (len(everyone) / kept.sum())
