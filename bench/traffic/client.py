"""Sends requests to an OpenAI-compatible endpoint and records when each part of the answer arrived.

A failure of a request is part of what is measured: it is written into the record and never raised.
Proxies of the environment are not used: they would be measured too.
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from bench.errors import TargetError, TargetFailed
from bench.records import Record
from bench.traffic import access
from bench.traffic.connection import Connection
from bench.traffic.request import Request
from bench.traffic.response import Response
from bench.traffic.sse import UNREADABLE, error_text
from bench.traffic.target import PAGES, Target, encode, header_lines


class Client:
    """Asks one target over its own connections. For one event loop.

    Args:
        target: whom to ask.
        clock: seconds since the start of the run; what records are written in.

    Raises:
        TargetError: the URL is not one, or `ca_file` has no certificate.
    """

    def __init__(self, target: Target, clock: Callable[[], float]) -> None:
        parts = urlsplit(target.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TargetError.of("url", target.url, "is not http://host:port or https://host")
        self._target, self._clock = target, clock
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = access.tls(target.ca_file) if parts.scheme == "https" else None
        self._base = parts.path.rstrip("/") or "/v1"
        self._headers = header_lines(parts.netloc.rpartition("@")[2], target)
        page = PAGES[target.endpoint]
        self._post = f"POST {self._base}{page} HTTP/1.1\r\n{self._headers}content-length: "
        self._addresses: list[str] = []
        self._resolving = asyncio.Lock()
        self._idle: list[Connection] = []

    async def ask(self, request: Request, record: Record) -> Record:
        """Send a request and fill in its record. Raises nothing but cancellation."""
        answer = Response(record, self._target.keep_text)
        await self.exchange(request, answer)
        return answer.read()

    async def exchange(self, request: Request, answer: Response) -> None:
        """As `ask`, but what came back is still to be decoded, by `Response.read` or `slices`.

        `record.sent_s` is when the client set about sending: the write on a connection that is
        open, or the start of a new connection. How long the server takes to accept a connection
        is then its time and not the client's lag.

        Cancelled, it closes the connection; what has come until then can be decoded.
        """
        answer.begin(request, {**self._target.extra, **request.extra})
        if self._target.endpoint == "embeddings":
            answer.record.asked_output_tokens = 0
        try:
            body = encode(self._target, request)
        except ValueError as error:
            answer.fail(f"cannot be sent: {error}", self._clock())
            return
        head = f"{self._post}{len(body)}\r\n\r\n".encode()
        await self._send(head + body, answer)

    async def models(self) -> list[str]:
        """The models that the target says it serves.

        Raises:
            TargetError: it cannot be reached, or does not say.
        """
        answer = Response(Record(index=0, planned_s=self._clock()), keep_text=False)
        await self._send(
            f"GET {self._base}/models HTTP/1.1\r\n{self._headers}\r\n".encode(), answer
        )
        record, body = answer.record, b"".join(answer.parts)
        error = (
            record.error or (f"http {record.status}: {error_text(body)}", "")[record.status == 200]
        )
        if error:
            raise TargetFailed(f"url = {self._target.url!r}: {error}")
        try:
            return [model.id for model in msgspec.json.decode(body, type=_Models).data]
        except UNREADABLE as problem:
            raise TargetFailed(
                f"url = {self._target.url!r}: no list of models: {problem}"
            ) from None

    def close(self) -> None:
        """Close the connections that wait."""
        while self._idle:
            self._idle.pop().abort()

    # --- connections ------------------------------------------------------------------------

    async def _send(self, data: bytes, answer: Response) -> None:
        """Exchange one request, with the time that it may take; failures go into the answer."""
        limit_s = self._target.timeout_s
        try:
            async with asyncio.timeout(limit_s) as timeout:
                await self._exchange(data, answer)
        except OSError as error:
            if timeout.expired():
                answer.fail(f"timeout: not over after {limit_s:g} s", self._clock())
            else:
                answer.fail(_reason(error, self._host), self._clock())
                answer.record.sent_s = None
        except asyncio.CancelledError:
            answer.fail("interrupted: the run was stopped", self._clock())
            raise

    async def _exchange(self, data: bytes, answer: Response) -> None:
        record = answer.record
        record.sent_s = self._clock()
        connection = self._waiting() or await self._connect()
        await self._over(connection, data, answer)
        if connection.reusable and not connection.lost and not self._target.fresh_connections:
            connection.idle_since_s = self._clock()
            self._idle.append(connection)
        elif not connection.lost:
            connection.abort()

    async def _over(self, connection: Connection, data: bytes, answer: Response) -> None:
        over = connection.exchange(data, answer)
        try:
            await over
        except asyncio.CancelledError:
            connection.abort()
            raise

    def _waiting(self) -> Connection | None:
        """The connection that was used last, if the server is not about to close it.

        A server closes a connection that was idle for long, and may do so while a request is on
        its way. Other clients send such a request again; here that would hide a server that
        closes without an answer. So nothing is sent where a close is due, and one that comes all
        the same is the server's failure.
        """
        while self._idle:
            connection = self._idle.pop()
            idle_s = self._clock() - connection.idle_since_s
            if not connection.lost and idle_s < connection.kept_alive_s:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        """A new connection to the first address that takes one."""
        loop = asyncio.get_running_loop()
        async with self._resolving:
            if not self._addresses:
                addresses = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                self._addresses = [str(address[4][0]) for address in addresses]
        failure: OSError = OSError("the host has no address")
        for address in list(self._addresses):
            try:
                _, connection = await loop.create_connection(
                    lambda: Connection(self._clock, self._target.kept_alive_s),
                    address,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
            except OSError as error:
                failure = error
                continue
            self._addresses.remove(address)
            self._addresses.insert(0, address)
            return connection
        raise failure


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def check(target: Target) -> None:
    """Whether the target can be reached and serves its model.

    Raises:
        TargetError: it does not; the message names the models that it serves.
    """
    loop = asyncio.get_running_loop()
    client = Client(target, loop.time)
    try:
        models = await client.models()
    finally:
        client.close()
    if target.model not in models:
        problem = f"is not served at {target.url}"
        raise TargetError.of("model", target.model, problem, models)


def _reason(error: OSError, host: str) -> str:
    """The same failure in the same words, so that failures can be counted by reason."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionResetError):
        return "connection reset"
    if isinstance(error, socket.gaierror):
        return f"unknown host: {host}"
    if isinstance(error, ssl.SSLError):
        return f"tls: {error.reason or error}"
    return f"connection failed: {os.strerror(error.errno) if error.errno else error}"
