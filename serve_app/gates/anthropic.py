"""Anthropic's route as Anthropic's clients expect it: the shape of errors, and `thinking`.

    {"type": "error", "error": {"type": "authentication_error", "message": "..."}}

https://docs.anthropic.com/en/api/errors. Errors of all gates and of vLLM pass here; only CORS comes
after it. Events of a stream that has begun have that shape already.
"""

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PATHS = ("/v1/messages", "/v1/messages/count_tokens")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicErrors:
    """ASGI middleware: rewrites the body of an error."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun: Message | None = None
        body = b""

        async def rewrite(message: Message) -> None:
            nonlocal begun, body
            # Inner gates may have normalised the path.
            is_error = message.get("status", 200) >= 400 and scope["path"] in _PATHS
            if message["type"] == "http.response.start" and is_error:
                begun = message
                return
            if begun is None:
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                content = _rewritten(begun["status"], body)
                headers = [
                    (name, str(len(content)).encode() if name == b"content-length" else value)
                    for name, value in begun["headers"]
                ]
                await send({**begun, "headers": headers})
                await send({**message, "body": content})

        await self._app(scope, receive, rewrite)


class WithoutThinking:
    """ASGI middleware, before a model that does not think: a wish that it should is no error.

    Anthropic's clients may always send `thinking`. vLLM answers 400 and names a flag of its own
    command line, which is no help to a client.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/messages":
            await self._app(scope, receive, send)
            return

        async def without() -> Message:
            message = await receive()
            # LimitGate gives a body in one piece.
            if b'"thinking"' in message.get("body", b"") and not message.get("more_body", False):
                return {**message, "body": _without_thinking(message["body"])}
            return message

        await self._app(scope, without, send)


def _without_thinking(body: bytes) -> bytes:
    try:
        data = json.loads(body)
        if data["thinking"]["type"] != "enabled":
            return body
    except (ValueError, KeyError, TypeError, RecursionError):
        return body  # vLLM says what is wrong with it.
    del data["thinking"]
    return json.dumps(data).encode()


def _rewritten(status: int, body: bytes) -> bytes:
    try:
        error: Any = json.loads(body)["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError):
        return body  # Of another shape, and none of ours.
    default = "invalid_request_error" if status < 500 else "api_error"
    kind = _TYPES.get(status, default)
    rest = {key: error[key] for key in ("param", "code") if error.get(key) is not None}
    answer = {"type": "error", "error": {"type": kind, "message": message, **rest}}
    return json.dumps(answer).encode()
