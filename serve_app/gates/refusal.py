"""A refusal before the first token has its proper status, streamed or not.

vLLM begins a streamed answer with 200 before it compiles the request's grammar. So an invalid JSON
schema is a 400 without streaming, but an error event in a stream. This gate holds the beginning of
a stream back until its first event, with which it would be sent anyway.
"""

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import sse


class RefusalGate:
    """ASGI middleware, around vLLM's application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        pending_start: Message | None = None
        refused = False

        async def first_event_first(message: Message) -> None:
            nonlocal pending_start, refused
            if refused:
                return  # "[DONE]" of the stream that was none.
            if message["type"] == "http.response.start" and _begins_stream(message):
                pending_start = message
                return
            if pending_start is not None:
                start, pending_start = pending_start, None
                if (refusal := _refusal(message.get("body", b""))) is not None:
                    refused = True
                    await _refuse(start, *refusal, send)
                    return
                await send(start)
            await send(message)

        await self._app(scope, receive, first_event_first)


def _begins_stream(start: Message) -> bool:
    return start["status"] == 200 and sse.is_stream(start)


def _refusal(body: bytes) -> tuple[int, bytes] | None:
    """Status and body of an error that is the first event of a stream; None for any other event."""
    event = body.partition(b"\n\n")[0]
    if not event.startswith(sse.DATA + b'{"error"'):
        return None
    try:
        error: dict[str, Any] = json.loads(event.removeprefix(sse.DATA))
        status = int(error["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return None
    return (status, json.dumps(error).encode()) if 400 <= status < 500 else None


async def _refuse(start: Message, status: int, body: bytes, send: Send) -> None:
    headers = [
        (name, value)
        for name, value in start["headers"]
        if name not in (b"content-type", b"content-length", b"cache-control")
    ]
    headers += [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({**start, "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
