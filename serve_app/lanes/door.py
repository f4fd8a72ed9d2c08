"""The door: asked once for each request that could take the fast lane, by HAProxy or the gateway.

Each replica has one, so that the requests of both lanes share a queue, and so that the door knows
the engine's state. Each request has its own TCP connection (launch/ask_door.lua): a line with a
secret, then the request as the client sent it. HAProxy and the replicas share the secret; the
gateway (gateway/place.py) sends the replica's token. The answer is one of three.

    full                                          the full lane must answer it
    fast HOST PORT TOKEN ID TIMEOUT_MS HEADERS    HAProxy passes it to the Rust front end
    refuse STATUS HEADERS BODY                    an error of ours

HEADERS and BODY are lengths in bytes, and the header lines and the body follow. HAProxy adds the
header lines of `fast` to the answer of the Rust front end.

After `fast` the connection stays open for as long as HAProxy has the request, and *is* the
request's place in the engine: when the stream ends, the client leaves, or HAProxy dies, it closes.
So no message about its end can get lost. While a request waits in the queue, the door answers `wait
SECONDS` at once, so a door that does not answer hangs.
"""

import asyncio
import contextlib
import hmac
import logging
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.gates.keys import tenant
from serve_app.gates.reading import Reading
from serve_app.gates.work import work
from serve_app.observe import metrics
from serve_app.observe.timeline import Timeline
from serve_app.replica.reports import Ended, client_ids

logger = logging.getLogger("serve_app")

# Header with the secret, and the path at which a replica's own server says where its door is.
SECRET_HEADER, PATH = b"x-door", "/-/door"
# Headers and body of a request together, at most.
LARGEST_BYTES = 2**18
# How long the engine may take to report a request that HAProxy is done with.
_REPORT_S = 2.0


class Frontend(Protocol):
    """The address of this replica's Rust front end, and its token."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def token(self) -> str: ...


class Ends:
    """Matches what the engine reports to the requests that wait for it.

    A client may use one id for several requests at once: their reports are in order.
    """

    def __init__(self) -> None:
        self._expected: dict[str, deque[asyncio.Future[Ended]]] = defaultdict(deque)

    def expect(self, request_id: str) -> "asyncio.Future[Ended]":
        end: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._expected[request_id].append(end)
        return end

    def tell(self, ended: Ended) -> None:
        """The engine ended a request."""
        for request_id in client_ids(ended.request_id):
            if waiting := self._expected.get(request_id):
                end = waiting.popleft()
                if not end.done():
                    end.set_result(ended)
                if not waiting:
                    del self._expected[request_id]
                return

    def forget(self, request_id: str, end: "asyncio.Future[Ended]") -> None:
        """Nobody waits for it any more."""
        waiting = self._expected.get(request_id)
        if waiting and end in waiting:
            waiting.remove(end)
        if not waiting:
            self._expected.pop(request_id, None)

    def __len__(self) -> int:
        return sum(map(len, self._expected.values()))


class Grant:
    """The application behind the gates of the fast lane: lets HAProxy pass the request on.

    It is over, for the gates in front of it, when HAProxy and the engine are both done with it.

    Args:
        frontend: of the engine that runs now.
        abort: ends a request in the engine, by its id.
        timeout_s: how long the Rust front end may be silent.
        alive: whether there is an engine, which will report what ended.
    """

    def __init__(
        self,
        frontend: Callable[[], Frontend],
        ends: Ends,
        model: str,
        abort: Callable[[str], Coroutine[Any, Any, None]],
        timeout_s: Callable[[], float],
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self._frontend, self._ends, self._model, self._abort = frontend, ends, model, abort
        self._timeout_s, self._alive = timeout_s, alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = request_id or uuid.uuid4().hex  # The meter gives one, where there is a meter.
        end = self._ends.expect(request_id)
        frontend = self._frontend()
        await receive()  # The body, which HAProxy keeps.
        address = f"{frontend.host} {frontend.port} {frontend.token}"
        grant = f"fast {address} {request_id} {round(self._timeout_s() * 1000)}"
        parsed: Reading = scope.get("state", {}).get("reading") or Reading(stream=True)
        kind = b"text/event-stream" if parsed.stream else b"application/json"
        headers = [(b"content-type", kind)]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        try:
            await send({**start, "grant": grant.encode()})
            status = (await receive()).get("status", 200)
            ended = await self._ended(end) if status == 200 else None
        except asyncio.CancelledError:  # Longer than request_timeout_s.
            await self._abort(request_id)
            self._count(Timeline.of(await self._ended(end), 200))
            raise
        finally:
            self._ends.forget(request_id, end)
        timeline = Timeline.of(ended, status)
        self._count(timeline)
        # Of what the client got, what the meter reads of an answer in one piece.
        usage = {"usage": {"completion_tokens": timeline.generated_tokens}}
        body = b"" if parsed.stream else msgspec.json.encode(usage)
        await send({"type": "http.response.body", "body": body, "timeline": timeline})

    def _count(self, timeline: Timeline) -> None:
        if (done := work.get()) is not None:
            done.has_counts = not timeline.broken
            done.prompt_tokens += timeline.prompt_tokens
            done.cached_tokens += timeline.cached_tokens
            done.output_tokens += timeline.generated_tokens
        labels = self._model, metrics.tenant_label(tenant.get())
        metrics.series(metrics.prompt_tokens, *labels).inc(timeline.prompt_tokens)
        metrics.series(metrics.generated_tokens, *labels).inc(timeline.generated_tokens)

    async def _ended(self, end: "asyncio.Future[Ended]") -> Ended | None:
        if end.done():  # As a rule: the engine knows first.
            return end.result()
        if not self._alive():
            return None
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(end), _REPORT_S)
        return None


@dataclass(frozen=True)
class Request:
    """A request as HAProxy passes it on."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def scope(self) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": list(self.headers),
            "state": {"body": self.body},
        }


def parse(data: bytes) -> Request | None:
    """The request, or None while it is not complete.

    Raises:
        ValueError: it is none.
    """
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        return None
    first, *lines = head.split(b"\r\n")
    method, target, _ = first.decode("latin-1").split(" ")
    headers = []
    for line in lines:
        name, _, value = line.partition(b":")
        headers.append((name.lower(), value.strip()))
    length = next((int(value) for name, value in headers if name == b"content-length"), 0)
    if len(body) < length:
        return None
    return Request(method, target.partition("?")[0], tuple(headers), body[:length])


class Door:
    """The server that HAProxy asks.

    Args:
        app: the gates of the fast lane, with a `Grant` behind them.
        secret: what HAProxy says first.
        obstacle: why a request must take the full lane, or None.
        wait_s: how long a request may wait in the queue.
    """

    def __init__(
        self,
        app: ASGIApp,
        secret: str,
        obstacle: Callable[[Request], str | None],
        wait_s: Callable[[], float],
    ) -> None:
        self.app, self.obstacle, self.wait_s = app, obstacle, wait_s
        self.secret = secret.encode()
        self.address = ""  # host:port, once it listens.
        self.tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> None:
        """Listen on a port that the system picks."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), host, 0, backlog=4096)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Take nothing new."""
        if self._server is not None:
            self._server.close()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and return once every request that was let in is over."""
        self.close()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=timeout_s)


class _Connection(asyncio.Protocol):
    """One request."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._data = b""
        self._request: Request | None = None
        self._granted = False
        self._status, self._body = 0, b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._received = False
        self._passed_status = 200
        self._timer: asyncio.TimerHandle | None = None
        self._disconnected = False
        self._leaving: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._request is not None:
            # HAProxy says how the Rust front end answered, where that was not 200.
            word, _, value = data.partition(b" ")
            if word == b"status" and value.strip().isdigit():
                self._passed_status = int(value)
            return
        self._data += data
        try:
            self._request = parse(self._data)
            if self._request is None:
                if len(self._data) > LARGEST_BYTES:
                    raise ValueError("too large")
                return
        except ValueError:
            self._transport.close()
            return
        self._data = b""
        self._decide(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._disconnected = True
        if self._leaving is not None and not self._leaving.done():
            self._leaving.set_result(None)

    def _decide(self, request: Request) -> None:
        headers = dict(reversed(request.headers))  # The first of each name.
        if not hmac.compare_digest(headers.get(SECRET_HEADER, b""), self._door.secret):
            self._transport.close()
            return
        if self._door.obstacle(request) is not None:
            self._answer(b"full\n")
            return
        # Soon: the queue was not there, or it is long.
        self._timer = asyncio.get_running_loop().call_later(0.5, self._wait)
        task = asyncio.get_running_loop().create_task(self._run(request))
        self._door.tasks.add(task)
        task.add_done_callback(self._door.tasks.discard)

    def _wait(self) -> None:
        self._transport.write(f"wait {self._door.wait_s():g}\n".encode())

    async def _run(self, request: Request) -> None:
        try:
            await self._door.app(request.scope, self._receive, self._send)
        except Exception:
            logger.exception("the door failed")
        finally:
            if not self._transport.is_closing():
                self._transport.close()

    async def _receive(self) -> Message:
        assert self._request is not None
        if not self._received:
            self._received = True
            return {"type": "http.request", "body": self._request.body, "more_body": False}
        if not self._disconnected:
            self._leaving = asyncio.get_running_loop().create_future()
            await self._leaving
        return {"type": "http.disconnect", "status": self._passed_status}

    async def _send(self, message: Message) -> None:
        if (grant := message.get("grant")) is not None:
            self._granted = True
            self._stop_waiting()
            # The gates' own, as x-ratelimit-*. What the Rust front end answers has these two.
            own = (b"content-type", b"content-length")
            lines = _lines([each for each in message["headers"] if each[0].lower() not in own])
            self._transport.write(b"%s %d\n%s" % (grant, len(lines), lines))
        elif self._granted:
            return  # HAProxy has it from the Rust front end.
        elif message["type"] == "http.response.start":
            self._status, self._headers = message["status"], message["headers"]
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                self._refuse()

    def _refuse(self) -> None:
        self._stop_waiting()
        lines = _lines(self._headers)
        first = f"refuse {self._status} {len(lines)} {len(self._body)}\n".encode()
        self._answer(first + lines + self._body)

    def _answer(self, data: bytes) -> None:
        self._transport.write(data)
        self._transport.close()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%s: %s\r\n" % header for header in headers)


class Locator:
    """ASGI middleware that tells only HAProxy the address of this replica's door."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(SECRET_HEADER, b"") if scope["type"] == "http" else b""
        if not given or not hmac.compare_digest(given, self._door.secret):
            await self.app(scope, receive, send)
            return
        body = self._door.address.encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
