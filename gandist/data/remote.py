"""Bytes behind a URL: http(s) by requests, object stores by fsspec, a command's output if the configuration allows it."""

import os
import selectors
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import requests
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from gandist.errors import DataError

PIPE = "pipe:"
TRIES = 6
_CHUNK = 1 << 20
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}  # URL scheme → extra of this package
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class TransientError(DataError):
    """May be gone when tried again."""


def is_remote(url: str) -> bool:
    """Whether this is a URL or a command, not a path."""
    return "://" in url or url.startswith(PIPE)


def without_query(url: str) -> str:
    """A web address up to its question mark; anything else as it is."""
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def retrying(slowest: float) -> Retrying:
    """Tries up to TRIES times what raises TransientError, after random waits of at most `slowest` seconds."""
    return Retrying(
        retry=retry_if_exception_type(TransientError),
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(multiplier=0.5, max=slowest),
        reraise=True,
    )


@dataclass(frozen=True)
class Remote:
    """timeout: seconds without a byte after which a connection or a command counts as dead"""

    timeout: float = 30.0
    allow_pipe: bool = False

    def read(self, url: str) -> bytes | None:
        """A small file at a path or URL, or None if there is none. Raises DataError."""
        if not is_remote(url):
            path = Path(url)
            return path.read_bytes() if path.is_file() else None
        for attempt in retrying(self.timeout):
            with attempt:
                try:
                    with self.stream(url) as (_, chunks):
                        return b"".join(chunks)
                except FileNotFoundError:
                    return None
        raise AssertionError("unreachable")

    def glob(self, pattern: str) -> list[str]:
        """The URLs in an object store that match, sorted. Raises DataError, also for what cannot list, as http."""
        with _as_data_errors(pattern):
            filesystem, path = fsspec.url_to_fs(pattern)
            return sorted(filesystem.unstrip_protocol(found) for found in filesystem.glob(path))

    @contextmanager
    def stream(self, url: str) -> Iterator[tuple[int | None, Iterator[bytes]]]:
        """Size in bytes, if it is told beforehand, and the content.

        Raises FileNotFoundError, TransientError for what may succeed when tried again, or DataError.
        """
        if url.startswith(PIPE):
            opened = self._run(url.removeprefix(PIPE))
        elif url.startswith(("http://", "https://")):
            opened = self._get(url)
        else:
            opened = _open_with_fsspec(url)
        with ExitStack() as stack:
            with _as_data_errors(url):
                size, chunks = stack.enter_context(opened)
            yield size, _whole(chunks, size, url)

    @contextmanager
    def _get(self, url: str) -> Iterator[tuple[int | None, Iterator[bytes]]]:
        headers = {"Accept-Encoding": "identity"}
        with requests.get(url, stream=True, timeout=self.timeout, headers=headers) as response:
            answer = f"{url}: HTTP {response.status_code} {response.reason}"
            if response.status_code in (404, 410):
                raise FileNotFoundError(answer)
            if response.status_code in _TRY_AGAIN:
                raise TransientError(answer)
            if not response.ok:
                raise DataError(f"{answer}: check the address and your access to it")
            encoded = "Content-Encoding" in response.headers  # although not asked for; the length is then another
            size = None if encoded else response.headers.get("Content-Length")
            yield size and int(size), response.iter_content(_CHUNK)

    @contextmanager
    def _run(self, command: str) -> Iterator[tuple[None, Iterator[bytes]]]:
        if not self.allow_pipe:
            allowing = "data.allow_pipe=true allows, on the command line or in a file of --config, not in the folder of a run"
            raise DataError(f"{PIPE}{command}: runs a command in a shell, which {allowing}")
        process = subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
        )

        def chunks() -> Iterator[bytes]:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while selector.select(self.timeout):
                    if not (chunk := os.read(process.stdout.fileno(), _CHUNK)):
                        break
                    yield chunk
                else:
                    raise TransientError(f"{PIPE}{command}: no output for {self.timeout:g} s")
            if status := process.wait(self.timeout):
                raise TransientError(f"{PIPE}{command}: exit status {status}")

        try:
            yield None, chunks()
        finally:
            if process.returncode is None:  # nobody has waited for it: its group is still its own, whether it lives or not
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()


def _whole(chunks: Iterator[bytes], size: int | None, url: str) -> Iterator[bytes]:
    received = 0
    with _as_data_errors(url):
        for chunk in chunks:
            received += len(chunk)
            yield chunk
    if size is not None and received != size:
        raise TransientError(f"{url}: ended after {received} of {size} bytes")


@contextmanager
def _open_with_fsspec(url: str) -> Iterator[tuple[int | None, Iterator[bytes]]]:
    filesystem, path = fsspec.url_to_fs(url)
    with filesystem.open(path, "rb") as file:
        yield filesystem.size(path), iter(lambda: file.read(_CHUNK), b"")


@contextmanager
def _as_data_errors(url: str) -> Iterator[None]:
    """What the libraries behind URLs raise, which is their own. The caller's errors do not pass here."""
    scheme = url.partition("://")[0]
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error) if url in str(error) else f"{url}: there is no such file") from error
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        what = f"pip install 'gandist[{extra}]'" if extra else str(error)
        raise DataError(f"{url}: {scheme}:// needs a package that is not installed: {what}") from error
    except (PermissionError, ValueError, NotImplementedError) as error:
        raise DataError(f"{url}: {error}") from error
    except Exception as error:
        raise TransientError(f"{url}: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    """requests wraps urllib3's exceptions, which wrap the system's."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return str(getattr(error, "reason", None) or error) or type(error).__name__
