"""API keys: their sources, and the gate that checks them.

Every route except the health routes is behind the gate. vLLM's own check protects only some
prefixes and leaves others (/tokenize, /metrics, /invocations) open, so it is not used.
"""

import base64
import hashlib
import os
import time
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import ConfigError, Unauthorized
from serve_app.progress import say
from serve_app.settings import ApiKeys

# What a load balancer must be able to ask without a key.
OPEN_PATHS = frozenset({"/health", "/ping"})
# The page of a tenant, for which a browser asks for the key itself (HTTP Basic).
_PAGE_PATH = "/tenant"
# A rotated file takes effect within this time; stat() on every request would cost more than a key.
_REREAD_S = 1.0

# Who asks: the name of the key, for metrics and logs. Set for the time of a request.
tenant: ContextVar[str] = ContextVar("tenant", default="anonymous")


class Keys(Protocol):
    """The accepted keys, from wherever they come: a KeyRing, or the registry of tenants."""

    @property
    def required(self) -> bool:
        """Whether a request needs one."""
        ...

    def holder(self, key: str) -> str | None:
        """The name of the tenant that has this key; None if there is none."""
        ...

    def __len__(self) -> int: ...


class KeyRing:
    """The accepted keys, as digests. A configured source that is empty or missing accepts none.

    The file holds one key a line; blank lines and lines that start with # are skipped. It is read
    again when it changes. The environment variable holds keys separated by commas. Before a key may
    stand a name and a space: metrics and logs call it that, and one without a name by the first
    eight digits of its SHA-256.
    """

    def __init__(self, source: ApiKeys) -> None:
        self.required = source.configured
        self._file = Path(source.file) if source.file is not None else None
        self._from_env = _keys(os.environ.get(source.env or "", "").split(","))
        self._from_file: Mapping[bytes, str] = {}
        self._signature: tuple[int, int, int] | None = None
        self._read_at = -_REREAD_S

    def holder(self, key: str) -> str | None:
        """The name of the tenant that has this key; None if there is none."""
        self._reread()
        for digest in sent_digests(key):
            name = self._from_env.get(digest) or self._from_file.get(digest)
            if name is not None:
                return name
        return None

    def __len__(self) -> int:
        self._reread()
        return len(self._from_env) + len(self._from_file)

    def _reread(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._read_at < _REREAD_S:
            return
        self._read_at = now
        try:
            stat = self._file.stat()
            # A mounted Secret is replaced by renaming a link: the inode tells where mtime may not.
            signature = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if signature != self._signature:
                lines = self._file.read_text(encoding="utf-8").splitlines()
                self._from_file = _keys([w for w in lines if not w.lstrip().startswith("#")])
                self._signature = signature
        except (OSError, UnicodeDecodeError):
            # Fails closed: a secret that was taken away no longer opens the door.
            self._from_file, self._signature = {}, None


def sent_digests(key: str) -> tuple[bytes, ...]:
    """The SHA-256 digests of the keys that a client may have meant by a header's value.

    A header has bytes, and `key` is what they are as latin-1. Clients send a key beyond ASCII as
    UTF-8, some as latin-1; either is accepted. Keys are looked up by digest: how long that takes
    says nothing of how nearly a key matches.
    """
    utf8 = key.encode("utf-8", "surrogateescape")
    if key.isascii():
        return (hashlib.sha256(utf8).digest(),)
    latin1 = key.encode("latin-1", "replace")
    return (hashlib.sha256(utf8).digest(), hashlib.sha256(latin1).digest())


def _keys(lines: list[str]) -> Mapping[bytes, str]:
    """The names of keys, by digest."""
    names: dict[bytes, str] = {}
    for line in lines:
        *name, key = line.split() or [""]
        if key:
            digest = hashlib.sha256(key.encode())
            names.setdefault(digest.digest(), " ".join(name) or digest.hexdigest()[:8])
    return names


class KeyGate:
    """ASGI middleware: 401 without an accepted key.

    The key is read from `Authorization: Bearer` (OpenAI) or `x-api-key` (Anthropic, and wherever a
    platform keeps the Authorization header for itself).
    """

    def __init__(self, app: ASGIApp, ring: Keys) -> None:
        self.app = app
        self.ring = ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or not self.ring.required:
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        candidates = [headers.get("x-api-key", "")]
        if scheme.lower() == "bearer":
            candidates.append(bearer.strip())
        elif scheme.lower() == "basic" and scope["path"] == _PAGE_PATH:
            candidates.append(_password(bearer))
        holders = [self.ring.holder(key) for key in candidates if key]
        if holder := next((name for name in holders if name is not None), None):
            tenant.set(holder)
            await self.app(scope, receive, send)
        else:
            error = Unauthorized(
                "Missing or unknown API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
            )
            if scope["path"] == _PAGE_PATH:
                error.headers = [(b"www-authenticate", b'Basic realm="an API key as the password"')]
            await error(scope, receive, send)


def _password(given: str) -> str:
    """The password that a browser sends; empty where that cannot be read."""
    try:
        return base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
    except ValueError:
        return ""


def check_exposure(ring: Keys, allowed: bool) -> None:
    """Without keys, only this machine may ask, unless the settings say otherwise.

    Raises:
        ConfigError: the server listens beyond this machine, and anybody could ask.
    """
    if ring.required and not len(ring):
        say("warning: keys are required and there is none: every request is refused")
    if ring.required or allowed:
        return
    host = http_host()
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            "http_options.host",
            host,
            "listens beyond this machine and no api_keys are configured; set api_keys, or "
            "host 127.0.0.1, or allow_unauthenticated_network: true",
        )


def http_host() -> str:
    """The address that Ray Serve's HTTP server listens on."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    return str(ray.get(controller.get_http_config.remote()).host)
