"""Whether a server can be reached."""

import threading
from contextlib import suppress

import requests

PATIENCE = 3.0  # s


def is_reachable(url: str) -> bool:
    """Whether a server answers there, through a proxy where the environment names one.

    In bounded time: names are looked up by a thread, as nothing else bounds that.
    """
    answered = threading.Event()

    def ask() -> None:
        with suppress(OSError, ValueError):  # of the network, of the URL
            requests.head(url, timeout=PATIENCE)
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    return answered.is_set()
