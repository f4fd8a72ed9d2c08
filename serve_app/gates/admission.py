"""Which requests run, wait or are refused: the bounded queue in front of the engine.

As many sequences run as the engine batches, so the engine is always full and its own queue always
short. A bounded number of requests wait. Further requests are refused at once, which costs a header
and no engine time. So the throughput at ten times the capacity equals that at capacity, and every
admitted request is served. Requests are admitted in order of arrival, or with tenants by their
shares (tenants/fair.py).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import sse
from serve_app.errors import GatewayTimeout, RequestError, TooManyRequests, Unavailable
from serve_app.gates import routes
from serve_app.gates.reading import Reading
from serve_app.gates.work import BatchClock, Work, work
from serve_app.scaling.signals import Signals
from serve_app.settings import Limits
from serve_app.tenants.fair import EVERYBODY, UNREAD_TOKENS, Entry, FairQueue, Share, work_of

logger = logging.getLogger("serve_app")

# How long the application may take to end a request that was cancelled.
_CANCELLED_S = 3.0


@dataclass(eq=False, slots=True)
class _Request:
    """A request in the queue or the engine.

    Attributes:
        turn: done once its wait is over, whichever way that is.
        entry: its place in the queue, or in the account of its tenant.
        prompt_tokens: that it is expected to have.
        room: sequences that are counted for it; None: it was given no room.
        began_s: when it was given room, on the clock of the batch.
    """

    sequences: int
    body_bytes: int
    prompt_tokens: int
    turn: asyncio.Future[None] | None = None
    entry: "Entry[_Request] | None" = None
    room: int | None = None
    began_s: float = 0.0


class Admission:
    """Counts sequences that run and requests that wait. For one event loop.

    What is counted for a request is written down with it, and just that is given back: a turn that
    comes in the same moment as a cancellation or a timeout was either counted or it was not.

    Args:
        max_running: sequences that may run at once.
        max_queued: requests that may wait; one more is `TooManyRequests`.
        gpus: of the engine.
        max_unread_tokens: as in `FairQueue`.

    Attributes:
        running: sequences that were let in.
        admitted: requests that were ever let in.
        closed: no request is admitted, and all wait, for example while the engine sleeps.
    """

    def __init__(
        self,
        max_running: int,
        max_queued: int,
        retry_after_s: float,
        gpus: int = 1,
        max_unread_tokens: int = UNREAD_TOKENS,
    ) -> None:
        self.max_running = max_running
        self.max_queued = max_queued
        self.retry_after_s = retry_after_s
        self.running = self.admitted = 0
        self.closed = False
        self._changed = asyncio.Event()
        self._queue: FairQueue[_Request] = FairQueue(max_unread_tokens)
        # Of the bodies of the requests that wait.
        self.queued_bytes = 0
        self._clock = BatchClock(gpus)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def change(self, max_running: int, max_queued: int, retry_after_s: float) -> None:
        """Change the bounds. Requests that were admitted stay admitted."""
        self.max_running, self.max_queued = max_running, max_queued
        self.retry_after_s = retry_after_s
        self._wake()

    def close(self) -> None:
        """Admit no request until `open`. Admitted requests continue.

        Those that would be running may wait as well, so that `max_queued` refuses no more of them.
        """
        self.closed = True

    def open(self) -> None:
        """Let requests in again, those that wait first."""
        self.closed = False
        self._wake()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once the condition holds; it is checked when a request begins to wait or ends."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def read(self, sequences: int) -> None:
        """The engine produced the first tokens of this many sequences: their prompts have been
        read.
        """
        self._queue.read(sequences)
        self._wake()

    @contextlib.asynccontextmanager
    async def slot(
        self,
        sequences: int,
        queue_timeout_s: float,
        body_bytes: int = 0,
        share: Share = EVERYBODY,
        expected_work: float = 0.0,
        done: Work | None = None,
        prompt_tokens: int = 0,
    ) -> AsyncIterator[int]:
        """Hold room for `sequences` sequences, waiting for it as long as others are served first.

        Yields the sequences that are counted for it.

        Args:
            done: what the engine does for it, as far as that is known when its room is given back:
                its tenant is charged for that instead of `expected_work`.
            prompt_tokens: that its prompt is expected to have.

        Raises:
            TooManyRequests: the queue is full.
            Unavailable: no room within `queue_timeout_s`.
        """
        request = _Request(sequences, body_bytes, prompt_tokens)
        room = self._room_for(request, share)
        if room is not None and self._may_pass(share):
            request.entry = self._queue.begin_at_once(
                share, room, expected_work, request, prompt_tokens
            )
            self._count(request, room)
        else:
            await self._wait(request, share, expected_work, queue_timeout_s)
        assert request.room is not None
        try:
            yield request.room
        finally:
            self._give_back(request, done or Work())

    def _may_pass(self, share: Share) -> bool:
        """Whether a request that there is room for need not wait behind those that wait."""
        if not self._queue:
            return True
        # It may use places reserved for its tenant if no request waits for them.
        return not self._queue.is_above(share) and self._queue.first_below_share() is None

    def _room_for(self, request: _Request, share: Share) -> int | None:
        """What to count for a request that may run now, or None: it may not.

        One that is larger than the whole engine still runs, alone.
        """
        if self.closed:
            return None
        room = min(max(request.sequences, 1), self.max_running)
        if not self.running:
            return room
        fits = self._queue.fits(share, room, request.prompt_tokens, self.running, self.max_running)
        return room if fits else None

    async def _wait(
        self, request: _Request, share: Share, expected_work: float, timeout_s: float
    ) -> None:
        if len(self._queue) >= self.max_queued + (self.max_running if self.closed else 0):
            self._make_place(share)
        turn = request.turn = asyncio.get_running_loop().create_future()
        request.entry = self._queue.push(
            share, max(1, request.sequences), expected_work, request, request.prompt_tokens
        )
        self.queued_bytes += request.body_bytes
        self._changed.set()
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            self._leave(request)
            if isinstance(error, TimeoutError):
                raise Unavailable(
                    f"The request waited {timeout_s:g} s for capacity. Try again later.",
                    retry_after_s=self.retry_after_s,
                ) from None
            raise

    def _make_place(self, share: Share) -> None:
        """Turn away a request of the tenant that has the most in the full queue.

        Raises:
            TooManyRequests: that is the tenant of the new request.
        """
        error = TooManyRequests(
            f"This replica is full: {self.running} sequences are running and {self.queued} "
            "requests are waiting. Try again later.",
            retry_after_s=self.retry_after_s,
        )
        victim = self._queue.victim(share)
        if victim is None:
            raise error
        self._unqueue(victim.item)
        assert victim.item.turn is not None
        if not victim.item.turn.done():
            victim.item.turn.set_exception(error)

    def _leave(self, request: _Request) -> None:
        """Give up a place in the queue, or the room that was given in the same moment."""
        if request.room is not None:
            self._give_back(request, Work())
        elif request.entry is not None:
            self._unqueue(request)
            self._wake()

    def _unqueue(self, request: _Request) -> None:
        assert request.entry is not None
        self._queue.leave(request.entry)
        self.queued_bytes -= request.body_bytes
        request.entry = None

    def _count(self, request: _Request, room: int) -> None:
        request.room, request.began_s = room, self._clock.advance(self.running)
        self.running += room
        self.admitted += 1

    def _give_back(self, request: _Request, done: Work) -> None:
        assert request.room is not None
        assert request.entry is not None
        done.gpu_s += request.room * (self._clock.advance(self.running) - request.began_s)
        self.running -= request.room
        read = done.prompt_tokens - done.cached_tokens
        # What the engine says nothing of was as much work as expected.
        spent = work_of(read, done.output_tokens) if done.has_counts else request.entry.work
        self._queue.end(request.entry, spent)
        self._changed.set()
        self._wake()

    def _wake(self) -> None:
        """Let in those whose turn it is, as far as there is room."""
        while (entry := self._next()) is not None:
            request = entry.item
            assert request.turn is not None
            if request.turn.done():  # It leaves: it was cancelled in this turn of the loop.
                self._unqueue(request)
                continue
            room = self._room_for(request, entry.share)
            assert room is not None
            self.queued_bytes -= request.body_bytes
            self._queue.begin(entry, room)
            self._count(request, room)
            request.turn.set_result(None)

    def _next(self) -> "Entry[_Request] | None":
        """The request to let in now, or to forget; None: there is none, or no room for it."""
        first = self._queue.first()
        if first is None or _has_left(first) or self._room_for(first.item, first.share):
            return first
        if self.running + min(first.item.sequences, self.max_running) > self.max_running:
            return None
        # There is room that is kept for others.
        first = self._queue.first_below_share()
        if first is None or _has_left(first) or self._room_for(first.item, first.share):
            return first
        return None


def _has_left(entry: "Entry[_Request]") -> bool:
    return entry.item.turn is not None and entry.item.turn.done()


class AdmissionGate:
    """ASGI middleware: admits generation requests, and bounds the time of every request.

    Args:
        healthy: whether the engine can answer; while it cannot, 503 with Retry-After.
        signals: gets each arrival, and how long it waited for a place.
        waited: gets that wait, in seconds.
        cancellable: whether `app` ends the engine's work itself when it is cancelled.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        limits: Limits,
        healthy: Callable[[], bool],
        signals: Signals,
        waited: Callable[[float], None] = lambda wait_s: None,
        cancellable: bool = False,
    ) -> None:
        self.app = app
        self.admission = admission
        self.limits = limits
        self.healthy = healthy
        self.signals = signals
        self.waited = waited
        self._cancellable = cancellable

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _generates(scope):
            await self.app(scope, receive, send)
            return
        response = _Response(send, self._engine_error)
        state = scope.get("state", {})
        parsed: Reading = state.get("reading") or Reading(sequences=1)
        share: Share = state.get("share", EVERYBODY)
        done: Work = state.get("work") or Work()
        arrived_s = time.monotonic()
        self.signals.arrived()
        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                if not self.healthy():
                    raise self._unavailable()
                async with self.admission.slot(
                    parsed.sequences,
                    self.limits.queue_timeout_s,
                    parsed.body_bytes,
                    share,
                    work_of(parsed.prompt_tokens_expected, parsed.output_tokens_expected),
                    done,
                    parsed.prompt_tokens_expected,
                ):
                    work.set(done)
                    wait_s = time.monotonic() - arrived_s
                    self.signals.admitted(wait_s, parsed.body_bytes)
                    self.waited(wait_s)
                    await self._answer(scope, receive, response)
            await response.end(scope)
        except TimeoutError:
            bound_s = self.limits.request_timeout_s
            await response.fail(
                GatewayTimeout(f"The response was not complete within {bound_s:g} s."), scope
            )
        except RequestError as error:
            await response.fail(error, scope)
        except ConnectionError:
            raise  # The connection must end without an answer (replica/backend.py).
        except Exception:
            if not response.streaming:
                raise  # It has become a response with status 500.
            logger.exception("a stream failed after it had begun")
            await response.fail(RequestError("The response was interrupted. Try again."), scope)

    async def _answer(self, scope: Scope, receive: Receive, response: "_Response") -> None:
        """Run the application, so that a cancellation also ends the engine's work.

        vLLM works on a request that is not streamed in a task of its own, which it ends when the
        client leaves, but not when it is cancelled; and cancelling is what Ray Serve does when the
        client leaves, and what a timeout does. So a cancellation counts as a client that left.
        Returns, or raises, once the engine is done with the request: only then is its room free.
        """
        if self._cancellable:
            await self.app(scope, receive, response.send)
            return
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
                await asyncio.wait_for(answer, _CANCELLED_S)
            raise

    def _engine_error(self, status: int) -> RequestError | None:
        """What to answer instead of vLLM's 500 for a request whose engine died under it."""
        return self._unavailable() if status == 500 and not self.healthy() else None

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            "The engine failed and is being restarted. Try again.",
            retry_after_s=self.limits.retry_after_s,
        )


def _generates(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    route = routes.find(scope["path"])
    return route is not None and route.generates


class _Inbox:
    """The request's channel, which can report that the client has left."""

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
        """Report to present and later readers that the client has left."""
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
                self.streaming = sse.is_stream(message)
        if self._replaced is None:
            await self._send(message)

    async def end(self, scope: Scope) -> None:
        """Send the replacement of the application's answer, if there is one."""
        if self._replaced is not None:
            await self._replaced(scope, _no_message, self._send)

    async def fail(self, error: RequestError, scope: Scope) -> None:
        if not self.started:
            await error(scope, _no_message, self._send)
        elif self.streaming:
            event = sse.error_event(scope["path"], error.body())
            await self._send({"type": "http.response.body", "body": event, "code": error.code})


async def _no_message() -> Message:
    return {"type": "http.disconnect"}
