"""What one update of both players costs on one CPU core: `python -m benchmarks.step`."""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plain import PlainStep, build_plain
from benchmarks.report import header, table
from benchmarks.studiogan import build_studiogan
from gandist.config import Config
from gandist.config_file import load_config
from gandist.data import normalize
from gandist.distributed import World, join_world
from gandist.engine import frozen
from gandist.models.spectral_norm import power_iteration
from gandist.trainer import Trainer

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


NO_KERNEL = {torch.ops.aten.empty.memory_format, torch.ops.aten._unsafe_view.default}


class Operations(TorchDispatchMode):
    """Counts the ATen operations that are called, and those of them that compute: views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.all += 1
        self.kernels += not (function.is_view or function in NO_KERNEL)
        return function(*args, **(kwargs or {}))


class Contest:
    """Ways to make one step, on the same images: ours, and others."""

    def __init__(self, config: Config, world: World, rivals: Mapping[str, PlainStep]):
        self.trainer = Trainer(config, world)
        self.rivals = rivals
        self.batches = self.trainer.train_set.training_batches(seed=0, batch_size=config.train.batch_size, start=0)

    def contestants(self) -> dict[str, Callable[[], None]]:
        rivals = {name: partial(self._step, rival) for name, rival in self.rivals.items()}
        return {"gandist": lambda: self.trainer.train_step(self.batches), **rivals}

    def _step(self, rival: PlainStep) -> None:
        images, labels, _ = next(self.batches)
        rival(normalize(images, torch.float32).contiguous(), labels)

    def operations(self) -> dict[str, tuple[Operations, Operations]]:
        """Of the forward and backward passes of D's and of G's update, power iterations among them."""
        images, labels, _ = next(self.batches)
        real = normalize(images, torch.float32)
        latents = torch.randn(len(real), self.trainer.config.model.latent_dim)
        discriminating, generating = self.trainer.discriminator.objective, self.trainer.generator.objective
        seen = torch.zeros(())

        def noise(objective: torch.nn.Module) -> torch.Tensor:
            return torch.zeros(len(real), objective.columns.width)

        def our_discriminator() -> None:
            with torch.no_grad():
                fake = generating.generate(latents, labels)
            discriminating(real, labels, fake, None, labels, noise(discriminating), seen, True)[0].backward()
            power_iteration(discriminating.network)

        def our_generator() -> None:
            with frozen(discriminating.network):
                generating(latents, labels, noise(generating), seen, True)[0].backward()
            power_iteration(generating.network)

        counts = {"gandist": (count(our_discriminator), count(our_generator))}
        for name, rival in self.rivals.items():
            of_discriminator = count(lambda rival=rival: rival.discriminator_loss(real, labels).backward())
            counts[name] = of_discriminator, count(lambda rival=rival: rival.generator_loss(labels).backward())
        return counts


def count(update: Callable[[], None]) -> Operations:
    update()  # gradients are there, as in all steps but the first
    with Operations() as operations:
        update()
    return operations


def cpu_seconds(step: Callable[[], None], steps: int) -> float:
    begin = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - begin) / steps


def take_turns(steps: Mapping[str, Callable[[], None]], rounds: int, times: int) -> dict[str, list[float]]:
    """CPU-seconds of a step of each, in each round."""
    for step in steps.values():
        step()
    turns = [{name: cpu_seconds(step, times) for name, step in steps.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in steps}


def open_contest(shape: str, batch_size: int, folder: str, world: World, *more: str, studiogan: Path | None = None) -> Contest:
    overrides = [*COMMON, f"train.batch_size={batch_size}", f"run_dir={folder}/{shape}", *more]
    config = load_config(SHAPES[shape], overrides)
    rivals = {"plain": PlainStep(config, *build_plain(config))}
    if studiogan:
        rivals["studiogan"] = PlainStep(config, *build_studiogan(studiogan, shape))
    return Contest(config, world, rivals)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="in which all take turns")
    parser.add_argument("--steps", type=int, default=2, help="a turn")
    parser.add_argument("--studiogan", type=Path, metavar="CHECKOUT", help="whose networks take part")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(header())
    rows = []
    with join_world() as world, tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            contest = open_contest(shape, options.batch_size, folder, world, studiogan=options.studiogan)
            operations = contest.operations()
            turns = take_turns(contest.contestants(), options.rounds, options.steps)
            for name, seconds in turns.items():
                of_discriminator, of_generator = operations[name]
                ratio = median(ours / theirs for ours, theirs in zip(turns["gandist"], seconds, strict=True))
                rows.append(
                    [
                        shape,
                        name,
                        f"{of_discriminator.all} + {of_generator.all}",
                        f"{of_discriminator.kernels} + {of_generator.kernels}",
                        f"{median(seconds):.3f}",
                        f"{options.batch_size / median(seconds):.1f}",
                        f"{ratio:.2f}",
                    ]
                )
    columns = [
        "shape",
        "",
        "operations, D + G",
        "of them kernels",
        "CPU-s a step",
        "images a CPU-s",
        "gandist's CPU-s by these",
    ]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
