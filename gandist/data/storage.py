"""Where a node reads shards from: in place, or from its cache of remote ones. It keeps the index of each."""

import hashlib
import io
import os
import threading
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from gandist.data.cache import ShardCache
from gandist.data.index import LabelRule, content_id, scan
from gandist.data.remote import is_remote
from gandist.data.sources import Shard
from gandist.errors import DataError


class OpenShard(NamedTuple):
    """file: open for reading; table: its index, int64 [n, 3], mapped from a file; index: that file"""

    file: BinaryIO
    table: np.ndarray
    index: Path


class Storage:
    """Opens shards for the processes of one node.

    folder: of the indices; cache: takes remote shards; stage: whether it takes all others as well
    """

    def __init__(self, folder: Path, cache: ShardCache, rule: LabelRule, *, stage: bool = False):
        self.rule = rule
        self.cache = cache
        self._folder = folder
        self._stage = stage
        self._indices: dict[Shard, Path] = {}  # of shards read in place

    def is_cached(self, shard: Shard) -> bool:
        """Whether the shard is copied to this node's disk before it is read."""
        return self._stage or is_remote(shard.url)

    def open(self, shard: Shard) -> OpenShard:
        """Fetches and scans the shard where that was not done before. Raises DataError."""
        try:
            if not is_remote(shard.url) and Path(shard.url).exists() and not Path(shard.url).is_file():
                raise DataError(f"{shard}: is a pipe, a device or a folder, not a file: name the shards themselves")
            return self._open_cached(shard) if self.is_cached(shard) else self._open_in_place(shard)
        except OSError as error:
            raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from error

    def adopt(self, shard: Shard, index: str, table: np.ndarray | None) -> None:
        """Takes over the index that another rank has made of a shard read in place, with its table if from another node."""
        if not self.is_cached(shard):
            self._indices[shard] = self._folder / index
            if table is not None and _load(self._indices[shard]) is None:
                _store(self._indices[shard], table)

    def _open_in_place(self, shard: Shard) -> OpenShard:
        file = Path(shard.url).open("rb")  # noqa: SIM115
        if shard not in self._indices:
            # Found again when the shard has moved, and not when it has changed.
            changed = os.fstat(file.fileno()).st_mtime_ns
            name = _digest(content_id(file), changed, shard.count, shard.sha256, self.rule)
            self._indices[shard] = self._folder / f"{name}.npy"
        index = self._indices[shard]
        if (table := _load(index)) is None:
            table = _store(index, scan(file, shard, self.rule))
        return OpenShard(file, table, index)

    def _open_cached(self, shard: Shard) -> OpenShard:
        index = self._folder / f"{_digest(shard, self.rule)}.npy"
        file = self.cache.fetch(shard.url, lambda path: self._check_in(shard, path, index))
        if (table := _load(index)) is None:  # it came when labels were read by another rule
            table = _store(index, scan(file, shard, self.rule))
        return OpenShard(file, table, index)

    def _check_in(self, shard: Shard, path: Path, index: Path) -> None:
        with path.open("rb") as file:
            table = scan(file, shard, self.rule)
        before = _load(index)
        if before is not None and not np.array_equal(before, table):
            raise DataError(f"{shard}: is not what it was when it was first read: restore it, or remove {index} to accept it")
        _store(index, table)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _load(index: Path) -> np.ndarray | None:
    try:
        return np.asarray(np.load(index, mmap_mode="r"))  # a plain view of the map: rows of a memmap take ten times as long
    except (OSError, ValueError, EOFError):
        return None


def _store(index: Path, table: np.ndarray) -> np.ndarray:
    index.parent.mkdir(parents=True, exist_ok=True)
    partial = index.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    content = io.BytesIO()
    np.save(content, table)  # into a file it would not say that the disk is full
    try:
        partial.write_bytes(content.getbuffer())
        partial.replace(index)
    finally:
        partial.unlink(missing_ok=True)
    return table
