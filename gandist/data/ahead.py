"""Batches that a thread makes while those before them are used."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def ahead(batches: Iterator[T], count: int, begin: Callable[[], None]) -> Iterator[T]:
    """The same batches. A thread makes up to `count` of them ahead; its errors are raised here in their turn. Closing this
    generator ends the thread.

    begin: called first, in the thread
    """
    made: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(count)
    over = threading.Event()

    def make() -> None:
        try:
            begin()
            while room.acquire() and not over.is_set():
                made.put((next(batches), None))
        except BaseException as error:  # StopIteration, too
            made.put((None, error))

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield batch
    finally:
        over.set()
        room.release()
        thread.join()
