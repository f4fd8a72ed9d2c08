"""A replica's own HTTP server, for the gateway: who may connect, and what marks its streams carry.

Behind a gateway an engine's replica is not an ingress of Ray Serve, which would open no port for
it. It listens on a port that the system picks, on its node's address, and tells address and token
to the gateway as Serve's replica metadata. Whoever lacks the token is told nothing.

A body that goes on with an answer begins with its `Progress`, as many bytes as the header
`x-continue` says, and the request as it was follows.
"""

import asyncio
import contextlib
import hmac
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import msgspec
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import sse
from serve_app.continuation import Marks, Progress
from serve_app.errors import NotFound
from serve_app.gates.keys import tenant
from serve_app.replica import accounts
from serve_app.replica.accounts import Accounts
from serve_app.tenants.fair import Share

TOKEN_HEADER, CONTINUE_HEADER = "x-engine-token", "x-continue"
# In the answer to a ping: for how many seconds the engine has been asked for something and has
# neither answered nor worked.
STALLED_HEADER = "x-engine-stalled"
# Who asks, as the gateway found out; percent-encoded.
TENANT_HEADER = "x-tenant"
# Its weight, and the rank of its class, where there are tenants.
SHARE_HEADER = "x-tenant-share"
# The prefix below which clients reach the gateway; absent where it is /.
PREFIX_HEADER = "x-route-prefix"
# Of an answer that is none: the engine failed before it began, or is not there at all.
FAILED_HEADER = "x-engine-failed"
DIED, ABSENT = "died", "absent"
# In the metadata of a replica that has a fast lane: where its door is, and what it serves.
FAST_LANE = "fast_lane"


@dataclass
class Exchange:
    """One request of the gateway, as the engine sees it.

    Attributes:
        progress: what is known of the answer already; None for a new one.
        sequences: that were begun for it.
        replayed: what vLLM made of the progress, to be given out again.
        repeating: the engine's name of the request whose tokens are made again.
        started: its response has begun.
        broken: the engine failed under it: the connection ends, instead of an error event.
    """

    marks: Marks = field(default_factory=Marks)
    progress: Progress | None = None
    sequences: int = 0
    replayed: deque[Any] = field(default_factory=deque)
    repeating: str = ""
    started: bool = False
    broken: bool = False


# Set for the time of a request; vLLM's handlers and generate() run in its context.
exchange: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


class EngineFailed(ConnectionAbortedError):
    """Ends a connection before the end of its response, which tells the gateway."""


class Backend:
    """ASGI middleware: asks for the token, hands `Progress` to the engine, marks the events.

    Args:
        has_engine: whether an engine runs.
        stalled_s: for how long it has been asked and has neither answered nor worked.
        accounts: get the work of each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str,
        has_engine: Callable[[], bool] = lambda: True,
        stalled_s: Callable[[], float] = lambda: 0.0,
        accounts: Accounts | None = None,
    ) -> None:
        self.app = app
        self.token = token.encode()
        self._has_engine, self._stalled_s = has_engine, stalled_s
        self._accounts = accounts or Accounts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self._has_engine():  # Anybody may know, as of a port that is closed.
            await _send_status(send, 502, FAILED_HEADER, ABSENT)
            return
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(TOKEN_HEADER.encode(), b""), self.token):
            await NotFound("No such route.")(scope, receive, send)
            return
        if scope["path"] == "/ping":
            await _send_status(send, 200, STALLED_HEADER, f"{self._stalled_s():g}")
            return
        account = headers.get(accounts.HEADER.encode())
        if scope["path"] == accounts.PATH and account is not None:
            await self._accounts.read(account.decode("latin-1"), receive, send)
            return
        with self._accounts.account(account) as done:
            scope.setdefault("state", {})["work"] = done
            await self._exchange(scope, headers, receive, send)

    async def _exchange(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        """Answer one request of a gateway."""
        current = Exchange()
        if (length := headers.get(CONTINUE_HEADER.encode())) is not None:
            current.progress, receive = await _split(int(length), receive)
        exchange.set(current)
        if (holder := headers.get(TENANT_HEADER.encode())) is not None:
            tenant.set(unquote(holder.decode("latin-1")))
        if (prefix := headers.get(PREFIX_HEADER.encode())) is not None:
            scope["root_path"] = prefix.decode("latin-1")
        if (words := headers.get(SHARE_HEADER.encode())) is not None:
            weight, rank = words.split()
            scope["state"]["share"] = Share(tenant.get(), float(weight), int(rank))
        try:
            await self.app(scope, receive, _marking(current, send))
        except EngineFailed:
            if current.started:
                raise
            # uvicorn would make of it a 500 that looks like an answer.
            await _send_status(send, 502, FAILED_HEADER, DIED)


async def _send_status(send: Send, status: int, header: str, value: str) -> None:
    """A response that consists of one header."""
    headers = [(header.encode(), value.encode()), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _split(length: int, receive: Receive) -> tuple[Progress, Receive]:
    """What stands before the request's own body, and a channel that gives the rest."""
    body, more = b"", True
    while more and len(body) < length:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise EngineFailed("the gateway left")
        body += message.get("body", b"")
        more = message.get("more_body", False)
    progress = msgspec.json.decode(body[:length], type=Progress)
    first: Message | None = {
        "type": "http.request",
        "body": body[length:],
        "more_body": more,
    }

    async def rest() -> Message:
        nonlocal first
        if first is None:
            return await receive()
        message, first = first, None
        return message

    return progress, rest


def _marking(current: Exchange, send: Send) -> Send:
    streaming = False

    async def marked(message: Message) -> None:
        nonlocal streaming
        if current.broken:
            raise EngineFailed("the engine failed")
        if message["type"] == "http.response.start":
            current.started = True
            streaming = sse.is_stream(message)
        elif streaming and message.get("body") and (lines := current.marks.take()):
            message = {**message, "body": lines + message["body"]}
        await send(message)

    return marked


class Server:
    """The HTTP server. Serves from `start` to `drain`.

    Attributes:
        address: host:port.
        token: what a request must bring.
        accounts: what gateways are told of their requests.
    """

    def __init__(self, host: str) -> None:
        self._socket = socket.create_server((host, 0), family=_family(host), backlog=2048)
        self.address = "{}:{}".format(*self._socket.getsockname()[:2])
        self.token = secrets.token_urlsafe(32)
        self.accounts = Accounts()
        self._server: _Quiet | None = None
        self._task: asyncio.Task[None] | None = None

    def start(
        self,
        app: ASGIApp,
        has_engine: Callable[[], bool] = lambda: True,
        stalled_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        config = uvicorn.Config(
            Backend(app, self.token, has_engine, stalled_s, self.accounts),
            log_config=None,  # It would close the handlers of everybody else.
            log_level="critical",  # What broke is the gateway's to tell.
            access_log=False,
            lifespan="off",
            timeout_keep_alive=600,
            server_header=False,
            date_header=False,
        )
        self._server = _Quiet(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and return once every request has been answered."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        self.accounts.close()
        _, late = await asyncio.wait({self._task}, timeout=timeout_s)
        if late:
            self._server.force_exit = True
            await asyncio.wait({self._task}, timeout=1)


class _Quiet(uvicorn.Server):
    """A server beside others in this process, which does not handle signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
