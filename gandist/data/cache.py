"""Remote shards on this node's disk, within a limit.

One process of the node downloads a shard, the others wait for it. What is there is whole: it arrives under another name,
is checked there, and renamed. The shards that were opened longest ago make room for new ones; an open one stays
readable. A process may be killed at any moment: its lock goes with it and its part of a shard is cleared away.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from gandist.data.remote import Remote, TransientError, retrying
from gandist.errors import DataError

_SHARD, _PARTIAL, _LOCK = ".tar", ".partial", ".lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class ShardCache:
    """Shared by all processes of a node that name the same folder; `limit` in bytes."""

    def __init__(self, folder: Path, limit: int, remote: Remote):
        self.folder = folder
        self.limit = limit
        self.remote = remote

    def fetch(self, url: str, arrived: Callable[[Path], None]) -> BinaryIO:
        """The shard, open for reading, downloaded unless it is there already.

        `arrived` is called with the path of a newly downloaded file before anybody else may see it, and raises DataError
        to have it thrown away. Raises DataError when the shard is not there, stays out of reach, or finds no room.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(url)
        with FileLock(path.with_suffix(_LOCK)):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                partial = path.with_suffix(_PARTIAL)
                try:
                    for attempt in retrying(self.remote.timeout):
                        with attempt:
                            self._download(url, partial)
                    arrived(partial)
                    file = partial.open("rb")
                    partial.rename(path)
                except FileNotFoundError as error:
                    raise DataError(f"{error}: restore it, or correct data.train and data.test") from error
                finally:
                    partial.unlink(missing_ok=True)
            else:
                os.utime(path)
            return file

    def _path(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}{_SHARD}"

    def _download(self, url: str, partial: Path) -> None:
        with self.remote.stream(url) as (size, chunks):
            try:
                self._reserve(url, partial, size or 0)
                with partial.open("r+b") as file:
                    for chunk in chunks:
                        file.write(chunk)
                if size is None:
                    self._make_room(0)
            except OSError as error:
                if error.errno in _NO_ROOM and self._evict_oldest():
                    raise TransientError(f"{partial}: {error.strerror}") from error
                raise DataError(f"{partial}: {error.strerror}: make room, or set data.cache_dir to another disk") from error

    def _reserve(self, url: str, partial: Path, size: int) -> None:
        """Makes `partial`, of its full size, where that fits within the limit and on the disk."""
        if size > self.limit:
            raise DataError(f"{url}: {size:,} bytes are more than data.cache_limit={self.limit:,}: raise it")
        partial.unlink(missing_ok=True)
        while not self._make_room(size, partial):
            time.sleep(0.2)  # others' downloads fill the limit: when they are done, they may be evicted

    def _make_room(self, size: int, partial: Path | None = None) -> bool:
        """Evicts until `size` bytes more fit and makes them `partial`; False if only running downloads are left."""
        with FileLock(self.folder / "room.lock"):
            while self._used() + size > self.limit:
                if not (self._evict_oldest() or self._clear_abandoned()):
                    return False
            if partial is not None:
                with partial.open("wb") as file:
                    while size:
                        try:
                            os.posix_fallocate(file.fileno(), 0, size)
                            break
                        except OSError as error:
                            if error.errno not in _NO_ROOM:
                                file.truncate(size)  # a file system that cannot reserve
                                break
                            if not (self._evict_oldest() or self._clear_abandoned()):
                                raise
        return True

    def _used(self) -> int:
        return sum(size for _, size, _ in self._files(_SHARD) + self._files(_PARTIAL))

    def _evict_oldest(self) -> bool:
        for _, _, path in sorted(self._files(_SHARD))[:1]:
            path.unlink(missing_ok=True)
            return True
        return False

    def _clear_abandoned(self) -> bool:
        """Removes a part that a killed process left."""
        for _, size, path in self._files(_PARTIAL):
            try:
                with FileLock(path.with_suffix(_LOCK), timeout=0):
                    path.unlink(missing_ok=True)
                    if size:
                        return True
            except Timeout:
                continue
        return False

    def _files(self, suffix: str) -> list[tuple[float, int, Path]]:
        """When last used, bytes, path."""
        files = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(suffix):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                files.append((status.st_mtime, status.st_size, Path(entry.path)))
        return files
