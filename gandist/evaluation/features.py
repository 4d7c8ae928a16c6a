"""Extractors: images → features, by networks that had no part in the training."""

import hashlib
import io
from importlib.resources import files
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gandist.errors import GandistError

DIGITS_JUDGE = "digits-judge"
_WEIGHTS = {DIGITS_JUDGE: ("digits_judge.pt", "909952f7e941516995861be6868077dddf98d1370fd3ff032ec461ecf13ea8ba")}


class DigitsJudge(nn.Module):
    """A classifier of handwritten digits (65,834 parameters) whose last hidden layer serves as features.

    Trained by `python -m gandist.evaluation.judge` on the training split alone.
    """

    resolution = 16
    channels = 1
    num_features = 64
    num_classes = 10

    def __init__(self):
        super().__init__()
        widths = [1, 32, 32, 64, 64]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.classifier = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B, 1, H, W] → features float32 [B, 64], class_logits float32 [B, 10]"""
        x = images.float() / 127.5 - 1
        if x.shape[-1] != self.resolution:
            x = F.interpolate(x, size=(self.resolution,) * 2, mode="bilinear", antialias=True)
        for layer, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.relu(norm(convolution(x)))
            if layer == 1:
                x = F.max_pool2d(x, 2)
        features = x.mean(dim=(2, 3))
        return features, self.classifier(features)


def load_digits_judge(device: torch.device) -> DigitsJudge:
    """The judge that ships with the package, in evaluation mode. Raises GandistError if its file was changed."""
    name, expected = _WEIGHTS[DIGITS_JUDGE]
    content = files("gandist.evaluation").joinpath("weights", name).read_bytes()
    if hashlib.sha256(content).hexdigest() != expected:
        raise GandistError(f"gandist/evaluation/weights/{name} is not the file that was released: install gandist again")
    judge = DigitsJudge()
    judge.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return judge.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def weights_sha256(extractor: str) -> str:
    return _WEIGHTS[extractor][1]
