"""The response to one client, which may come from several replicas."""

from starlette.types import Message, Send

from serve_app import sse
from serve_app.continuation import Stream
from serve_app.errors import RequestError
from serve_app.gateway.failures import WholeResponse


class Answer:
    """What the client has been sent so far.

    Attributes:
        begun: there is a status; an error can only be an event now.
        stream: the stream of the current replica.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False
        self.stream = Stream()

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The status line of a stream; later replicas' are dropped."""
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def data(self, data: bytes) -> None:
        """Pass on the new part of a piece of a replica's stream.

        Raises:
            Malformed: the piece is no part of a stream.
        """
        if events := self.stream.events(data):
            body = b"\n\n".join(events) + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def whole(self, answer: WholeResponse) -> None:
        length = (b"content-length", str(len(answer.body)).encode())
        await self.begin(answer.status, [*answer.headers, length])
        await self._send({"type": "http.response.body", "body": answer.body})

    async def fail(self, error: RequestError, path: str) -> None:
        """End with an error: as a response, or as the last event of a stream that has begun."""
        if not self.begun:
            await error({"type": "http"}, _nothing, self._send)
            return
        if self.stream.ended:
            await self.end()
            return
        body = sse.error_event(path, error.body())
        await self._send({"type": "http.response.body", "body": body, "code": error.code})


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
