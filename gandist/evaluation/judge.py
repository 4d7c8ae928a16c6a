"""The judge, a classifier that has no part in the training: `python -m gandist.evaluation.judge FILE [key=value …]` trains one
on the real images of `data.train`."""

import argparse
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gandist.arguments import positive
from gandist.config import DataConfig
from gandist.config_file import load_config
from gandist.data import open_dataset
from gandist.distributed import World, join_alone, run
from gandist.errors import ConfigError, GandistError
from gandist.evaluation.classification import Classification

DIGITS = "digits-judge"
DIGITS_SHA256 = "ad8a5f57357121443b7502a5b66e0e5098941ce3da0fae69832f915f46ff6ae6"
EPOCHS = 40
BATCH_SIZE = 64
MAX_WIDTH = 256


class Judge(nn.Module):
    """A convolutional classifier whose last hidden layer serves as features.

    Two convolutions at each size, each with batch norm, from `resolution` down to 8 pixels (or to 4, of smaller images).
    It sees images of any other size stretched or shrunk to squares of `resolution`.
    """

    def __init__(self, resolution: int, channels: int, num_classes: int):
        super().__init__()
        self.resolution, self.channels, self.num_classes = resolution, channels, num_classes
        stages = max(2, (resolution - 1).bit_length() - 2)
        first = 32 if resolution <= 16 else 64
        widths = [channels, *(min(first << stage, MAX_WIDTH) for stage in range(stages) for _ in range(2))]
        self.num_features = widths[-1]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.classifier = nn.Linear(self.num_features, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B, C, H, W] → features float32 [B, D], class_logits float32 [B, K]"""
        x = images.float() / 127.5 - 1
        if x.shape[-2:] != (self.resolution,) * 2:
            x = F.interpolate(x, size=(self.resolution,) * 2, mode="bilinear", antialias=True)
        for layer, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True), 1):
            x = F.relu(norm(convolution(x)))
            if layer % 2 == 0 and layer < len(self.norms):
                x = F.max_pool2d(x, 2)
        features = x.mean(dim=(2, 3))
        return features, self.classifier(features)

    def save(self, path: Path) -> None:
        described = {"resolution": self.resolution, "channels": self.channels, "num_classes": self.num_classes}
        torch.save({"judge": described, "weights": self.state_dict()}, path)


def load_judge(path: Path | None) -> tuple[Judge, str]:
    """A judge in evaluation mode, and its file's SHA-256; `None`: that of the digits, which ships with the package.

    Raises ConfigError for a file that is none, GandistError if the package's own was changed.
    """
    try:
        content = path.read_bytes() if path else files("gandist.evaluation").joinpath("weights", "digits_judge.pt").read_bytes()
    except OSError as error:
        raise ConfigError(f"evaluation.judge={path}: {error.strerror}", on_every_rank=False) from error
    digest = hashlib.sha256(content).hexdigest()
    if not path and digest != DIGITS_SHA256:
        raise GandistError(
            "gandist/evaluation/weights/digits_judge.pt is not the file that was released: install gandist again"
        )
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        judge = Judge(**saved["judge"])
        judge.load_state_dict(saved["weights"])
    except Exception as error:  # of many kinds, for what may be any file
        raise ConfigError(
            f"evaluation.judge={path} is not a judge, as `python -m gandist.evaluation.judge` writes them: {error}",
            on_every_rank=False,
        ) from error
    return judge.eval().requires_grad_(False), digest


def train_judge(
    judge: Judge, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], num_images: int, *, epochs: int = EPOCHS
) -> Judge:
    """Trains it on batches of BATCH_SIZE uint8 images [B, C, H, W] and labels, −1 for none, without end.

    Images are shifted by up to an eighth of their height and width, labels are smoothed. num_images: an epoch has
    """
    steps = max(1, epochs * num_images // BATCH_SIZE)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    judge.requires_grad_(True).train()
    for _ in range(steps):
        images, labels = next(batches)
        down, right = (max(1, side // 8) for side in images.shape[2:])
        shift = [int(torch.randint(-most, most + 1, ())) for most in (down, right)]
        images = F.pad(images, [right, right, down, down]).roll(shift, dims=(2, 3))[..., down:-down, right:-right]
        _, class_logits = judge(images)
        optimizer.zero_grad()
        F.cross_entropy(class_logits, labels, label_smoothing=0.1, ignore_index=-1).backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def top1(judge: Judge, data: DataConfig, world: World) -> float:
    """Accuracy on the labelled images of `data.test`."""
    return accuracy(judge, open_dataset(data.test, data, world, split="test").evaluation_batches(BATCH_SIZE), world)


@torch.no_grad()
def accuracy(judge: Judge, batches: Iterable[tuple], world: World) -> float:
    """batches: uint8 images [B, C, H, W] and labels [B], −1 for none, and whatever else"""
    verdicts = Classification(judge.num_classes, world)
    for images, labels, *_ in batches:
        verdicts.update(judge(images)[1], labels)
    return verdicts.report().top1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.evaluation.judge",
        description="Train a judge on the images of data.train, to be named in evaluation.judge, and test it on data.test.",
        epilog="example: python -m gandist.evaluation.judge judge.pt data.train=data/cifar10 data.test=data/cifar10 "
        "data.resolution=32 data.channels=3",
    )
    parser.add_argument("file", type=Path, help="where the judge goes")
    parser.add_argument("--config", type=Path, metavar="CONFIG", help="whose data section says what to train on")
    parser.add_argument("--epochs", type=positive, default=EPOCHS, metavar="N", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration, such as data.train=…")
    options = parser.parse_intermixed_args(arguments)
    data = load_config(
        options.config, [*options.overrides, "data.labelled=1", "evaluation.metrics=[]", "checkpoint.best=null"]
    ).data
    if not data.num_classes:
        raise ConfigError("a judge tells classes apart: data.num_classes is 0")
    with join_alone("the judge is trained") as world:
        torch.manual_seed(0)
        judge = Judge(max(data.size), data.channels, data.num_classes).to(world.device, memory_format=torch.channels_last)
        dataset = open_dataset(data.train, data, world)
        with closing(dataset.training_batches(seed=0, batch_size=BATCH_SIZE, start=0)) as batches:
            train_judge(judge, (batch[:2] for batch in batches), len(dataset), epochs=options.epochs)
        held_out = top1(judge, data, world) if data.test else None
        judge.cpu().save(options.file)
    if held_out is not None:
        print(f"accuracy on data.test: {held_out:.4f}")
    print(f"{hashlib.sha256(options.file.read_bytes()).hexdigest()}  {options.file}")


if __name__ == "__main__":
    run(main)
