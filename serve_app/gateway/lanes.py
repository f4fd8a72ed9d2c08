"""The two ways to a replica's answer: its own HTTP server (full), and vllm-rs on its engine (fast).

The capability table decides whether a request may take the fast lane (lanes/capability.py), once,
at its first attempt. After a failure it continues in the full lane.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Literal

import aiohttp
import msgspec
from yarl import URL

from serve_app.continuation import Method, Stream
from serve_app.gateway.answer import Answer
from serve_app.gateway.failures import Busy, ReplicaFailed, WholeResponse
from serve_app.gateway.fleet import Upstream
from serve_app.gateway.handover import FastStream
from serve_app.gateway.place import CONNECT_S, Place, hold
from serve_app.gateway.request import Request
from serve_app.gateway.visit import Visit
from serve_app.lanes import capability
from serve_app.lanes.door import LARGEST_BYTES
from serve_app.replica.backend import ABSENT, CONTINUE_HEADER, FAILED_HEADER
from serve_app.settings import Limits

Lane = Literal["fast", "python"]
# How long idle connections are kept. The server at the other end keeps them for longer, or it would
# close one under a request: vllm-rs for 75 s (replica/frontends.py), our own for 600.
_IDLE_FAST_S, _IDLE_FULL_S = 60, 300
# Fields that put more into a stream's events than text and token ids, which handover.py continues.
_MORE_THAN_TEXT = frozenset({"echo", "logprobs", "top_logprobs", "tools", "tool_choice"})
# Of a request's headers, what vllm-rs is not shown.
_CREDENTIALS = frozenset({"authorization", "x-api-key"})


class Lanes:
    """Asks replicas, in either lane.

    Args:
        limits: those that are in force.
    """

    def __init__(self, limits: Callable[[], Limits]) -> None:
        self._limits = limits
        self.full, self._fast = _session(_IDLE_FULL_S), _session(_IDLE_FAST_S)

    async def close(self) -> None:
        await self.full.close()
        await self._fast.close()

    @contextlib.asynccontextmanager
    async def ask(
        self, visit: Visit, request: Request, answer: Answer
    ) -> AsyncIterator[tuple[Lane, aiohttp.ClientResponse]]:
        """A replica's response, and the lane that it comes from.

        Raises:
            Busy: the replica takes nothing now.
            ReplicaFailed: it cannot answer.
        """
        if self._may_be_fast(visit.replica, request):
            async with self._ask_fast(visit, request, answer) as response:
                if response is not None:
                    yield "fast", response
                    return
        async with self._ask_full(visit.replica, request, answer) as response:
            raise_failure(response.headers.get(FAILED_HEADER))
            yield "python", response

    def _may_be_fast(self, replica: Upstream, request: Request) -> bool:
        if replica.fast is None or request.attempts or request.method != "POST":
            return False
        path, served = request.path.partition("?")[0], replica.fast.served
        if len(request.body) > LARGEST_BYTES // 2 or capability.obstacle(
            path, request.given, request.body, served, self._limits()
        ):
            return False
        return not request.stream or _text_alone(request.body)

    @contextlib.asynccontextmanager
    async def _ask_fast(
        self, visit: Visit, request: Request, answer: Answer
    ) -> AsyncIterator[aiohttp.ClientResponse | None]:
        """The response of vllm-rs; None: the full lane must answer."""
        replica = visit.replica
        assert replica.fast is not None
        headers, path, body = request.headers_for(replica), request.path, request.body
        async with hold(replica.fast.door, replica.token, path, headers, body) as place:
            if not isinstance(place, Place):
                if place is not None:
                    _refuse(place)
                request.unreported()
                yield None
                return
            visit.frontend = place.address
            if request.stream:
                body, asked = _with_token_ids(body)
                answer.stream = FastStream(with_ids=asked)
            shown = [header for header in request.headers if header[0].lower() not in _CREDENTIALS]
            shown.append(("authorization", f"Bearer {place.token}"))
            url = URL(f"http://{place.address}{path}", encoded=True)
            async with self._fast.post(url, data=body, headers=shown) as response:
                if response.status == 200:
                    yield response
                    return
                # Python says better what is wrong with a request, and that the engine failed.
                place.answered(response.status)
        visit.frontend = None
        yield None

    @contextlib.asynccontextmanager
    async def _ask_full(
        self, replica: Upstream, request: Request, answer: Answer
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers, body = request.headers_for(replica), request.body
        if answer.stream.sent:
            state = state_of(answer.stream)
            headers.append((CONTINUE_HEADER, str(len(state))))
            body = state + body
        else:
            answer.stream = Stream()
        url = URL(f"http://{replica.address}{request.path}", encoded=True)
        async with self.full.request(request.method, url, data=body, headers=headers) as response:
            yield response


def raise_failure(how: str | None) -> None:
    """Raise the failure that the header FAILED_HEADER of a response names, if any.

    Raises:
        ReplicaFailed: the response is no answer.
    """
    if how == ABSENT:
        raise ReplicaFailed("its engine is restarting", "restarting")
    if how is not None:
        raise ReplicaFailed("its engine failed")


def _refuse(refusal: WholeResponse) -> None:
    """Raise what a door's refusal means. Of any other the full lane decides itself.

    Raises:
        Busy, ReplicaFailed: another replica is to be asked.
    """
    raise_failure(dict(refusal.headers).get(FAILED_HEADER.encode(), b"").decode() or None)
    if refusal.status in (429, 503):
        raise Busy(refusal)


def state_of(stream: Stream) -> bytes:
    """The state of an answer, for the engine that continues it."""
    stream.restart()
    repeat = None if isinstance(stream, FastStream) else stream.method is Method.REPEAT
    return msgspec.json.encode(msgspec.structs.replace(stream.progress, repeat=repeat))


def _text_alone(body: bytes) -> bool:
    """Whether no field asks for more than text. Many clients send `"logprobs": null`."""
    asked = {
        name for name, value in _fields(body).items() if bytes(value) not in (b"null", b"false")
    }
    return asked.isdisjoint(_MORE_THAN_TEXT)


def _fields(body: bytes) -> dict[str, msgspec.Raw]:
    return msgspec.json.decode(body, type=dict[str, msgspec.Raw])


def _with_token_ids(body: bytes) -> tuple[bytes, bool]:
    """The same request for an answer with token ids, and whether it asked for them itself."""
    fields = _fields(body)
    given = fields.get("return_token_ids")
    if given is None:  # The table has let it in: it is an object with some field.
        return b'{"return_token_ids":true,' + body.lstrip()[1:], False
    if bytes(given) == b"true":
        return body, True
    return msgspec.json.encode({**fields, "return_token_ids": True}), False


def _session(idle_s: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=idle_s),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        read_bufsize=2**18,
    )
