"""Sends requests to an OpenAI-compatible endpoint and records when each part of the answer arrived.

The client is the measuring instrument, so it spends little on each event: one callback of the event
loop for each read, one reading of the clock, and the bytes are put aside. They are decoded when
the response is over (`Answer`), so that decoding neither delays the reading of another response
nor shifts its times.

A failure of a request is part of what is measured: it is written into the record and never raised.
Proxies of the environment are not used: they would be measured too.
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from bench.errors import TargetError, TargetFailed
from bench.records import Record
from bench.traffic import access
from bench.traffic.request import Request
from bench.traffic.sse import UNREADABLE, Events, error_text, read_whole

# How long an idle connection is trusted where the server does not say: the shortest that common
# servers keep one is 5 s (uvicorn).
_KEPT_ALIVE_S, _MARGIN_S = 4.0, 1.0
# Events decoded before the loop may look for new ones: a fraction of a millisecond.
_SLICE = 256


Endpoint = Literal["completions", "chat", "responses", "messages", "embeddings"]
PAGES: Mapping[Endpoint, str] = {
    "completions": "/completions",
    "chat": "/chat/completions",
    "responses": "/responses",
    "messages": "/messages",
    "embeddings": "/embeddings",
}


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured, and how it is asked.

    Attributes:
        url: base of the API, "http://host:8000" or "https://host/v1"; /v1 is added to a bare host.
        model: its name in requests.
        endpoint: which API is asked: OpenAI's completions, chat, Responses or embeddings, or
            Anthropic's messages.
        headers: more headers of each request; an API key is one of them.
        ca_file: the certificate authority to trust in place of the system's.
        timeout_s: from the start of a request to the end of its response.
        keep_text: whether records keep what was generated.
        fresh_connections: a connection for each request, instead of keeping them alive.
        kept_alive_s: how long an idle connection is used again where the server does not say.
        extra: more fields of each body, such as `{"ignore_eos": True}`; those of a request come
            before these, and None takes a field away.
    """

    url: str
    model: str
    endpoint: Endpoint = "completions"
    headers: dict[str, str] = {}
    ca_file: str = ""
    timeout_s: float = 600.0
    keep_text: bool = False
    fresh_connections: bool = False
    kept_alive_s: float = _KEPT_ALIVE_S
    extra: dict[str, Any] = {}


class Answer:
    """A response that is over but not decoded: its bytes, and when each piece of them came."""

    __slots__ = (
        "_answers",
        "_asked_stream",
        "_keep_text",
        "cut",
        "parts",
        "record",
        "streamed",
        "times",
    )

    def __init__(self, record: Record, keep_text: bool) -> None:
        self.record = record
        self.parts: list[bytes] = []
        self.times: list[float] = []
        self.streamed = False
        self.cut = ""  # What ended the response before its end.
        self._keep_text = keep_text
        self._asked_stream, self._answers = True, 1

    def begin(self, request: Request, extra: dict[str, Any]) -> None:
        """Note what is asked for, `extra` being the fields of the body beside the prompt."""
        record = self.record
        record.asked_input_tokens = request.input_tokens
        record.asked_output_tokens = request.output_tokens
        record.limit, record.shared = request.limit, request.shared
        record.kind, record.turn = request.kind, request.turn
        self._asked_stream = bool(extra.get("stream", True))
        answers = extra.get("n") or 1
        self._answers = answers if isinstance(answers, int) else 1

    def fail(self, error: str, at_s: float) -> None:
        """It is over without an end; the part of a response that came is still decoded."""
        self.record.end_s = at_s
        if self.record.status:
            self.cut = error
        else:
            self.record.error = error

    def read(self) -> Record:
        """Decode everything at once; returns the record, which is complete."""
        for _ in self.slices():
            continue
        return self.record

    def slices(self) -> Iterator[None]:
        """Decode step by step. The record is complete when this ends."""
        record = self.record
        if record.error or not record.status:
            return
        if self.streamed:
            yield from self._stream()
            return
        body = b"".join(self.parts)
        if record.status != 200:
            text = error_text(body)
            record.error = f"http {record.status}: {text}" if text else f"http {record.status}"
        elif self.cut:
            record.error = self.cut
        else:
            at_s = self.times[-1] if self.times else 0.0
            expected = self._asked_stream, self._answers
            read_whole(record, body, at_s, self._keep_text, *expected)

    def _stream(self) -> Iterator[None]:
        events = Events(self.record, self._keep_text, self._answers)
        for number, (part, at_s) in enumerate(zip(self.parts, self.times, strict=True), 1):
            events.feed(part, at_s)
            if number % _SLICE == 0:
                yield
        self.parts, self.times = [], []
        if self.cut and not (events.done or self.record.error):
            self.record.error = self.cut
        events.end()


class _Connection(asyncio.Protocol):
    """One connection: sends a request, collects its response. One exchange at a time."""

    def __init__(self, clock: Callable[[], float], kept_alive_s: float) -> None:
        self._clock = clock
        self._now_s = 0.0
        self._answer: Answer | None = None
        self._over: asyncio.Future[None] | None = None
        self.lost = False
        self.reusable = False
        self.idle_since_s = 0.0
        self.kept_alive_s = kept_alive_s

    # --- the request ------------------------------------------------------------------------

    def exchange(self, data: bytes, answer: Answer) -> "asyncio.Future[None]":
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
        self._headers = _headers(parts.netloc.rpartition("@")[2], target)
        page = PAGES[target.endpoint]
        self._post = f"POST {self._base}{page} HTTP/1.1\r\n{self._headers}content-length: "
        self._addresses: list[str] = []
        self._resolving = asyncio.Lock()
        self._idle: list[_Connection] = []

    async def ask(self, request: Request, record: Record) -> Record:
        """Send a request and fill in its record. Raises nothing but cancellation."""
        answer = Answer(record, self._target.keep_text)
        await self.exchange(request, answer)
        return answer.read()

    async def exchange(self, request: Request, answer: Answer) -> None:
        """As `ask`, but what came back is still to be decoded, by `Answer.read` or `slices`.

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
        answer = Answer(Record(index=0, planned_s=self._clock()), keep_text=False)
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

    async def _send(self, data: bytes, answer: Answer) -> None:
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

    async def _exchange(self, data: bytes, answer: Answer) -> None:
        record = answer.record
        record.sent_s = self._clock()
        connection = self._waiting() or await self._connect()
        await self._over(connection, data, answer)
        if connection.reusable and not connection.lost and not self._target.fresh_connections:
            connection.idle_since_s = self._clock()
            self._idle.append(connection)
        elif not connection.lost:
            connection.abort()

    async def _over(self, connection: _Connection, data: bytes, answer: Answer) -> None:
        over = connection.exchange(data, answer)
        try:
            await over
        except asyncio.CancelledError:
            connection.abort()
            raise

    def _waiting(self) -> _Connection | None:
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

    async def _connect(self) -> _Connection:
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
                    lambda: _Connection(self._clock, self._target.kept_alive_s),
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


def encode(target: Target, request: Request) -> bytes:
    """The body of a request.

    Raises:
        ValueError: the prompt is of a kind that the endpoint does not take.
    """
    body = {
        "model": target.model,
        **_body_of(target.endpoint, request),
        **target.extra,
        **request.extra,
    }
    if target.endpoint == "embeddings":
        body = {key: value for key, value in body.items() if key not in _OF_TEXT}
    elif not body["stream"]:
        body.pop("stream_options", None)  # Servers refuse it otherwise.
    return msgspec.json.encode({key: value for key, value in body.items() if value is not None})


# What an answer in text may be asked to be, and an embedding not.
_OF_TEXT = ("temperature", "ignore_eos", "stream", "max_tokens")


def _body_of(endpoint: Endpoint, request: Request) -> dict[str, Any]:
    """The fields of a body that say the prompt, how long the answer may be, and that it streams.

    Raises:
        ValueError: the prompt is of a kind that the endpoint does not take.
    """
    prompt, tokens = request.prompt, request.output_tokens
    messages = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
    if endpoint in ("completions", "embeddings") and messages:
        raise ValueError(f"the {endpoint} endpoint takes text or token ids, not messages")
    if endpoint == "embeddings":
        return {"input": prompt}
    if endpoint == "completions":
        usage = {"stream_options": {"include_usage": True}}
        return {"prompt": prompt, "max_tokens": tokens, "stream": True, **usage}
    if not messages and not isinstance(prompt, str):
        raise ValueError(f"the {endpoint} endpoint takes text or messages, not token ids")
    if endpoint == "responses":
        return {"input": prompt, "max_output_tokens": tokens, "stream": True}
    content: list[Any] = (
        prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    )
    if endpoint == "chat":
        usage = {"stream_options": {"include_usage": True}}
        return {"messages": content, "max_tokens": tokens, "stream": True, **usage}
    # Messages have the system prompt apart.
    systems = [part["content"] for part in content if part.get("role") == "system"]
    rest = [part for part in content if part.get("role") != "system"]
    system = {"system": "\n".join(map(str, systems))} if systems else {}
    return {**system, "messages": rest, "max_tokens": tokens, "stream": True}


def _headers(host: str, target: Target) -> str:
    headers = {"host": host, "content-type": "application/json", "user-agent": "bench"}
    if target.endpoint == "messages":
        headers["anthropic-version"] = "2023-06-01"
    headers |= {name.lower(): value for name, value in target.headers.items()}
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def _kept_alive_s(header: bytes) -> float:
    """How long a server keeps an idle connection, from its Keep-Alive header, less a margin."""
    for part in header.lower().split(b","):
        name, _, value = part.strip().partition(b"=")
        if name == b"timeout" and value.strip().isdigit():
            return max(0.0, float(value) - _MARGIN_S)
    return _KEPT_ALIVE_S


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
