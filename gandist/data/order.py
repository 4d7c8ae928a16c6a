"""Position in the run → sample of the data set: pure integer arithmetic, the same on every machine.

Position p belongs to epoch p // N and is the p % N-th sample of that epoch's shuffled order. So the state of the input is
one integer, every sample comes exactly once an epoch, and neither ranks nor workers nor batch sizes have a part in it.
Any position is looked up at once: nothing is listed, sorted or skipped through, however many samples there are.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_ROUNDS = 10


class Block(NamedTuple):
    """Shards whose samples are shuffled among each other, in one epoch."""

    start: int  # positions [start, end)
    end: int
    shards: np.ndarray  # int64 [K]
    shard_ends: np.ndarray  # int64 [K], samples of the block up to the end of each


class SampleOrder:
    """The shuffled order of a data set's samples, epoch after epoch.

    shard_sizes:   samples in each shard; sample ids count through the shards in this order
    shuffle_block: samples are shuffled within blocks of so many shards, themselves in a shuffled order, so that remote
                   shards are read a block at a time; 0: all samples among each other
    lanes:         positions p ≡ l (modulo lanes) take their samples from the l-th part of each block's shards. Where the
                   world size divides `lanes`, and `lanes` the batch size, a rank so reads its share of the shards alone
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, shuffle_block: int = 0, lanes: int = 1):
        self.num_samples = int(sum(shard_sizes))
        self.lanes = lanes
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._seed = seed
        self._block_shards = min(shuffle_block, len(self._sizes)) or len(self._sizes)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # number, order of shards, their starts in it
        self._block: Block | None = None

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids, int64 [n], at ascending positions, int64 [n]."""
        ids = np.empty_like(positions)
        done = 0
        while done < len(positions):
            block = self.block(int(positions[done]))
            until = int(np.searchsorted(positions, block.end))
            places = self._shuffled(positions[done:until], block)
            which = np.searchsorted(block.shard_ends, places, "right")
            ids[done:until] = self._starts[block.shards[which] + 1] - block.shard_ends[which] + places
            done = until
        return ids

    def block(self, position: int) -> Block:
        """The block around this position."""
        if self._block is None or not self._block.start <= position < self._block.end:
            epoch, offset = divmod(position, self.num_samples)
            if self._epoch is None or self._epoch[0] != epoch:
                order = permutation(len(self._sizes), self._seed, epoch)
                self._epoch = epoch, order, np.concatenate([[0], np.cumsum(self._sizes[order])])
            _, order, starts = self._epoch
            first = (int(np.searchsorted(starts, offset, "right")) - 1) // self._block_shards * self._block_shards
            last = min(first + self._block_shards, len(order))
            start, end = (epoch * self.num_samples + int(starts[shard]) for shard in (first, last))
            self._block = Block(start, end, order[first:last], starts[first + 1 : last + 1] - starts[first])
        return self._block

    def shards_of_lanes(self, block: Block, lanes: Iterable[int]) -> np.ndarray:
        """Those shards of a block that hold samples of these lanes, int64, ascending."""
        held = np.zeros(len(block.shards), bool)
        for lane in lanes:
            first, size = self._lane(lane, block)
            if size:
                low, high = np.searchsorted(block.shard_ends, [first, first + size - 1], "right")
                held[low : high + 1] = True
        return np.sort(block.shards[held])

    def _shuffled(self, positions: np.ndarray, block: Block) -> np.ndarray:
        """Places in the block's unshuffled list of samples, int64 [n], of positions in it."""
        places = np.empty_like(positions)
        lanes = positions % self.lanes
        for lane in np.unique(lanes).tolist():
            first, size = self._lane(lane, block)
            mine = lanes == lane
            turns = (positions[mine] - block.start) // self.lanes
            places[mine] = first + shuffle(turns, size, self._seed, block.start, lane)
        return places

    def _lane(self, lane: int, block: Block) -> tuple[int, int]:
        """First place and number of a lane's samples in a block."""

        def size(lane: int) -> int:
            return len(range(block.start + (lane - block.start) % self.lanes, block.end, self.lanes))

        return sum(map(size, range(lane))), size(lane)


def shuffle(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where items `index` of range(size) go, int64 [n], in a permutation chosen by the integers of `key`.

    A Feistel network over rows × columns ≥ size, walked on from what falls outside of range(size) until it is inside
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"): constant time and memory an item at any size.
    """
    rows = np.uint64(math.isqrt(size - 1) + 1)
    columns = np.uint64(-(-size // int(rows)))
    keys = _round_keys(*key)
    moved = _feistel(index.astype(np.uint64), rows, columns, keys)
    while (outside := moved >= size).any():
        moved[outside] = _feistel(moved[outside], rows, columns, keys)
    return moved.astype(np.int64)


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size), int64, chosen by the integers of `key`.

    It sorts i by a hash of i ^ salt(key). The hash is a bijection of 64-bit integers, so there are no ties and every
    sorting algorithm gives the same result.
    """
    return np.argsort(_splitmix64(np.arange(size, dtype=np.uint64) ^ _salt(*key)))


def _feistel(x: np.ndarray, rows: np.uint64, columns: np.uint64, keys: np.ndarray) -> np.ndarray:
    row, column = np.divmod(x, columns)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        row = (row + _splitmix64(column ^ even) % rows) % rows
        column = (column + _splitmix64(row ^ odd) % columns) % columns
    return row * columns + column


@lru_cache(1024)
def _round_keys(*key: int) -> np.ndarray:
    return _splitmix64(_salt(*key) ^ np.arange(_ROUNDS, dtype=np.uint64))


def _salt(*key: int) -> np.ndarray:
    """uint64 [1]"""
    salt = np.zeros(1, np.uint64)
    for part in key:
        salt = _splitmix64(salt ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return salt


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The mixing function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), uint64 [n] → uint64 [n]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
