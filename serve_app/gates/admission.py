"""Who runs, who waits and who is turned away: the bounded queue in front of the engine.

As many sequences run as the engine batches, so that it is always full and its own queue always
short; a bounded number of requests wait in order of arrival; the rest are turned away at once,
which costs a header and no engine time. Then throughput at ten times the capacity is throughput
at capacity, and everyone who was let in is served.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import GatewayTimeout, RequestError, TooManyRequests, Unavailable
from serve_app.gates import routes
from serve_app.gates.reading import Reading
from serve_app.scaling.signals import Signals
from serve_app.settings import Limits

logger = logging.getLogger("serve_app")

# How long the application may take to end what it was told to leave.
_FAREWELL_S = 3.0


@dataclass(eq=False, slots=True)
class _Waiter:
    """A request in the queue.

    Attributes:
        turn: done once its wait is over, whichever way that is.
        room: sequences that were counted for it; None: it was given no room.
    """

    sequences: int
    body_bytes: int
    turn: asyncio.Future[None]
    room: int | None = None


class Admission:
    """Counts sequences that run and requests that wait. For one event loop.

    What is counted for a request is written down with it, and just that is given back: a turn that
    comes in the same moment as a cancellation or a timeout was either counted or it was not.

    Args:
        max_running: sequences that may run at once.
        max_queued: requests that may wait; one more is `TooManyRequests`.
    """

    def __init__(self, max_running: int, max_queued: int, retry_after_s: float) -> None:
        self.max_running = max_running
        self.max_queued = max_queued
        self.retry_after_s = retry_after_s
        self.running = 0
        self._waiting: deque[_Waiter] = deque()

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def queued_bytes(self) -> int:
        """Of the bodies of the requests that wait."""
        return sum(waiter.body_bytes for waiter in self._waiting)

    def change(self, max_running: int, max_queued: int, retry_after_s: float) -> None:
        """Other bounds from now on; who is in stays in."""
        self.max_running, self.max_queued = max_running, max_queued
        self.retry_after_s = retry_after_s
        self._wake()

    @contextlib.asynccontextmanager
    async def slot(
        self, sequences: int, queue_timeout_s: float, body_bytes: int = 0
    ) -> AsyncIterator[None]:
        """Hold room for `sequences` sequences, waiting for it in order of arrival.

        Raises:
            TooManyRequests: the queue is full.
            Unavailable: no room within `queue_timeout_s`.
        """
        if not self._waiting and (room := self._room_for(sequences)) is not None:
            self.running += room
        else:
            room = await self._wait(sequences, body_bytes, queue_timeout_s)
        try:
            yield
        finally:
            self._give_back(room)

    def _room_for(self, sequences: int) -> int | None:
        """What to count for a request that may run now, or None: it may not.

        One that is larger than the whole engine still runs, alone.
        """
        room = min(max(sequences, 1), self.max_running)
        return room if not self.running or self.running + room <= self.max_running else None

    async def _wait(self, sequences: int, body_bytes: int, timeout_s: float) -> int:
        if len(self._waiting) >= self.max_queued:
            raise TooManyRequests(
                f"{self.running} sequences run and {self.queued} requests wait, which is all this "
                "replica takes. Try again later.",
                retry_after_s=self.retry_after_s,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(sequences, body_bytes, turn)
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            self._leave(waiter)
            if isinstance(error, TimeoutError):
                raise Unavailable(
                    f"No room within {timeout_s:g} s. Try again later.",
                    retry_after_s=self.retry_after_s,
                ) from None
            raise
        assert waiter.room is not None
        return waiter.room

    def _leave(self, waiter: _Waiter) -> None:
        """Give up a place in the queue, or the room that was given in the same moment."""
        if waiter.room is not None:
            self._give_back(waiter.room)
        elif waiter in self._waiting:
            self._waiting.remove(waiter)
            self._wake()

    def _give_back(self, room: int) -> None:
        self.running -= room
        self._wake()

    def _wake(self) -> None:
        """Let in those at the head of the queue, as far as there is room."""
        while self._waiting:
            first = self._waiting[0]
            if first.turn.done():  # It leaves: it was cancelled in this turn of the loop.
                self._waiting.popleft()
                continue
            if (room := self._room_for(first.sequences)) is None:
                return
            self._waiting.popleft()
            self.running += room
            first.room = room
            first.turn.set_result(None)


class AdmissionGate:
    """ASGI middleware: admits generation requests, and bounds the time of every request.

    Args:
        healthy: whether the engine can answer; while it cannot, 503 with Retry-After.
        signals: is told who came, and how long each had to wait for room.
        waited: is told that wait, in seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        limits: Limits,
        healthy: Callable[[], bool],
        signals: Signals,
        waited: Callable[[float], None] = lambda wait_s: None,
    ) -> None:
        self.app = app
        self.admission = admission
        self.limits = limits
        self.healthy = healthy
        self.signals = signals
        self.waited = waited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _generates(scope):
            await self.app(scope, receive, send)
            return
        response = _Response(send, self._engine_error)
        parsed: Reading = scope.get("state", {}).get("reading") or Reading(sequences=1)
        came_s = time.monotonic()
        self.signals.arrived()
        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                if not self.healthy():
                    raise self._unavailable()
                queue_timeout_s = self.limits.queue_timeout_s
                async with self.admission.slot(
                    parsed.sequences, queue_timeout_s, parsed.body_bytes
                ):
                    wait_s = time.monotonic() - came_s
                    self.signals.admitted(wait_s, parsed.body_bytes)
                    self.waited(wait_s)
                    await self._answer(scope, receive, response)
            await response.end(scope)
        except TimeoutError:
            bound_s = self.limits.request_timeout_s
            await response.fail(GatewayTimeout(f"Not finished within {bound_s:g} s."), scope)
        except RequestError as error:
            await response.fail(error, scope)
        except ConnectionError:
            raise  # The connection is to end without a word (replica/backend.py).
        except Exception:
            if not response.streaming:
                raise  # It has become a response with status 500.
            logger.exception("a stream broke off")
            await response.fail(RequestError("The answer broke off. Ask again."), scope)

    async def _answer(self, scope: Scope, receive: Receive, response: "_Response") -> None:
        """Run the application, so that a cancellation also ends the engine's work.

        vLLM works on a request that is not streamed in a task of its own, which it ends when the
        client leaves, but not when it is cancelled; and cancelling is what Ray Serve does when the
        client leaves, and what a timeout does. So a cancellation is told as a client that left.
        Returns, or raises, once the engine is done with the request: only then is its room free.
        """
        inbox = _Inbox(receive)
        answer = asyncio.ensure_future(self.app(scope, inbox.receive, response.send))
        try:
            await asyncio.shield(answer)
        except asyncio.CancelledError:
            response.abandoned = True
            if response.started:
                answer.cancel()  # A stream has no task of its own.
            else:
                inbox.leave()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await asyncio.wait_for(answer, _FAREWELL_S)
            raise

    def _engine_error(self, status: int) -> RequestError | None:
        """What to answer instead of vLLM's 500 for a request whose engine died under it."""
        return self._unavailable() if status == 500 and not self.healthy() else None

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            "The engine stopped and is being replaced. Try again.",
            retry_after_s=self.limits.retry_after_s,
        )


def _generates(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    route = routes.find(scope["path"])
    return route is not None and route.generates


class _Inbox:
    """The request's channel, which may be told to say that the client left."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = False
        self._waiting: set[asyncio.Task[Any]] = set()

    async def receive(self) -> Message:
        if self._left:
            return await _no_message()
        # vLLM waits for a message in a task of its own.
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            return await self._receive()
        except asyncio.CancelledError:
            if not self._left or task.uncancel():
                raise  # Somebody else cancelled it as well.
            return await _no_message()
        finally:
            self._waiting.discard(task)

    def leave(self) -> None:
        """The client left: whoever waits for a message, or asks for one later, hears that."""
        self._left = True
        for task in self._waiting:
            task.cancel()


class _Response:
    """The response under way: an error becomes a response before it began, an event after.

    Attributes:
        started: whether the client has been sent anything.
        streaming: it is a stream that has begun.
        abandoned: what the application still sends is dropped.
    """

    def __init__(self, send: Send, instead: Callable[[int], RequestError | None]) -> None:
        self._send = send
        self._instead = instead
        self.started = False
        self.abandoned = False
        self.streaming = False
        self._replaced: RequestError | None = None

    async def send(self, message: Message) -> None:
        if self.abandoned:
            return
        if message["type"] == "http.response.start":
            self._replaced = self._instead(message["status"])
            if self._replaced is None:
                self.started = True
                self.streaming = any(
                    name == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message["headers"]
                )
        if self._replaced is None:
            await self._send(message)

    async def end(self, scope: Scope) -> None:
        """Send what was put in the place of the application's own answer, if anything was."""
        if self._replaced is not None:
            await self._replaced(scope, _no_message, self._send)

    async def fail(self, error: RequestError, scope: Scope) -> None:
        if not self.started:
            await error(scope, _no_message, self._send)
        elif self.streaming:
            event = b"event: error\n" if scope["path"] == "/v1/messages" else b""
            data = b"data: " + error.body() + b"\n\n"
            body = {"type": "http.response.body", "body": event + data, "code": error.code}
            await self._send(body)


async def _no_message() -> Message:
    return {"type": "http.disconnect"}
