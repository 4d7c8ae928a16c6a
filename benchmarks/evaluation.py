"""What the evaluation costs: `python -m benchmarks.evaluation distance` (the Fréchet distance against SciPy's way),
`torchrun --standalone --nproc_per_node=2 -m benchmarks.evaluation moments` (of 50,000 features), and the same with `share`
(of a run's time, at the defaults)."""

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import scipy.linalg
import torch

from benchmarks.report import header, table
from gandist.config_file import load_config
from gandist.distributed import World, join_world
from gandist.evaluation.frechet import Moments, frechet_distance
from gandist.train import train
from gandist.trainer import Trainer

BATCH_SIZE = 256


def distance(options: argparse.Namespace) -> None:
    """Ours and SciPy's in turn, of the same moments."""
    print(header(), flush=True)
    random = torch.Generator().manual_seed(0)
    count = options.features
    scale = torch.logspace(0, -2, count, dtype=torch.float64)
    sets = []
    for shift in (0.0, 0.1):
        moments = Moments.empty(count)
        for _ in range(20):
            moments.update(torch.randn(500, count, generator=random, dtype=torch.float64) * scale + shift)
        sets.append(moments)
    seconds, values = {"gandist": [], "scipy.linalg.sqrtm": []}, {}
    for _ in range(options.rounds):
        for name, way in (("gandist", frechet_distance), ("scipy.linalg.sqrtm", by_sqrtm)):
            start = time.perf_counter()
            values[name] = way(*sets)
            seconds[name].append(time.perf_counter() - start)
    rows = [[name, f"{median(times):.2f}", f"{values[name]:.8f}"] for name, times in seconds.items()]
    print(table([f"{count} features, {torch.get_num_threads()} thread(s)", "s, median", "distance"], rows))
    ratio = median(b / a for a, b in zip(*seconds.values(), strict=True))
    apart = abs(values["gandist"] / values["scipy.linalg.sqrtm"] - 1)
    print(f"{ratio:.1f} times as fast, {apart:.1e} apart")


def by_sqrtm(a: Moments, b: Moments) -> float:
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces) - 2 * float(np.trace(root))


def moments(options: argparse.Namespace) -> None:
    """Features as an extractor gives them, float32 batches dealt to the ranks, and then the distance on rank 0."""
    with join_world() as world:
        count = options.features
        features = torch.randn(BATCH_SIZE, count, device=world.device)
        real = Moments.empty(count, world.device)
        for _ in range(max(1, 2 * count // BATCH_SIZE)):
            real.update(torch.randn_like(features))
        real = real.over_ranks(world)
        before = _peak_memory(world)
        times = {"moments": [], "over ranks": [], "distance": []}
        for _ in range(options.rounds):
            world.gather(None)
            start = time.perf_counter()
            fake = Moments.empty(count, world.device)
            for _ in range(0, options.images, BATCH_SIZE)[world.rank :: world.size]:
                fake.update(features)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            updated = time.perf_counter()
            together = fake.over_ranks(world)
            summed = time.perf_counter()
            if world.is_main:
                frechet_distance(real, together)
            for name, took in zip(times, (updated - start, summed - updated, time.perf_counter() - summed), strict=True):
                times[name].append(took)
        grown = max(world.gather(_peak_memory(world) - before)) / 2**20
        if world.is_main:
            print(f"{header()}\n\n{options.images:,} × {count} features, {world.size} rank(s) on {world.device.type}")
            print(table(["", "s, median"], [[name, f"{median(each):.2f}"] for name, each in times.items()]))
            print(f"peak memory of a rank: {grown:.0f} MiB more")


def _peak_memory(world: World) -> int:
    """Bytes of this process, and of its GPU."""
    on_device = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + on_device


def share(options: argparse.Namespace) -> None:
    """The built-in digits, with their default interval and metrics."""
    spent = []

    def timed(*arguments):
        start = time.perf_counter()
        try:
            return evaluate(*arguments)
        finally:
            spent.append(time.perf_counter() - start)

    evaluate = Trainer._evaluate
    with join_world() as world, tempfile.TemporaryDirectory() as folder, patch.object(Trainer, "_evaluate", timed):
        settings = [f"run_dir={Path(world.broadcast(folder)) / 'run'}", "tracking.wandb=off", *options.overrides]
        start = time.perf_counter()
        train(load_config(None, settings), world)
        total = time.perf_counter() - start
        if world.is_main:
            print(f"\n{header()}\n{len(spent)} evaluations, {sum(spent):.2f} s of {total:.1f} s: {sum(spent) / total:.1%}")
            print("each: " + ", ".join(f"{seconds:.2f} s" for seconds in spent))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("what", choices=["distance", "moments", "share"])
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--features", type=int, default=2048, help="of an image (default: Inception's %(default)s)")
    parser.add_argument("--images", type=int, default=50_000, help="for moments (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the run of share")
    options = parser.parse_intermixed_args(arguments)
    {"distance": distance, "moments": moments, "share": share}[options.what](options)


if __name__ == "__main__":
    main()
