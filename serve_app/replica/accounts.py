"""What the engine did for each request of a gateway, which keeps the ledger of tenants.

Only the replica knows: tokens of a stream whose client asked for no usage, of an answer that its
client left, and seconds of GPUs. A gateway names itself and the request in a header, and reads one
response without end (`PATH`) in which there is a line for each of its requests that is over, in
either lane. Lines wait while it does not read.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator

import msgspec
from starlette.types import Receive, Send

from serve_app.gates.work import Work

PATH = "/accounts"
# Of a request: the gateway's name and its number of the request. Of a reader: the name.
HEADER = "x-account"
# Lines that wait for a gateway, and gateways that are remembered: one that has gone reads no more.
_MOST_LINES, _MOST_GATEWAYS = 10_000, 64


class Account(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What an engine did for one request.

    Attributes:
        number: the gateway's.
        has_counts: whether the engine received the request and reported on it.
    """

    number: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    gpu_s: float
    has_counts: bool


class _Lines:
    """The accounts that one gateway has not read."""

    def __init__(self) -> None:
        self.waiting: deque[Account] = deque(maxlen=_MOST_LINES)
        self.news = asyncio.Event()


class Accounts:
    """The accounts of one replica, in both lanes. For one event loop."""

    def __init__(self) -> None:
        self._of: dict[str, _Lines] = {}
        self._running = 0
        self._closing = False

    @contextlib.contextmanager
    def account(self, header: bytes | None) -> Iterator[Work]:
        """The work of a request, reported at its end to the gateway that the header names."""
        done = Work()
        self._running += 1
        try:
            yield done
        finally:
            self._running -= 1
            if header is not None:
                self._add(header.decode("latin-1"), done)
            self._end_readers()

    def close(self) -> None:
        """End the responses of readers once no request is under way."""
        self._closing = True
        self._end_readers()

    async def read(self, gateway: str, receive: Receive, send: Send) -> None:
        """Send a gateway one line for each account, until it disconnects or this replica ends."""
        headers = [(b"content-type", b"application/x-ndjson")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        lines = self._lines(gateway)
        leaving = asyncio.ensure_future(_left(receive))
        try:
            while not leaving.done() and self._of.get(gateway) is lines:
                news = asyncio.ensure_future(lines.news.wait())
                await asyncio.wait({news, leaving}, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                lines.news.clear()
                if lines.waiting and not leaving.done():
                    body = b"".join(msgspec.json.encode(each) + b"\n" for each in lines.waiting)
                    lines.waiting.clear()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                if self._over:
                    break
            await send({"type": "http.response.body", "body": b""})
        finally:
            leaving.cancel()

    @property
    def _over(self) -> bool:
        return self._closing and not self._running

    def _add(self, header: str, done: Work) -> None:
        gateway, _, number = header.partition(" ")
        counts = done.prompt_tokens, done.cached_tokens, done.output_tokens
        lines = self._lines(gateway)
        lines.waiting.append(Account(int(number), *counts, done.gpu_s, done.has_counts))
        lines.news.set()

    def _lines(self, gateway: str) -> _Lines:
        lines = self._of.pop(gateway, None) or _Lines()
        self._of[gateway] = lines  # The last one is the one that was named last.
        while len(self._of) > _MOST_GATEWAYS:
            forgotten = self._of.pop(next(iter(self._of)))
            forgotten.news.set()
        return lines

    def _end_readers(self) -> None:
        if self._over:
            for lines in self._of.values():
                lines.news.set()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
