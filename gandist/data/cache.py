"""Remote shards on this node's disk, within a limit.

One process of the node downloads a shard, the others wait for it. What is there is whole: it arrives under another name,
is checked there, and renamed. The shards that were opened longest ago make room for new ones; an open one stays
readable. A process may be killed at any moment: its lock goes with it and its part of a shard is cleared away.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
                try:
                    for attempt in retrying(self.remote.timeout):
                        with attempt, self._arriving(path) as partial:
                            self._download(url, partial)
                            arrived(partial)
                            file = partial.open("rb")
                            partial.rename(path)
                except FileNotFoundError as error:
                    raise DataError(f"{error}: restore it, or correct data.train and data.test") from error
            else:
                os.utime(file.fileno())  # not the path, which may have been evicted by now
            return file

    def _path(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}{_SHARD}"

    def _download(self, url: str, partial: Path) -> None:
        with self.remote.stream(url) as (size, chunks), partial.open("wb") as file:
            received, reserved = 0, size or 0
            self._reserve(url, file, reserved)
            for chunk in chunks:
                received += len(chunk)
                if received > reserved:  # the size was not told
                    reserved = max(received, min(received * 5 // 4, self.limit))
                    self._reserve(url, file, reserved)
                file.write(chunk)
            file.truncate(received)

    @contextmanager
    def _arriving(self, path: Path) -> Iterator[Path]:
        """The name under which a shard arrives. What is not renamed goes, and takes no room until the next try."""
        partial = path.with_suffix(_PARTIAL)
        try:
            yield partial
        except FileNotFoundError:
            raise
        except OSError as error:
            failure = TransientError if error.errno in _NO_ROOM and self._evict_oldest() else DataError
            raise failure(f"{partial}: {error.strerror}: make room, or set data.cache_dir to another disk") from error
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, url: str, file: BinaryIO, size: int) -> None:
        """Extends `file` to `size` bytes where that fits within the limit and on the disk."""
        if size > self.limit:
            raise DataError(f"{url}: {size:,} bytes or more do not fit into data.cache_limit={self.limit:,}: raise it")
        while not self._make_room(file.fileno(), size):
            if os.fstat(file.fileno()).st_size:  # two that wait for each other's room would wait for ever
                raise TransientError(f"{url}: finds no room beside other downloads in data.cache_limit={self.limit:,}")
            time.sleep(0.2)  # others' downloads fill the limit: when they are done, they may be evicted

    def _make_room(self, file: int, size: int) -> bool:
        """Extends the file behind this descriptor, evicting for it; False if only running downloads are left."""
        with FileLock(self.folder / "room.lock"):
            while self._used() + size - os.fstat(file).st_size > self.limit:
                if not (self._evict_oldest() or self._clear_abandoned()):
                    return False
            while (held := os.fstat(file).st_size) < size:
                try:
                    os.posix_fallocate(file, held, size - held)
                except OSError as error:
                    if error.errno not in _NO_ROOM:
                        os.ftruncate(file, size)  # a file system that cannot reserve
                    elif not (self._evict_oldest() or self._clear_abandoned()):
                        raise
        return True

    def _used(self) -> int:
        # In this order, what is renamed in between counts twice, not never.
        return sum(size for suffix in (_PARTIAL, _SHARD) for _, size, _ in self._files(suffix))

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
