"""Whether anything has become slower: `python -m benchmarks.regress`.

Each measurement is a ratio of CPU times, ours by those of a loop that stays as it is, taken in turns in one process: so the
machine, and what else it does, cancels out. It is compared with the ratio in `regress.json`; where it is more than a tenth
above, it is measured once more, and the exit status is 1 if it still is.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from benchmarks.evaluation import by_sqrtm
from benchmarks.report import header, table
from benchmarks.step import cpu_seconds, open_contest
from gandist.data.decode import ImageFormat
from gandist.data.loader import ShardReader
from gandist.data.shards import ShardDataset
from gandist.distributed import World, join_world
from gandist.evaluation.frechet import Moments, frechet_distance

STORED = Path(__file__).with_suffix(".json")
SLOWER = 1.1
NARROW = {  # so narrow that a step is made of its operations, not of its products
    "sngan": ["model.generator_width=16", "model.discriminator_width=16"],
    "biggan": ["model.generator_width=8", "model.discriminator_width=8", "model.attention=[16]"],
}
Turn = tuple[Callable[[], object], Callable[[], object], int]  # ours, the yardstick, how often in a turn


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regress", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="in which both take turns")
    parser.add_argument(
        "--file", type=Path, default=STORED, help="of the stored ratios (default: regress.json beside this file)"
    )
    parser.add_argument("--store", action="store_true", help="write what is measured to that file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    stored = json.loads(options.file.read_text()) if options.file.exists() else {}
    found, rows = {}, []
    with join_world() as world, tempfile.TemporaryDirectory() as folder:
        for name, turn in measurements(folder, world).items():
            ratio = measure(turn, options.rounds)
            limit = SLOWER * stored.get(name, float("inf"))
            if ratio > limit and not options.store:
                ratio = min(ratio, measure(turn, 2 * options.rounds))
            found[name] = round(ratio, 4)
            verdict = "slower" if ratio > limit else "ok"
            rows.append([name, f"{ratio:.3f}", f"{stored[name]:.3f}" if name in stored else "-", verdict])
    print(header())
    print(table(["measurement", "ratio", "stored", ""], rows))
    if options.store:
        options.file.write_text(json.dumps(found, indent=2) + "\n")
    elif any(row[-1] == "slower" for row in rows):
        sys.exit(1)


def measure(turn: Turn, rounds: int) -> float:
    ours, yardstick, times = turn
    ours(), yardstick()
    return median(cpu_seconds(ours, times) / cpu_seconds(yardstick, times) for _ in range(rounds))


def measurements(folder: str, world: World) -> dict[str, Turn]:
    found: dict[str, Turn] = {}
    for shape, narrow in NARROW.items():
        contest = open_contest(shape, 16, folder, world, *narrow)
        steps = contest.contestants()
        found[f"step of {shape}"] = steps["gandist"], steps["plain"], 3
    read, samples = ShardReader(contest.trainer.train_set.shards, ImageFormat(32, 3)), list(range(0, 1024, 2))
    found["reading 512 images"] = (lambda: read(samples)), (lambda: read_plainly(read.dataset, samples)), 2
    one, other = moments(0.0), moments(0.1)
    found["Fréchet distance"] = (lambda: frechet_distance(one, other)), (lambda: by_sqrtm(one, other)), 1
    return found


def read_plainly(shards: ShardDataset, samples: Sequence[int]) -> np.ndarray:
    """With Pillow."""
    images = (Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in shards.read(samples))
    return np.stack([np.asarray(image) for image in images])


def moments(shift: float) -> Moments:
    of_features = Moments.empty(512)
    of_features.update(torch.randn(2000, 512, generator=torch.Generator().manual_seed(0)) + shift)
    return of_features


if __name__ == "__main__":
    main()
