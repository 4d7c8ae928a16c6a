"""What tracking costs: `python -m benchmarks.tracking`. The built-in digits with all trackers, W&B offline, and with
none, in turn."""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

from benchmarks.report import header, table
from gandist import trainer
from gandist.config_file import load_config
from gandist.distributed import World, join_world
from gandist.tracking import Trackers
from gandist.train import train


def steps_per_second(run_dir: Path, kimg: float, world: World, *, tracked: bool) -> float:
    """Of the loop, without what comes before and after it."""
    seconds = 0.0
    loop = trainer.Trainer._train

    def timed(self: trainer.Trainer, *arguments: object) -> bool:
        nonlocal seconds
        start = time.perf_counter()
        stopped = loop(self, *arguments)
        seconds = time.perf_counter() - start
        return stopped

    settings = [f"run_dir={run_dir}", f"train.kimg={kimg}", "tracking.wandb=offline", "evaluation.metrics=[]"]
    config = load_config(None, settings)
    openers = trainer.open_trackers if tracked else lambda *given, **options: Trackers()
    with patch.object(trainer.Trainer, "_train", timed), patch.object(trainer, "open_trackers", openers):
        _, steps = train(config, world)
    return steps / seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracking", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--kimg", type=float, default=40, help="of each run (default: %(default)s)")
    options = parser.parse_args(arguments)
    rates = {True: [], False: []}
    with join_world() as world, tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for tracked in (True, False) if number % 2 else (False, True):
                run_dir = Path(folder) / f"{number}-{tracked}"
                rates[tracked].append(steps_per_second(run_dir, options.kimg, world, tracked=tracked))
    print(f"\n{header()}")
    names = {True: "all trackers, W&B offline", False: "none"}
    print(table(["tracking", "steps/s, median"], [[names[each], f"{median(rates[each]):.2f}"] for each in rates]))
    print(f"ratio within a round, median: {median(a / b for a, b in zip(rates[True], rates[False], strict=True)):.3f}")


if __name__ == "__main__":
    main()
