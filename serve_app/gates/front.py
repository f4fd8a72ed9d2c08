"""The outermost gate after the meter: it normalises the path and the method of a request.

Clients join base addresses and paths in different ways, and check with HEAD whether a route exists.
A doubled slash counts as one, a slash at the end as none, and HEAD is a GET whose answer has no
body. Header lines beyond a bound are refused here, in JSON.
"""

import re
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import HeadersTooLarge
from serve_app.gates.anthropic import AnthropicErrors
from serve_app.gates.cors import CorsGate

# Of all header lines together. HAProxy and uvicorn take more.
MAX_HEADER_BYTES = 16 * 1024


def front(app: ASGIApp, engine: Mapping[str, Any]) -> ASGIApp:
    """`app` behind the gates that every client meets first.

    Args:
        engine: the engine arguments, for CORS.
    """
    return CorsGate(AnthropicErrors(FrontGate(app)), engine)


class FrontGate:
    """ASGI middleware: one spelling of path and method, and a bound on the headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEADER_BYTES:
            error = HeadersTooLarge(
                f"The header lines have {size} bytes, above this server's {MAX_HEADER_BYTES}."
            )
            await error(scope, receive, send)
            return
        # The server's own scope is changed, and no copy: gates further out read from it too.
        if "//" in scope["path"] or scope["path"].endswith("/"):
            scope["path"] = re.sub("/+", "/", scope["path"]).rstrip("/") or "/"
            raw = re.sub(b"/+", b"/", scope.get("raw_path") or b"")
            scope["raw_path"] = raw.rstrip(b"/") or b"/"
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        await self._app({**scope, "method": "GET"}, receive, _without_body(send))


def _without_body(send: Send) -> Send:
    ended = False

    async def headers_only(message: Message) -> None:
        nonlocal ended
        if message["type"] == "http.response.start":
            await send(message)
        elif not ended and not message.get("more_body", False):
            ended = True
            await send({**message, "body": b""})

    return headers_only
