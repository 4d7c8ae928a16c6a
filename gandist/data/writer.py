"""Writes a collection as pre-shuffled shards and `_info.json`, with worker processes, resumable after a kill.

All is written into `FOLDER.partial`: `plan.json` says what is being packed, `lock` keeps a second process waiting,
`records` holds a file for each shard that is done, `shards` becomes FOLDER in the end.
"""

import hashlib
import json
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from filelock import FileLock, Timeout
from tqdm import tqdm

from gandist.data.collections import Samples
from gandist.data.decode import ImageError
from gandist.data.encode import Encoding, encode
from gandist.data.index import UNLABELLED
from gandist.data.order import permutation
from gandist.distributed import World
from gandist.errors import DataError
from gandist.resolution import resolution_of

SHUFFLE_SEED = 0
_FORMAT = 1  # raised when the same images would make other shards
_NAMED_FAILURES = 10
_PLAN = "plan.json"


class FolderExists(DataError):
    """What is to be packed is there, from before or from another process meanwhile."""


@dataclass(frozen=True)
class ShardPlan:
    """samples: in the order of writing; numbers: int64 [n], unique in the split; their keys are SPLIT-NUMBER"""

    filename: str
    split: str
    samples: Samples
    numbers: np.ndarray
    digits: int = 8

    def key(self, place: int) -> str:
        return f"{self.split}-{self.numbers[place]:0{self.digits}d}"


class _Job(NamedTuple):
    """What every worker knows. The arrays are memory that all processes share."""

    shards: Sequence[ShardPlan]
    encoding: Encoding
    partial: Path
    progress: np.ndarray  # int64 [shards]: images done; a worker writes to its own shard's place only
    stop: np.ndarray  # int64 [1]: not 0 when the workers are to leave off


def cut(name: str, splits: dict[str, Samples], shard_size: int) -> list[ShardPlan]:
    """The shards of shuffled splits, of `shard_size` images but for the last one of a split."""
    shards = []
    for split, samples in splits.items():
        shuffled = samples[permutation(len(samples), SHUFFLE_SEED)]
        for number, start in enumerate(range(0, len(samples), shard_size)):
            part = shuffled[start : start + shard_size]
            filename = f"{name}-{split}-{number:05d}.tar"
            shards.append(ShardPlan(filename, split, part, np.arange(start, start + len(part))))
    return shards


def write_shards(
    folder: Path, name: str, classes: list[str] | None, shards: Sequence[ShardPlan], encoding: Encoding, *, workers: int = 0
) -> dict:
    """Writes the shards and returns what `_info.json` says of them; the folder appears whole or not at all.

    The bytes do not depend on `workers`; 0: all is done in this process. What a killed process has left is gone on with.

    Raises FolderExists, and DataError naming the images that cannot be used, or if something else was begun there.
    """
    partial = _partial(folder)
    with _only_process(folder, partial):
        _check_plan(partial, _digest(name, classes, shards, encoding))
        job = _Job(shards, encoding, partial, _shared_zeros(len(shards)), _shared_zeros(1))
        failures = _write_missing(job, range(len(shards)), workers)
        if failures:
            named = "\n".join(f"  {failure}" for failure in failures[:_NAMED_FAILURES])
            more = f"\n  and {len(failures) - _NAMED_FAILURES} more" if len(failures) > _NAMED_FAILURES else ""
            raise DataError(
                f"{len(failures)} image(s) cannot be packed: put whole ones in their place and run the same command again, "
                f"or leave them out and remove {partial} first\n{named}{more}"
            )
        return _finish(folder, name, classes, shards, encoding)


def write_shards_on_all_ranks(
    folder: Path, name: str, classes: list[str] | None, shards: Sequence[ShardPlan], encoding: Encoding, world: World
) -> None:
    """As `write_shards`, each rank its share of the shards: of images that are there on any of them, and cannot fail."""
    with ExitStack() as alone:
        with world.together():
            if world.is_main:
                alone.enter_context(_only_process(folder, _partial(folder)))
                _check_plan(_partial(folder), _digest(name, classes, shards, encoding))
        with world.together():
            job = _Job(shards, encoding, _partial(folder), _shared_zeros(len(shards)), _shared_zeros(1))
            _write_missing(job, range(world.rank, len(shards), world.size), workers=0)
        with world.together():
            if world.is_main:
                _finish(folder, name, classes, shards, encoding)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """FOLDER.partial, to be written into: in the end it becomes the folder, or after an error it is gone.

    Raises FolderExists, also where shards were begun that are not to be lost.
    """
    check_absent(folder)
    partial = _partial(folder)
    if (partial / _PLAN).exists():
        raise FolderExists(f"{partial} holds shards that are not finished: name another folder, or remove it")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _finish(folder: Path, name: str, classes: list[str] | None, shards: Sequence[ShardPlan], encoding: Encoding) -> dict:
    """All shards are written: the folder appears. Returns `_info.json`."""
    partial = _partial(folder)
    info = _describe(name, classes, shards, [_read_record(partial, shard) for shard in shards], encoding)
    (partial / "shards" / "_info.json").write_text(json.dumps(info, indent=2) + "\n")
    (partial / "shards").rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    return info


@contextmanager
def _only_process(folder: Path, partial: Path) -> Iterator[None]:
    """Waits for other processes that write the same. Raises FolderExists if one has finished it."""
    check_absent(folder)
    lock = FileLock(partial / "lock")
    while not lock.is_locked:
        partial.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the other process has finished just now, and taken the lock's folder away
            _wait_for(lock, folder)
    try:
        if folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
        check_absent(folder)
        yield
    finally:
        lock.release()


def _wait_for(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is packing {folder}: waiting for it", file=sys.stderr, flush=True)
        lock.acquire()


def check_absent(folder: Path) -> None:
    """Raises FolderExists."""
    if folder.exists():
        raise FolderExists(f"{folder} exists already: name another folder, or remove it")


def _digest(name: str, classes: list[str] | None, shards: Sequence[ShardPlan], encoding: Encoding) -> str:
    """Of all that decides what the shards will hold, but for the images' own content."""
    digest = hashlib.sha256(json.dumps([_FORMAT, name, classes, asdict(encoding)]).encode())
    for shard in shards:
        names = map(shard.samples.source.name, shard.samples.indices.tolist())
        digest.update(os.fsencode("\0".join([shard.filename, *names])))
        digest.update(shard.samples.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _check_plan(partial: Path, digest: str) -> None:
    """Begins a partial folder, or checks that it was begun for the same. Raises DataError."""
    for leftover in partial.glob("*.tmp"):
        leftover.unlink()
    plan = partial / _PLAN
    if not plan.exists():
        _write_whole(plan, json.dumps({"digest": digest}))
    elif json.loads(plan.read_text())["digest"] != digest:
        raise DataError(
            f"{partial} was begun with other images or options: run that command again to finish it, or remove {partial}"
        )
    for subfolder in ("shards", "records"):
        (partial / subfolder).mkdir(exist_ok=True)


def _write_whole(path: Path, text: str) -> None:
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    temporary.write_text(text)
    temporary.replace(path)


def _read_record(partial: Path, shard: ShardPlan) -> dict | None:
    """What is known of a shard if it is done."""
    try:
        record = json.loads((partial / "records" / f"{shard.filename}.json").read_text())
        return record if (partial / "shards" / shard.filename).stat().st_size == record["bytes"] else None
    except (OSError, ValueError):
        return None


def _write_missing(job: _Job, numbers: Iterable[int], workers: int) -> list[str]:
    """Writes those of the shards of these numbers that are not done yet; returns what is wrong with which images."""
    missing = []
    for number in numbers:
        if _read_record(job.partial, job.shards[number]):
            job.progress[number] = len(job.shards[number].samples)
        else:
            missing.append(number)
    if not missing or not workers:
        return [failure for number in missing for failure in _write_shard(job, number)]
    try:
        return _write_with_workers(job, missing, min(workers, len(missing)))
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory: run the same command again, with fewer --workers"
        ) from error


def _write_with_workers(job: _Job, missing: Sequence[int], workers: int) -> list[str]:
    fork = multiprocessing.get_context("fork")  # the job reaches them as it is, open data sets included
    total, before = sum(len(shard.samples) for shard in job.shards), int(job.progress.sum())
    with ProcessPoolExecutor(workers, fork, _start_worker, (job,)) as executor:
        futures = [executor.submit(_write_in_worker, number) for number in missing]
        try:
            with tqdm(total=total, initial=before, unit=" images", disable=None) as bar:
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    bar.update(int(job.progress.sum()) - bar.n)
                    for future in done:
                        future.result()  # raises what stopped it
        except BaseException:
            job.stop[0] = 1
            executor.shutdown(cancel_futures=True)
            raise
    return [failure for future in futures for failure in future.result()]


_job: _Job  # a worker's, set when it starts


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent says when to stop
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed says nothing to its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_in_worker(number: int) -> list[str]:
    return _write_shard(_job, number)


def _write_shard(job: _Job, number: int) -> list[str]:
    """Writes a shard and its record; or nothing, and returns what is wrong with which images."""
    shard, samples = job.shards[number], job.shards[number].samples
    failures, sizes, channels = [], set(), set()
    temporary = job.partial / f"{shard.filename}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file, wds.TarWriter(file, mtime=0) as writer:
            for place, (index, label) in enumerate(zip(samples.indices.tolist(), samples.labels.tolist(), strict=True)):
                if job.stop[0]:
                    return failures
                try:
                    image = encode(samples.source.read(index), job.encoding)
                except (ImageError, OSError) as error:
                    reason = error.strerror or error if isinstance(error, OSError) else error
                    failures.append(f"{samples.source.name(index)}: {reason}")
                else:
                    members = {image.extension: image.content} | ({} if label == UNLABELLED else {"cls": str(label)})
                    writer.write({"__key__": shard.key(place), **members})
                    sizes.add(image.size)
                    channels.add(image.channels)
                job.progress[number] = place + 1
        if not failures:
            _finish_shard(job.partial, shard, temporary, sizes, max(channels))
    finally:
        temporary.unlink(missing_ok=True)
    return failures


def _finish_shard(partial: Path, shard: ShardPlan, temporary: Path, sizes: set[tuple[int, int]], channels: int) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
        record = {
            "length": len(shard.samples),
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "size": sizes.pop() if len(sizes) == 1 else None,
            "channels": channels,
        }
    temporary.rename(partial / "shards" / shard.filename)
    _write_whole(partial / "records" / f"{shard.filename}.json", json.dumps(record))


def _describe(
    name: str, classes: list[str] | None, shards: Sequence[ShardPlan], records: Sequence[dict], encoding: Encoding
) -> dict:
    """`_info.json`: timm's form, plus `resolution` if all images have one size, `channels`, `classes`."""
    sizes = {tuple(record["size"] or ()) for record in records}
    size = sizes.pop() if len(sizes) == 1 else ()
    parts: dict[str, list[tuple[ShardPlan, dict]]] = {}
    for shard, record in zip(shards, records, strict=True):
        parts.setdefault(shard.split, []).append((shard, record))
    return {
        "name": name,
        **({"resolution": resolution_of(*reversed(size))} if size else {}),
        "channels": encoding.channels or max(record["channels"] for record in records),
        **({"classes": classes} if classes else {}),
        "splits": {split: _describe_split(split, classes, part) for split, part in parts.items()},
    }


def _describe_split(split: str, classes: list[str] | None, part: Sequence[tuple[ShardPlan, dict]]) -> dict:
    labels = np.concatenate([shard.samples.labels for shard, _ in part])
    labelled = labels[labels != UNLABELLED]
    counts: dict = {}
    if classes:
        counts["class_counts"] = np.bincount(labelled, minlength=len(classes)).tolist()
    if 0 < len(labelled) < len(labels):
        counts["unlabelled"] = len(labels) - len(labelled)
    return {
        "name": split,
        "num_samples": len(labels),
        "filenames": [shard.filename for shard, _ in part],
        "shard_lengths": [len(shard.samples) for shard, _ in part],
        **counts,
        "sha256": [record["sha256"] for _, record in part],
    }


def _shared_zeros(length: int) -> np.ndarray:
    """int64 [length] in memory that this process shares with those it forks."""
    return np.frombuffer(mmap.mmap(-1, 8 * length), np.int64)
