"""What the discriminator says of an image: trunk features → adversarial logit, class logits, and an embedding.

One head a conditioning method. Each is built of the number of features, the number of classes, and what the family makes of a
layer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gandist.models.layers import Layer, Trunk, gather_over_ranks, rank_and_size

EMBEDDING = 512  # features of what images are compared by, as ContraGAN and ReACGAN have them


class DiscriminatorOutput(NamedTuple):
    logits: torch.Tensor  # [B], above 0 for real
    class_logits: torch.Tensor  # [B, K]
    features: torch.Tensor  # [B, F]
    embedding: torch.Tensor  # [B, E], by which images are compared with each other; E = 0 where they are not


class Head(nn.Module):
    """guides_generator: whether the generator, too, is trained to be classified rightly; where the adversarial logit itself
                      knows the label, it need not be
    contrast: how images of a batch are compared with each other: a key of losses.CONTRASTS
    detached: whether the trunk learns nothing from the class head
    """

    guides_generator = False
    contrast: str | None = None
    detached = False

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """features [B, F], labels int64 [B], −1 for none → logits [B], class_logits [B, K], embedding [B, E]"""
        return self.judge(features, labels), self.classify(features), self.embed(features)

    def judge(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(features.detach() if self.detached else features)

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :0]


class LinearHead(Head):
    """The logit is linear in the features."""

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.adversarial = layer(nn.Linear(features, 1))

    def judge(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.adversarial(features).squeeze(1)


class ProjectionHead(LinearHead):
    """The logit has a term for the match of image and label (Miyato & Koyama 2018, 1802.05637)."""

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__(features, num_classes, layer)
        self.embedding = layer(nn.Embedding(num_classes, features))
        self.classifier = nn.Linear(features, num_classes)

    def judge(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        match = (self.embedding(labels.clamp(min=0)) * features).sum(1) * (labels >= 0)
        return super().judge(features, labels) + match


class PureProjectionHead(Head):
    """The logit is the match of image and label, and nothing else (R3GAN, Huang et al. 2024, 2501.05441)."""

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.project = layer(nn.Linear(features, features, bias=False))
        self.embedding = nn.Embedding(num_classes, features)
        self.classifier = nn.Linear(features, num_classes)
        nn.init.normal_(self.embedding.weight, std=(num_classes * features) ** -0.5)

    def judge(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
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


class ComparingHead(LinearHead):
    """Images are compared with each other and with a proxy of their class. The classifier is there for classification alone."""

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__(features, num_classes, layer)
        self.project = layer(nn.Linear(features, EMBEDDING))
        self.proxies = layer(nn.Embedding(num_classes, EMBEDDING))
        self.classifier = nn.Linear(features, num_classes)

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.project(features), dim=1)

    def proxies_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Of length 1, [B, E]; labels of −1 have any."""
        return F.normalize(self.proxies(labels.clamp(min=0)), dim=1)

    def others(self, embedding: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the global batch: embeddings [N, E], labels [N]; and those that each image is not compared with, bool [B, N]."""
        rank, size = rank_and_size() if self.training else (0, 1)  # in evaluation mode, one rank may be alone
        everyone, all_labels = (gather_over_ranks(each) if size > 1 else each for each in (embedding, labels))
        numbers = torch.arange(len(labels), device=labels.device) + rank * len(labels)
        itself = numbers[:, None] == torch.arange(len(all_labels), device=labels.device)
        return everyone, all_labels, itself | (all_labels < 0)


class ContrastiveHead(ComparingHead):
    """ContraGAN's (Kang & Park 2020, 2006.12681)."""

    contrast = "contrastive"


class D2DCEHead(ComparingHead):
    """ReACGAN's (Kang et al. 2021, 2111.01118)."""

    contrast = "d2d_ce"


class Discriminator(nn.Module):
    """A family's trunk under a head."""

    def __init__(self, trunk: Trunk, head: Head):
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> DiscriminatorOutput:
        """images [B, C, H, W] in [-1, 1], labels int64 [B]"""
        features = self.trunk(images)
        logits, class_logits, embedding = self.head(features, labels)
        return DiscriminatorOutput(logits, class_logits, features, embedding)
