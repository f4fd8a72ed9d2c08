"""One HTTP connection of the load generator.

It is part of the measuring instrument, so it spends little on each event: one callback of the event
loop for each read, one reading of the clock, and the bytes are put aside (`Response`).
"""

import asyncio
from collections.abc import Callable
from typing import cast

import httptools

from bench.traffic.response import Response
from bench.traffic.target import KEEP_ALIVE_S

_MARGIN_S = 1.0


class Connection(asyncio.Protocol):
    """One connection: sends a request, collects its response. One exchange at a time."""

    def __init__(self, clock: Callable[[], float], kept_alive_s: float) -> None:
        self._clock = clock
        self._now_s = 0.0
        self._answer: Response | None = None
        self._over: asyncio.Future[None] | None = None
        self.lost = False
        self.reusable = False
        self.idle_since_s = 0.0
        self.kept_alive_s = kept_alive_s

    # --- the request ------------------------------------------------------------------------

    def exchange(self, data: bytes, answer: Response) -> "asyncio.Future[None]":
        """Send a request. The future is done when the response is over, whole or not."""
        self._answer, self.reusable = answer, False
        self._parser = httptools.HttpResponseParser(self)
        self._framed = self._interim = False
        self._over = asyncio.get_running_loop().create_future()
        if self.lost:
            self._finish()
        else:
            self._transport.write(data)
        return self._over

    def abort(self) -> None:
        self._answer = self._over = None
        self._transport.abort()

    # --- the socket -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now_s = self._clock()
        if not self._answer:
            self._transport.abort()  # Nothing was asked: what comes is not an answer.
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._answer:
                self._answer.fail(f"bad response: not HTTP: {error}", self._now_s)
            self._finish()
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        answer = self._answer
        if not answer:
            return
        self._now_s = self._clock()
        if not answer.record.status:
            how = "reset" if exc else "closed without a response"
            answer.record.error = f"connection {how}"
        elif self._framed or exc:
            answer.cut = f"cut: connection {'reset' if exc else 'closed'} in the response"
        self._finish()

    # --- the response, called by the parser -------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._framed = True  # Otherwise the end of the connection is the end of the response.
        elif name == b"content-type" and self._answer:
            self._answer.streamed = value.lower().startswith(b"text/event-stream")
        elif name == b"keep-alive":
            self.kept_alive_s = _kept_alive_s(value)

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._interim = 100 <= status < 200
        if self._answer and not self._interim:
            self._answer.record.status = status
            self._answer.record.headers_s = self._now_s
            self._answer.streamed = self._answer.streamed and status == 200

    def on_body(self, data: bytes) -> None:
        answer = self._answer
        if answer:
            answer.parts.append(data)
            answer.times.append(self._now_s)

    def on_message_complete(self) -> None:
        if not self._interim:
            self.reusable = self._parser.should_keep_alive()
            self._finish()

    def _finish(self) -> None:
        answer, over = self._answer, self._over
        self._answer = self._over = None
        if answer:
            answer.record.end_s = self._now_s
        if over and not over.done():
            over.set_result(None)


def _kept_alive_s(header: bytes) -> float:
    """How long a server keeps an idle connection, from its Keep-Alive header, less a margin."""
    for part in header.lower().split(b","):
        name, _, value = part.strip().partition(b"=")
        if name == b"timeout" and value.strip().isdigit():
            return max(0.0, float(value) - _MARGIN_S)
    return KEEP_ALIVE_S
