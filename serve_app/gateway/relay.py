"""The road of a request through the gateway: to a replica, and to another one if that fails.

    1  what decides about its way is read from it                        Ask
    2  a replica is chosen                                               routing.py, replicas.py
    3  the request goes there, its answer comes back event by event      _forward
    4  the replica fails: the answer goes on with 2, from where it was   continuation.py

Nothing else of a request is looked into: what it means is the engine's to say.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import aiohttp
import msgspec
from starlette.types import Message, Scope, Send
from yarl import URL

from serve_app.continuation import Method, Stream
from serve_app.errors import (
    BadRequest,
    CannotContinue,
    GatewayTimeout,
    Poison,
    RequestError,
    Unavailable,
)
from serve_app.gates import reading, routes
from serve_app.gates.keys import tenant
from serve_app.gates.reading import Reading
from serve_app.gateway.fleet import Replica, Replicas
from serve_app.gateway.routing import Candidate, Router, prefix_keys
from serve_app.observe import metrics
from serve_app.replica.backend import (
    ABSENT,
    CONTINUE_HEADER,
    FAILED_HEADER,
    SILENT_HEADER,
    TENANT_HEADER,
    TOKEN_HEADER,
)
from serve_app.settings import Gateway

logger = logging.getLogger("serve_app")

# A replica is on the same network: one that does not take a connection within this is not there.
_CONNECT_S = 2.0
# How soon those that were full are asked again to go on with an answer.
_AGAIN_S = 0.2
# What a request is taken to cost before anything is known of it: bytes of a prompt for each token,
# tokens of an answer that names no bound, and of one that names any.
_BYTES_A_TOKEN, _TOKENS_EXPECTED, _MOST_TOKENS_EXPECTED = 4, 256, 4096
# A second death counts against a request unless its answer went on by so many tokens in between.
_INNOCENT = 8
# What concerns one connection, or is made anew on each.
_HOP_HEADERS = frozenset(
    (b"host", b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"upgrade")
)
_OWN_HEADERS = frozenset(
    (TOKEN_HEADER.encode(), CONTINUE_HEADER.encode(), TENANT_HEADER.encode(), b"x-request-id")
)


@dataclass
class Ask:
    """A request on its way.

    Attributes:
        keys, session: what routing goes by.
        tokens: what it is taken to cost a replica: prompt and answer.
        deaths: replicas that died under it, less those that it was innocent of.
        tried: names of the replicas that failed it.
    """

    id: str
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    model: str | None = None
    keys: tuple[int, ...] = ()
    session: str | None = None
    tokens: int = 0
    deaths: int = 0
    attempts: int = 0
    tried: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, scope: Scope, body: bytes, session_header: str) -> "Ask":
        given = {name: value for name, value in scope["headers"]}
        request_id = given.get(b"x-request-id", b"").decode("latin-1") or uuid.uuid4().hex
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in scope["headers"]
            if name not in _HOP_HEADERS and name not in _OWN_HEADERS
        ]
        # Each attempt has the same: the answer's id is made of it.
        headers.append(("x-request-id", request_id))
        headers.append((TENANT_HEADER, tenant.get()))
        query = scope.get("query_string", b"").decode("latin-1")
        raw = scope.get("raw_path") or scope["path"].encode()
        path = raw.decode("latin-1").partition("?")[0] + (f"?{query}" if query else "")
        ask = cls(request_id, scope["method"], path, headers, body)
        asked = _reading(scope, body)
        ask.model = asked.model
        if asked.sequences:
            ask.keys = prefix_keys(asked.prompt_head)
            ask.tokens = _expected_tokens(asked)
        header = given.get(session_header.encode(), b"").decode("latin-1")
        ask.session = header or asked.session
        return ask

    def again(self) -> "Ask":
        """The same for another model."""
        return replace(self, tried=[])


def _reading(scope: Scope, body: bytes) -> Reading:
    """What LimitGate read of the body, or what stands in it where no LimitGate is."""
    left: Reading | None = scope.get("state", {}).get("reading")
    if left is not None:
        return left
    try:
        return reading.read(routes.find(scope["path"]) or routes.OTHER, body)
    except BadRequest:
        return Reading()  # The engine says what is wrong with it.


def _expected_tokens(asked: Reading) -> int:
    """What a request is taken to cost a replica; a huge bound says nothing of the answer."""
    answer = asked.max_tokens or _TOKENS_EXPECTED
    most = min(max(answer, 1), _MOST_TOKENS_EXPECTED)
    return asked.body_bytes // _BYTES_A_TOKEN + most * asked.sequences


@dataclass(frozen=True)
class Whole:
    """A response that came in one piece."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Answer:
    """What the client has been sent so far.

    Attributes:
        begun: there is a status; an error can only be an event now.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False
        self.stream = Stream()

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def data(self, data: bytes) -> None:
        if events := self.stream.events(data):
            body = b"\n\n".join(events) + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def whole(self, answer: Whole) -> None:
        length = (b"content-length", str(len(answer.body)).encode())
        await self.begin(answer.status, [*answer.headers, length])
        await self._send({"type": "http.response.body", "body": answer.body})

    async def fail(self, error: RequestError, path: str) -> None:
        if not self.begun:
            await error({"type": "http"}, _nothing, self._send)
            return
        name = b"event: error\n" if path.startswith("/v1/messages") else b""
        body = name + b"data: " + error.body() + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "code": error.code})


class Relay:
    """Passes requests to the replicas of one model.

    Args:
        timeout_s: of a whole request, its attempts and waits together.
        model: its name, for metrics.
        wake: called where there is no replica: asks for one.
    """

    def __init__(
        self,
        replicas: Replicas,
        router: Router,
        settings: Gateway,
        timeout_s: float,
        model: str,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.replicas = replicas
        self._router = router
        self._settings = settings
        self._timeout_s = timeout_s
        self._wake = wake
        self._model = model
        metrics.replicas_known.labels(model).set_function(lambda: len(replicas.ready()))
        # A count that begins above 0 has no rate: the first failure would not be seen.
        metrics.retries.labels(model)
        for kind in FAILURES:
            metrics.failed_attempts.labels(model, kind)
        for how in ("again", Method.RESUME, Method.REPEAT):
            metrics.continuations.labels(model, how)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=300),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=2**18,
        )
        self._visits: set[_Visit] = set()
        self._watch = asyncio.create_task(self._watch_visits())

    async def close(self) -> None:
        self._watch.cancel()
        await self._session.close()

    async def __call__(self, ask: Ask, send: Send) -> None:
        """Answer one request. Ray Serve cancels this when the client leaves."""
        answer = Answer(send)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._serve(ask, answer)
        except TimeoutError:
            error = GatewayTimeout(f"Not finished within {self._timeout_s:g} s.")
            await answer.fail(error, ask.path)
        except RequestError as error:
            await answer.fail(error, ask.path)

    async def _serve(self, ask: Ask, answer: Answer) -> None:
        """Answer from one replica, or from one after the other."""
        busy_until_s: float | None = None
        while True:
            replica = await self._choose(ask)
            known = len(answer.stream.progress.groups)
            try:
                with _carrying(replica, ask):
                    await self._forward(replica, ask, answer)
                self.replicas.answered(replica)
                return
            except Busy as busy:
                # Full, not broken: others may have room. The last one speaks for all.
                ask.tried.append(replica.name)
                metrics.retries.labels(self._model).inc()
                if self.replicas.others(ask.tried):
                    continue
                if not answer.begun:
                    await answer.whole(busy.said)
                    return
                # Who has been sent the half of an answer is not sent away: there will be room.
                busy_until_s = busy_until_s or time.monotonic() + self._settings.replica_timeout_s
                if time.monotonic() > busy_until_s:
                    raise Unavailable("Every replica is full.", retry_after_s=1.0) from busy
                ask.tried.clear()
                await asyncio.sleep(_AGAIN_S)
            except ReplicaFailed as failure:
                ask.tried.append(replica.name)
                self.replicas.failed(replica)
                self._router.forget(replica.name)
                went_on = len(answer.stream.progress.groups) - known >= _INNOCENT
                metrics.failed_attempts.labels(self._model, failure.kind).inc()
                logger.warning(
                    "replica %s failed: %s", replica.name, failure, extra={"request_id": ask.id}
                )
                self._may_go_on(failure, ask, answer.stream, went_on)
                stream = answer.stream
                how = str(stream.method) if stream.sent and stream.method else "again"
                metrics.continuations.labels(self._model, how).inc()

    def _may_go_on(self, failure: "ReplicaFailed", ask: Ask, stream: Stream, went_on: bool) -> None:
        """Whether another replica may be asked.

        Raises:
            RequestError: it has been too often, or the answer would not be exact.
        """
        ask.attempts += 1
        if failure.died:
            ask.deaths = 1 if went_on else ask.deaths + 1
        if ask.deaths >= self._settings.max_deaths:
            raise Poison(f"{ask.deaths} replicas died while they worked on this request.")
        if ask.attempts >= self._settings.max_attempts:
            raise Unavailable(f"{ask.attempts} replicas failed this request.", retry_after_s=1.0)
        if stream.progress.groups and stream.method is Method.NEVER:
            raise CannotContinue(
                "The replica that wrote this answer is gone, and no other can go on with it "
                "exactly. Ask again."
            )

    async def _choose(self, ask: Ask) -> Replica:
        if not len(self.replicas):
            self._wake()
        timeout_s = self._settings.replica_timeout_s
        with metrics.unplaced.labels(self._model).track_inprogress():
            found = await self.replicas.some(timeout_s, ask.tried)
        if not found:
            raise Unavailable(f"No replica within {timeout_s:g} s.", retry_after_s=1.0)
        candidates = [
            Candidate(replica.name, replica.outstanding, replica.running) for replica in found
        ]
        choice = self._router.choose(candidates, ask.keys, ask.session)
        return next(replica for replica in found if replica.name == choice.name)

    async def _forward(self, replica: Replica, ask: Ask, answer: Answer) -> None:
        """Send the request to one replica, and its answer to the client.

        Raises:
            Busy: the replica takes nothing now.
            ReplicaFailed: the answer did not come, or not to its end.
        """
        headers, body = _sent(ask, answer.stream, replica)
        url = URL(f"http://{replica.address}{ask.path}", encoded=True)
        visit = _Visit(replica, asyncio.timeout(None))
        self._visits.add(visit)
        try:
            async with (
                visit.limit,
                self._session.request(ask.method, url, data=body, headers=headers) as response,
            ):
                if (how := response.headers.get(FAILED_HEADER)) is not None:
                    if how == ABSENT:
                        raise ReplicaFailed("its engine is being started anew", "connection")
                    raise ReplicaFailed("its engine failed")
                kept = _kept(response)
                if response.content_type != "text/event-stream":
                    whole = Whole(response.status, kept, await response.read())
                    if response.status in (429, 503):
                        raise Busy(whole)
                    await answer.whole(whole)
                    return
                await answer.begin(response.status, kept)
                async for data in response.content.iter_any():
                    visit.sending = True
                    await answer.data(data)
                    visit.sending = False
                    visit.silent_from_s = time.monotonic()
                await answer.end()
        except aiohttp.ClientConnectorError as error:
            raise ReplicaFailed(
                f"it takes no connection: {error.os_error}", "connection"
            ) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ReplicaFailed(f"{type(error).__name__}: {error}") from error
        except TimeoutError as error:
            if not visit.limit.expired():
                raise
            raise ReplicaFailed("it fell silent", "silent") from error
        finally:
            self._visits.discard(visit)

    async def _watch_visits(self) -> None:
        """Break off what stalls: a stream that stopped, all at a replica or engine that did."""
        bound_s = self._settings.stall_timeout_s
        pings: dict[Replica, asyncio.Task[bool]] = {}
        while True:
            await asyncio.sleep(min(1.0, bound_s / 4))
            now_s = time.monotonic()
            for replica in {visit.replica for visit in self._visits} - pings.keys():
                pings[replica] = asyncio.create_task(self._ping(replica, bound_s))
            lost = {r for r, ping in pings.items() if ping.done() and not ping.result()}
            pings = {replica: ping for replica, ping in pings.items() if not ping.done()}
            for visit in list(self._visits):
                since_s = visit.silent_from_s
                stopped = since_s is not None and now_s - since_s > bound_s
                if not visit.sending and (stopped or visit.replica in lost):
                    visit.limit.reschedule(0)

    async def _ping(self, replica: Replica, timeout_s: float) -> bool:
        """Whether a replica's event loop turns, and its engine is not silent for too long."""
        url, headers = f"http://{replica.address}/ping", {TOKEN_HEADER: replica.token}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.get(url, headers=headers) as response,
            ):
                return float(response.headers.get(SILENT_HEADER, 0)) <= timeout_s
        except TimeoutError:
            return False
        except (aiohttp.ClientError, OSError):
            return True  # Refused or cut: its requests hear of that themselves.


class Busy(Exception):
    """A replica takes nothing now: what it said, for when all say so."""

    def __init__(self, said: Whole) -> None:
        super().__init__(f"status {said.status}")
        self.said = said


FAILURES = ("connection", "died", "silent")


class ReplicaFailed(Exception):
    """A replica did not answer to the end.

    Attributes:
        kind: how, one of FAILURES; "connection": it takes none.
    """

    def __init__(self, why: str, kind: str = "died") -> None:
        super().__init__(why)
        self.kind = kind

    @property
    def died(self) -> bool:
        """Whether it may have been this request that ended it."""
        return self.kind != "connection"


@dataclass(eq=False)
class _Visit:
    """A request at a replica.

    Attributes:
        sending: the client is being sent what has come: broken off now, that would be lost.
        silent_from_s: when the last of it was sent; None before the answer has begun.
    """

    replica: Replica
    limit: asyncio.Timeout
    sending: bool = False
    silent_from_s: float | None = None


@contextlib.contextmanager
def _carrying(replica: Replica, ask: Ask) -> Iterator[None]:
    replica.outstanding += ask.tokens
    replica.running += 1
    try:
        yield
    finally:
        replica.outstanding -= ask.tokens
        replica.running -= 1


def _sent(ask: Ask, stream: Stream, replica: Replica) -> tuple[list[tuple[str, str]], bytes]:
    """Headers and body for a replica; with what is known of the answer, if it has begun."""
    headers, body = [*ask.headers, (TOKEN_HEADER, replica.token)], ask.body
    if stream.sent:
        stream.again()
        progress = msgspec.structs.replace(stream.progress, repeat=stream.method is Method.REPEAT)
        known = msgspec.json.encode(progress)
        headers.append((CONTINUE_HEADER, str(len(known))))
        body = known + body
    return headers, body


def _kept(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    """A replica's headers, less those of its connection."""
    named = ((name.lower(), value) for name, value in response.raw_headers)
    return [(name, value) for name, value in named if name not in _HOP_HEADERS]


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
