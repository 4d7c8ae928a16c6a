"""The order of a data set that is too large to list: `python -m benchmarks.order`. No shards are needed."""

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from statistics import median

import numpy as np
import psutil

from benchmarks.report import header, table
from gandist.data.loader import PLANNED_BATCHES, TrainingBatches
from gandist.data.order import SampleOrder

BATCH_SIZE = 64
FAR_EPOCHS = 1000.37  # where the far position lies
REPEATS = 50


def measure(num_shards: int, shard_size: int, shuffle_block: int, lanes: int, far: bool) -> list[str]:
    """One row of the table. A process measures once, so that its memory has not grown before."""
    sizes = np.full(num_shards, shard_size, np.int64).tolist()
    position = int(FAR_EPOCHS * num_shards * shard_size) if far else 0
    memory = psutil.Process().memory_info().rss
    start = time.perf_counter()
    order = SampleOrder(sizes, seed=0, shuffle_block=shuffle_block, lanes=lanes)
    built = time.perf_counter()
    batches = TrainingBatches(order, BATCH_SIZE, rank=0, world_size=1, start=position)
    batches.samples(range(1))
    first = time.perf_counter()
    memory = psutil.Process().memory_info().rss - memory
    single = _seconds(batches, 1)
    planned = _seconds(batches, PLANNED_BATCHES)
    return [
        f"{position:.1e}",
        shuffle_block or "all",
        lanes,
        f"{built - start:.2f}",
        f"{first - built:.2f}",
        f"{memory / 2**20:.0f}",
        f"{1e6 * single:.0f}",
        f"{1e6 * planned:.0f}",
        f"{1e6 * planned / BATCH_SIZE:.2f}",
    ]


def _seconds(batches: TrainingBatches, together: int) -> float:
    """Processor time of a batch where so many are looked up together, the median of many."""
    times = []
    for first in range(0, REPEATS * together, together):
        start = time.process_time()
        batches.samples(range(first, first + together))
        times.append((time.process_time() - start) / together)
    return median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.order", description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=10**6)
    parser.add_argument("--shard-size", type=int, default=1000, help="samples")
    options = parser.parse_args(arguments)
    head = ["position", "block", "lanes", "open s", "first batch s", "MiB", "µs/batch", f"in {PLANNED_BATCHES}s", "µs/sample"]
    print(f"{header()}\n\n{options.shards * options.shard_size:,} samples in {options.shards:,} shards")
    context = multiprocessing.get_context("forkserver")  # whose processes have imported what they need, and no more
    context.set_forkserver_preload(["gandist.data.loader"])
    rows = []
    for block, lanes, far in product((0, 64), (1, 8), (False, True)):
        with ProcessPoolExecutor(1, mp_context=context) as process:
            rows.append(process.submit(measure, options.shards, options.shard_size, block, lanes, far).result())
    print(table(head, rows))


if __name__ == "__main__":
    main()
