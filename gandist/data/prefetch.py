"""Brings the shards that are read next onto this node's disk, in the background."""

import threading
from collections import deque
from collections.abc import Sequence

from gandist.data.shards import ShardDataset
from gandist.errors import DataError

PARALLEL_DOWNLOADS = 4


class Prefetcher:
    """For data sets whose shards pass through the node's cache; for others it does nothing."""

    def __init__(self, dataset: ShardDataset):
        self._dataset = dataset
        self._plan: list[int] = []
        self._queue: deque[int] = deque()
        self._sizes: dict[int, int] = {}  # bytes
        self._threads: list[threading.Thread] = []

    def want(self, shards: Sequence[int]) -> None:
        """These next, in this order, and nothing else. Raises DataError if they do not fit into the cache together."""
        if not self._dataset.is_cached:
            return
        if list(shards) != self._plan:
            self._plan = list(shards)
            self._queue.clear()
            self._queue.extend(self._plan)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(min(PARALLEL_DOWNLOADS - len(self._threads), len(self._queue))):
            thread = threading.Thread(target=self._fetch, daemon=True)
            thread.start()
            self._threads.append(thread)
        if sum(self._sizes.get(shard, 0) for shard in {*self._plan}) > self._dataset.cache_limit:
            raise DataError(
                f"data.cache_limit={self._dataset.cache_limit:,} bytes hold less than the {len(self._plan)} shards that are "
                "shuffled together now and next, which would be downloaded again and again: raise it, or lower "
                "data.shuffle_block"
            )

    def _fetch(self) -> None:
        while True:
            try:
                shard = self._queue.popleft()
                self._sizes[shard] = self._dataset.fetch(shard)
            except IndexError:
                return
            except DataError:
                continue  # whoever reads this shard meets the same, and says so
