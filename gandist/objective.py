"""The loss of each player, computed whole inside one module's forward: so it can be wrapped, reduced and compiled."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gandist.augment import SHIFT_AND_FLIP, Augmentation, shift_and_flip
from gandist.config import Config, Cosine
from gandist.errors import ConfigError
from gandist.losses import ADVERSARIAL_LOSSES, cross_entropy
from gandist.models import Discriminator
from gandist.penalties import (
    PERTURBATION,
    LeCam,
    PathLength,
    feature_distance,
    gradient_of,
    interpolate,
    one_centered,
    orthogonal_penalty,
    perturb,
    weights_of_best,
    zero_centered,
)
from gandist.randomness import Columns, normal_from_uniform
from gandist.schedule import value_at

Statistics = dict[str, torch.Tensor]  # names → scalars on the device, without gradient
Autocast = Callable[[], AbstractContextManager]


class Term(NamedTuple):
    """Of a loss, [], by the name that it is logged under."""

    name: str
    value: torch.Tensor
    weight: float | torch.Tensor = 1.0


class Penalty(NamedTuple):
    name: str
    weight: float | Cosine
    function: Callable[[torch.Tensor], torch.Tensor]  # of the images' gradients [B, C, H, W] → []


class Batch(NamedTuple):
    """What the discriminator is shown."""

    images: torch.Tensor  # [B, C, H, W] in [-1, 1]
    labels: torch.Tensor  # int64 [B], −1 for none
    uniforms: torch.Tensor  # [B, columns] in [0, 1), of which the augmentation is made


class Verdict(NamedTuple):
    """What the discriminator says of some images."""

    logits: torch.Tensor  # [B]
    class_logits: torch.Tensor  # [B, K]
    evidence: torch.Tensor  # [B, E]
    features: torch.Tensor  # [B, F]
    gradient: torch.Tensor | None = None  # of the logits with respect to the images, [B, C, H, W]


class DiscriminatorObjective(nn.Module):
    """Tells real from made, and the classes of the real ones.

    columns: the uniform numbers that it wants for each image
    Raises ConfigError where a gradient penalty meets a discriminator with batch norm.
    """

    def __init__(self, discriminator: Discriminator, config: Config, autocast: Autocast):
        super().__init__()
        loss, consistency = config.loss, config.consistency
        self.network = discriminator
        self.network.head.detached = config.classification.detach
        self.network.head.temperature, self.network.head.margin = loss.temperature, loss.margin
        self.autocast = autocast
        self.augmentation = Augmentation(config.augmentation, config.data.channels, config.train.batch_size)
        self.adversarial = ADVERSARIAL_LOSSES[loss.adversarial]
        self.class_weight = config.classification.weight
        self.conditioning_weight = loss.conditioning_weight
        self.lecam = LeCam() if loss.lecam_weight else None
        self.lecam_weight = loss.lecam_weight
        penalties = {
            "real": Penalty("r1", loss.r1_gamma, zero_centered),
            "fake": Penalty("r2", loss.r2_gamma, zero_centered),
            "mixed": Penalty("wgan_gp", loss.wgan_gp_lambda, one_centered),
            "perturbed": Penalty("dragan", loss.dragan_lambda, one_centered),
        }
        self.penalties = {images: penalty for images, penalty in penalties.items() if penalty.weight}
        self.penalty_every = loss.penalty_every
        weights = {
            "changed_real": consistency.real_weight,
            "changed_fake": consistency.fake_weight,
            "near": consistency.latent_weight,
        }
        self.consistency = {images: weight for images, weight in weights.items() if weight}
        self.latent_noise = consistency.latent_noise
        self.columns = Columns(
            real=self.augmentation.columns,
            fake=self.augmentation.columns,
            mixed=1 if "mixed" in self.penalties else 0,
            perturbed=PERTURBATION if "perturbed" in self.penalties else 0,
            changed_real=SHIFT_AND_FLIP if "changed_real" in self.consistency else 0,
            changed_fake=SHIFT_AND_FLIP if "changed_fake" in self.consistency else 0,
            near=config.model.latent_dim if "near" in self.consistency else 0,
        )
        self._refuse_batch_norm()

    @property
    def wants_near(self) -> bool:
        """Whether it compares generated images with those of latents nearby."""
        return "near" in self.consistency

    def is_penalized(self, update: int) -> bool:
        """Whether this update, counted from 0, comes with the gradient penalties."""
        return bool(self.penalties) and update % self.penalty_every == 0

    def near(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents near these, [B, Z]; noise [B, columns] as in `forward`."""
        return nearby(latents, self.columns.split(noise)["near"], self.latent_noise)

    def judge(self, batch: Batch, seen: torch.Tensor) -> Verdict:
        """As the generator, too, has its images judged."""
        images = self.augmentation(batch.images, batch.uniforms, seen)
        with self.autocast():
            output = self.network(images, batch.labels)
        said = output.logits, output.class_logits, output.evidence, output.features
        return Verdict(*(each.to(images.dtype) for each in said))

    def forward(
        self,
        real: torch.Tensor,
        real_labels: torch.Tensor,
        fake: torch.Tensor,
        near: torch.Tensor | None,
        fake_labels: torch.Tensor,
        noise: torch.Tensor,
        seen: torch.Tensor,
        penalized: bool,
    ) -> tuple[torch.Tensor, Statistics]:
        """Images [B, C, H, W] in [-1, 1], labels int64 [B], −1 for none → the loss [] and statistics.

        near:      images like `fake` of latents near theirs, if `wants_near`
        noise:     uniform in [0, 1), [B, columns.width]
        seen:      images that the run has seen, [], of the images' dtype
        penalized: whether with the gradient penalties
        """
        parts = self.columns.split(noise)
        penalties = self.penalties if penalized else {}
        batches = {"real": Batch(real, real_labels, parts["real"]), "fake": Batch(fake, fake_labels, parts["fake"])}
        if "mixed" in penalties:
            batches["mixed"] = batches["real"]._replace(images=interpolate(real, fake, parts["mixed"]))
        if "perturbed" in penalties:
            batches["perturbed"] = batches["real"]._replace(images=perturb(real, parts["perturbed"], together=self.training))
        if "changed_real" in self.consistency:
            batches["changed_real"] = batches["real"]._replace(images=shift_and_flip(real, parts["changed_real"]))
        if "changed_fake" in self.consistency:
            batches["changed_fake"] = batches["fake"]._replace(images=shift_and_flip(fake, parts["changed_fake"]))
        if "near" in self.consistency:
            batches["near"] = batches["fake"]._replace(images=near)
        verdicts = self._discriminate(batches, penalties, seen)
        self.augmentation.observe(verdicts["real"].logits)

        terms = self._adversarial_terms(verdicts, real_labels, fake_labels)
        for images, (name, weight, function) in penalties.items():
            weight = value_at(weight, seen) * self.penalty_every
            terms.append(Term(f"penalty/{name}", function(verdicts[images].gradient), weight))
        for images, weight in self.consistency.items():
            original = verdicts["real" if images == "changed_real" else "fake"]
            change = (verdicts[images].logits - original.logits).square().mean()
            terms.append(Term(f"consistency/{images}", change, weight))
        if self.lecam:
            terms.append(Term("penalty/lecam", self.lecam(verdicts["real"].logits, verdicts["fake"].logits), self.lecam_weight))
        return summed(terms, {**self._describe(verdicts, real_labels), **self.augmentation.statistics(seen)})

    def _discriminate(self, batches: Mapping[str, Batch], penalized: Collection[str], seen: torch.Tensor) -> dict[str, Verdict]:
        """In as few passes as can be: one with gradients of the images, and one without."""
        if self.network.trunk.couples_images:
            passes = [[name] for name in batches]
        else:
            passes = [[name for name in batches if (name in penalized) == with_gradient] for with_gradient in (True, False)]
        verdicts = {}
        for names in filter(None, passes):
            batch = Batch(*(torch.cat(parts) for parts in zip(*(batches[name] for name in names), strict=True)))
            verdict = self._judge_with_gradient(batch, seen) if names[0] in penalized else self.judge(batch, seen)
            parts = [output.chunk(len(names)) if output is not None else [None] * len(names) for output in verdict]
            verdicts |= {name: Verdict(*part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}
        return verdicts

    def _judge_with_gradient(self, batch: Batch, seen: torch.Tensor) -> Verdict:
        def judge(images: torch.Tensor) -> tuple[torch.Tensor, Verdict]:
            verdict = self.judge(batch._replace(images=images), seen)
            return verdict.logits, tuple(verdict[:4])

        gradient, verdict = gradient_of(judge, batch.images)
        return Verdict(*verdict, gradient)

    def _adversarial_terms(
        self, verdicts: dict[str, Verdict], real_labels: torch.Tensor, fake_labels: torch.Tensor
    ) -> list[Term]:
        real, fake = verdicts["real"], verdicts["fake"]
        head = self.network.head
        terms = []
        if not head.replaces_adversarial:
            terms.append(Term("loss/discriminator", self.adversarial.discriminator(real.logits, fake.logits).mean()))
        if real.class_logits.size(1):
            # A mean over all images, labelled or not, so that ranks with more or fewer of them weigh alike.
            terms.append(Term("loss/classification", cross_entropy(real.class_logits, real_labels).mean(), self.class_weight))
        if head.conditions:
            conditioning = head.discriminator_loss(real.evidence, real_labels, fake.evidence, fake_labels).mean()
            name = "loss/discriminator" if head.replaces_adversarial else "loss/conditioning"
            terms.append(Term(name, conditioning, self.conditioning_weight))
        return terms

    def _describe(self, verdicts: dict[str, Verdict], real_labels: torch.Tensor) -> Statistics:
        statistics = {}
        for name in ("real", "fake"):
            logits = verdicts[name].logits
            right = (logits > 0) == (name == "real")
            statistics[f"logits/{name}"] = logits.mean()
            statistics[f"logits/{name}_square"] = logits.square().mean()
            statistics[f"logits/{name}_accuracy"] = right.to(logits.dtype).mean()
        class_logits = verdicts["real"].class_logits
        if class_logits.size(1):
            statistics["classification/train_top1"] = (class_logits.argmax(1) == real_labels).to(logits.dtype).mean()
            statistics["classification/labelled"] = (real_labels >= 0).to(logits.dtype).mean()
        return statistics

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

    opponent: held without being registered: its parameters are the other player's, and are to be frozen while this one is
              updated
    columns: the uniform numbers that it wants for each image
    """

    def __init__(self, generator: nn.Module, opponent: DiscriminatorObjective, config: Config, autocast: Autocast):
        super().__init__()
        loss, consistency = config.loss, config.consistency
        self.network = generator
        self._opponent = (opponent,)
        self.autocast = autocast
        self.adversarial = ADVERSARIAL_LOSSES[loss.adversarial]
        self.class_weight = config.classification.weight if opponent.network.head.guides_generator else 0.0
        self.conditioning_weight = loss.conditioning_weight
        self.adversarial_weight = loss.generator_weight
        self.top_k = loss.top_k
        self.feature_matching_weight = loss.feature_matching_weight
        self.orthogonal_weight = loss.orthogonal_weight
        self.path_length = PathLength() if loss.path_length_weight else None
        self.path_length_every = loss.path_length_every
        self.path_length_weight = loss.path_length_weight * loss.path_length_every
        self.translates = config.model.translates
        self.reconstruction_weight, self.identity_weight = loss.reconstruction_weight, loss.identity_weight
        self.diversity_weight = consistency.latent_diversity_weight
        self.latent_noise = consistency.latent_noise
        self.columns = Columns(
            fake=opponent.augmentation.columns,
            real=opponent.augmentation.columns if self.judges_real else 0,
            near=config.model.latent_dim if self.diversity_weight else 0,
        )

    @property
    def wants_real(self) -> bool:
        """Whether its update takes real images, too."""
        return self.judges_real or self.translates

    @property
    def judges_real(self) -> bool:
        """Whether its loss takes what the discriminator says of real images."""
        return self.adversarial.paired or self.feature_matching_weight > 0

    def is_penalized(self, update: int) -> bool:
        """Whether this update, counted from 0, comes with the path length penalty."""
        return self.path_length is not None and update % self.path_length_every == 0

    def generate(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], or images [B, C, H, W] that are translated, labels int64 [B] → images [B, C, H, W] in [-1, 1], of the
        latents' dtype"""
        with self.autocast():
            return self.network(latents, labels).to(latents.dtype)

    def forward(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor,
        noise: torch.Tensor,
        seen: torch.Tensor,
        penalized: bool,
        real: torch.Tensor | None = None,
        real_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Statistics]:
        """latents [B, Z], labels int64 [B] → the loss [] and statistics.

        noise, seen: as for the discriminator
        penalized:   whether with the path length penalty
        real:        images [B, C, H, W] and their labels, if `wants_real`; a paired loss has the generated ones of these, and
                     where they are translated they are the latents, too
        """
        (opponent,) = self._opponent
        parts = self.columns.split(noise)
        lengthy = penalized and self.path_length is not None
        fake, path_length = (
            self._generate_with_path_length(latents, labels) if lengthy else (self.generate(latents, labels), None)
        )
        verdict = opponent.judge(Batch(fake, labels, parts["fake"]), seen)
        if self.judges_real:
            with torch.no_grad():
                of_real = opponent.judge(Batch(real, real_labels, parts["real"]), seen)
        judged = [verdict.logits, of_real.logits] if self.adversarial.paired else [verdict.logits]
        terms = self._adversarial_terms(verdict, labels, judged, seen)
        if self.feature_matching_weight:
            distance = feature_distance(of_real.features, verdict.features, together=self.training)
            terms.append(Term("loss/feature_matching", distance, self.feature_matching_weight))
        if lengthy:
            terms.append(Term("penalty/path_length", path_length, self.path_length_weight))
        if self.reconstruction_weight:
            reconstruction = (self.generate(fake, real_labels) - real).abs().mean()
            terms.append(Term("loss/reconstruction", reconstruction, self.reconstruction_weight))
        if self.identity_weight:
            identity = (self.generate(real, real_labels) - real).abs().mean()
            terms.append(Term("loss/identity", identity, self.identity_weight))
        if self.diversity_weight:
            near = self.generate(nearby(latents, parts["near"], self.latent_noise), labels)
            terms.append(Term("consistency/diversity", (fake - near).square().mean(), -self.diversity_weight))
        if self.orthogonal_weight:
            terms.append(Term("penalty/orthogonal", orthogonal_penalty(self.network), self.orthogonal_weight))
        return summed(terms, {})

    def _adversarial_terms(
        self, fake: Verdict, labels: torch.Tensor, judged: list[torch.Tensor], seen: torch.Tensor
    ) -> list[Term]:
        """judged: the logits that the adversarial loss takes"""
        (opponent,) = self._opponent
        head = opponent.network.head
        terms = []
        if not head.replaces_adversarial:
            losses = self.adversarial.generator(*judged)
            if self.top_k != 1:
                losses = losses * weights_of_best(fake.logits, value_at(self.top_k, seen), together=self.training)
            terms.append(Term("loss/generator", losses.mean(), self.adversarial_weight))
        if self.class_weight:
            classification = cross_entropy(fake.class_logits, labels).mean()
            terms.append(Term("loss/generator_classification", classification, self.class_weight))
        if head.conditions:
            conditioning = head.generator_loss(fake.evidence, labels).mean()
            name = "loss/generator" if head.replaces_adversarial else "loss/generator_conditioning"
            terms.append(Term(name, conditioning, self.conditioning_weight))
        return terms

    def _generate_with_path_length(self, latents: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def synthesize(styles: torch.Tensor) -> torch.Tensor:
            with self.autocast():
                return self.network.synthesize(styles, latents).to(latents.dtype)

        with self.autocast():
            styles = self.network.styles(latents, labels).to(latents.dtype)
        return self.path_length(synthesize, styles, latents)


def nearby(latents: torch.Tensor, uniforms: torch.Tensor, deviation: float) -> torch.Tensor:
    """Latents [B, Z] with normal noise made of uniforms [B, Z] added."""
    return latents + deviation * normal_from_uniform(uniforms)


def summed(terms: list[Term], statistics: Statistics) -> tuple[torch.Tensor, Statistics]:
    """The loss [], and the statistics with all its terms."""
    # Not by `+`: torch.compile leaves out a product with 1, and a loss of one term then is the detached statistic.
    loss = torch.stack([term.weight * term.value for term in terms]).sum()
    values = {term.name: term.value for term in terms} | statistics
    return loss, {name: value.detach() for name, value in values.items()}
