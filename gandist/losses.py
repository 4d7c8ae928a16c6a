"""Adversarial losses: functions of the discriminator's logits [B], each the mean over the batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class AdversarialLoss(NamedTuple):
    discriminator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (real logits, fake logits) → []
    generator: Callable[[torch.Tensor], torch.Tensor]  # fake logits → []


def hinge_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss (Lim & Ye 2017, 1705.02894)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def negative_logit_generator(fake: torch.Tensor) -> torch.Tensor:
    """-D(G(z)), the generator's part of the hinge and the Wasserstein game."""
    return -fake.mean()


def logistic_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """-log D(x) - log(1 - D(G(z))) for D = sigmoid(logits) (Goodfellow et al. 2014, 1406.2661)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def non_saturating_generator(fake: torch.Tensor) -> torch.Tensor:
    """-log D(G(z)) (Goodfellow et al. 2014, 1406.2661, section 3)."""
    return F.softplus(-fake).mean()


def wasserstein_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The critic's estimate of minus the Wasserstein distance (Arjovsky et al. 2017, 1701.07875)."""
    return fake.mean() - real.mean()


ADVERSARIAL_LOSSES = {
    "hinge": AdversarialLoss(hinge_discriminator, negative_logit_generator),
    "non_saturating": AdversarialLoss(logistic_discriminator, non_saturating_generator),
    "wasserstein": AdversarialLoss(wasserstein_discriminator, negative_logit_generator),
}
