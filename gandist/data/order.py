"""Position in the run → sample of the data set: pure integer arithmetic, the same on every machine.

Position p belongs to epoch p // N and is the sample `permutation(seed, epoch)[p % N]`. So the state of the input is one
integer, every sample comes exactly once an epoch, and neither ranks nor workers nor batch sizes have a part in it.
"""

from collections.abc import Sequence

import numpy as np

_SHARD_ORDER = 0  # salts of the permutation of shards, and of the samples in block b
_FIRST_BLOCK = 1


class SampleOrder:
    """The shuffled order of a data set's samples, epoch after epoch.

    shard_sizes:   samples in each shard; sample ids count through the shards in this order
    shuffle_block: samples are shuffled within blocks of so many shards, themselves in a shuffled order, so that remote
                   shards are read a block at a time; 0: all samples among each other
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, shuffle_block: int = 0):
        self.num_samples = int(sum(shard_sizes))
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._seed = seed
        self._block_shards = shuffle_block or len(self._sizes)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # number, order of shards, starts of blocks
        self._block: tuple[tuple[int, int], np.ndarray] | None = None  # (epoch, block), its sample ids

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids, int64 [n], at ascending positions, int64 [n]."""
        ids = np.empty_like(positions)
        done = 0
        while done < len(positions):
            epoch, offset = divmod(int(positions[done]), self.num_samples)
            shard_order, block_starts = self._open_epoch(epoch)
            block = int(np.searchsorted(block_starts, offset, "right")) - 1
            start = epoch * self.num_samples + block_starts[block]
            end = epoch * self.num_samples + block_starts[block + 1]
            until = int(np.searchsorted(positions, end))
            ids[done:until] = self._open_block(epoch, block, shard_order)[positions[done:until] - start]
            done = until
        return ids

    def _open_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            order = permutation(len(self._sizes), self._seed, epoch, _SHARD_ORDER)
            ends = np.cumsum(self._sizes[order])
            block_ends = ends[
                np.arange(self._block_shards, len(ends) + self._block_shards, self._block_shards).clip(max=len(ends)) - 1
            ]
            self._epoch = epoch, order, np.concatenate([[0], block_ends])
        return self._epoch[1:]

    def _open_block(self, epoch: int, block: int, shard_order: np.ndarray) -> np.ndarray:
        if self._block is None or self._block[0] != (epoch, block):
            shards = shard_order[block * self._block_shards : (block + 1) * self._block_shards]
            ids = np.concatenate([np.arange(self._starts[shard], self._starts[shard + 1]) for shard in shards])
            shuffled = ids[permutation(len(ids), self._seed, epoch, _FIRST_BLOCK + block)]
            self._block = (epoch, block), shuffled
        return self._block[1]


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size), int64, chosen by the integers of `key`.

    It sorts i by a hash of i ^ salt(key). The hash is a bijection of 64-bit integers, so there are no ties and every
    sorting algorithm gives the same result.
    """
    salt = np.zeros(1, np.uint64)
    for part in key:
        salt = _splitmix64(salt ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return np.argsort(_splitmix64(np.arange(size, dtype=np.uint64) ^ salt))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The mixing function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), uint64 [n] → uint64 [n]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
