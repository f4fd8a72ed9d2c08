"""What a single request may ask for, checked before it costs the engine anything.

Only what vLLM does not check itself: the size of a body and the time it may take to arrive, and
this deployment's bounds on `n` and `max_tokens`. Everything about the meaning of a request is left
to vLLM, which knows the model.
"""

import asyncio
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import BadRequest, NotFound, PayloadTooLarge, RequestError, RequestTimeout
from serve_app.settings import Limits

# vLLM's routes that steer the engine instead of asking it something. Behind a balancer they would
# reach one replica at random, and any client's key would open them.
_CONTROL_PREFIXES = ("/inference/", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/invocations")


class RequestSize(msgspec.Struct):
    """The fields of any generation request that say how much it asks for."""

    n: Any = None
    best_of: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    prompt: Any = None

    @property
    def sequences(self) -> int:
        """How many sequences the engine will run for this request."""
        prompts = 1
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str | list):
            prompts = len(self.prompt)
        return prompts * max(_whole(self.n), _whole(self.best_of), 1)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


class LimitGate:
    """ASGI middleware: reads the body within its bounds, then checks the request's.

    What the request asks for is left in `scope["state"]["size"]`, and how long its body was in
    `scope["state"]["body_bytes"]`, for the admission behind it.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if scope["path"].startswith(_CONTROL_PREFIXES):
                raise NotFound(f"No such route: {scope['path']}")
            if scope["method"] == "POST":
                body = await self._body(scope, receive)
                state = scope.setdefault("state", {})
                state["size"], state["body_bytes"] = self._check(body), len(body)
                receive = _replay(body, receive)
        except RequestError as error:
            await error(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, or the error that says why it is not taken."""
        bound = self.limits.max_body_bytes
        too_large = PayloadTooLarge(f"The body is larger than {bound} bytes.")
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > bound:
                raise too_large
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise BadRequest("The client left before its body was complete.")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > bound:
                        raise too_large
                    chunks.append(chunk)
                    more = message.get("more_body", False)
        except TimeoutError:
            waited_s = self.limits.body_timeout_s
            raise RequestTimeout(f"The body did not arrive within {waited_s:g} s.") from None
        return b"".join(chunks)

    def _check(self, body: bytes) -> RequestSize:
        if not body:
            return RequestSize()
        try:
            size = msgspec.json.decode(body, type=RequestSize)
        except msgspec.ValidationError:
            raise BadRequest("The body must be a JSON object.") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"The body is not valid JSON: {error}") from None
        bounds = {
            "n": self.limits.max_n,
            "best_of": self.limits.max_n,
            "max_tokens": self.limits.max_tokens,
            "max_completion_tokens": self.limits.max_tokens,
            "max_output_tokens": self.limits.max_tokens,
        }
        for field, bound in bounds.items():
            value = _whole(getattr(size, field))
            if bound is not None and value > bound:
                raise BadRequest(f"{field} is {value}, above this server's {bound}.", param=field)
        return size


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that gives the body once more, then what the client does next."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
