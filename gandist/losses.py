"""Losses of each image, [B], as functions of what the discriminator says: adversarial ones of its logits [B], and those by
which it is conditioned on the class."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class AdversarialLoss(NamedTuple):
    """paired: each generated image is judged beside a real one of the same class, in the generator's update too"""

    discriminator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (real logits, fake logits) → [B]
    generator: Callable[..., torch.Tensor]  # fake logits → [B], or if paired (fake logits, real logits) → [B]
    paired: bool = False


def hinge_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss (Lim & Ye 2017, 1705.02894)."""
    return F.relu(1 - real) + F.relu(1 + fake)


def negative_logit_generator(fake: torch.Tensor) -> torch.Tensor:
    """-D(G(z)), the generator's part of the hinge and the Wasserstein game."""
    return -fake


def logistic_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """-log D(x) - log(1 - D(G(z))) for D = sigmoid(logits) (Goodfellow et al. 2014, 1406.2661)."""
    return F.softplus(-real) + F.softplus(fake)


def non_saturating_generator(fake: torch.Tensor) -> torch.Tensor:
    """-log D(G(z)) (Goodfellow et al. 2014, 1406.2661, section 3)."""
    return F.softplus(-fake)


def saturating_generator(fake: torch.Tensor) -> torch.Tensor:
    """log(1 - D(G(z))), the minimax game as it stands (Goodfellow et al. 2014, 1406.2661, equation 1)."""
    return -F.softplus(fake)


def least_squares_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """½ (D(x) - 1)² + ½ D(G(z))² (Mao et al. 2017, 1611.04076, equation 9)."""
    return ((real - 1).square() + fake.square()) / 2


def least_squares_generator(fake: torch.Tensor) -> torch.Tensor:
    """½ (D(G(z)) - 1)² (Mao et al. 2017, 1611.04076, equation 9)."""
    return (fake - 1).square() / 2


def relativistic_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(D(x) - D(G(z))) of pairs (Jolicoeur-Martineau 2019, 1807.00734; as R3GAN, Huang et al. 2024, 2501.05441)."""
    return F.softplus(fake - real)


def relativistic_generator(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(D(G(z)) - D(x)) of pairs, the non-saturating form."""
    return F.softplus(real - fake)


def wasserstein_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The critic's estimate of minus the Wasserstein distance (Arjovsky et al. 2017, 1701.07875)."""
    return fake - real


ADVERSARIAL_LOSSES = {
    "hinge": AdversarialLoss(hinge_discriminator, negative_logit_generator),
    "non_saturating": AdversarialLoss(logistic_discriminator, non_saturating_generator),
    "saturating": AdversarialLoss(logistic_discriminator, saturating_generator),
    "least_squares": AdversarialLoss(least_squares_discriminator, least_squares_generator),
    "wasserstein": AdversarialLoss(wasserstein_discriminator, negative_logit_generator),
    "relativistic": AdversarialLoss(relativistic_discriminator, relativistic_generator, paired=True),
}


class Similarity(NamedTuple):
    """Of each image's embedding to others, as cosines.

    to_proxy:  and its class's proxy, [B, 1]
    to_others: and the embeddings of the global batch, [B, N]
    alike, left_out: bool [B, N], which of these are of its class, and which it is not compared with, itself among them
    """

    to_proxy: torch.Tensor
    to_others: torch.Tensor
    alike: torch.Tensor
    left_out: torch.Tensor


def conditional_contrastive(cosines: Similarity, temperature: float, margin: float) -> torch.Tensor:
    """The 2C loss of each image, [B] (ContraGAN, Kang & Park 2020, 2006.12681, equation 8): nearer to the proxy of its class
    and to images of it than to other images. It has no margin."""
    to_proxy = cosines.to_proxy / temperature
    to_others = (cosines.to_others / temperature).masked_fill(cosines.left_out, -torch.inf)
    positive = torch.cat([to_proxy, to_others.masked_fill(~cosines.alike, -torch.inf)], 1).logsumexp(1)
    return torch.cat([to_proxy, to_others], 1).logsumexp(1) - positive


def data_to_data_cross_entropy(cosines: Similarity, temperature: float, margin: float) -> torch.Tensor:
    """The D2D-CE loss of each image, [B] (ReACGAN, Kang et al. 2021, 2111.01118, equation 6): as `conditional_contrastive`, but
    images of the same class leave each other alone, and cosines above the margin to the proxy, or below 1 − margin to other
    images, count no further."""
    to_proxy = (cosines.to_proxy - margin).clamp(max=0) / temperature
    to_others = (cosines.to_others - (1 - margin)).clamp(min=0) / temperature
    to_others = to_others.masked_fill(cosines.alike | cosines.left_out, -torch.inf)
    return torch.cat([to_proxy, to_others], 1).logsumexp(1) - to_proxy.squeeze(1)


def cross_entropy(class_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log p(label), [B]; 0 for labels of −1. class_logits [B, K]"""
    return F.cross_entropy(class_logits, labels, ignore_index=-1, reduction="none")


def multi_hinge(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """max(0, 1 − score of the label + the highest of the others), [B] (Crammer & Singer 2001; for GANs, Kavalerov et al.
    2019, 1912.04216); 0 for labels of −1. scores [B, K]"""
    of_label = scores.gather(1, labels.clamp(min=0)[:, None])
    itself = torch.arange(scores.size(1), device=scores.device) == labels[:, None]
    margin = of_label.squeeze(1) - scores.masked_fill(itself, -torch.inf).amax(1)
    return F.relu(1 - margin) * (labels >= 0)
