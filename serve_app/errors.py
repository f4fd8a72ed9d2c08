"""The errors of this application, each with its HTTP status and OpenAI code.

One tree, so that `except ServeError` catches all of them:

    ServeError
    ├── ConfigError            a start that cannot succeed (no status: no client sees it)
    └── RequestError           an answer to one request
        ├── BadRequest         400
        ├── Unauthorized       401
        ├── BudgetUsedUp       402  a tenant's quota of a day or a month
        ├── NotFound           404
        ├── ModelNotFound      404  also a model that the tenant may not use
        ├── RequestTimeout     408  the client was too slow to send
        ├── PayloadTooLarge    413
        ├── TooManyRequests    429, with Retry-After
        ├── RateLimited        429, with Retry-After: a tenant's quota
        ├── HeadersTooLarge    431
        ├── Unavailable        503, with Retry-After
        ├── BudgetUnknown      503, with Retry-After: the database of tenants is unavailable
        ├── GatewayTimeout     504  the answer took too long
        ├── CannotContinue     502  it broke off, and no other replica can continue it exactly
        └── Poison             500  the request kills replicas

The body of a `RequestError` is the one that OpenAI's clients parse
(https://platform.openai.com/docs/guides/error-codes); its outer `type` makes it Anthropic's too.
"""

import difflib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # What reads a model's size has Python alone: `make runpod-up`.
    from starlette.types import Receive, Scope, Send


class ServeError(Exception):
    """Base of every error this application raises on purpose."""


class ConfigError(ServeError):
    """A setting that cannot be honoured: one sentence that names key, value and mend."""

    def __init__(self, key: str, value: object, problem: str, nearest: str | None = None) -> None:
        hint = f"; did you mean {nearest}?" if nearest is not None else ""
        super().__init__(f"{key} = {value!r}: {problem}{hint}")
        # Ray pickles what a replica's constructor raises, and pickle calls __init__ again.
        self.fields = (key, value, problem, nearest)

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[object, ...]]:
        return type(self), self.fields


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` most likely meant, quoted; None where nothing is near."""
    matches = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return repr(matches[0]) if matches else None


class RequestError(ServeError):
    """An error answer to one request, usable as an ASGI application.

    Attributes:
        status: HTTP status.
        kind: OpenAI's `error.type`.
        code: OpenAI's `error.code`, a stable word for programs.
        retry_after_s: seconds for the Retry-After header, or None for no header.
        headers: more of them.
    """

    status = 500
    kind = "server_error"
    code = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers: list[tuple[bytes, bytes]] = []

    def body(self) -> bytes:
        error = {
            "message": str(self),
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"type": "error", "error": error}).encode()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        body = self.body()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if self.retry_after_s is not None:
            # Whole seconds, never 0: a client that comes back at once has not waited.
            headers.append((b"retry-after", str(max(1, round(self.retry_after_s))).encode()))
        headers += self.headers
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        # `code` is for the meter: servers leave what they do not know.
        start = {
            "type": "http.response.start",
            "status": self.status,
            "headers": headers,
            "code": self.code,
        }
        await send(start)
        await send({"type": "http.response.body", "body": body})


class BadRequest(RequestError):
    status = 400
    kind = "invalid_request_error"
    code = "invalid_value"


class Unauthorized(RequestError):
    status = 401
    kind = "invalid_request_error"
    code = "invalid_api_key"


class BudgetUsedUp(RequestError):
    status = 402
    kind = "insufficient_quota"
    code = "insufficient_quota"


class NotFound(RequestError):
    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class ModelNotFound(RequestError):
    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class RequestTimeout(RequestError):
    status = 408
    kind = "timeout_error"
    code = "timeout"


class PayloadTooLarge(RequestError):
    status = 413
    kind = "invalid_request_error"
    code = "body_too_large"


class HeadersTooLarge(RequestError):
    status = 431
    kind = "invalid_request_error"
    code = "headers_too_large"


class TooManyRequests(RequestError):
    status = 429
    kind = "rate_limit_error"
    code = "queue_full"


class RateLimited(RequestError):
    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(RequestError):
    status = 503
    kind = "server_error"
    code = "unavailable"


class BudgetUnknown(RequestError):
    status = 503
    kind = "server_error"
    code = "budget_unknown"


class GatewayTimeout(RequestError):
    status = 504
    kind = "timeout_error"
    code = "timeout"


class CannotContinue(RequestError):
    status = 502
    kind = "server_error"
    code = "cannot_continue"


class Poison(RequestError):
    status = 500
    kind = "server_error"
    code = "replicas_died"
