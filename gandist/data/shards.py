"""A data set of shards: opened and checked by all ranks together, then read at random."""

import hashlib
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gandist.data.index import LABEL, OFFSET, UNLABELLED, content_id, key_at
from gandist.data.sources import Shard, ShardList
from gandist.data.storage import OpenShard, Storage
from gandist.distributed import World
from gandist.errors import DataError

SHARDS_A_ROUND = 16  # that a rank scans between two exchanges, so that no rank waits longer than for these
_NAMED = 100  # failures in one report
_OPEN_SHARDS = 4096
_MIXING_SHARDS = 100  # that are looked at


class RawSample(NamedTuple):
    """An encoded image and its label, −1 for none."""

    image: bytes
    label: int


class LabelPolicy(NamedTuple):
    """num_classes: labels are below it; 0: there are none. unlabelled: whether samples may lack one"""

    num_classes: int
    unlabelled: bool = False


class ShardDataset:
    """Random access to the samples of a list of shards, which count through them in order.

    shard_sizes:  samples in each shard
    class_counts: labelled samples of each class, int64 [num_classes]; zeros where they are not known
    content:      tells this content from other data; None where the shards have not all been seen
    identity:     tells these very files, at the time they were seen, from any others; None likewise
    class_mixing: classes in a shard, as a share of those that samples drawn at random would have; None where not known
    labels:       of all samples, int64 [N], −1 for none; None where they were not asked for
    is_cached:    whether shards are copied to this node's disk before they are read
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shard_sizes: Sequence[int],
        storage: Storage,
        policy: LabelPolicy,
        class_counts: np.ndarray,
        content: str | None = None,
        identity: str | None = None,
        class_mixing: float | None = None,
        labels: np.ndarray | None = None,
    ):
        self.shards = tuple(shards)
        self.shard_sizes = tuple(shard_sizes)
        self.policy = policy
        self.class_counts = class_counts
        self.content = content
        self.identity = identity
        self.class_mixing = class_mixing
        self.labels = labels
        self.is_cached = any(map(storage.is_cached, shards))
        self._storage = storage
        self._ends = np.cumsum(self.shard_sizes)
        self._starts = self._ends - self.shard_sizes
        self._opened: OrderedDict[int, OpenShard] = OrderedDict()
        self._capacity = _allow_open_files()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": OrderedDict()}  # files mean nothing in another process

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def cache_limit(self) -> int:
        """Bytes."""
        return self._storage.cache.limit

    def fetch(self, shard: int) -> int:
        """Brings a shard into this node's cache; returns the bytes it takes there. Raises DataError."""
        if not self._storage.is_cached(self.shards[shard]):
            return 0
        with self._storage.open(self.shards[shard]).file as file:
            return os.fstat(file.fileno()).st_size

    @property
    def fingerprint(self) -> dict[str, str | None]:
        """Identifies the data: names and sizes of the shards always, their content where all have been seen."""
        names = "".join(f"{shard.name} {size}\n" for shard, size in zip(self.shards, self.shard_sizes, strict=True))
        return {"shards": hashlib.sha256(names.encode()).hexdigest(), "content": self.content}

    def read(self, samples: Sequence[int]) -> list[RawSample]:
        """The samples of these ids. Raises DataError where a shard cannot be read, or is shorter than its index says."""
        ids, places = np.unique(samples, return_inverse=True)  # in the order in which they lie on the disk
        shards, rows = self._locate(ids)
        read = list(map(self._read, shards.tolist(), rows.tolist()))
        return [read[place] for place in places.tolist()]

    def describe(self, sample: int) -> str:
        """Names a sample in an error: shard, key, byte offset."""
        shard, key, offset = self._key(sample)
        return f"{shard}: sample '{key}' (byte {offset})"

    def name(self, sample: int) -> str:
        """SHARD/KEY"""
        shard, key, _ = self._key(sample)
        return f"{shard}/{key}"

    def after(self, sample: int) -> Iterator[int]:
        """The other samples of the same shard, in order from this one on, and around."""
        shard, row = map(int, self._locate(sample))
        size = self.shard_sizes[shard]
        return (sample - row + (row + step) % size for step in range(1, size))

    def _locate(self, samples: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each sample and its row there, int64 of the same shape."""
        shards = np.searchsorted(self._ends, samples, "right")
        return shards, samples - self._starts[shards]

    def _key(self, sample: int) -> tuple[Shard, str, int]:
        """The shard, the key and the byte offset of a sample."""
        shard, row = map(int, self._locate(sample))
        opened = self._open(shard)
        offset = int(opened.table[row, OFFSET])
        return self.shards[shard], key_at(opened.file, offset), offset

    def _read(self, shard: int, row: int) -> RawSample:
        opened = self._open(shard)
        offset, size, label = opened.table[row].tolist()
        try:
            image = os.pread(opened.file.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"{self.shards[shard]}: cannot be read: {error.strerror}") from error
        if len(image) < size:
            raise DataError(
                f"{self.shards[shard]}: ends before byte {offset + size}, it was changed since it was indexed: restore it"
            )
        return RawSample(image, label if self.policy.num_classes else UNLABELLED)

    def _open(self, shard: int) -> OpenShard:
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        self._close_evicted()
        opened = _open_checked(self._storage, self.shards[shard], self.policy)
        if len(opened.table) != self.shard_sizes[shard]:
            raise DataError(f"{self.shards[shard]}: was changed while the run went on: restore it")
        self._opened[shard] = opened
        return opened

    def _close_evicted(self) -> None:
        """An open file keeps its disk space, also when it is no longer in the cache."""
        gone = [shard for shard, opened in self._opened.items() if _is_deleted(opened)]
        oldest = list(self._opened)[: max(0, len(self._opened) + 1 - self._capacity)]
        for shard in {*gone, *oldest}:
            self._opened.pop(shard).file.close()


def open_shards(
    found: ShardList, storage: Storage, policy: LabelPolicy, world: World, *, scan_all: bool, with_labels: bool = False
) -> ShardDataset:
    """Opens the shards that were found; the ranks share the work.

    scan_all: look into every shard now, not only when it is read; so it is anyway where the counts are not all declared.
    with_labels: keep the labels of all samples, for which every shard is looked into as well
    Raises DataError on every rank with all that is wrong of all shards.
    """
    shards = found.shards
    if not (scan_all or with_labels) and all(shard.count is not None for shard in shards):
        known = len(found.class_counts) == policy.num_classes
        class_counts = np.array(found.class_counts if known else [0] * policy.num_classes, np.int64)
        return ShardDataset(shards, [shard.count for shard in shards], storage, policy, class_counts)

    seen: dict[int, _Seen] = {}
    failures: list[str] = []
    round_size = SHARDS_A_ROUND * world.size
    for first in range(0, len(shards), round_size):
        mine, wrong = {}, []
        for shard in range(first + world.rank, min(first + round_size, len(shards)), world.size):
            world.watchdog.doing(f"reading {shards[shard]}")
            try:
                mine[shard] = tuple(_see(shards[shard], storage, policy, world, with_labels))
            except DataError as error:
                wrong.append(str(error))
        for rank, (part, wrong_there) in enumerate(world.gather((mine, wrong))):
            failures += wrong_there
            for shard, entry in ((shard, _Seen(*fields)) for shard, fields in part.items()):
                elsewhere = rank // world.local_size != world.rank // world.local_size
                storage.adopt(shards[shard], entry.index, entry.table if elsewhere and world.local_rank == 0 else None)
                seen[shard] = entry._replace(table=None)
    if failures:
        more = [f"… and {len(failures) - _NAMED} more"] if len(failures) > _NAMED else []
        raise DataError("\n".join(sorted(failures)[:_NAMED] + more), on_every_rank=True)
    ordered = [seen[shard] for shard in range(len(shards))]
    content = hashlib.sha256(b"".join(entry.content for entry in ordered)).hexdigest()
    identity = hashlib.sha256(f"{content} {[entry.index for entry in ordered]}".encode()).hexdigest()
    class_counts = sum(entry.class_counts for entry in ordered)
    mixing = _class_mixing(ordered, class_counts)
    labels = np.concatenate([entry.labels for entry in ordered]) if with_labels else None
    sizes = [entry.count for entry in ordered]
    return ShardDataset(shards, sizes, storage, policy, class_counts, content, identity, mixing, labels)


class _Seen(NamedTuple):
    count: int
    class_counts: np.ndarray
    content: bytes
    index: str
    table: np.ndarray | None
    labels: np.ndarray | None


def _see(shard: Shard, storage: Storage, policy: LabelPolicy, world: World, with_labels: bool) -> _Seen:
    opened = _open_checked(storage, shard, policy)
    with opened.file:
        labels = opened.table[:, LABEL]
        class_counts = np.bincount(labels[labels >= 0] if policy.num_classes else [], minlength=policy.num_classes)
        table = np.array(opened.table) if world.size > world.local_size else None
        kept = np.array(labels) if with_labels else None
        return _Seen(len(labels), class_counts, content_id(opened.file), opened.index.name, table, kept)


def _class_mixing(seen: Sequence[_Seen], class_counts: np.ndarray) -> float | None:
    if not class_counts.any():
        return None
    some = [entry.class_counts for entry in seen[:: -(-len(seen) // _MIXING_SHARDS)]]
    frequencies = class_counts / class_counts.sum()
    expected = sum((1 - (1 - frequencies) ** counts.sum()).sum() for counts in some)
    return float(sum(np.count_nonzero(counts) for counts in some) / expected)


def _open_checked(storage: Storage, shard: Shard, policy: LabelPolicy) -> OpenShard:
    opened = storage.open(shard)
    labels = opened.table[:, LABEL]
    if not policy.num_classes:
        return opened
    if len(wrong := np.flatnonzero(labels >= policy.num_classes)):
        what = f"label {labels[wrong[0]]}, outside 0..{policy.num_classes - 1}"
        advice = "set data.num_classes to the number of classes"
    elif len(wrong := np.flatnonzero(labels < 0)) and not policy.unlabelled:
        what = f"no label ({storage.rule.source})"
        advice = "correct data.label, or say data.unlabelled=allow if some have none, or data.num_classes=0 if all"
    else:
        return opened
    with opened.file:
        key = key_at(opened.file, int(opened.table[wrong[0], OFFSET]))
    raise DataError(f"{shard}: sample '{key}' has {what} ({len(wrong)} such): {advice}")


def _is_deleted(opened: OpenShard) -> bool:
    return os.fstat(opened.file.fileno()).st_nlink == 0


def _allow_open_files() -> int:
    """Raises this process's limit of open files as far as it may; returns how many shards to keep open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return max(16, min(_OPEN_SHARDS, most // 4 if most != resource.RLIM_INFINITY else _OPEN_SHARDS))
