"""A model hub with one model in it: what `snapshot_download` asks, over real HTTP."""

import hashlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.runpod import web

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(web.Server):
    """The server. `fetched` are the files that were sent, in that order."""

    def __init__(self, port: int, model: str, folder: Path) -> None:
        super().__init__(port, _Handler)
        self.model = model
        self.files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        self.fetched: list[str] = []


class _Handler(web.Handler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        model = self.server.model
        if path in (f"/api/models/{model}", f"/api/models/{model}/revision/main"):
            self.send_json(200, self._info())
        elif path.startswith(f"/api/models/{model}/tree/"):
            files = self.server.files.items()
            self.send_json(
                200,
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}
                    for name, file in files
                ],
            )
        elif path.startswith(f"/{model}/resolve/"):
            self._file(path.rsplit("/", 1)[1], with_body)
        else:
            self.send(404, b"", "text/plain", {"X-Error-Code": "RepoNotFound"})

    def _info(self) -> Any:
        siblings = [{"rfilename": name} for name in self.server.files]
        return {"id": self.server.model, "sha": COMMIT, "siblings": siblings, "private": False}

    def _file(self, name: str, with_body: bool) -> None:
        file = self.server.files.get(name)
        if file is None:
            self.send(404, b"", "text/plain", {"X-Error-Code": "EntryNotFound"})
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT}
        if with_body:
            self.server.fetched.append(name)
        self.send(200, data, "application/octet-stream", headers, with_body)


def _oid(file: Path) -> str:
    """What the hub's cache files its blobs under."""
    return hashlib.sha1(file.read_bytes()).hexdigest()


def serving(port: int, model: str, folder: Path) -> AbstractContextManager[Hub]:
    """The hub, while the block runs."""
    return web.running(Hub(port, model, folder))
