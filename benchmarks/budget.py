"""What one step of each family is made of: `torchrun --standalone --nproc_per_node=2 -m benchmarks.budget`."""

import argparse
import math
from collections.abc import Sequence
from itertools import repeat
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.report import header, table
from benchmarks.scaling import count_exchanged
from benchmarks.step import COMMON, Operations
from benchmarks.throughput import random_batch
from gandist.config import Config
from gandist.config_file import load_config
from gandist.distributed import World, join_world
from gandist.trainer import Trainer

PRESETS = {  # name → configuration and overrides
    "dcgan": ["configs/cifar10-dcgan.yaml"],
    "sngan": ["configs/cifar10-sngan.yaml"],
    "sagan": ["configs/cifar10-sagan.yaml"],
    "biggan": ["configs/cifar10-biggan.yaml"],
    "biggan, 128 px": ["configs/imagenet128-biggan-256.yaml"],
    "biggan_deep, 128 px": [
        "configs/imagenet128-biggan-256.yaml",
        "model.family=biggan_deep",
        "model.generator_width=128",
        "model.discriminator_width=128",
        "model.latent_dim=128",
    ],
    "stylegan2": ["configs/cifar10-stylegan2-ada.yaml", "model.minibatch_std=2"],
    "stylegan2, 256 px": ["configs/ffhq256-stylegan2.yaml", "model.minibatch_std=2"],
    "r3gan": ["configs/cifar10-r3gan.yaml"],
    "stargan": ["configs/digits-translate.yaml"],
}


def budget(config: Config, world: World) -> list[str]:
    """A row of the table, on rank 0 of what is so on all."""
    trainer = Trainer(config, world)
    batches = repeat(random_batch(config, config.train.batch_size // world.size, world.device))
    exchanged = count_exchanged(trainer)
    trainer.train_step(batches)  # DDP makes its buckets anew after the first
    exchanged.clear()
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce, Operations() as step:
        trainer.train_step(batches)
    updates = config.train.discriminator_updates
    sizes = [
        4 * sum(each.numel() for each in player.parameters.values()) for player in (trainer.discriminator, trainer.generator)
    ]
    least_exchanged = updates * sizes[0] + sizes[1]
    norms = sum(isinstance(module, _BatchNorm) for module in trainer.generator.network.modules())
    least_flops = least(trainer) if trainer.flops else math.nan
    update = trainer.flops.get("update", math.nan)
    return [
        f"{update / 1e9:,.2f}",
        f"{update / least_flops:.2f}",
        f"{step.kernels:,}",
        f"{step.all:,}",
        f"{sum(exchanged) / 1e6:,.1f}",
        f"{sum(exchanged) / least_exchanged:.2f}",
        f"{len(exchanged)}",
        f"{all_reduce.call_count - len(exchanged)}",
        f"{norms * (updates + 2)}",
    ]


def least(trainer: Trainer) -> float:
    """FLOPs for each real image if every pass is made once: forward one, backward two, or one where only the input's derivative
    is wanted; twice that where the derivative by the images is part of the loss."""
    config, discriminating, generating = trainer.config, trainer.discriminator.objective, trainer.generator.objective
    generator, discriminator = trainer.flops["generator"], trainer.flops["discriminator"]
    passes = 3.0 * (2 + len(discriminating.consistency))
    for images in discriminating.penalties:
        passes += (3 if images in ("real", "fake") else 6) / config.loss.penalty_every
    fakes = 2 if discriminating.wants_near else 1
    made = 1 + bool(generating.reconstruction_weight) + bool(generating.identity_weight) + bool(generating.diversity_weight)
    in_generator = 3 * made * generator + (2 + generating.judges_real) * discriminator
    return fakes * generator + passes * discriminator + in_generator / config.train.discriminator_updates


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget", description=__doc__)
    parser.add_argument("presets", nargs="*", default=list(PRESETS), metavar="PRESET", help=f"of {', '.join(PRESETS)}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    with join_world() as world, TemporaryDirectory() as folder:
        small = [f"train.batch_size={2 * world.size}", "train.accumulation=1", f"run_dir={folder}/run"]
        for name in options.presets:
            path, *overrides = PRESETS[name]
            rows.append([name, *budget(load_config(path, [*COMMON, *overrides, *small]), world)])
        if world.is_main:
            print(header())
            columns = [
                "GFLOP/image",
                "× least",
                "kernels",
                "operations",
                "exchanged, MB",
                "× weights",
                "buckets",
                "others",
                "batch norm's",
            ]
            print(table(["", *columns], rows))


if __name__ == "__main__":
    main()
