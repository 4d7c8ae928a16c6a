"""How a step scales: `torchrun --standalone --nproc_per_node=N -m benchmarks.scaling measure` on the ranks at hand, and
`python -m benchmarks.scaling predict CONFIG` by a model on many GPUs."""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.report import header, table
from gandist.config_file import load_config
from gandist.distributed import World, join_world
from gandist.engine.ddp import DDPPlayer
from gandist.flops import count_run
from gandist.models import build_discriminator, build_generator
from gandist.objective import DiscriminatorObjective, GeneratorObjective
from gandist.trainer import Trainer

BUCKET = 25 * 2**20  # bytes, DDP's
EAGER_BACKWARD = 0.6  # share of an eager step in which gradients come one by one
GPUS = (8, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Cluster:
    """tflops:   that a GPU achieves
    nvlink:   bytes a second of a GPU within its node; network: to other nodes; latency: s of a message
    node:     GPUs of one
    backward: share of the compute behind which gradients are exchanged; compiled, 0: all of them come when it is over
    """

    tflops: float = 400.0
    nvlink: float = 450e9
    network: float = 50e9
    latency: float = 5e-6
    node: int = 8
    backward: float = 0.0

    def exchange(self, size: float, gpus: int) -> float:
        """Seconds of an all-reduce of `size` bytes: rings within the nodes, and across them, where each GPU has its part."""
        inside, nodes = min(gpus, self.node), max(1, gpus // self.node)
        volume = 2 * (inside - 1) / inside * size / self.nvlink + 2 * (nodes - 1) / nodes * size / inside / self.network
        return volume + 2 * math.log2(gpus) * self.latency

    def exposed(self, size: float, compute: float, gpus: int) -> float:
        """Seconds of the exchange that a backward pass does not hide: at least the last bucket's, after all the compute."""
        whole = math.ceil(size / BUCKET) * self.exchange(min(size, BUCKET), gpus)
        return max(whole - self.backward * compute, self.exchange(min(size, BUCKET), gpus))


def predict(options: argparse.Namespace) -> None:
    """Weak scaling, with as many images for each GPU; and strong scaling, of the configuration's own batch."""
    config = load_config(options.config, options.overrides)
    compiled = config.train.compile and not config.train.activation_checkpointing
    cluster = Cluster(tflops=options.tflops, network=options.network * 1e9, backward=0.0 if compiled else EAGER_BACKWARD)
    generator, discriminator = build_generator(config.model, config.data), build_discriminator(config.model, config.data)
    discriminating = DiscriminatorObjective(discriminator, config, nullcontext)
    generating = GeneratorObjective(generator, discriminating, config, nullcontext)
    flops = count_run(config, discriminating, generating, torch.device("cpu"), torch.float32)["update"]
    updates, batch_size = config.train.discriminator_updates, config.train.batch_size
    sizes = [4.0 * sum(parameter.numel() for parameter in network.parameters()) for network in (discriminator, generator)]
    norms = sum(isinstance(module, _BatchNorm) for module in generator.modules())

    def efficiency(images: float, gpus: int) -> tuple[float, float, float, float]:
        """Of so many images a GPU: s of compute, of gradients' exchange, of batch norm's; and the share of the first."""
        compute = images * updates * flops / (cluster.tflops * 1e12)
        update = compute / (updates + 1)
        gradients = updates * cluster.exposed(sizes[0], update, gpus) + cluster.exposed(sizes[1], update, gpus)
        statistics = norms * (updates + 2) * cluster.exchange(2**13, gpus)  # in each of G's forwards, and its backward
        return compute, gradients, statistics, compute / (compute + gradients + statistics)

    rows = []
    for gpus in GPUS:
        compute, gradients, statistics, weak = efficiency(options.images, gpus)
        strong = f"{efficiency(batch_size / gpus, gpus)[-1]:.1%}" if batch_size >= gpus else "-"
        milliseconds = [f"{1000 * seconds:.2f}" for seconds in (compute, gradients, statistics)]
        rows.append([gpus, f"{gpus * options.images:,}", *milliseconds, f"{weak:.1%}", strong])
    manner = "compiled" if compiled else "eager"
    counted = f"{flops / 1e9:,.1f} GFLOP for each real image, {sum(sizes) / 1e6:,.0f} MB of gradients"
    print(f"{options.config}, {manner}: {counted}; {cluster}")
    head = ["GPUs", "batch", "compute, ms", "gradients, ms", "statistics, ms", "weak", f"strong, batch {batch_size}"]
    print(table(head, rows))


def measure(options: argparse.Namespace) -> None:
    """A step, and the same without the exchange of gradients; and what is exchanged."""
    torch.set_num_threads(1)
    with join_world() as world, TemporaryDirectory() as folder:
        batch_size = options.images * (world.size if options.weak else 1)
        quiet = ["evaluation.metrics=[]", "tracking.wandb=off", f"train.batch_size={batch_size}", f"run_dir={folder}/run"]
        config = load_config(options.config, [*options.overrides, *quiet])
        trainer = Trainer(config, world)
        batches = trainer.train_set.training_batches(seed=0, batch_size=batch_size, start=0)
        exchanged = count_exchanged(trainer)
        trainer.train_step(batches)
        volume = sum(exchanged)
        turns = [
            (_seconds(trainer, batches, options.steps, world), _alone(trainer, batches, options.steps, world)) for _ in range(5)
        ]
        whole, alone = (median(turn[place] for turn in turns) for place in (0, 1))
        exposed = median((turn[0] - turn[1]) / turn[0] for turn in turns)
        if world.is_main:
            print(header())
            parameters = sum(
                p.numel() for player in (trainer.generator, trainer.discriminator) for p in player.network.parameters()
            )
            head = [
                "ranks",
                "batch",
                "step, ms",
                "without exchange, ms",
                "exposed",
                "images/s",
                "exchanged, bytes",
                "4 · weights",
            ]
            row = [world.size, batch_size, f"{1e3 * whole:.1f}", f"{1e3 * alone:.1f}", f"{exposed:.1%}"]
            print(table(head, [[*row, f"{batch_size / whole:,.0f}", f"{volume:,}", f"{4 * parameters:,}"]]))


def _alone(trainer: Trainer, batches: Iterator, steps: int, world: World) -> float:
    """As `_seconds`, without the exchange of gradients."""

    def never(player: DDPPlayer, last: bool) -> AbstractContextManager:
        return player.parallel.no_sync()

    with patch.object(DDPPlayer, "exchanging", never):
        return _seconds(trainer, batches, steps, world)


def _seconds(trainer: Trainer, batches: Iterator, steps: int, world: World) -> float:
    """Of a step, on the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(steps):
        trainer.train_step(batches)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return max(world.gather(time.perf_counter() - begin)) / steps


def count_exchanged(trainer: Trainer) -> list[int]:
    """Bytes of each bucket of gradients that is exchanged from now on."""
    counted = []

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counted.append(bucket.buffer().nbytes)
        summed = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return summed.then(lambda future: future.value()[0])

    for player in (trainer.discriminator, trainer.generator):
        player.parallel.register_comm_hook(None, hook)
    return counted


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    commands = parser.add_subparsers(required=True)
    measured = commands.add_parser("measure")
    measured.set_defaults(do=measure)
    measured.add_argument("--weak", action="store_true", help="as many images a rank; else as many in all")
    measured.add_argument("--steps", type=int, default=10, help="a turn")
    measured.add_argument("--config", help="default: the built-in digits")
    predicted = commands.add_parser("predict")
    predicted.set_defaults(do=predict)
    predicted.add_argument("config")
    predicted.add_argument("--tflops", type=float, default=Cluster.tflops, help="that a GPU achieves")
    predicted.add_argument(
        "--network", type=float, default=Cluster.network / 1e9, metavar="GB/S", help="of a GPU to other nodes"
    )
    for command in (measured, predicted):
        command.add_argument("--images", type=int, default=64, help="a GPU, or measured without --weak in all")
        command.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    options.do(options)


if __name__ == "__main__":
    main()
