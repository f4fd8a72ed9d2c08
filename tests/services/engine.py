"""A small real HTTP server: answers as an engine's replica does, marks and all, and fails as told.

Its answer to any request is the same: `length` tokens, one an event, whose text is their number, in
the form of the route that was asked (streams.py). It goes on with an answer where a `Progress` is
sent along, as an engine would.

With `fast` it has a door and a Rust front end as well, on the same port, whose streams are written
as vllm-rs writes them: ids in the events, a first event for the prompt's, an end of its own; and a
part of each token's text is held back until the next one.
"""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import msgspec

from serve_app.continuation import Progress
from serve_app.replica.backend import (
    ABSENT,
    CONTINUE_HEADER,
    FAILED_HEADER,
    FAST_LANE,
    STALLED_HEADER,
    TENANT_HEADER,
    TOKEN_HEADER,
)
from tests.services import streams
from tests.services.streams import CHAT, COMPLETIONS, DONE


@dataclass
class Fault:
    """What goes wrong with one request.

    Attributes:
        cut_after, stall_after: events until the connection ends, or falls silent. 0: before the
            response begins.
        stall_s: how long it falls silent; None: until the gateway leaves.
        status: answer with this instead.
        half: cut within the next event.
        orderly: where it is cut, the response ends as if it were complete.
        error_after: events until an error event, which ends the stream.
        instead: events by their place, and what is written in place of each.
        beside: the same, and what is written after each.
        pieces: sizes of the pieces in which the bytes are written; none: an event each.
    """

    cut_after: int | None = None
    stall_after: int | None = None
    stall_s: float | None = None
    status: int | None = None
    half: bool = False
    orderly: bool = False
    error_after: int | None = None
    instead: dict[int, bytes] = field(default_factory=dict)
    beside: dict[int, bytes] = field(default_factory=dict)
    pieces: list[int] = field(default_factory=list)


@dataclass
class EngineServer:
    """One replica. `faults` holds one entry for each coming request; none: all goes well.

    Attributes:
        unit: what stands behind each number of the text.
        requests: what came along of an answer, and the body, of each request.
        tenants: in whose name each came.
        fast: whether it has a fast lane.
        fast_asked: the body of each request that came to the Rust front end.
        places, left_places: connections to the door that were granted, and how many of them ended.
        door: what the door says instead of a grant, for each coming request.
        status, whole: what is answered where no stream is asked for; no body: the tokens' text.
        restarting: its engine is being started anew.
    """

    name: str
    length: int = 10
    unit: str = " "
    pause_s: float = 0.0
    method: str = "resume"
    faults: list[Fault | None] = field(default_factory=list)
    requests: list[tuple[Progress | None, bytes]] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    status: int = 200
    whole: bytes = b""
    left: int = 0
    deaf: bool = False
    stalled_s: float = 0.0
    token: str = "secret"
    fast: bool = False
    fast_asked: list[bytes] = field(default_factory=list)
    fast_status: int = 200
    places: int = 0
    left_places: int = 0
    door: list[bytes] = field(default_factory=list)
    fast_deaf: bool = False
    restarting: bool = False

    async def start(self) -> "EngineServer":
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname()[:2])
        self._writers: set[asyncio.StreamWriter] = set()
        return self

    async def stop(self) -> None:
        """As SIGKILL does: nothing listens, and every connection is cut."""
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    @property
    def replica(self) -> tuple[str, dict[str, Any]]:
        metadata: dict[str, Any] = {"address": self.address, "token": self.token}
        if self.fast:
            served = {"models": ["m"], "max_model_len": 1000, "vocabulary": 1000}
            metadata[FAST_LANE] = {"door": self.address, **served}
        return self.name, metadata

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left += 1
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        named = (line.split(": ", 1) for line in lines if line)
        headers = {name.lower(): value for name, value in named}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if self.deaf:
            await asyncio.sleep(3600)
        if self.restarting:
            writer.write(_whole(502, b"", f"{FAILED_HEADER}: {ABSENT}\r\n".encode()))
            return True
        if first.startswith("GET /ping"):
            assert headers[TOKEN_HEADER] == self.token
            writer.write(_whole(200, b"", f"{STALLED_HEADER}: {self.stalled_s:g}\r\n".encode()))
            return True
        if first.startswith("GET /health"):
            await asyncio.sleep(3600 if self.fast_deaf else 0)
            writer.write(_whole(200, b""))
            return True
        if headers.get("x-door") is not None:
            assert headers["x-door"] == headers[TOKEN_HEADER] == self.token
            return await self._let_in(reader, writer)
        if headers.get("authorization") == f"Bearer {FAST_TOKEN}":
            return await self._answer_fast(reader, writer, body, first.split(" ")[1])
        assert headers[TOKEN_HEADER] == self.token
        progress = None
        if (length := headers.get(CONTINUE_HEADER)) is not None:
            progress = msgspec.json.decode(body[: int(length)], type=Progress)
            body = body[int(length) :]
        self.requests.append((progress, body))
        self.tenants.append(unquote(headers.get(TENANT_HEADER, "")))
        fault = self._fault()
        if fault.status is not None:
            writer.write(_whole(fault.status, b'{"error": {"message": "told to"}}'))
            return True
        if json.loads(body or b"{}").get("stream"):
            path = first.split(" ")[1]
            events = self._events(progress, path)
            return await self._stream(reader, writer, events, fault, path)
        return await self._in_one_piece(reader, writer, fault)

    def _fault(self) -> Fault:
        return (self.faults.pop(0) if self.faults else None) or Fault()

    async def _in_one_piece(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault
    ) -> bool:
        if fault.stall_after is not None:
            await reader.read(1)
            raise ConnectionResetError
        if fault.cut_after is not None:
            return False
        text = {"text": self.whole_text}
        writer.write(_whole(self.status, self.whole or json.dumps(text).encode()))
        return True

    async def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """As the door: the connection is the request's place until it ends."""
        if self.door:
            writer.write(self.door.pop(0))
            return False
        self.places += 1
        host, port = self.address.split(":")
        writer.write(f"wait 30\nfast {host} {port} {FAST_TOKEN} r1 60000\n".encode())
        try:
            await reader.read()
        finally:
            self.left_places += 1
        return False

    async def _answer_fast(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, path: str
    ) -> bool:
        """As vllm-rs."""
        self.fast_asked.append(body)
        asked, fault = json.loads(body), self._fault()
        assert asked.get("return_token_ids", False) is asked.get("stream", False)
        if self.fast_status != 200 or fault.status is not None:
            writer.write(
                _whole(fault.status or self.fast_status, b'{"error": {"message": "rust"}}')
            )
            return True
        if not asked.get("stream"):
            return await self._in_one_piece(reader, writer, fault)
        return await self._stream(reader, writer, self._fast_events(path), fault, path)

    @property
    def whole_text(self) -> str:
        return "".join(map(self._text, range(self.length)))

    def _text(self, token: int) -> str:
        return f"{token}{self.unit}"

    def _fast_events(self, path: str = COMPLETIONS) -> Iterator[bytes]:
        head = {"id": self.name + "-0", "created": sum(map(ord, self.name)), "model": "m"}

        def event(text: str, **choice: Any) -> bytes:
            said = {"delta": {"content": text}} if path == CHAT else {"text": text}
            each = {"index": 0, "finish_reason": None, "stop_reason": None, **said, **choice}
            data = {**head, "choices": [each], "system_fingerprint": None}
            line = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
            return f"data: {line}\n\n".encode()

        yield event("", prompt_token_ids=[1, 2, 3])
        start = 0
        for token in range(self.length):
            end = len(self.whole_text)
            if token < self.length - 1:
                end = self.whole_text.index(self._text(token)) + 1
            yield event(self.whole_text[start:end], token_ids=[token])
            start = end
        yield event("", finish_reason="length")
        yield DONE

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        events: Iterator[bytes],
        fault: Fault,
        path: str,
    ) -> bool:
        if fault.cut_after == 0:
            return False
        gone = asyncio.ensure_future(reader.read(1))
        if fault.stall_after == 0:
            await asyncio.wait({gone}, timeout=fault.stall_s)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        sizes, held = itertools.cycle(fault.pieces or [0]), b""
        for place, event in enumerate(events):
            if place and place == fault.stall_after:
                await asyncio.wait({gone}, timeout=fault.stall_s)
            if place == fault.cut_after:
                if fault.half:
                    writer.write(_chunk(held + event[:-9]))
                    await writer.drain()
                if not fault.orderly:
                    return False
                held = b""
                break
            if place == fault.error_after:
                held += streams.failure(path)
                break
            held += fault.instead.get(place, event) + fault.beside.get(place, b"")
            while held and len(held) >= (size := next(sizes)):
                writer.write(_chunk(held[: size or len(held)]))
                held = held[size or len(held) :]
            await writer.drain()
            await asyncio.wait({gone}, timeout=self.pause_s)
            if gone.done():
                raise ConnectionResetError
        if held:
            writer.write(_chunk(held))
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone
        return True

    def _events(self, progress: Progress | None, path: str = COMPLETIONS) -> Iterator[bytes]:
        expected = progress.groups if progress is not None else []
        start = len(expected) if progress is not None and not progress.repeat else 0
        groups = [*expected, *([token] for token in range(len(expected), self.length))]
        assert start <= self.length
        written = streams.Writer(path, self.name)
        yield from written.before()
        for place, group in enumerate(groups):
            ends = place == self.length - 1
            marks = b": how " + self.method.encode() + b"\n" if place == 0 else b""
            marks += b": t " + b" ".join(b"%d" % token for token in group) + b"\n"
            marks += b": end length null\n" if ends else b""
            for event in written.group(self._text(group[0]), first=place == 0, last=ends):
                yield marks + event
                marks = b""
        yield from written.after(self.whole_text)


# What the Rust front end asks for.
FAST_TOKEN = "rust"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _whole(status: int, body: bytes, headers: bytes = b"") -> bytes:
    return (
        b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\nretry-after: 7\r\n"
        b"%scontent-length: %d\r\n\r\n%s" % (status, headers, len(body), body)
    )
