"""Shards of a WebDataset: which files, and where in them each sample lies.

A shard is an uncompressed tar whose adjacent members `KEY.png` (or jpg, jpeg, webp) and `KEY.cls` make one sample.
"""

import glob
import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from braceexpand import UnbalancedBracesError
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from gandist.distributed import World
from gandist.errors import DataError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
OFFSET, SIZE, LABEL = range(3)  # columns of an index table
_BLOCK = tarfile.BLOCKSIZE
_OPEN_FILES = 128


class RawSample(NamedTuple):
    """An encoded image with its label, and where it came from."""

    image: bytes
    label: int
    shard: Path
    offset: int

    def __str__(self) -> str:
        return f"{self.shard}: sample '{_key_at(self.shard, self.offset)}' (byte {self.offset})"


class ShardDataset:
    """Random access to the samples of indexed shards.

    paths:  the shards
    tables: an index of each, int64 [n, 3]: byte offset and size of the image, label
    """

    def __init__(self, paths: Sequence[Path], tables: Sequence[np.ndarray]):
        self.paths = tuple(paths)
        self.shard_sizes = [len(table) for table in tables]
        self._ends = np.cumsum(self.shard_sizes)
        self._table = np.concatenate(tables)
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict()}  # descriptors mean nothing in another process

    def __len__(self) -> int:
        return len(self._table)

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]"""
        return self._table[:, LABEL]

    @property
    def fingerprint(self) -> str:
        """Identifies the content as far as names, counts, image sizes and labels tell."""
        digest = hashlib.sha256()
        for path, count in zip(self.paths, self.shard_sizes, strict=True):
            digest.update(f"{path.name} {count}\n".encode())
        digest.update(np.ascontiguousarray(self._table[:, SIZE:], "<i8").tobytes())
        return digest.hexdigest()

    def read(self, samples: Iterable[int]) -> list[RawSample]:
        """The samples of these ids. Raises DataError where a shard is shorter than its index says."""
        return [self._read(int(sample)) for sample in samples]

    def _read(self, sample: int) -> RawSample:
        shard = int(np.searchsorted(self._ends, sample, "right"))
        offset, size, label = self._table[sample].tolist()
        path = self.paths[shard]
        try:
            image = os.pread(self._open(shard), size, offset)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if len(image) < size:
            raise DataError(f"{path}: ends before byte {offset + size}, it was changed since it was indexed: restore it")
        return RawSample(image, label, path, offset)

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) == _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        descriptor = os.open(self.paths[shard], os.O_RDONLY)
        self._files[shard] = descriptor
        return descriptor


def open_shards(spec: str | Sequence[str], *, num_classes: int, cache_dir: Path, world: World) -> ShardDataset:
    """Finds the shards of `spec` and indexes them; each rank scans its share.

    Raises DataError on every rank with all that is wrong: missing or damaged shards, missing, repeated or out-of-range
    samples and labels.
    """
    with world.together():
        paths = find_shards(spec)
    tables, failures = {}, []
    for shard in range(world.rank, len(paths), world.size):
        try:
            tables[shard] = _cached_scan(paths[shard], cache_dir)
            _check_labels(paths[shard], tables[shard], num_classes)
        except (DataError, OSError) as error:
            failures.append(str(error))
    with world.together():
        if failures:
            raise DataError("\n".join(failures))
    tables = {shard: table for part in world.gather(tables) for shard, table in part.items()}
    return ShardDataset(paths, [tables[shard] for shard in range(len(paths))])


def find_shards(spec: str | Sequence[str]) -> list[Path]:
    """The shards that a folder, a glob, braces (`train-{0000..0007}.tar`) or a list of these name, in this order.

    Raises DataError for what does not exist.
    """
    paths, missing = [], []
    for entry in [spec] if isinstance(spec, str) else spec:
        try:
            names = expand_urls(str(Path(entry).expanduser()))
        except UnbalancedBracesError as error:
            raise DataError(f"{entry}: a brace is not closed: {error}") from error
        for name in names:
            pattern = f"{glob.escape(name)}/*.tar" if Path(name).is_dir() else name
            found = [Path(path) for path in sorted(glob.glob(pattern))]
            paths += found
            missing += [] if found else [f"no shard at {pattern}"]
    if missing:
        raise DataError("\n".join(missing) + "\nset data.train and data.test to the shards that are there, or restore these")
    if not paths:
        raise DataError("no shards: data.train is an empty list")
    if repeated := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise DataError(f"named twice: {', '.join(repeated)}: every sample is to come once an epoch")
    return paths


def scan(path: Path) -> np.ndarray:
    """The index of a shard, int64 [n, 3]: byte offset of each image, its size, its label.

    Raises DataError for damage, also for what readers of tar pass over in silence: data behind a broken header.
    """
    rows, keys = [], set()
    members: dict[str, tarfile.TarInfo] = {}
    key = None

    def finish() -> None:
        images = [name for name in members if name in IMAGE_EXTENSIONS]
        if len(images) != 1 or "cls" not in members:
            raise DataError(
                f"{path}: sample '{key}' has {sorted(members)}: wanted are one image ({', '.join(IMAGE_EXTENSIONS)}) "
                "and a label (cls), side by side"
            )
        if key in keys:
            raise DataError(f"{path}: sample '{key}' is there twice")
        keys.add(key)
        text = tar.extractfile(members["cls"]).read()
        try:
            label = int(text)
        except ValueError:
            raise DataError(f"{path}: the label of sample '{key}' is {text[:20]!r}, not an integer") from None
        rows.append((members[images[0]].offset_data, members[images[0]].size, label))

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                base, extension = base_plus_ext(member.name)
                if base is None:
                    raise DataError(f"{path}: member '{member.name}' has no extension")
                if base != key:
                    if members:
                        finish()
                    key, members = base, {}
                members[extension.lower()] = member
            if members:
                finish()
            _check_end(path, tar.offset, len(rows))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: damaged or truncated after {len(rows)} samples ({error}): restore it") from error
    if not rows:
        raise DataError(f"{path}: no samples in it")
    return np.array(rows, np.int64)


def _check_end(path: Path, offset: int, samples: int) -> None:
    """tarfile ends in silence at a broken header; a whole archive ends in zeros."""
    with path.open("rb") as file:
        file.seek(offset)
        tail = file.read(_BLOCK)
        whole = len(tail) == _BLOCK
        while whole and tail:
            whole = not any(tail)
            tail = file.read(1 << 20)
    if not whole:
        raise DataError(f"{path}: damaged or truncated at byte {offset} after {samples} samples: restore it")


def _cached_scan(path: Path, cache_dir: Path) -> np.ndarray:
    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    cached = cache_dir / "index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npy"
    try:
        return np.load(cached)
    except (OSError, ValueError, EOFError):
        table = scan(path)
    _check_declared_count(path, len(table))
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        np.save(file, table)
    partial.replace(cached)
    return table


def _check_declared_count(path: Path, count: int) -> None:
    for split in read_info(path.parent).get("splits", {}).values():
        declared = dict(zip(split["filenames"], split["shard_lengths"], strict=True)).get(path.name, count)
        if declared != count:
            raise DataError(f"{path}: {count} samples, but _info.json declares {declared}: restore one of them")


def _check_labels(path: Path, table: np.ndarray, num_classes: int) -> None:
    wrong = np.flatnonzero((table[:, LABEL] < 0) | (table[:, LABEL] >= num_classes))
    if len(wrong):
        offset, _, label = table[wrong[0]].tolist()
        raise DataError(
            f"{path}: sample '{_key_at(path, offset)}' has label {label}, outside 0..{num_classes - 1} "
            f"({len(wrong)} such): set data.num_classes to the number of classes"
        )


def _key_at(path: Path, offset: int) -> str:
    """The key of the image at this byte, from the tar header before it."""
    with path.open("rb") as file:
        file.seek(offset - _BLOCK)
        name = file.read(100).rstrip(b"\0").decode(errors="replace")
    return base_plus_ext(name)[0] or name


def read_info(folder: Path) -> dict:
    """The `_info.json` beside the shards (timm's form, plus `classes`, `resolution`), or an empty dict."""
    path = folder / "_info.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
