"""The loss of each player, computed whole inside one module's forward: so it can be wrapped, reduced and compiled."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gandist.config import LossConfig
from gandist.errors import ConfigError
from gandist.losses import ADVERSARIAL_LOSSES, CONTRASTS
from gandist.models import Discriminator
from gandist.models.heads import Head
from gandist.penalties import input_gradient, interpolate, one_centered, zero_centered

Statistics = dict[str, torch.Tensor]  # names → scalars on the device, without gradient
Autocast = Callable[[], AbstractContextManager]


class Penalty(NamedTuple):
    name: str
    weight: float
    function: Callable[[torch.Tensor], torch.Tensor]  # of the images' gradients [B, C, H, W] → []


class Contrast(NamedTuple):
    """Of images with each other."""

    weight: float
    temperature: float


class Verdict(NamedTuple):
    """What the discriminator says of some images."""

    logits: torch.Tensor  # [B]
    class_logits: torch.Tensor  # [B, K]
    embedding: torch.Tensor  # [B, E]
    gradient: torch.Tensor | None = None  # of the logits with respect to the images, [B, C, H, W]


class DiscriminatorObjective(nn.Module):
    """Tells real from made, and the classes of the real ones.

    class_weight:      of the cross-entropy of the class head on real images
    detach_class_head: whether only the class head itself learns from it
    Raises ConfigError where a gradient penalty meets a discriminator with batch norm.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        loss: LossConfig,
        *,
        class_weight: float,
        autocast: Autocast,
        detach_class_head: bool = False,
    ):
        super().__init__()
        self.network = discriminator
        self.adversarial = ADVERSARIAL_LOSSES[loss.adversarial]
        self.class_weight = class_weight
        discriminator.head.detached = detach_class_head
        self.contrast = Contrast(loss.conditioning_weight, loss.temperature) if discriminator.head.contrast else None
        self.autocast = autocast
        penalties = {
            "real": Penalty("r1", loss.r1_gamma, zero_centered),
            "fake": Penalty("r2", loss.r2_gamma, zero_centered),
            "mixed": Penalty("wgan_gp", loss.wgan_gp_lambda, one_centered),
        }
        self.penalties = {images: penalty for images, penalty in penalties.items() if penalty.weight}
        self._refuse_batch_norm()

    def forward(
        self,
        real: torch.Tensor,
        real_labels: torch.Tensor,
        fake: torch.Tensor,
        fake_labels: torch.Tensor,
        mixing: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Statistics]:
        """Images [B, C, H, W] in [-1, 1], labels int64 [B], −1 for none; mixing [B] in [0, 1], for WGAN-GP alone
        → the loss [] and statistics."""
        batches = {"real": (real, real_labels), "fake": (fake, fake_labels)}
        if "mixed" in self.penalties:
            batches["mixed"] = interpolate(real, fake, mixing), real_labels
        verdicts = self._discriminate(
            {name: batch for name, batch in batches.items() if name in self.penalties}, with_gradient=True
        )
        verdicts |= self._discriminate({name: batch for name, batch in batches.items() if name not in self.penalties})

        loss = self.adversarial.discriminator(verdicts["real"].logits, verdicts["fake"].logits)
        statistics = {"loss/discriminator": loss}
        for name in ("real", "fake"):
            logits = verdicts[name].logits
            right = (logits > 0) == (name == "real")
            statistics[f"logits/{name}"] = logits.mean()
            statistics[f"logits/{name}_square"] = logits.square().mean()
            statistics[f"logits/{name}_accuracy"] = right.to(logits.dtype).mean()
        class_logits = verdicts["real"].class_logits
        if class_logits.size(1):
            # A mean over all images, labelled or not, so that ranks with more or fewer of them weigh alike.
            classification = F.cross_entropy(class_logits, real_labels, ignore_index=-1, reduction="sum") / len(real)
            loss = loss + self.class_weight * classification
            statistics["loss/classification"] = classification
            statistics["classification/train_top1"] = (class_logits.argmax(1) == real_labels).to(loss.dtype).mean()
            statistics["classification/labelled"] = (real_labels >= 0).to(loss.dtype).mean()
        if self.contrast:
            conditioning = compare(self.network.head, verdicts["real"].embedding, real_labels, self.contrast.temperature)
            loss = loss + self.contrast.weight * conditioning
            statistics["loss/conditioning"] = conditioning
        for images, (name, weight, function) in self.penalties.items():
            penalty = function(verdicts[images].gradient)
            loss = loss + weight * penalty
            statistics[f"penalty/{name}"] = penalty
        return loss, {name: value.detach() for name, value in statistics.items()}

    def _discriminate(
        self, batches: dict[str, tuple[torch.Tensor, torch.Tensor]], *, with_gradient: bool = False
    ) -> dict[str, Verdict]:
        """One pass over all these (images, labels), which have a size in common."""
        if not batches:
            return {}
        images, labels = (torch.cat(parts) for parts in zip(*batches.values(), strict=True))

        def discriminate(images: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
            with self.autocast():
                output = self.network(images, labels)
            logits, *others = (each.to(images.dtype) for each in (output.logits, output.class_logits, output.embedding))
            return logits, (logits, *others)

        if with_gradient:
            gradient, outputs = input_gradient(discriminate, images)
            outputs = *outputs, gradient
        else:
            _, outputs = discriminate(images)
        parts = zip(*(output.chunk(len(batches)) for output in outputs), strict=True)
        return {name: Verdict(*part) for name, part in zip(batches, parts, strict=True)}

    def _refuse_batch_norm(self) -> None:
        norms = [name for name, module in self.network.named_modules() if isinstance(module, _BatchNorm)]
        if norms and self.penalties:
            names = ", ".join(penalty.name for penalty in self.penalties.values())
            raise ConfigError(
                f"the discriminator has batch norm ({norms[0]}), which makes the images of a batch depend on each other, so "
                f"none has a gradient of its own for the penalty {names}: set its weight to 0, or use a discriminator "
                "without batch norm"
            )


class GeneratorObjective(nn.Module):
    """Makes images that the discriminator takes for real.

    The discriminator is held without being registered: its parameters are the other player's, and are to be frozen
    while this one is updated.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: Discriminator,
        loss: LossConfig,
        *,
        class_weight: float,
        autocast: Autocast,
    ):
        super().__init__()
        self.network = generator
        self._opponent = (discriminator,)
        self.adversarial = ADVERSARIAL_LOSSES[loss.adversarial]
        self.class_weight = class_weight if discriminator.head.guides_generator else 0.0
        self.contrast = Contrast(loss.conditioning_weight, loss.temperature) if discriminator.head.contrast else None
        self.autocast = autocast

    def generate(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1], of the latents' dtype"""
        with self.autocast():
            return self.network(latents, labels).to(latents.dtype)

    def forward(
        self, latents: torch.Tensor, labels: torch.Tensor, real: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Statistics]:
        """latents [B, Z], labels int64 [B]; real: images of these labels [B, C, H, W], for a paired loss → the loss [] and
        statistics."""
        (discriminator,) = self._opponent
        fake = self.generate(latents, labels)
        with self.autocast():
            output = discriminator(fake, labels)
        judged = [output.logits.to(fake.dtype)]
        if self.adversarial.paired:
            with torch.no_grad(), self.autocast():
                judged.append(discriminator(real, labels).logits.to(fake.dtype))
        adversarial = self.adversarial.generator(*judged)
        loss = adversarial
        statistics = {"loss/generator": adversarial}
        if self.class_weight:
            classification = F.cross_entropy(output.class_logits.to(fake.dtype), labels)
            loss = loss + self.class_weight * classification
            statistics["loss/generator_classification"] = classification
        if self.contrast:
            conditioning = compare(discriminator.head, output.embedding.to(fake.dtype), labels, self.contrast.temperature)
            loss = loss + self.contrast.weight * conditioning
            statistics["loss/generator_conditioning"] = conditioning
        return loss, {name: value.detach() for name, value in statistics.items()}


def compare(head: Head, embedding: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean over these images of how each compares with those of the global batch, []; unlabelled ones are left out."""
    others, other_labels, left_out = head.others(embedding, labels)
    to_proxy = (embedding * head.proxies_of(labels)).sum(1, keepdim=True)
    alike = labels[:, None] == other_labels
    losses = CONTRASTS[head.contrast](to_proxy, embedding @ others.T, alike, left_out, temperature)
    return torch.where(labels >= 0, losses, 0).sum() / len(labels)
