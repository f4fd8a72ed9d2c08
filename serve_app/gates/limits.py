"""The limits of a single request, checked before it reaches the engine.

They cover what vLLM does not check: whether the route exists, the size of a body, how long it may
take to arrive, and this deployment's bounds. The meaning of a request is left to vLLM, which knows
the model.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import BadRequest, NotFound, PayloadTooLarge, RequestError, RequestTimeout
from serve_app.gates import reading, routes
from serve_app.gates.reading import Reading
from serve_app.settings import Limits

# Content parts, tool calls and tools that a request may have for each message that it may have.
_PARTS_A_MESSAGE = 4
# vLLM takes bad words of 1,024 tokens in all, and counts them after it has tokenized each word.
_MAX_BAD_WORDS_LENGTH = 2**16


class LimitGate:
    """ASGI middleware: reads the body within its bounds, then checks the request's.

    Leaves in `scope["state"]` the `route` (routes.Route) and the `reading` (reading.Reading) of the
    request, for all that come after it.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        # The door has read the body, which is in its channel all the same.
        body: bytes | None = state.get("body")
        try:
            route = _route(scope["path"])
            if body is None or len(body) > self.limits.max_body_bytes:
                body = await self._body(scope, receive)
                receive = _replay(body, receive)
            parsed = reading.read(route, body) if scope["method"] == "POST" else Reading()
            check(parsed, self.limits)
        except RequestError as error:
            await error(scope, receive, send)
            return
        state["route"], state["reading"] = route, parsed
        await self.app(scope, receive, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, or the error with which it is refused."""
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
                        raise BadRequest("The client disconnected before its body was complete.")
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


def check(parsed: Reading, limits: Limits) -> None:
    """Whether a request stays within the limits of one request.

    Raises:
        BadRequest: it does not; names the field.
    """
    bounds: list[tuple[str, int, int | None]] = [
        ("n", parsed.choices, limits.max_n),
        ("best_of", parsed.best_of, limits.max_n),
        ("the number of messages", parsed.messages, limits.max_messages),
        (
            "the number of content parts, tools and messages",
            parsed.parts,
            limits.max_messages * _PARTS_A_MESSAGE,
        ),
        ("the length of bad_words", parsed.bad_words_length, _MAX_BAD_WORDS_LENGTH),
        *((name, value, limits.max_tokens) for name, value in parsed.token_bounds),
        # Of other prompts vLLM counts the tokens (replica/bounds.py).
        ("the number of token_ids", parsed.token_ids, limits.max_prompt_tokens),
    ]
    for field, value, bound in bounds:
        if bound is not None and value > bound:
            param = field.rpartition(" ")[2]
            raise BadRequest(f"{field} is {value}, above this server's {bound}.", param=param)
    if parsed.sequences > limits.max_sequences:
        raise BadRequest(
            f"The request asks for {parsed.sequences} sequences (prompts times choices), above "
            f"this server's {limits.max_sequences}. Split it into several requests."
        )
    if parsed.grammar_bytes > limits.max_grammar_bytes:
        raise BadRequest(
            f"The grammar of the answer is too large: {parsed.grammar_bytes} bytes, above "
            f"this server's {limits.max_grammar_bytes}."
        )


def _route(path: str) -> routes.Route:
    route = routes.find(path)
    if route is None:
        near = routes.nearest_path(path)
        hint = f" Did you mean {near}?" if near is not None else ""
        raise NotFound(f"There is no route {path!r}.{hint}")
    return route


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
