"""A web server on loopback that does what it is told, and tells what it was asked."""

import gzip
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path


class Web:
    """Serves the files of a folder.

    log: the paths that were asked for
    """

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        self.log: list[str] = []
        self.released = threading.Event()  # ends what stalls
        self._answers: dict[str, Iterator[int | str]] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Web":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, content: bytes) -> str:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)
        return f"{self.url}/{name}"

    def will(self, name: str, *answers: int | str, then: int | str = 200) -> None:
        """What happens to the next requests for this path: a status, or a way to answer (see _Handler)."""
        self._answers[f"/{name}"] = chain(answers, repeat(then))

    def asked(self, names: Iterable[str] | str) -> int:
        """How often these files were asked for."""
        paths = {f"/{name}" for name in ([names] if isinstance(names, str) else names)}
        return sum(path in paths for path in list(self.log))

    def answer(self, path: str) -> int | str:
        with self._lock:
            self.log.append(path)
            return next(self._answers.get(path, repeat(200)))


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    web: Web

    def do_GET(self) -> None:
        answer, file = self.web.answer(self.path), self.web.folder / self.path[1:].partition("?")[0]
        if answer == "redirect":
            self.send_response(302)
            self.send_header("Location", f"/moved{self.path}")
            self.end_headers()
        elif not isinstance(answer, str) and answer != 200:
            self.send_error(answer)
        elif not file.is_file():
            self.send_error(404)
        else:
            self._send(file.read_bytes(), answer)

    def _send(self, content: bytes, answer: int | str) -> None:
        self.send_response(200)
        if answer == "gzip":
            content = gzip.compress(content)
            self.send_header("Content-Encoding", "gzip")
        if answer != "unsized":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if answer in ("stall", "short"):
            content = content[: len(content) // 2]
        self.wfile.write(content)
        if answer == "stall":
            self.web.released.wait()

    def log_message(self, *_: object) -> None:
        pass
