"""What unlabelled images are worth: `python -m benchmarks.few_labels [NAME …]` trains configs/digits-10pct.yaml with several
choices of the labelled tenth, and its discriminator on these labelled images alone, and prints how well each classifies the
held-out images.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gandist.augment import Augmentation
from gandist.config import Config
from gandist.config_file import load_config
from gandist.data import normalize, open_dataset
from gandist.distributed import World, join_world
from gandist.losses import cross_entropy
from gandist.models import build_discriminator
from gandist.models.spectral_norm import power_iteration

CONFIG = Path(__file__).parent.parent / "configs" / "digits-10pct.yaml"
ALONE = {  # name → what the training on labelled images has other than the GAN
    "alone": ["augmentation.pipe=none"],
    "alone, translated": [],
}
GAN = "gan"
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
ACCURACY = "classification/test_top1"
OTHERS = ("eval/gan_test", "eval/fd_classifier")


class Labelled(NamedTuple):
    images: torch.Tensor  # float32 [N, C, H, W] in [-1, 1]
    labels: torch.Tensor  # int64 [N]


def configure(seed: int, overrides: Sequence[str]) -> Config:
    return load_config(CONFIG, [f"seed={seed}", f"data.labelled_seed={seed}", "tracking.wandb=off", *overrides])


def train_alone(config: Config, world: World, steps: int) -> float:
    """Accuracy on the held-out images of the discriminator that learned from the labelled ones alone: Adam with a rate that
    falls to 0 along a cosine."""
    labelled, held_out = _read(config, world)
    torch.manual_seed(config.seed)
    network = build_discriminator(config.model, config.data)
    augmentation = Augmentation(config.augmentation, config.data.channels, BATCH_SIZE)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(labelled.labels), (BATCH_SIZE,))
        images, labels = labelled.images[chosen], labelled.labels[chosen]
        images = augmentation(images, torch.rand(BATCH_SIZE, augmentation.columns), torch.zeros(()))
        loss = cross_entropy(network(images, labels).class_logits, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        power_iteration(network)
        schedule.step()
    with torch.no_grad():
        predictions = network.eval()(*held_out).class_logits.argmax(1)
    return (predictions == held_out.labels).double().mean().item()


def train_gan(config: Config, run_dir: Path) -> dict[str, float]:
    """The last values that the run measured."""
    file = run_dir.with_suffix(".yaml")
    file.write_text(config.to_yaml())
    command = [sys.executable, "-m", "gandist.train", "--config", str(file), f"run_dir={run_dir}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    return {record["metric"]: record["value"] for record in records if "value" in record}


def _read(config: Config, world: World) -> tuple[Labelled, Labelled]:
    train_set = open_dataset(config.data.train, config.data, world)
    test_set = open_dataset(config.data.test, config.data, world, split="test")
    whole = [next(each.evaluation_batches(len(each))) for each in (train_set, test_set)]
    train, held_out = (Labelled(normalize(batch.images, torch.float32), batch.labels) for batch in whole)
    used = torch.from_numpy(train_set.labelled)
    return Labelled(*(each[used] for each in train)), held_out


def row(name: str, found: dict[str, list[float]]) -> str:
    """found: metric → a value a seed"""
    values = found[ACCURACY]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    others = [f"{statistics.mean(found[metric]):.4g}" if metric in found else "" for metric in OTHERS]
    cells = [f"{statistics.mean(values):.4f}", f"{spread:.4f}", ", ".join(f"{value:.4f}" for value in values), *others]
    return f"| {name} | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_labels", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {'; '.join([*ALONE, GAN])}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="of runs and labels (default: 0 … 4)")
    parser.add_argument("--steps", type=int, default=5000, help="on labelled images alone (default: %(default)s)")
    parser.add_argument("--runs", type=Path, help="where to keep the runs; default: nowhere")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all of them")
    options = parser.parse_intermixed_args(arguments)
    overrides = [name for name in options.names if "=" in name]
    names = [name for name in options.names if "=" not in name] or [*ALONE, GAN]
    if unknown := [name for name in names if name not in [*ALONE, GAN]]:
        parser.error(f"there is no {unknown[0]!r}: {'; '.join([*ALONE, GAN])}")
    torch.set_num_threads(1)
    print("| | mean | standard deviation | each | GAN-test | `fd_classifier` |\n|" + " --- |" * 6, flush=True)
    with join_world() as world, tempfile.TemporaryDirectory() as temporary:
        for name in names:
            if name == GAN:
                folder = options.runs or Path(temporary)
                folder.mkdir(parents=True, exist_ok=True)
                runs = [train_gan(configure(seed, overrides), folder / f"seed-{seed}") for seed in options.seeds]
                found = {metric: [run[metric] for run in runs] for metric in (ACCURACY, *OTHERS)}
            else:
                configs = [configure(seed, [*ALONE[name], *overrides]) for seed in options.seeds]
                found = {ACCURACY: [train_alone(config, world, options.steps) for config in configs]}
            print(row(name, found), flush=True)


if __name__ == "__main__":
    main()
