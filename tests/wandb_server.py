"""As much of a W&B server as its client needs to send a run: on loopback, in this process."""

import gzip
import json
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4


@dataclass
class SentRun:
    """rows: of the history, by their number; uploads: names of files"""

    created: bool = False
    config: str = "{}"
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    exit_code: int | None = None


class Server:
    """WANDB_BASE_URL is its `url`."""

    def __init__(self) -> None:
        self.runs: dict[str, SentRun] = defaultdict(SentRun)
        self.uploads: list[str] = []
        self.artifacts: list[dict[str, Any]] = []
        self._http = _Quiet(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_state": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def stream(self, run: SentRun, content: dict[str, Any]) -> None:
        history = (content.get("files") or {}).get("wandb-history.jsonl")
        if history:
            run.rows |= {history["offset"] + number: json.loads(row) for number, row in enumerate(history["content"])}
        if content.get("complete"):
            run.exit_code = content.get("exitcode")

    def query(self, text: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or ""
        if "upsertBucket" in text:
            run = self.runs[name]
            inserted, run.created = not run.created, True
            run.config = variables.get("config") or run.config
            project = {"id": "p", "name": "gandist", "entity": {"id": "e", "name": "me"}}
            described = {"id": "UnVuOg==", "name": name, "displayName": name, "config": run.config, "project": project}
            return {"upsertBucket": {"bucket": described | {"historyLineCount": len(run.rows)}, "inserted": inserted}}
        if "historyTail" in text:
            known = self.runs.get(name)
            bucket = known and known.created and self._resumable(name, known)
            return {"model": {"id": "p", "name": "gandist", "entity": {"id": "e", "name": "me"}, "bucket": bucket or None}}
        if "query ArtifactType(" in text:
            return {"project": {"artifact": None}}
        if "createArtifact(" in text:
            self.artifacts.append(variables["input"])
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if "useArtifact(" in text:
            return {"useArtifact": {"artifact": {"id": "a"}}}
        if "createRunFiles" in text:
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables.get("files", [])]
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
        if "viewer" in text:
            viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {"max_cli_version": "9"}}}
        if "serverInfo" in text:
            return {"serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "9"}}}
        if "stopped" in text:
            return {"project": {"run": {"stopped": False}}}
        return {}

    def _resumable(self, name: str, run: SentRun) -> dict[str, Any]:
        tail = [json.dumps(run.rows[number]) for number in sorted(run.rows)[-1:]]
        counts = {"logLineCount": 0, "historyLineCount": len(run.rows), "eventsLineCount": 0}
        described = {"name": name, "displayName": name, "config": run.config, "tags": [], "summaryMetrics": "{}"}
        tails = {"historyTail": json.dumps(tail), "eventsTail": "[]", "wandbConfig": json.dumps({"t": 1})}
        return described | counts | tails


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self.server_state.uploads.append(self.path.removeprefix("/upload/"))
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/file_stream"):
            self.server_state.stream(self.server_state.runs[self.path.split("/")[-2]], json.loads(body))
            self._answer({"limits": {}})
        elif self.path == "/graphql":
            asked = json.loads(body)
            text = re.sub(r"\s+", " ", asked.get("query", ""))
            self._answer({"data": self.server_state.query(text, asked.get("variables") or {})})
        else:
            self._answer({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
