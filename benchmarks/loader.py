"""The input pipeline against webdataset's own and against the bare decoder: `python -m benchmarks.loader`.

All contestants take turns, round after round; a ratio compares two of the same round, as the machine may not be ours alone.
"""

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil
from tqdm import tqdm

from benchmarks.photos import CLASSES, PhotoSet
from benchmarks.report import header, table

PHOTOS = {64: PhotoSet(64, 20_000, 20, quality=95, grain=16), 256: PhotoSet(256, 2_000, 10, quality=92, grain=14)}
BATCH_SIZE = 64
WARM_UP = 0.3  # of the time measured


class Contestant(NamedTuple):
    pipeline: str  # a key of PIPELINES
    workers: int = 0
    simplejpeg: bool = True  # else its import fails, as where it is not installed


class Speed(NamedTuple):
    """Images a second: of the processor time of all processes together, and by the clock."""

    cpu: float
    wall: float


LIMIT = Contestant("bare decoder")
CONTESTANTS = [
    *(Contestant("webdataset torchrgb8", workers) for workers in (0, 1, 2)),
    *(Contestant("webdataset pil", workers) for workers in (0, 1, 2)),
    *(Contestant("gandist", workers) for workers in (0, 1, 2)),
    *(Contestant("gandist", workers, simplejpeg=False) for workers in (0, 1, 2)),
    LIMIT,
    LIMIT._replace(simplejpeg=False),
]
IN_MEMORY = Contestant("gandist in_memory")


def webdataset_batches(decode: str, folder: Path, size: int, workers: int, cache: Path) -> Iterator:
    """The pipeline of webdataset's documentation: shuffled shards, a shuffle buffer, decoded, batched as uint8."""
    import numpy as np
    import webdataset as wds

    dataset = wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=100).shuffle(1000).decode(decode)
    dataset = dataset.to_tuple("jpg", "cls").repeat()
    if decode == "pil":
        dataset = dataset.map_tuple(np.asarray)
    return iter(wds.WebLoader(dataset.batched(BATCH_SIZE), batch_size=None, num_workers=workers))


def gandist_batches(folder: Path, size: int, workers: int, cache: Path) -> Iterator:
    """What the trainer reads: every sample once an epoch, shuffled among all shards."""
    from gandist.data.loader import load_batches

    reader = _reader(folder, size, cache)
    return load_batches(reader, _batches(reader), reader.dataset, num_workers=workers)


def decoded_batches(folder: Path, size: int, workers: int, cache: Path) -> Iterator:
    """The same from the decoded copy that data.in_memory makes."""
    from gandist.data.loader import load_batches
    from gandist.data.memory import DecodedImages, decode_all, decoded_folder, identity

    reader = _reader(folder, size, cache)
    decoded = decoded_folder(cache, identity(reader))
    if not decoded.exists():
        decode_all(decoded, reader, num_workers=0)
    return load_batches(DecodedImages(decoded), _batches(reader), reader.dataset, num_workers=workers)


def bare_batches(folder: Path, size: int, workers: int, cache: Path) -> Iterator:
    """Images that lie in memory, decoded into one buffer again and again: as fast as a core can be."""
    import numpy as np
    import torch
    from torchvision.io import ImageReadMode, decode_image

    try:
        import simplejpeg
    except ImportError:
        simplejpeg = None

    dataset = _reader(folder, size, cache).dataset
    encoded = [sample.image for sample in dataset.read(range(min(1024, len(dataset))))]
    images = np.empty((BATCH_SIZE, size, size, 3), np.uint8)
    while True:
        for first in range(0, len(encoded), BATCH_SIZE):
            for place, image in enumerate(encoded[first : first + BATCH_SIZE]):
                if simplejpeg:
                    simplejpeg.decode_jpeg(image, "RGB", buffer=images[place])
                else:
                    content = torch.frombuffer(bytearray(image), dtype=torch.uint8)
                    images[place] = decode_image(content, ImageReadMode.RGB).permute(1, 2, 0).numpy()
            yield images


PIPELINES: dict[str, Callable[..., Iterator]] = {
    "webdataset torchrgb8": lambda *arguments: webdataset_batches("torchrgb8", *arguments),
    "webdataset pil": lambda *arguments: webdataset_batches("pil", *arguments),
    "gandist": gandist_batches,
    IN_MEMORY.pipeline: decoded_batches,
    LIMIT.pipeline: bare_batches,
}


def _batches(reader):
    from gandist.data.loader import TrainingBatches
    from gandist.data.order import SampleOrder

    return TrainingBatches(SampleOrder(reader.dataset.shard_sizes, seed=0), BATCH_SIZE, rank=0, world_size=1, start=0)


def _reader(folder: Path, size: int, cache: Path):
    from gandist.data.cache import ShardCache
    from gandist.data.decode import ImageFormat
    from gandist.data.index import LabelRule
    from gandist.data.loader import ShardReader
    from gandist.data.remote import Remote
    from gandist.data.shards import LabelPolicy, open_shards
    from gandist.data.sources import find_shards
    from gandist.data.storage import Storage
    from gandist.distributed import join_world

    storage = Storage(cache / "index", ShardCache(cache / "shards", 10**9, Remote()), LabelRule())
    with join_world() as world:
        dataset = open_shards(find_shards(str(folder), Remote()), storage, LabelPolicy(CLASSES), world, scan_all=True)
    return ShardReader(dataset, ImageFormat(size, 3))


def measure(contestant: Contestant, photos: PhotoSet, parent: Path, seconds: float) -> Speed:
    """The speed in the middle of a run: after the workers' start and a warm-up."""
    import torch

    torch.set_num_threads(1)
    batches = PIPELINES[contestant.pipeline](photos.folder(parent), photos.size, contestant.workers, parent / "cache")
    _consume(batches, WARM_UP * seconds)
    cpu = _cpu_seconds()
    images, wall = _consume(batches, seconds)
    cpu = _cpu_seconds() - cpu
    _come_to_rest()
    del batches  # ends its workers
    gc.collect()
    return Speed(images / cpu, images / wall)


def _consume(batches: Iterator, seconds: float) -> tuple[int, float]:
    """Takes batches for so long and at least 8; returns images and seconds."""
    start, taken = time.perf_counter(), 0
    while taken < 8 or time.perf_counter() - start < seconds:
        next(batches)
        taken += 1
    return taken * BATCH_SIZE, time.perf_counter() - start


def _come_to_rest() -> None:
    """Waits for workers to fill their queues: ended while they send a batch, they may abort with a message of torch's."""
    before = -1.0
    while (now := _cpu_seconds()) - before > 0.02:
        before = now
        time.sleep(0.2)


def _cpu_seconds() -> float:
    """Of this process and those that it has started, user and system."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _prepare(simplejpeg: bool) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of decoding workers, as in a process that torchrun starts
    if not simplejpeg:
        sys.modules["simplejpeg"] = None  # any import of it raises ImportError, in the workers too


def _process(simplejpeg: bool) -> ProcessPoolExecutor:
    """A process that has imported nothing yet."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (simplejpeg,))


def run_rounds(contestants: list[Contestant], photos: PhotoSet, parent: Path, seconds: float, rounds: int) -> list[dict]:
    """The speed of every contestant, round by round."""
    with (
        _process(simplejpeg=True) as with_it,
        _process(simplejpeg=False) as without,
        tqdm(total=rounds * len(contestants), desc=f"{photos.size} px", disable=None) as progress,
    ):
        speeds = []
        for _ in range(rounds):
            speeds.append({})
            for contestant in contestants:
                process = with_it if contestant.simplejpeg else without
                speeds[-1][contestant] = process.submit(measure, contestant, photos, parent, seconds).result()
                progress.update()
    return speeds


def report(speeds: list[dict[Contestant, Speed]]) -> str:
    """Medians over the rounds."""
    rows = []
    for contestant in speeds[0]:
        rival = Contestant("webdataset torchrgb8", contestant.workers)
        name = contestant.pipeline if contestant.simplejpeg else f"{contestant.pipeline}, no simplejpeg"
        rows.append(
            [
                name,
                contestant.workers,
                f"{median(each[contestant].cpu for each in speeds):,.0f}",
                f"{median(each[contestant].wall for each in speeds):,.0f}",
                f"{median(each[contestant].cpu / each[rival].cpu for each in speeds):.2f}",
                f"{median(each[contestant].wall / each[rival].wall for each in speeds):.2f}",
                f"{median(each[contestant].cpu / each[LIMIT].cpu for each in speeds):.2f}",
            ]
        )
    head = ["", "workers", "images/CPU-s", "images/s", "× webdataset, CPU", "× webdataset, clock", "of the limit"]
    return table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gandist-benchmarks", help="of the shards")
    parser.add_argument("--sizes", type=int, nargs="+", choices=PHOTOS, default=list(PHOTOS), help="pixels")
    parser.add_argument("--samples", type=int, help="photographs of each size (default: 20,000 of 64 px, 2,000 of 256 px)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="measured of each contestant in each round")
    options = parser.parse_args(arguments)
    print(header())
    for size in options.sizes:
        photos = replace(PHOTOS[size], samples=options.samples) if options.samples else PHOTOS[size]
        folder = photos.folder(options.folder)
        encoded = sum(path.stat().st_size for path in folder.glob("*.tar")) / photos.samples
        contestants = [*CONTESTANTS, IN_MEMORY] if size <= 64 else CONTESTANTS
        speeds = run_rounds(contestants, photos, options.folder, options.seconds, options.rounds)
        print(f"\n{size}×{size} pixels, {photos.samples:,} JPEGs in {photos.shards} shards, {encoded:,.0f} bytes a sample")
        print(report(speeds), flush=True)


if __name__ == "__main__":
    main()
