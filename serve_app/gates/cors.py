"""CORS: which pages in a browser may use the server. It covers our own answers and errors and
vLLM's.

The settings are vLLM's: `engine.allowed_origins`, `allowed_methods`, `allowed_headers` and
`allow_credentials`. This gate is in front of the one that checks keys, because a browser sends a
preflight without a key, and hides errors without CORS headers from a page. Starlette does the work.
"""

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import BadRequest
from serve_app.gates.origins import allowed_origins, as_list

# What a page may read of an answer beside its body.
_EXPOSED = ("x-request-id", "retry-after")
# How long a browser may remember a preflight.
_MAX_AGE_S = 600


class CorsGate:
    """ASGI middleware: answers preflights, and lets pages of allowed origins read the answers."""

    def __init__(self, app: ASGIApp, engine: Mapping[str, Any]) -> None:
        self._app = app
        self._cors = CORSMiddleware(
            app,
            allow_origins=allowed_origins(engine),
            allow_methods=as_list(engine.get("allowed_methods"), ["*"]),
            allow_headers=as_list(engine.get("allowed_headers"), ["*"]),
            allow_credentials=str(engine.get("allow_credentials")).lower() in ("true", "1", "yes"),
            expose_headers=_EXPOSED,
            max_age=_MAX_AGE_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        asks = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if origin is not None and asks and not self._cors.is_allowed_origin(origin):
            error = BadRequest(
                f"Pages of {origin} may not use this server: its origin is not in "
                "engine.allowed_origins of serve_config.yaml."
            )
            await error(scope, receive, send)
            return
        await self._cors(scope, receive, send)
