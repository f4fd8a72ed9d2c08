"""A small real HTTP server: answers as an engine's replica does, marks and all, and fails as told.

Its answer to any request is the same: `length` tokens, one an event, whose text is their number. It
goes on with an answer where a `Progress` is sent along, as an engine would.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote

import msgspec

from serve_app.continuation import Progress
from serve_app.replica.backend import CONTINUE_HEADER, STALLED_HEADER, TENANT_HEADER, TOKEN_HEADER


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
    """

    cut_after: int | None = None
    stall_after: int | None = None
    stall_s: float | None = None
    status: int | None = None
    half: bool = False
    orderly: bool = False
    error_after: int | None = None
    instead: dict[int, bytes] = field(default_factory=dict)


@dataclass
class EngineServer:
    """One replica. `faults` holds one entry for each coming request; none: all goes well.

    Attributes:
        requests: what came along of an answer, and the body, of each request.
        tenants: in whose name each came.
        status, whole: what is answered where no stream is asked for; no body: the tokens' text.
    """

    name: str
    length: int = 10
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
    def replica(self) -> tuple[str, dict[str, str]]:
        return self.name, {"address": self.address, "token": self.token}

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
        if first.startswith("GET /ping"):
            assert headers[TOKEN_HEADER] == self.token
            writer.write(_whole(200, b"", f"{STALLED_HEADER}: {self.stalled_s:g}\r\n".encode()))
            return True
        assert headers[TOKEN_HEADER] == self.token
        progress = None
        if (length := headers.get(CONTINUE_HEADER)) is not None:
            progress = msgspec.json.decode(body[: int(length)], type=Progress)
            body = body[int(length) :]
        self.requests.append((progress, body))
        self.tenants.append(unquote(headers.get(TENANT_HEADER, "")))
        fault = (self.faults.pop(0) if self.faults else None) or Fault()
        if fault.status is not None:
            writer.write(_whole(fault.status, b'{"error": {"message": "told to"}}'))
            return True
        if json.loads(body or b"{}").get("stream"):
            return await self._stream(reader, writer, progress, fault)
        if fault.stall_after is not None:
            await reader.read(1)
            raise ConnectionResetError
        if fault.cut_after is not None:
            return False
        text = {"text": "".join(map(_text, range(self.length)))}
        writer.write(_whole(self.status, self.whole or json.dumps(text).encode()))
        return True

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        progress: Progress | None,
        fault: Fault,
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
        for place, event in enumerate(self._events(progress)):
            if place and place == fault.stall_after:
                await asyncio.wait({gone}, timeout=fault.stall_s)
            if place == fault.cut_after:
                if fault.half:
                    writer.write(_chunk(event[:-9]))
                    await writer.drain()
                if not fault.orderly:
                    return False
                break
            if place == fault.error_after:
                writer.write(_chunk(ERROR))
                break
            writer.write(_chunk(fault.instead.get(place, event)))
            await writer.drain()
            await asyncio.wait({gone}, timeout=self.pause_s)
            if gone.done():
                raise ConnectionResetError
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone
        return True

    def _events(self, progress: Progress | None) -> Iterator[bytes]:
        expected = progress.groups if progress is not None else []
        start = len(expected) if progress is not None and not progress.repeat else 0
        groups = [*expected, *([token] for token in range(len(expected), self.length))]
        assert start <= self.length
        for place, group in enumerate(groups):
            marks = b": how " + self.method.encode() + b"\n" if place == 0 else b""
            marks += b": t " + b" ".join(b"%d" % token for token in group) + b"\n"
            if place == self.length - 1:
                marks += b": end length null\n"
            event = {
                "id": self.name + "-0",
                "created": sum(map(ord, self.name)),
                "text": _text(group[0]),
            }
            yield marks + b"data: " + json.dumps(event).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"


# What vLLM writes where a request fails after its response began.
ERROR = (
    b'data: {"error": {"message": "told to", "type": "InternalServerError", "param": null, '
    b'"code": 500}}\n\ndata: [DONE]\n\n'
)


def _text(token: int) -> str:
    return f"{token} "


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _whole(status: int, body: bytes, headers: bytes = b"") -> bytes:
    return (
        b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\nretry-after: 7\r\n"
        b"%scontent-length: %d\r\n\r\n%s" % (status, headers, len(body), body)
    )
