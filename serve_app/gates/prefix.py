"""`route_prefix` of serve_config.yaml: the path below which Ray Serve mounts the application.

Ray Serve leaves the prefix in the path of a request, and names it in ASGI's `root_path`. Every gate
compares paths, so the prefix is removed in front of the first one. vLLM's application gets it back,
because its /docs and /openapi.json name addresses.
"""

from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send


class WithoutPrefix:
    """ASGI middleware: the application behind it sees paths such as /v1/models."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefix, path = scope.get("root_path", ""), scope.get("path", "")
        if prefix and f"{path}/".startswith(f"{prefix}/"):
            raw = scope.get("raw_path") or quote(path).encode()
            scope = {
                **scope,
                "path": path[len(prefix) :] or "/",
                "raw_path": raw.removeprefix(prefix.encode()) or b"/",
            }
        await self._app(scope, receive, send)


class WithPrefix:
    """ASGI middleware: the application behind it sees the paths that clients ask for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if prefix := scope.get("root_path"):
            raw = prefix.encode() + scope.get("raw_path", b"")
            scope = {**scope, "path": prefix + scope["path"], "raw_path": raw}
        await self._app(scope, receive, send)
