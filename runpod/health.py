"""The health port: what Runpod's load balancer asks to learn whether this worker can be used.

    204   loading: not to be used yet, and not to be given up either
    200   a warm-up answer was generated, and a replica is healthy now
    503   draining, failed, or no replica is healthy

It is a port of its own because the application's port is closed while the model loads, which the
balancer would take for unhealthy. It knows nothing but a status, so it asks for no key.
"""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

# One slow answer under load is no illness.
_MISSES = 2
_PERIOD_S = 1.0
_TIMEOUT_S = 5.0


class Health:
    """The status, and the server that tells it. Safe to use from every thread."""

    def __init__(self, port: int, path: str = "/ping", host: str = "0.0.0.0") -> None:
        self._status = HTTPStatus.NO_CONTENT
        self._probe: Callable[[], bool] | None = None
        self._over = threading.Event()
        self._server = ThreadingHTTPServer((host, port), self._handler(path))
        self._server.daemon_threads = True
        self._threads = [
            threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True),
            threading.Thread(target=self._watch, daemon=True),
        ]

    def __enter__(self) -> "Health":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def status(self) -> int:
        return int(self._status)

    def loading(self) -> None:
        self._set(HTTPStatus.NO_CONTENT, None)

    def ready(self, probe: Callable[[], bool]) -> None:
        """An answer was generated; from now on `probe` says whether there is a healthy replica."""
        self._set(HTTPStatus.OK, probe)

    def unavailable(self) -> None:
        """Draining, or past help."""
        self._set(HTTPStatus.SERVICE_UNAVAILABLE, None)

    def _set(self, status: HTTPStatus, probe: Callable[[], bool] | None) -> None:
        self._probe, self._status = probe, status

    def _watch(self) -> None:
        misses = 0
        while not self._over.wait(_PERIOD_S):
            probe = self._probe
            if probe is None:
                misses = 0
                continue
            misses = 0 if probe() else misses + 1
            # `probe` took its time: what was said meanwhile stands.
            if self._probe is probe:
                sick = misses >= _MISSES
                self._status = HTTPStatus.SERVICE_UNAVAILABLE if sick else HTTPStatus.OK

    def _handler(self, path: str) -> type[BaseHTTPRequestHandler]:
        health = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_GET(self) -> None:
                known = self.path.partition("?")[0] == path
                self.send_response(health._status if known else HTTPStatus.NOT_FOUND)
                if not known or health._status != HTTPStatus.NO_CONTENT:
                    self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *words: object) -> None:
                """A line every few seconds for ever would hide the others."""

        return Handler


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            return bool(response.status == HTTPStatus.OK)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def wait_until(true: Callable[[], bool], timeout_s: float, period_s: float = 0.1) -> bool:
    """Whether `true` becomes so in time."""
    deadline_s = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(period_s)
    return True
