"""Makes shards, and opens them."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gandist.data.cache import ShardCache
from gandist.data.index import LabelRule, scan
from gandist.data.pack import encode_png
from gandist.data.remote import Remote
from gandist.data.shards import LabelPolicy, ShardDataset, open_shards
from gandist.data.sources import Shard, find_shards
from gandist.data.storage import Storage
from gandist.distributed import World

REMOTE = Remote(timeout=1)


def png(size: int, level: int = 0) -> bytes:
    return encode_png(np.full((size, size), level, np.uint8))


def write_shard(path: Path, *, first: int = 0, count: int) -> Path:
    """Samples first, first + 1, …: 4×4 images of that grey level, labelled by the last digit."""
    samples = range(first, first + count)
    members = [
        each for i in samples for each in ((f"{i:06d}.png", png(4, level=i % 256)), (f"{i:06d}.cls", str(i % 10).encode()))
    ]
    return write_tar(path, members)


def write_shards(folder: Path, sizes: Sequence[int]) -> list[Path]:
    """Shards 0000.tar, 0001.tar, … of so many samples, numbered through."""
    folder.mkdir(exist_ok=True)
    firsts = np.cumsum([0, *sizes]).tolist()
    return [write_shard(folder / f"{i:04d}.tar", first=firsts[i], count=size) for i, size in enumerate(sizes)]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def scan_file(path: Path, rule: LabelRule | None = None, **declared) -> np.ndarray:
    with path.open("rb") as file:
        return scan(file, Shard(str(path), **declared), rule or LabelRule())


def open_files(
    spec: str | Sequence[str],
    cache_dir: Path,
    world: World,
    *,
    policy: LabelPolicy | None = None,
    rule: LabelRule | None = None,
    limit: int = 10**9,
    stage: bool = False,
    scan_all: bool = True,
) -> ShardDataset:
    storage = Storage(cache_dir / "index", ShardCache(cache_dir / "shards", limit, REMOTE), rule or LabelRule(), stage=stage)
    return open_shards(find_shards(spec, REMOTE), storage, policy or LabelPolicy(10), world, scan_all=scan_all)
