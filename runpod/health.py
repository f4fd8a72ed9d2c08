"""The health port: what Runpod's load balancer asks to learn whether this worker can be used.

    204   loading: not to be used yet, and not to be given up either
    200   a warm-up answer was generated, and a replica is healthy now
    503   draining, failed, or no replica is healthy

It is a port of its own because the application's port is closed while the model loads, which the
balancer would take for unhealthy. It knows nothing but a status, so it asks for no key.

The status is that of a probe which runs once a second and is given `_TIMEOUT_S`: while no replica
is up, the application may hold requests until there is one, and a probe held with them would leave
the last status standing. A refusal is believed at once, silence when it is repeated.
"""

import http.client
import queue
import threading
import time
import urllib.parse
from collections.abc import Callable
from enum import Enum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

_PERIOD_S = 1.0
_TIMEOUT_S = 1.5
# One slow answer under load is no illness.
_SILENCES = 2


class Answer(Enum):
    """What a probe came to."""

    YES = "a replica is healthy"
    NO = "none is"
    SILENCE = "no answer in time"


class Health:
    """The status, and the server that tells it. Safe to use from every thread."""

    def __init__(self, port: int, path: str = "/ping", host: str = "0.0.0.0") -> None:
        self._status = HTTPStatus.NO_CONTENT
        self._probe: Callable[[], Answer] | None = None
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

    def ready(self, probe: Callable[[], Answer]) -> None:
        """An answer was generated; from now on `probe` says whether there is a healthy replica.

        It must return within a few seconds.
        """
        self._set(HTTPStatus.OK, probe)

    def unavailable(self) -> None:
        """Draining, or past help."""
        self._set(HTTPStatus.SERVICE_UNAVAILABLE, None)

    def _set(self, status: HTTPStatus, probe: Callable[[], Answer] | None) -> None:
        self._probe, self._status = probe, status

    def _watch(self) -> None:
        silences = 0
        while not self._over.wait(_PERIOD_S):
            probe = self._probe
            if probe is None:
                silences = 0
                continue
            answer = probe()
            silences = silences + 1 if answer is Answer.SILENCE else 0
            # `probe` took its time: a status that was set meanwhile stands.
            if self._probe is not probe:
                continue
            if answer is Answer.YES:
                self._status = HTTPStatus.OK
            elif answer is Answer.NO or silences >= _SILENCES:
                self._status = HTTPStatus.SERVICE_UNAVAILABLE

    def _handler(self, path: str) -> type[BaseHTTPRequestHandler]:
        health = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_GET(self) -> None:
                matches = self.path.partition("?")[0] == path
                self.send_response(health._status if matches else HTTPStatus.NOT_FOUND)
                if not matches or health._status != HTTPStatus.NO_CONTENT:
                    self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *words: object) -> None:
                """A line every few seconds for ever would hide the others."""

        return Handler


def ask(url: str, timeout_s: float = _TIMEOUT_S) -> Answer:
    """What a GET of `url` says within `timeout_s`: 200 is YES, another status or no server NO.

    A thread of its own waits for it, because the time limit of a socket begins anew with each byte.
    """
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_get(url, timeout_s)), daemon=True).start()
    try:
        return answers.get(timeout=timeout_s)
    except queue.Empty:
        return Answer.SILENCE


def _get(url: str, timeout_s: float) -> Answer:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or "/")
        status = connection.getresponse().status
        return Answer.YES if status == HTTPStatus.OK else Answer.NO
    except TimeoutError:
        return Answer.SILENCE
    except (OSError, http.client.HTTPException):
        return Answer.NO
    finally:
        connection.close()


def wait_until(true: Callable[[], bool], timeout_s: float, period_s: float = 0.1) -> bool:
    """Whether `true` becomes so in time."""
    deadline_s = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(period_s)
    return True
