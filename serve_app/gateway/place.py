"""A place in a replica's engine for one request of the fast lane, from the replica's door.

The gateway speaks to the door as HAProxy does (lanes/door.py): it sends each request over a
separate connection. The request has its place while this connection is open.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from serve_app.gateway.failures import ReplicaFailed, WholeResponse
from serve_app.lanes.door import SECRET_HEADER

# A replica is on the same network. If it accepts no connection within this time, it is gone.
CONNECT_S = 2.0


@dataclass
class Place:
    """What the door grants: the address of that replica's vllm-rs, and its token.

    Attributes:
        address: host:port.
    """

    address: str
    token: str
    _writer: asyncio.StreamWriter

    def answered(self, status: int) -> None:
        """Report to the door that vllm-rs did not answer with status 200."""
        self._writer.write(b"status %d\n" % status)


@contextlib.asynccontextmanager
async def hold(
    door: str, secret: str, path: str, headers: list[tuple[str, str]], body: bytes
) -> AsyncIterator[Place | WholeResponse | None]:
    """A place that is held until the end of the context; or a refusal; or None: use the full lane.

    Raises:
        ReplicaFailed: the door takes no connection, or closed it without an answer.
    """
    host, _, port = door.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host, int(port))
    except OSError as error:  # A timeout is one as well.
        raise ReplicaFailed(f"its door takes no connection: {error}", "connection") from error
    try:
        writer.write(_request_bytes(secret, path, headers, body))
        yield await _answer(reader, writer)
    finally:
        writer.close()


def _request_bytes(secret: str, path: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        f"{SECRET_HEADER.decode()}: {secret}",
        *(f"{name}: {value}" for name, value in headers),
        f"content-length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Place | WholeResponse | None:
    try:
        while (words := (await reader.readline()).split())[:1] == [b"wait"]:
            pass  # In the queue. The gateway's own timeout bounds it.
        match words:
            case [b"full"]:
                return None
            case [b"fast", host, port, token, *_]:
                return Place(f"{host.decode()}:{port.decode()}", token.decode(), writer)
            case [b"refuse", status, head_bytes, body_bytes]:
                head = await reader.readexactly(int(head_bytes))
                body = await reader.readexactly(int(body_bytes))
                return WholeResponse(int(status), _headers(head), body)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise ReplicaFailed(f"its door gave no answer: {error}") from error
    raise ReplicaFailed("its door closed the connection without an answer")


def _headers(head: bytes) -> list[tuple[bytes, bytes]]:
    lines = (line.partition(b": ") for line in head.split(b"\r\n") if line)
    return [(name.lower(), value) for name, _, value in lines]
