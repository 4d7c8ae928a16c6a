"""What the discriminator says of an image: trunk features → adversarial logit and class logits.

One head a conditioning method. `guides_generator` tells whether the generator, too, is trained to be classified rightly;
where the adversarial logit itself knows the label, it need not be. Each is built of the number of features, the number of
classes, and what the family makes of a layer.
"""

from typing import NamedTuple

import torch
from torch import nn

from gandist.models.layers import Layer


class DiscriminatorOutput(NamedTuple):
    logits: torch.Tensor  # [B], above 0 for real
    class_logits: torch.Tensor  # [B, K]
    features: torch.Tensor  # [B, F]


class ProjectionHead(nn.Module):
    """The logit has a term for the match of image and label (Miyato & Koyama 2018, 1802.05637)."""

    guides_generator = False

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.adversarial = layer(nn.Linear(features, 1))
        self.embedding = layer(nn.Embedding(num_classes, features))
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """features [B, F], labels int64 [B], −1 for none → logits [B], class_logits [B, K]"""
        match = (self.embedding(labels.clamp(min=0)) * features).sum(1) * (labels >= 0)
        return self.adversarial(features).squeeze(1) + match, self.classifier(features)


class PureProjectionHead(nn.Module):
    """The logit is the match of image and label, and nothing else (R3GAN, Huang et al. 2024, 2501.05441)."""

    guides_generator = False

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.project = layer(nn.Linear(features, features, bias=False))
        self.embedding = nn.Embedding(num_classes, features)
        self.classifier = nn.Linear(features, num_classes)
        nn.init.normal_(self.embedding.weight, std=(num_classes * features) ** -0.5)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """features [B, F], labels int64 [B] → logits [B], class_logits [B, K]"""
        return (self.embedding(labels) * self.project(features)).sum(1), self.classifier(features)


class UnconditionalHead(nn.Module):
    """For data without classes: one logit, and class logits of no classes."""

    guides_generator = False

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.adversarial = layer(nn.Linear(features, 1))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """features [B, F], labels int64 [B] (unused) → logits [B], class_logits [B, 0]"""
        return self.adversarial(features).squeeze(1), features[:, :0]


class AuxiliaryClassifierHead(nn.Module):
    """The logit knows nothing of the label; the generator answers to the classifier (AC-GAN, Odena et al. 2017,
    1610.09585). As in later work the discriminator's classifier learns from real images alone.
    """

    guides_generator = True

    def __init__(self, features: int, num_classes: int, layer: Layer):
        super().__init__()
        self.adversarial = layer(nn.Linear(features, 1))
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """features [B, F], labels int64 [B] (unused) → logits [B], class_logits [B, K]"""
        return self.adversarial(features).squeeze(1), self.classifier(features)


class Discriminator(nn.Module):
    """A family's trunk under a head."""

    def __init__(self, trunk: nn.Module, head: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> DiscriminatorOutput:
        """images [B, C, H, W] in [-1, 1], labels int64 [B]"""
        features = self.trunk(images)
        return DiscriminatorOutput(*self.head(features, labels), features)
