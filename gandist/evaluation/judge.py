"""Trains the digits judge: `python -m gandist.evaluation.judge FILE.pt`."""

import argparse
import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F

from gandist.config import DataConfig
from gandist.data import open_dataset
from gandist.distributed import World, join_world, run
from gandist.errors import ConfigError
from gandist.evaluation.features import DigitsJudge

EPOCHS = 40
BATCH_SIZE = 64


def train_judge(data: DataConfig, world: World, *, seed: int = 0, epochs: int = EPOCHS) -> DigitsJudge:
    """A judge trained on `data.train`, with images shifted by up to a pixel of the 8×8 originals and smoothed labels."""
    torch.manual_seed(seed)
    judge = DigitsJudge().to(world.device, memory_format=torch.channels_last)
    dataset = open_dataset(data.train, data, world)
    steps = epochs * len(dataset) // BATCH_SIZE
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    reach = data.resolution // 8
    with closing(dataset.training_batches(seed=seed, batch_size=BATCH_SIZE, start=0)) as batches:
        for _ in range(steps):
            images, labels, _ = next(batches)
            shift = torch.randint(-reach, reach + 1, (2,)).tolist()
            images = F.pad(images, [reach] * 4).roll(shift, dims=(2, 3))[..., reach:-reach, reach:-reach]
            _, class_logits = judge(images)
            optimizer.zero_grad()
            F.cross_entropy(class_logits, labels, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


@torch.no_grad()
def top1(judge: DigitsJudge, data: DataConfig, world: World) -> float:
    """Accuracy on `data.test`."""
    dataset = open_dataset(data.test, data, world, split="test")
    right = 0
    for images, labels, _ in dataset.evaluation_batches(BATCH_SIZE):
        _, class_logits = judge(images)
        right += int((class_logits.argmax(1) == labels).sum())
    return right / len(dataset)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gandist.evaluation.judge",
        description="Train the judge of the built-in digits on their training split.",
    )
    parser.add_argument("file", type=Path, help="where the weights go")
    options = parser.parse_args(arguments)
    with join_world() as world:
        if world.size > 1:
            raise ConfigError("the judge is trained by one process: start it with python, not with torchrun")
        data = DataConfig()
        judge = train_judge(data, world)
        torch.save(judge.cpu().state_dict(), options.file)
        accuracy = top1(judge.to(world.device), data, world)
    print(f"accuracy on the held-out images: {accuracy:.4f}")
    print(f"{hashlib.sha256(options.file.read_bytes()).hexdigest()}  {options.file}")


if __name__ == "__main__":
    run(main)
