"""The loss of each player, computed whole inside one module's forward: so it can be wrapped, reduced and compiled."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn

from gandist.losses import AdversarialLoss
from gandist.models import Discriminator
from gandist.penalties import r1_penalty

Statistics = dict[str, torch.Tensor]  # names → scalars on the device, without gradient
Autocast = Callable[[], AbstractContextManager]


class DiscriminatorObjective(nn.Module):
    """Tells real from made, and the classes of the real ones.

    class_weight: of the cross-entropy of the class head on real images
    r1_gamma:     of the R1 penalty; 0 leaves it out
    """

    def __init__(
        self,
        discriminator: Discriminator,
        adversarial: AdversarialLoss,
        *,
        class_weight: float,
        r1_gamma: float,
        autocast: Autocast,
    ):
        super().__init__()
        self.network = discriminator
        self.adversarial = adversarial
        self.class_weight = class_weight
        self.r1_gamma = r1_gamma
        self.autocast = autocast

    def forward(
        self, real: torch.Tensor, real_labels: torch.Tensor, fake: torch.Tensor, fake_labels: torch.Tensor
    ) -> tuple[torch.Tensor, Statistics]:
        """Images [B, C, H, W] in [-1, 1], labels int64 [B], −1 for none → the loss [] and statistics."""
        labels = torch.cat([real_labels, fake_labels])

        def discriminate(real: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            with self.autocast():
                output = self.network(torch.cat([real, fake]), labels)
            real_logits, fake_logits = output.logits.to(real.dtype).chunk(2)
            return real_logits, (real_logits, fake_logits, output.class_logits[: len(real)].to(real.dtype))

        if self.r1_gamma:
            r1, (real_logits, fake_logits, class_logits) = r1_penalty(discriminate, real)
        else:
            _, (real_logits, fake_logits, class_logits) = discriminate(real)
        adversarial = self.adversarial.discriminator(real_logits, fake_logits)
        loss = adversarial
        statistics = {"loss/discriminator": adversarial, "logits/real": real_logits.mean(), "logits/fake": fake_logits.mean()}
        if class_logits.size(1):
            # A mean over all images, labelled or not, so that ranks with more or fewer of them weigh alike.
            classification = F.cross_entropy(class_logits, real_labels, ignore_index=-1, reduction="sum") / len(real)
            loss = loss + self.class_weight * classification
            statistics["loss/classification"] = classification
            statistics["classification/train_top1"] = (class_logits.argmax(1) == real_labels).to(loss.dtype).mean()
            statistics["classification/labelled"] = (real_labels >= 0).to(loss.dtype).mean()
        if self.r1_gamma:
            loss = loss + self.r1_gamma * r1
            statistics["penalty/r1"] = r1
        return loss, {name: value.detach() for name, value in statistics.items()}


class GeneratorObjective(nn.Module):
    """Makes images that the discriminator takes for real.

    The discriminator is held without being registered: its parameters are the other player's, and are to be frozen
    while this one is updated.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: Discriminator,
        adversarial: AdversarialLoss,
        *,
        class_weight: float,
        autocast: Autocast,
    ):
        super().__init__()
        self.network = generator
        self._opponent = (discriminator,)
        self.adversarial = adversarial
        self.class_weight = class_weight if discriminator.head.guides_generator else 0.0
        self.autocast = autocast

    def generate(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1], of the latents' dtype"""
        with self.autocast():
            return self.network(latents, labels).to(latents.dtype)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, Statistics]:
        """latents [B, Z], labels int64 [B] → the loss [] and statistics."""
        (discriminator,) = self._opponent
        fake = self.generate(latents, labels)
        with self.autocast():
            output = discriminator(fake, labels)
        adversarial = self.adversarial.generator(output.logits.to(fake.dtype))
        loss = adversarial
        statistics = {"loss/generator": adversarial}
        if self.class_weight:
            classification = F.cross_entropy(output.class_logits.to(fake.dtype), labels)
            loss = loss + self.class_weight * classification
            statistics["loss/generator_classification"] = classification
        return loss, {name: value.detach() for name, value in statistics.items()}
