"""A model hub with one model in it: what `snapshot_download` asks, over real HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The server. `fetched` are the files that were sent, in that order."""

    daemon_threads = True

    def __init__(self, port: int, model: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model = model
        self.files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        self.fetched: list[str] = []
        self.url = f"http://127.0.0.1:{port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *words: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        model = self.server.model
        if path in (f"/api/models/{model}", f"/api/models/{model}/revision/main"):
            self._json(self._info())
        elif path.startswith(f"/api/models/{model}/tree/"):
            files = self.server.files.items()
            self._json(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}
                    for name, file in files
                ]
            )
        elif path.startswith(f"/{model}/resolve/"):
            self._file(path.rsplit("/", 1)[1], with_body)
        else:
            self._send(404, b"", "text/plain", {"X-Error-Code": "RepoNotFound"})

    def _info(self) -> Any:
        siblings = [{"rfilename": name} for name in self.server.files]
        return {"id": self.server.model, "sha": COMMIT, "siblings": siblings, "private": False}

    def _file(self, name: str, with_body: bool) -> None:
        file = self.server.files.get(name)
        if file is None:
            self._send(404, b"", "text/plain", {"X-Error-Code": "EntryNotFound"})
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT}
        if with_body:
            self.server.fetched.append(name)
        self._send(200, data, "application/octet-stream", headers, with_body)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _send(
        self, status: int, data: bytes, kind: str, headers: dict[str, str], with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


def _oid(file: Path) -> str:
    """What the hub's cache files its blobs under."""
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serving(port: int, model: str, folder: Path) -> Iterator[Hub]:
    """The hub, in threads of this process, while the block runs."""
    server = Hub(port, model, folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
