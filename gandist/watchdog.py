"""The watchdog: a rank that makes no progress says what it waits for, where, and ends."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gandist.launcher import report

EXIT_STATUS = 1
STARTING = 3.0  # times as long as anything else it may take to build the networks


class Watchdog:
    """Bounds the time in which a rank must show progress.

    A thread of its own looks at it, so that it sees a wait in a library that no exception can end. The stacks of all threads
    follow the message on the standard error.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.doing("starting", patience=STARTING)

    def doing(self, what: str, *, patience: float = 1.0) -> None:
        """Progress: what the rank does now, as in 'waiting for data'. It may take `patience` times as long as usual."""
        allowed = self.seconds * patience
        self._now = what, allowed, time.monotonic() + allowed

    @contextmanager
    def watching(self) -> Iterator[None]:
        over = threading.Event()
        self.doing("starting", patience=STARTING)
        thread = threading.Thread(target=self._watch, args=(over,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(min(1.0, self.seconds / 10)):
            what, allowed, deadline = self._now
            if time.monotonic() > deadline:
                report(
                    f"no progress for {allowed:g} s, {what}: the stacks of this rank follow, the other ranks tell "
                    "what they wait for; train.timeout_minutes allows more time"
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                os._exit(EXIT_STATUS)
