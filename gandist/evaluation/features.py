"""Extractors: images → features, by networks that had no part in the training. All in float32, without autocast or TF32."""

import io
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gandist.config import Config
from gandist.distributed import World
from gandist.errors import ConfigError
from gandist.evaluation.judge import DIGITS, load_judge
from gandist.evaluation.weights import Published, load_weights

INCEPTION = Published(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
    "evaluation.inception_weights",
)
DINOV2 = Published(
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    "evaluation.dinov2_weights",
)
DINOV2_ARCHITECTURE = "vit_large_patch14_dinov2"  # as timm calls it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Extractor:
    """network: uint8 [B, C, H, W] → features float32 [B, D], and class_logits float32 [B, K] or None

    name, weights_sha256, resize: as records have them; together they say what the features are
    """

    network: nn.Module
    name: str
    weights_sha256: str
    resize: str
    num_features: int

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if images.dtype != torch.uint8:
            raise TypeError(f"images are uint8, not {images.dtype}")
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images)

    @property
    def identity(self) -> dict[str, str]:
        return {"extractor": self.name, "weights_sha256": self.weights_sha256, "resize": self.resize}


def open_extractor(kind: str, config: Config, world: World) -> Extractor:
    """kind: a key of EXTRACTORS. Called by all ranks together. Raises ConfigError or DataError."""
    with world.together():
        extractor = EXTRACTORS[kind](config)
    extractor.network.to(world.device).eval().requires_grad_(False)
    return extractor


class InceptionFeatures(nn.Module):
    """Inception-2015 with the weights and the resizing of the original TensorFlow graph: the FID's features (Heusel et al.
    2017, 1706.08500), by torch-fidelity. features [B, 2048]; class_logits [B, 1008] without bias, as Inception Score has them.
    """

    def __init__(self, state_dict: dict[str, torch.Tensor]):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        verified = io.BytesIO()  # torch-fidelity unpickles whatever it reads: it gets what we have written
        torch.save(state_dict, verified)
        verified.seek(0)
        self.inception = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=verified
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inception(_rgb(images))


class DINOv2Features(nn.Module):
    """DINOv2's ViT-L/14 (Oquab et al. 2023, 2304.07193): the class token [B, 1024], of images of 224 pixels by bicubic
    antialiased resizing, as FD-DINOv2 has it (Stein et al. 2023, 2306.04675)."""

    size = 224
    offset = 0.1  # with which DINOv2 scales the embedding of positions

    def __init__(self, state_dict: dict[str, torch.Tensor]):
        super().__init__()
        import timm

        self.vit = timm.create_model(DINOV2_ARCHITECTURE, img_size=self.size, num_classes=0)
        state_dict = {name: tensor for name, tensor in state_dict.items() if name != "mask_token"}
        side = self.size // self.vit.patch_embed.patch_size[0]
        state_dict["pos_embed"] = self._resize_positions(state_dict["pos_embed"], side)
        self.vit.load_state_dict(state_dict)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        x = F.interpolate(_rgb(images).float(), size=(self.size,) * 2, mode="bicubic", antialias=True)
        return self.vit((x / 255 - self.mean) / self.std), None

    @classmethod
    def _resize_positions(cls, embedding: torch.Tensor, side: int) -> torch.Tensor:
        """[1, 1 + N², D] → [1, 1 + side², D]"""
        token, grid = embedding[:, :1], embedding[:, 1:]
        before = round(grid.shape[1] ** 0.5)
        grid = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=(side + cls.offset) / before, mode="bicubic")
        return torch.cat([token, grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], 1)


class RandomFeatures(nn.Module):
    """A small convolutional network as it was initialized: nothing to download, and blind to much. features [B, 64]"""

    def __init__(self):
        super().__init__()
        weights = torch.Generator().manual_seed(0)
        for layer, (before, after) in enumerate([(3, 32), (32, 64)]):
            weight = torch.randn(after, before, 3, 3, generator=weights) / (3 * before**0.5)
            self.register_buffer(f"weight{layer}", weight)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        x = _rgb(images).float() / 127.5 - 1
        for weight in (self.weight0, self.weight1):
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
        return x.mean(dim=(2, 3)), None


def _open_inception(config: Config) -> Extractor:
    state_dict, digest = load_weights(INCEPTION, config.evaluation.inception_weights, config.data)
    network = InceptionFeatures(state_dict)
    return Extractor(network, "inception-2015-12-05", digest, "299, bilinear as in TensorFlow 1", 2048)


def _open_dinov2(config: Config) -> Extractor:
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise ConfigError("DINOv2's network is timm's: pip install timm", on_every_rank=False) from error
    state_dict, digest = load_weights(DINOV2, config.evaluation.dinov2_weights, config.data)
    network = DINOv2Features(state_dict)
    return Extractor(network, "dinov2-vitl14", digest, "224, bicubic with antialiasing", network.vit.num_features)


def _open_judge(config: Config) -> Extractor:
    path, data = config.evaluation.judge, config.data
    judge, digest = load_judge(path)
    if data.channels != judge.channels or data.num_classes not in (0, judge.num_classes):
        raise ConfigError(
            f"the judge ({path or 'of the built-in digits'}) wants data.channels={judge.channels} and "
            f"data.num_classes={judge.num_classes}",
            on_every_rank=False,
        )
    judge.to(memory_format=torch.channels_last)
    name = f"judge {path.name}" if path else DIGITS
    return Extractor(judge, name, digest, f"{judge.resolution}, bilinear with antialiasing", judge.num_features)


def _open_random(config: Config) -> Extractor:
    return Extractor(RandomFeatures(), "random", "none", "none", 64)


EXTRACTORS = {"inception": _open_inception, "dinov2": _open_dinov2, "judge": _open_judge, "random": _open_random}


def _rgb(images: torch.Tensor) -> torch.Tensor:
    """Grey ones with three equal channels."""
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)
