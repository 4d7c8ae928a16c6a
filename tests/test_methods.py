"""Every loss, penalty and conditioning: the gradients of both players on 1, 2 and 4 ranks, against a literal transcription of
the paper's formula in one process, in float64."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from gandist.augment import shift_and_flip
from gandist.config import Config
from gandist.config_file import load_config
from gandist.distributed import World, join_world
from gandist.engine import build_player, choose_precision
from gandist.models import build_discriminator, build_generator
from gandist.models.noise import hashed_normal, hashed_uniform
from gandist.models.spectral_norm import power_iteration
from gandist.objective import DiscriminatorObjective, GeneratorObjective
from tests.ranks import run_ranks
from tests.test_player import HostWaits

BATCH_SIZE = 8
CLASSES = 5
CLASS_WEIGHT = 0.7
SEEN = 300  # images, where the cosines below are asked for their values
UPDATES = 2  # of which the second is compared: running means have a past then
BASE = [
    f"train.batch_size={BATCH_SIZE}",
    f"data.num_classes={CLASSES}",
    f"classification.weight={CLASS_WEIGHT}",
    "model.latent_dim=8",
    "model.generator_width=4",
    "model.discriminator_width=4",
]
TRANSLATION = [
    "model.family=stargan",
    "model.conditioning=auxiliary",
    "loss.adversarial=wasserstein",
    "loss.wgan_gp_lambda=10",
    "loss.reconstruction_weight=10",
    "loss.identity_weight=6",
]
K_PLUS_ONE = ["model.conditioning=k_plus_one", "loss.adversarial=non_saturating", "data.labelled=0.5"]
STYLES = ["model.family=stylegan2", "model.max_width=8", "model.mapping_layers=2"]

Gradients = dict[str, torch.Tensor]


class Inputs(NamedTuple):
    """Of one update: of the global batch, or of a rank's share of it."""

    real: torch.Tensor
    real_labels: torch.Tensor
    fake: torch.Tensor
    near: torch.Tensor
    labels: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor  # of the discriminator
    generator_noise: torch.Tensor


class Game(NamedTuple):
    config: Config
    discriminating: DiscriminatorObjective
    generating: GeneratorObjective

    def inputs(self, update: int) -> Inputs:
        random = torch.Generator().manual_seed(update)
        images = torch.rand(3, BATCH_SIZE, 1, 16, 16, dtype=torch.float64, generator=random) * 2 - 1
        real_labels, labels = torch.randint(CLASSES, (2, BATCH_SIZE), generator=random)
        if self.config.loss.adversarial == "relativistic":
            labels = real_labels
        elif self.config.data.without_label:
            real_labels[3] = -1
        latents = torch.randn(BATCH_SIZE, 8, dtype=torch.float64, generator=random)
        noises = [
            torch.rand(BATCH_SIZE, objective.columns.width, generator=random)
            for objective in (self.discriminating, self.generating)
        ]
        real, fake, near = images
        latents = real if self.config.model.translates else latents
        return Inputs(real, real_labels, fake, near, labels, latents, *noises)


def build(overrides: list[str]) -> Game:
    config = load_config(None, [*BASE, *overrides])
    torch.manual_seed(0)
    networks = [
        make(config.model, config.data).to(dtype=torch.float64, memory_format=torch.channels_last)
        for make in (build_generator, build_discriminator)
    ]
    with torch.no_grad():
        for parameter in (p for network in networks for p in network.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    for network in networks:
        power_iteration(network)
    generator, discriminator = networks
    autocast = choose_precision("float64", torch.device("cpu")).autocast
    discriminating = DiscriminatorObjective(discriminator, config, autocast).double()
    return Game(config, discriminating, GeneratorObjective(generator, discriminating, config, autocast).double())


# What gandist does.


def found_gradients(overrides: list[str], world: World) -> tuple[Gradients, Gradients]:
    """Of D's and of G's second update, from this rank's share of the batches, and what both objectives keep."""
    game = build(overrides)
    precision = choose_precision("float64", world.device)
    players = [
        build_player(name, objective, game.config, world, precision, lr=1e-3)
        for name, objective in (("discriminator", game.discriminating), ("generator", game.generating))
    ]
    seen = torch.tensor(float(SEEN), dtype=torch.float64)
    for update in range(UPDATES):
        mine = Inputs(*(each[world.rank :: world.size] for each in game.inputs(update)))
        penalized = update == UPDATES - 1
        near = mine.near if game.discriminating.wants_near else None
        real = [mine.real, mine.real_labels] if game.generating.wants_real else []
        given = [
            (mine.real, mine.real_labels, mine.fake, near, mine.labels, mine.noise, seen, penalized),
            (mine.latents, mine.labels, mine.generator_noise, seen, penalized, *real),
        ]
        for player, inputs in zip(players, given, strict=True):
            player.network.zero_grad()
            game.discriminating.network.requires_grad_(player is players[0])
            player.backward(player.parallel(*inputs)[0])
    found = []
    for player in players:
        gradients = {name: p.grad.clone().contiguous() for name, p in player.network.named_parameters() if p.grad is not None}
        found.append(gradients | {f"kept {name}": value.clone() for name, value in player.objective_state().items()})
    return tuple(found)


def all_gradients(cases: list[list[str]]) -> list[tuple[Gradients, Gradients]]:
    with join_world() as world:
        return [found_gradients(case, world) for case in cases]


# What the papers say.


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    return sum(values) / len(values)


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.log(1 + torch.exp(x))


def relu(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x, torch.zeros_like(x))


class Literal:
    """A formula for D and one for G, written with the networks themselves. Each subclass is one paper's."""

    def __init__(self, game: Game):
        self.config = game.config
        self.loss = game.config.loss
        self.D = game.discriminating.network
        self.G = game.generating.network
        self.columns = game.discriminating.columns

    def logits(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.D(images, labels).logits

    def cross_entropy(self, class_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Over all images, of which unlabelled ones bring nothing."""
        terms = [
            -torch.log(torch.exp(row[label]) / torch.exp(row).sum())
            for row, label in zip(class_logits, labels.tolist(), strict=True)
            if label >= 0
        ]
        return sum(terms) / len(labels)

    def adversarial_d(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return relu(1 - real).mean() + relu(1 + fake).mean()

    def adversarial_g(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return -fake.mean()

    def classification_d(self, x: Inputs) -> torch.Tensor:
        return CLASS_WEIGHT * self.cross_entropy(self.D(x.real, x.real_labels).class_logits, x.real_labels)

    def extra_d(self, x: Inputs) -> torch.Tensor | float:
        return 0.0

    def extra_g(self, x: Inputs, fake: torch.Tensor) -> torch.Tensor | float:
        return 0.0

    def discriminator(self, x: Inputs) -> torch.Tensor:
        adversarial = self.adversarial_d(self.logits(x.real, x.real_labels), self.logits(x.fake, x.labels))
        return adversarial + self.classification_d(x) + self.extra_d(x)

    def generator(self, x: Inputs) -> torch.Tensor:
        fake = self.G(x.latents, x.labels)
        adversarial = self.adversarial_g(self.logits(fake, x.labels), self.logits(x.real, x.labels).detach())
        return adversarial + self.extra_g(x, fake)

    def slopes(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The norm of the gradient of each logit, an image at a time, [B]"""
        norms = []
        for image, label in zip(images, labels, strict=True):
            image = image[None].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.logits(image, label[None])[0], image, create_graph=True)
            norms.append(gradient.square().sum().sqrt())
        return torch.stack(norms)

    def changed(self, images: torch.Tensor, numbers: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(D(x) − D(T(x)))²"""
        return mean([*(self.logits(images, labels) - self.logits(shift_and_flip(images, numbers), labels)) ** 2])


class NonSaturating(Literal):
    def adversarial_d(self, real, fake):
        return -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()

    def adversarial_g(self, fake, real):
        return -torch.log(torch.sigmoid(fake)).mean()


class Saturating(NonSaturating):
    def adversarial_g(self, fake, real):
        return torch.log(1 - torch.sigmoid(fake)).mean()


class LeastSquares(Literal):
    def adversarial_d(self, real, fake):
        return ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2

    def adversarial_g(self, fake, real):
        return ((fake - 1) ** 2).mean() / 2


class Wasserstein(Literal):
    def adversarial_d(self, real, fake):
        return -(real.mean() - fake.mean())


class Relativistic(Literal):
    def adversarial_d(self, real, fake):
        return mean([softplus(-(r - f)) for r, f in zip(real, fake, strict=True)])

    def adversarial_g(self, fake, real):
        return mean([softplus(-(f - r)) for r, f in zip(real, fake, strict=True)])


class R1(Literal):
    def extra_d(self, x):
        return self.loss.r1_gamma / 2 * (self.slopes(x.real, x.real_labels) ** 2).mean()


class R2(Literal):
    def extra_d(self, x):
        return self.loss.r2_gamma / 2 * (self.slopes(x.fake, x.labels) ** 2).mean()


class CosineR1(Literal):
    """γ from 8 to 2 within 1,000 images, at 300 of them."""

    def extra_d(self, x):
        gamma = 8 + (1 - (1 + math.cos(math.pi * SEEN / 1000)) / 2) * (2 - 8)
        return gamma / 2 * (self.slopes(x.real, x.real_labels) ** 2).mean()


class LazyR1(Literal):
    """Once in 16 updates, 16 times as heavy."""

    def extra_d(self, x):
        return 16 * self.loss.r1_gamma / 2 * (self.slopes(x.real, x.real_labels) ** 2).mean()


class WassersteinGradientPenalty(Wasserstein):
    def extra_d(self, x):
        share = self.columns.split(x.noise)["mixed"][:, :, None, None].double()
        slopes = self.slopes(share * x.real + (1 - share) * x.fake, x.real_labels)
        return self.loss.wgan_gp_lambda * ((slopes - 1) ** 2).mean()


class Dragan(NonSaturating):
    def extra_d(self, x):
        numbers = self.columns.split(x.noise)["perturbed"]
        noisy = x.real + 0.5 * x.real.std(correction=0) * hashed_uniform(numbers, x.real.shape[1:], salt=0)
        perturbed = x.real + numbers[:, 0].double()[:, None, None, None] * (noisy - x.real)
        return self.loss.dragan_lambda * ((self.slopes(perturbed, x.real_labels) - 1) ** 2).mean()


class ConsistencyOfReal(Literal):
    def extra_d(self, x):
        return 10 * self.changed(x.real, self.columns.split(x.noise)["changed_real"], x.real_labels)


class BalancedConsistency(ConsistencyOfReal):
    def extra_d(self, x):
        return super().extra_d(x) + 7 * self.changed(x.fake, self.columns.split(x.noise)["changed_fake"], x.labels)


class LatentConsistency(Literal):
    def extra_d(self, x):
        return 5 * ((self.logits(x.fake, x.labels) - self.logits(x.near, x.labels)) ** 2).mean()

    def extra_g(self, x, fake):
        u = x.generator_noise.double()
        near = x.latents + 0.07 * math.sqrt(2) * torch.special.erfinv(2 * u - 1 + 2**-24)
        return -0.5 * ((fake - self.G(near, x.labels)) ** 2).mean()


class LeCam(Literal):
    """Anchors of two updates: the mean of both."""

    def __init__(self, game):
        super().__init__(game)
        past = game.inputs(0)
        self.past = self.logits(past.real, past.real_labels).mean(), self.logits(past.fake, past.labels).mean()

    def extra_d(self, x):
        real, fake = self.logits(x.real, x.real_labels), self.logits(x.fake, x.labels)
        anchor_real, anchor_fake = ((a + b.mean()).detach() / 2 for a, b in zip(self.past, (real, fake), strict=True))
        return 0.3 * (((real - anchor_fake) ** 2).mean() + ((fake - anchor_real) ** 2).mean())


class Orthogonal(Literal):
    def extra_g(self, x, fake):
        total = 0.0
        for name, weight in self.G.named_parameters():
            if weight.dim() > 1 and not name.endswith(("gain.weight", "bias.weight")):
                rows = weight.reshape(weight.size(0), -1)
                total = total + sum((rows[:n] @ rows[n]).square().sum() * 2 for n in range(1, len(rows)))
        return 1e-3 * total


class TopK(Literal):
    def adversarial_g(self, fake, real):
        return -mean(sorted(fake, key=torch.Tensor.item)[-3:])


class Auxiliary(Literal):
    def extra_g(self, x, fake):
        return CLASS_WEIGHT * self.cross_entropy(self.D(fake, x.labels).class_logits, x.labels)


class TwinAuxiliary(Auxiliary):
    def extra_d(self, x):
        return self.loss.conditioning_weight * self.cross_entropy(self.D.head.twin(self.D(x.fake, x.labels).features), x.labels)

    def extra_g(self, x, fake):
        output = self.D(fake, x.labels)
        twin = self.cross_entropy(self.D.head.twin(output.features), x.labels)
        return super().extra_g(x, fake) - self.loss.conditioning_weight * twin


class DiscriminativeClassifier(Literal):
    """Classes 0 … K−1 are real, K … 2K−1 generated."""

    def of(self, images, labels):
        return self.D.head.discriminative(self.D(images, labels).features)

    def extra_d(self, x):
        real = self.cross_entropy(self.of(x.real, x.real_labels), x.real_labels)
        return self.loss.conditioning_weight * (real + self.cross_entropy(self.of(x.fake, x.labels), x.labels + CLASSES))

    def extra_g(self, x, fake):
        scores = self.of(fake, x.labels)
        difference = self.cross_entropy(scores, x.labels) - self.cross_entropy(scores, x.labels + CLASSES)
        return self.loss.conditioning_weight * difference


class MultiHinge(Literal):
    """K + 1 classes, the last for generated ones."""

    def hinges(self, images, labels, classes):
        scores = self.D.head.scores(self.D(images, labels).features)
        losses = [
            relu(1 - row[c] + max(row[k] for k in range(CLASSES + 1) if k != c))
            for row, c in zip(scores, classes, strict=True)
            if c >= 0
        ]
        return sum(losses) / len(images)

    def discriminator(self, x):
        fake = self.hinges(x.fake, x.labels, [CLASSES] * BATCH_SIZE)
        return self.hinges(x.real, x.real_labels, x.real_labels.tolist()) + fake + self.classification_d(x)

    def generator(self, x):
        return self.hinges(self.G(x.latents, x.labels), x.labels, x.labels.tolist())


class KPlusOne(Literal):
    """D(x) = Z / (Z + 1) with Z = Σ exp l_k; the generator answers to the classifier, too."""

    def real(self, images, labels):
        z = torch.exp(self.D(images, labels).class_logits).sum(1)
        return z / (z + 1)

    def discriminator(self, x):
        real, fake = self.real(x.real, x.real_labels), self.real(x.fake, x.labels)
        return -torch.log(real).mean() - torch.log(1 - fake).mean() + self.classification_d(x)

    def generator(self, x):
        fake = self.G(x.latents, x.labels)
        classification = CLASS_WEIGHT * self.cross_entropy(self.D(fake, x.labels).class_logits, x.labels)
        return self.loss.generator_weight * -torch.log(self.real(fake, x.labels)).mean() + classification


class FeatureMatching(KPlusOne):
    def generator(self, x):
        fake = self.G(x.latents, x.labels)
        features = [self.D.trunk(images) for images in (x.real, fake)]
        real, made = (mean([*each]) for each in features)
        return super().generator(x) + self.loss.feature_matching_weight * ((real - made) ** 2).sum()


class Contrastive(Literal):
    """Equation 8 of ContraGAN, a sum at a time, over the labelled images."""

    def extra_d(self, x):
        return self.loss.conditioning_weight * self.contrast(x.real, x.real_labels)

    def extra_g(self, x, fake):
        return self.loss.conditioning_weight * self.contrast(fake, x.labels)

    def contrast(self, images, labels):
        head = self.D.head
        embedding = head.project(self.D(images, labels).features)
        embedding = embedding / embedding.norm(dim=1, keepdim=True)
        proxies = head.proxies.weight / head.proxies.weight.norm(dim=1, keepdim=True)
        known = [index for index, label in enumerate(labels.tolist()) if label >= 0]
        losses = [self.term(embedding, proxies, labels, i, [j for j in known if j != i]) for i in known]
        return sum(losses) / len(labels)

    def term(self, embedding, proxies, labels, i, others):
        t = self.loss.temperature
        near = torch.exp(embedding[i] @ proxies[labels[i]] / t)
        every = sum(torch.exp(embedding[i] @ embedding[j] / t) for j in others)
        alike = sum(torch.exp(embedding[i] @ embedding[j] / t) for j in others if labels[j] == labels[i])
        return -torch.log((near + alike) / (near + every))


class D2DCE(Contrastive):
    """Equation 6 of ReACGAN."""

    def term(self, embedding, proxies, labels, i, others):
        t, zero = self.loss.temperature, torch.zeros((), dtype=torch.float64)
        near = torch.exp(torch.minimum(embedding[i] @ proxies[labels[i]] - 0.9, zero) / t)
        unlike = [embedding[j] for j in others if labels[j] != labels[i]]
        return -torch.log(near / (near + sum(torch.exp(torch.maximum(embedding[i] @ e - 0.1, zero) / t) for e in unlike)))


class Translation(WassersteinGradientPenalty):
    """StarGAN's equations 4, 5 and 8, of the images as their new classes and back; and CycleGAN's identity mapping loss."""

    def extra_g(self, x, fake):
        def distance(images):
            return mean([(image - again).abs().mean() for image, again in zip(x.real, images, strict=True)])

        classification = CLASS_WEIGHT * self.cross_entropy(self.D(fake, x.labels).class_logits, x.labels)
        return classification + 10 * distance(self.G(fake, x.real_labels)) + 6 * distance(self.G(x.real, x.real_labels))


class Augmented(Literal):
    """D never sees an image as it is; the penalty is of the image as it is."""

    def __init__(self, game):
        super().__init__(game)
        self.pipe = game.discriminating.augmentation.pipe
        self.D = Seen(self.D)

    def discriminator(self, x):
        parts = self.columns.split(x.noise)
        images = x.real.clone().requires_grad_()
        real = self.D(self.pipe(images, parts["real"], torch.tensor(0.6)), x.real_labels)
        fake = self.D(self.pipe(x.fake, parts["fake"], torch.tensor(0.6)), x.labels)
        (gradient,) = torch.autograd.grad(real.logits.sum(), images, create_graph=True)
        penalty = self.loss.r1_gamma / 2 * (gradient**2).sum((1, 2, 3)).mean()
        classification = CLASS_WEIGHT * self.cross_entropy(real.class_logits, x.real_labels)
        return self.adversarial_d(real.logits, fake.logits) + penalty + classification

    def generator(self, x):
        fake = self.G(x.latents, x.labels)
        return -self.D(self.pipe(fake, x.generator_noise, torch.tensor(0.6)), x.labels).logits.mean()


class Seen(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images, labels):
        return self.network(images, labels)


class PathLength(Literal):
    """An image and a row of the Jacobian at a time; a is a hundredth of the mean length, after an update without any."""

    def generator(self, x):
        styles = self.G.styles(x.latents, x.labels)
        fake = self.G.synthesize(styles, x.latents)
        y = hashed_normal(x.latents, fake.shape[1:], salt=-1).double()
        lengths = []
        for n in range(BATCH_SIZE):
            (gradient,) = torch.autograd.grad((fake[n] * y[n]).sum() / 16, styles, create_graph=True)
            lengths.append(torch.sqrt((gradient[n] ** 2).sum(1).mean()))
        a = 0.01 * mean(lengths).detach()
        return -self.logits(fake, x.labels).mean() + 2 * 4 * mean([(length - a) ** 2 for length in lengths])


class MinibatchDeviation(Literal):
    """Groups of two, four places apart; real and generated images apart. D is shown one group at a time."""

    def logits(self, images, labels):
        half = BATCH_SIZE // 2
        return torch.cat([self.D(images[n::half], labels[n::half]).logits for n in range(half)]).view(half, 2).T.flatten()

    def classification_d(self, x):
        half = BATCH_SIZE // 2
        class_logits = [self.D(x.real[n::half], x.real_labels[n::half]).class_logits for n in range(half)]
        labels = torch.cat([x.real_labels[n::half] for n in range(half)])
        return CLASS_WEIGHT * self.cross_entropy(torch.cat(class_logits), labels)


CASES: dict[str, tuple[type[Literal], list[str]]] = {
    "hinge": (Literal, []),
    "partly labelled": (Literal, ["data.unlabelled=allow"]),
    "non_saturating": (NonSaturating, ["loss.adversarial=non_saturating"]),
    "saturating": (Saturating, ["loss.adversarial=saturating"]),
    "least_squares": (LeastSquares, ["loss.adversarial=least_squares"]),
    "wasserstein": (Wasserstein, ["loss.adversarial=wasserstein"]),
    "relativistic": (Relativistic, ["loss.adversarial=relativistic"]),
    "r1": (R1, ["loss.r1_gamma=3"]),
    "r2": (R2, ["loss.r2_gamma=3"]),
    "cosine": (CosineR1, ["loss.r1_gamma={start: 8, end: 2, kimg: 1}"]),
    "lazy": (LazyR1, ["loss.r1_gamma=0.2", "loss.penalty_every=16"]),
    "wgan_gp": (WassersteinGradientPenalty, ["loss.adversarial=wasserstein", "loss.wgan_gp_lambda=10"]),
    "dragan": (Dragan, ["loss.adversarial=non_saturating", "loss.dragan_lambda=10"]),
    "consistency": (ConsistencyOfReal, ["consistency.real_weight=10"]),
    "balanced consistency": (BalancedConsistency, ["consistency.real_weight=10", "consistency.fake_weight=7"]),
    "latent consistency": (LatentConsistency, ["consistency.latent_weight=5", "consistency.latent_diversity_weight=0.5"]),
    "lecam": (LeCam, ["loss.lecam_weight=0.3"]),
    "orthogonal": (Orthogonal, ["loss.orthogonal_weight=1e-3"]),
    "top_k": (TopK, ["loss.top_k=0.375"]),
    "auxiliary": (Auxiliary, ["model.conditioning=auxiliary", "data.unlabelled=allow"]),
    "twin_auxiliary": (TwinAuxiliary, ["model.conditioning=twin_auxiliary", "loss.conditioning_weight=0.6"]),
    "adc": (DiscriminativeClassifier, ["model.conditioning=adc", "loss.conditioning_weight=0.6", "data.unlabelled=allow"]),
    "multi_hinge": (MultiHinge, ["model.conditioning=multi_hinge", "data.unlabelled=allow"]),
    "k_plus_one": (KPlusOne, K_PLUS_ONE),
    "feature matching": (FeatureMatching, [*K_PLUS_ONE, "loss.feature_matching_weight=3", "loss.generator_weight=0"]),
    "both": (FeatureMatching, [*K_PLUS_ONE, "loss.feature_matching_weight=3", "loss.generator_weight=0.4"]),
    "contrastive": (Contrastive, ["model.conditioning=contrastive", "loss.conditioning_weight=0.6", "data.unlabelled=allow"]),
    "d2d_ce": (D2DCE, ["model.conditioning=d2d_ce", "loss.temperature=0.4", "loss.margin=0.9", "data.unlabelled=allow"]),
    "diffaugment": (Augmented, ["augmentation.pipe=diffaugment", "augmentation.probability=0.6", "loss.r1_gamma=3"]),
    "ada": (Augmented, ["augmentation.pipe=ada", "augmentation.probability=0.6", "loss.r1_gamma=3"]),
    "path length": (PathLength, [*STYLES, "loss.path_length_weight=2", "loss.path_length_every=4", "model.minibatch_std=0"]),
    "translation": (Translation, TRANSLATION),
    "minibatch_std": (MinibatchDeviation, [*STYLES, "model.minibatch_std=2"]),
}


def expected_gradients(literal: type[Literal], overrides: list[str]) -> tuple[Gradients, Gradients]:
    game = build(overrides)
    formula = literal(game)
    inputs = game.inputs(UPDATES - 1)
    found = []
    for loss, network in ((formula.discriminator, game.discriminating.network), (formula.generator, game.generating.network)):
        names, parameters = zip(*network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss(inputs), parameters, allow_unused=True, materialize_grads=True)
        found.append(dict(zip(names, gradients, strict=True)))
    return tuple(found)


def distance(a: Gradients, b: Gradients) -> float:
    """Relative, over what both have."""
    flat_a, flat_b = (torch.cat([each[name].flatten() for name in sorted(a.keys() & b.keys())]) for each in (a, b))
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()


@pytest.fixture(scope="module")
def found() -> dict[int, list[tuple[Gradients, Gradients]]]:
    """World size → of each case."""
    cases = [overrides for _, overrides in CASES.values()]
    by_size = {size: run_ranks(size, all_gradients, cases) for size in (1, 2, 4)}
    for ranks in by_size.values():
        for other in ranks[1:]:
            for mine, theirs in zip(ranks[0], other, strict=True):
                assert all(distance(a, b) < 1e-12 for a, b in zip(mine, theirs, strict=True)), "ranks differ"
    return {size: ranks[0] for size, ranks in by_size.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_gradients_are_the_papers_on_any_number_of_ranks(
    case: str, world_size: int, found: dict[int, list[tuple[Gradients, Gradients]]]
) -> None:
    number = list(CASES).index(case)
    alone, mine = found[1][number], found[world_size][number]
    for gradients, expected in zip(mine, expected_gradients(*CASES[case]), strict=True):
        assert distance(gradients, expected) < 1e-7
    for gradients, expected in zip(mine, alone, strict=True):
        assert gradients.keys() == expected.keys()
        assert distance(gradients, expected) < 1e-9


def test_no_two_cases_are_alike(found: dict[int, list[tuple[Gradients, Gradients]]]) -> None:
    """What is left out or taken for another would be seen."""
    plain = found[1][list(CASES).index("hinge")]
    for name, gradients in zip(CASES, found[1], strict=True):
        if name != "hinge" and not {STYLES[0], TRANSLATION[0]} & {*CASES[name][1]}:
            assert max(distance(a, b) for a, b in zip(gradients, plain, strict=True)) > 1e-3, name


@pytest.mark.parametrize("case", CASES)
def test_no_method_waits_for_the_device(case: str) -> None:
    game = build(CASES[case][1])
    x = game.inputs(0)
    near = x.near if game.discriminating.wants_near else None
    real = [x.real, x.real_labels] if game.generating.wants_real else []
    seen = torch.tensor(float(SEEN), dtype=torch.float64)
    with HostWaits() as waits:
        game.discriminating(x.real, x.real_labels, x.fake, near, x.labels, x.noise, seen, True)[0].backward()
        game.generating(x.latents, x.labels, x.generator_noise, seen, True, *real)[0].backward()
    assert not waits.found
