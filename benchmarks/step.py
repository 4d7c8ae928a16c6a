"""What one update of both players costs on one CPU core: `python -m benchmarks.step`."""

import argparse
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plain import PlainStep
from benchmarks.report import header, table
from gandist.config import Config
from gandist.config_file import load_config
from gandist.data import normalize
from gandist.distributed import World, join_world
from gandist.engine import frozen
from gandist.models.spectral_norm import power_iteration
from gandist.trainer import Trainer

STUDIOGAN = {"sngan": (893, 485), "biggan": (1612, 1560)}  # ATen operations of D's and of G's update, forward and backward
SHAPES = {"sngan": "configs/cifar10-sngan.yaml", "biggan": "configs/cifar10-biggan.yaml"}
COMMON = [  # images of the right size, in memory
    "data.train=digits:train",
    "data.test=null",
    "data.channels=3",
    "train.discriminator_updates=1",
    "train.precision=float32",
    "train.compile=false",
    "evaluation.metrics=[]",
    "checkpoint.best=null",
    "tracking.wandb=off",
]


class Operations(TorchDispatchMode):
    """Counts the ATen operations that are called, views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class Contest:
    """Both ways of one step, on the same images."""

    def __init__(self, config: Config, world: World):
        self.trainer = Trainer(config, world)
        self.plain = PlainStep(config)
        self.batches = self.trainer.train_set.training_batches(seed=0, batch_size=config.train.batch_size, start=0)

    def ours(self) -> None:
        self.trainer.train_step(self.batches)

    def theirs(self) -> None:
        images, labels, _ = next(self.batches)
        self.plain(normalize(images, torch.float32).contiguous(), labels)

    def operations(self) -> dict[str, tuple[int, int]]:
        """Of the forward and backward passes of D's and of G's update, power iterations among them."""
        images, labels, _ = next(self.batches)
        real = normalize(images, torch.float32)
        latents = torch.randn(len(real), self.plain.config.model.latent_dim)
        discriminating, generating = self.trainer.discriminator.objective, self.trainer.generator.objective
        seen = torch.zeros(())

        def noise(objective: torch.nn.Module) -> torch.Tensor:
            return torch.zeros(len(real), objective.columns.width)

        def our_discriminator() -> None:
            power_iteration(discriminating.network)
            with torch.no_grad():
                fake = generating.generate(latents, labels)
            discriminating(real, labels, fake, None, labels, noise(discriminating), seen, True)[0].backward()

        def our_generator() -> None:
            power_iteration(generating.network)
            with frozen(discriminating.network):
                generating(latents, labels, noise(generating), seen, True)[0].backward()

        return {
            "gandist": (count(our_discriminator), count(our_generator)),
            "plain": (
                count(lambda: self.plain.discriminator_loss(real, labels).backward()),
                count(lambda: self.plain.generator_loss(labels).backward()),
            ),
        }


def count(update: Callable[[], None]) -> int:
    update()  # gradients are there, as in all steps but the first
    with Operations() as operations:
        update()
    return operations.count


def cpu_seconds(step: Callable[[], None], steps: int) -> float:
    begin = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - begin) / steps


def take_turns(contest: Contest, rounds: int, steps: int) -> list[tuple[float, float]]:
    """CPU-seconds of a step, ours and theirs, in each round."""
    contest.ours(), contest.theirs()
    return [(cpu_seconds(contest.ours, steps), cpu_seconds(contest.theirs, steps)) for _ in range(rounds)]


def open_contest(shape: str, batch_size: int, folder: str, world: World, *more: str) -> Contest:
    overrides = [*COMMON, f"train.batch_size={batch_size}", f"run_dir={folder}/{shape}", *more]
    return Contest(load_config(SHAPES[shape], overrides), world)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="in which both take turns")
    parser.add_argument("--steps", type=int, default=2, help="a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(header())
    rows = []
    with join_world() as world, tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            contest = open_contest(shape, options.batch_size, folder, world)
            operations = contest.operations()
            turns = take_turns(contest, options.rounds, options.steps)
            for place, name in enumerate(("gandist", "plain")):
                seconds = median(turn[place] for turn in turns)
                ratio = median(ours / theirs for ours, theirs in turns) if place == 0 else 1.0
                counted = operations[name]
                share = sum(counted) / sum(STUDIOGAN[shape])
                rows.append(
                    [
                        shape,
                        name,
                        f"{counted[0]} + {counted[1]}",
                        f"{share:.2f}",
                        f"{seconds:.3f}",
                        f"{options.batch_size / seconds:.1f}",
                        f"{ratio:.2f}",
                    ]
                )
    columns = ["shape", "", "operations, D + G", "of StudioGAN's", "CPU-s a step", "images a CPU-s", "× plain, CPU-s"]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
