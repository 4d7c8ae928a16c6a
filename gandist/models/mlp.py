"""The fully connected networks that GANs began with (Goodfellow et al. 2014, 1406.2661), for images of any size.

Two hidden layers of `model.generator_width` and `model.discriminator_width` units each, in tutorials 256.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import DataConfig, ModelConfig
from gandist.models.layers import Trunk, plain

SLOPE = 0.2  # of the leaky ReLUs


class MLPGenerator(nn.Module):
    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        width = model.generator_width
        self.shape = (data.channels, *data.size)
        self.embedding = nn.Embedding(data.num_classes, model.latent_dim) if data.num_classes else None
        self.hidden1 = nn.Linear(model.latent_dim * (2 if data.num_classes else 1), width)
        self.hidden2 = nn.Linear(width, width)
        self.to_image = nn.Linear(width, math.prod(self.shape))

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """latents [B, Z], labels int64 [B] → images [B, C, H, W] in [-1, 1]"""
        if self.embedding is not None:
            latents = torch.cat([latents, self.embedding(labels)], 1)
        x = F.relu(self.hidden2(F.relu(self.hidden1(latents))))
        return torch.tanh(self.to_image(x)).unflatten(1, self.shape)


class MLPTrunk(Trunk):
    layer = staticmethod(plain)

    def __init__(self, model: ModelConfig, data: DataConfig):
        super().__init__()
        self.features = model.discriminator_width
        self.hidden1 = nn.Linear(data.channels * math.prod(data.size), self.features)
        self.hidden2 = nn.Linear(self.features, self.features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] → features [B, F]"""
        x = F.leaky_relu(self.hidden1(images.flatten(1)), SLOPE)
        return F.leaky_relu(self.hidden2(x), SLOPE)
