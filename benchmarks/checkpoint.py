"""How long training waits for a checkpoint: `torchrun --standalone --nproc_per_node=2 -m benchmarks.checkpoint`."""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.report import header, table
from gandist.checkpoint import Saver
from gandist.config import CheckpointConfig
from gandist.distributed import World, join_world

LAYERS = 60  # of the made-up network; with Adam's two moments, each weight and bias is there three times


def made_up_state(megabytes: float, device: torch.device) -> dict:
    """Tensors as a run has them: a weight is many times its bias."""
    width = int((megabytes * 1e6 / 4 / 3 / LAYERS) ** 0.5)
    return {
        kind: {
            f"layer-{n}": {"weight": torch.rand(width, width, device=device), "bias": torch.rand(width, device=device)}
            for n in range(LAYERS)
        }
        for kind in ("weights", "exp_avg", "exp_avg_sq")
    }


def measure(saver: Saver, state: dict, world: World, saves: int, interval: float) -> tuple[float, float]:
    """Seconds that the loop waits in `save`, until the last rank is through, the median; milliseconds of its other steps."""
    stalls, steps = [], 0
    work = torch.rand(256, 256, device=world.device)
    with saver:
        begin = time.perf_counter()
        for number in range(saves):
            until = time.perf_counter() + interval
            while world.sum(torch.tensor(float(time.perf_counter() < until))).item():
                work = torch.nn.functional.normalize(work @ work)
                steps += 1
            dist.barrier(world.control)
            start = time.perf_counter()
            saver.save(number, state, {})
            dist.barrier(world.control)
            stalls.append(time.perf_counter() - start)
        total = time.perf_counter() - begin
    return median(stalls), 1000 * (total - sum(stalls)) / steps


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=200, help="of the state (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--interval", type=float, default=6.0, help="seconds between two saves (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    options = parser.parse_args(arguments)
    with join_world() as world, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        folder = Path(world.broadcast(folder))
        state = made_up_state(options.megabytes, world.device)
        waits, steps = {}, {}
        for background in (False, True):
            saver = Saver(folder / str(background), CheckpointConfig(asynchronous=background), world)
            waits[background], steps[background] = measure(saver, state, world, options.saves, options.interval)
        if world.is_main:
            print(f"{header()}\n\n{options.megabytes:g} MB, {world.size} ranks on {world.device.type}")
            rows = [
                [name, f"{waits[background]:.3f}", f"{waits[background] / waits[False]:.3f}", f"{steps[background]:.2f}"]
                for name, background in (("in the foreground", False), ("in the background", True))
            ]
            print(table(["checkpoint", "training waits, s", "ratio", "ms a step between"], rows))


if __name__ == "__main__":
    main()
