"""What the discriminator says of an image: trunk features → adversarial logit, class logits, and evidence of the class.

One head a conditioning method, with the loss by which it conditions, if it has one of its own. Each is built of the number of
features, the number of classes, and what the family makes of a layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gandist.losses import Similarity, conditional_contrastive, cross_entropy, data_to_data_cross_entropy, multi_hinge
from gandist.models.layers import Layer, Trunk, gather_over_ranks, rank_and_size

EMBEDDING = 512  # features of what images are compared by, as ContraGAN and ReACGAN have them


class DiscriminatorOutput(NamedTuple):
    logits: torch.Tensor  # [B], above 0 for real
    class_logits: torch.Tensor  # [B, K]
    features: torch.Tensor  # [B, F]
    evidence: torch.Tensor  # [B, E], what the head's own loss is made of; E = 0 where it has none


class Head(nn.Module):
    """guides_generator: whether the generator, too, is trained to be classified rightly; where the adversarial logit itself
                      knows the label, it need not be
    conditions:           whether there is a conditioning loss, `discriminator_loss` and `generator_loss`
    replaces_adversarial: whether that loss also tells real from made
    detached:             whether the trunk learns nothing from the class head
    temperature, margin:  of comparisons of images
    """

    guides_generator = False
    conditions = False
    replaces_adversarial = False
    detached = False
    temperature = 1.0
    margin = 1.0

    @classmethod
    def on(cls, trunk: Trunk, num_classes: int) -> "Head":
        """A new one for this trunk."""
        return cls(trunk.features, num_classes, trunk.layer)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """features [B, F], labels int64 [B], −1 for none → logits [B], class_logits [B, K], evidence [B, E]"""
        evidence = self.weigh(features)
        return self.judge(features, labels, evidence), self.classify(features), evidence

    def judge(self, features: torch.Tensor, labels: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(features.detach() if self.detached else features)

    def weigh(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :0]

    def discriminator_loss(
        self, real: torch.Tensor, real_labels: torch.Tensor, fake: torch.Tensor, fake_labels: torch.Tensor
    ) -> torch.Tensor:
        """Of the evidence of real and of generated images [B, E] and their labels [B] → [B]; unlabelled ones are left out."""
        raise NotImplementedError

    def generator_loss(self, fake: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of the evidence of generated images [B, E] and their labels [B] → [B]"""
        raise NotImplementedError


class LinearHead(Head):
    """The logit is linear in the features."""

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.adversarial = layer(nn.Linear(features, 1))

    def judge(self, features: torch.Tensor, labels: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
        return self.adversarial(features).squeeze(1)


class ProjectionHead(LinearHead):
    """The logit has a term for the match of image and label (Miyato & Koyama 2018, 1802.05637)."""

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__(features, num_classes, layer)
        self.embedding = layer(nn.Embedding(num_classes, features))
        self.classifier = nn.Linear(features, num_classes)

    def judge(self, features: torch.Tensor, labels: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
        match = (self.embedding(labels.clamp(min=0)) * features).sum(1) * (labels >= 0)
        return super().judge(features, labels, evidence) + match


class PureProjectionHead(Head):
    """The logit is the match of image and label, and nothing else (R3GAN, Huang et al. 2024, 2501.05441)."""

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.project = layer(nn.Linear(features, features, bias=False))
        self.embedding = nn.Embedding(num_classes, features)
        self.classifier = nn.Linear(features, num_classes)
        nn.init.normal_(self.embedding.weight, std=(num_classes * features) ** -0.5)

    def judge(self, features: torch.Tensor, labels: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
        return (self.embedding(labels) * self.project(features)).sum(1)


class UnconditionalHead(LinearHead):
    """For data without classes: one logit, and class logits of no classes."""

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :0]


class AuxiliaryClassifierHead(LinearHead):
    """The logit knows nothing of the label; the generator answers to the classifier (AC-GAN, Odena et al. 2017,
    1610.09585). As in later work the discriminator's classifier learns from real images alone.
    """

    guides_generator = True

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__(features, num_classes, layer)
        self.classifier = nn.Linear(features, num_classes)


class ConditioningHead(LinearHead):
    """With a conditioning loss of its own. The classifier is there for classification alone, unless the generator is guided."""

    conditions = True

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__(features, num_classes, layer)
        self.classifier = nn.Linear(features, num_classes)


class TwinAuxiliaryHead(ConditioningHead):
    """A second classifier learns from generated images, and the generator, besides answering to the first, keeps this twin from
    telling their classes (TAC-GAN, Gong et al. 2019, 1907.02690, equation 8)."""

    guides_generator = True

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__(features, num_classes, layer)
        self.twin = nn.Linear(features, num_classes)

    def weigh(self, features: torch.Tensor) -> torch.Tensor:
        return self.twin(features)

    def discriminator_loss(
        self, real: torch.Tensor, real_labels: torch.Tensor, fake: torch.Tensor, fake_labels: torch.Tensor
    ) -> torch.Tensor:
        return cross_entropy(fake, fake_labels)

    def generator_loss(self, fake: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -cross_entropy(fake, labels)


class DiscriminativeClassifierHead(ConditioningHead):
    """A classifier of 2K classes, real ones and generated ones (ADC-GAN, Hou et al. 2022, 2107.10060, equation 9)."""

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__(features, num_classes, layer)
        self.num_classes = num_classes
        self.discriminative = layer(nn.Linear(features, 2 * num_classes))

    def weigh(self, features: torch.Tensor) -> torch.Tensor:
        return self.discriminative(features)

    def discriminator_loss(
        self, real: torch.Tensor, real_labels: torch.Tensor, fake: torch.Tensor, fake_labels: torch.Tensor
    ) -> torch.Tensor:
        return cross_entropy(real, real_labels) + cross_entropy(fake, self.num_classes + fake_labels)

    def generator_loss(self, fake: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(fake, labels) - cross_entropy(fake, self.num_classes + labels)


class KPlusOneHead(Head):
    """A classifier of K + 1 classes, the last of which is `generated` and has the logit 0: the odds of all others together are
    those of being real (Salimans et al. 2016, 1606.03498, section 5). So what is learned of unlabelled images, that they are
    of some class, moves the classifier as well."""

    guides_generator = True

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.classifier = layer(nn.Linear(features, num_classes))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        class_logits = self.classify(features)
        return class_logits.logsumexp(1), class_logits, self.weigh(features)


class MultiHingeHead(Head):
    """A classifier of K + 1 classes, the last of which is `generated` (Kavalerov et al. 2019, 1912.04216, section 3). The logit
    is the margin between the likeliest of the others and it."""

    conditions = True
    replaces_adversarial = True

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.scores = layer(nn.Linear(features, num_classes + 1))
        self.classifier = nn.Linear(features, num_classes)

    def judge(self, features: torch.Tensor, labels: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
        return evidence[:, :-1].amax(1) - evidence[:, -1]

    def weigh(self, features: torch.Tensor) -> torch.Tensor:
        return self.scores(features)

    def discriminator_loss(
        self, real: torch.Tensor, real_labels: torch.Tensor, fake: torch.Tensor, fake_labels: torch.Tensor
    ) -> torch.Tensor:
        generated = torch.full_like(fake_labels, fake.size(1) - 1)
        return multi_hinge(real, real_labels) + multi_hinge(fake, generated)

    def generator_loss(self, fake: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return multi_hinge(fake, labels)


class ComparingHead(ConditioningHead):
    """Images are compared with each other, over all ranks, and with a proxy of their class."""

    compare: Callable[[Similarity, float, float], torch.Tensor]  # similarities, temperature, margin → [B]

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__(features, num_classes, layer)
        self.project = layer(nn.Linear(features, EMBEDDING))
        self.proxies = layer(nn.Embedding(num_classes, EMBEDDING))

    def weigh(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.project(features), dim=1)

    def proxies_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Of length 1, [B, E]; labels of −1 have any."""
        return F.normalize(self.proxies(labels.clamp(min=0)), dim=1)

    def discriminator_loss(
        self, real: torch.Tensor, real_labels: torch.Tensor, fake: torch.Tensor, fake_labels: torch.Tensor
    ) -> torch.Tensor:
        return self.generator_loss(real, real_labels)

    def generator_loss(self, fake: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        everyone, all_labels, rank = fake, labels, 0
        if self.training:  # in evaluation mode, one rank may be alone
            everyone, all_labels, rank = gather_over_ranks(fake), gather_over_ranks(labels), rank_and_size()[0]
        numbers = torch.arange(len(labels), device=labels.device) + rank * len(labels)
        itself = numbers[:, None] == torch.arange(len(all_labels), device=labels.device)
        to_proxy = (fake * self.proxies_of(labels).to(fake.dtype)).sum(1, keepdim=True)
        cosines = Similarity(to_proxy, fake @ everyone.T, labels[:, None] == all_labels, itself | (all_labels < 0))
        return torch.where(labels >= 0, self.compare(cosines, self.temperature, self.margin), 0)


class ContrastiveHead(ComparingHead):
    """ContraGAN's (Kang & Park 2020, 2006.12681)."""

    compare = staticmethod(conditional_contrastive)


class D2DCEHead(ComparingHead):
    """ReACGAN's (Kang et al. 2021, 2111.01118)."""

    compare = staticmethod(data_to_data_cross_entropy)


class Discriminator(nn.Module):
    """A family's trunk under a head."""

    def __init__(self, trunk: Trunk, head: Head):
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> DiscriminatorOutput:
        """images [B, C, H, W] in [-1, 1], labels int64 [B]"""
        features = self.trunk(images)
        logits, class_logits, evidence = self.head(features, labels)
        return DiscriminatorOutput(logits, class_logits, features, evidence)

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] → class_logits [B, K]"""
        return self.head.classify(self.trunk(images))
