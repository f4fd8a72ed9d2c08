"""An application below `route_prefix`: gates see paths without it, clients addresses with it."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.gates.front import front
from serve_app.gates.keys import KeyGate, KeyRing
from serve_app.gates.limits import LimitGate
from serve_app.gates.prefix import WithoutPrefix, WithPrefix
from serve_app.gateway.request import Request
from serve_app.replica.backend import TOKEN_HEADER, Backend
from serve_app.settings import ApiKeys, Limits

KEY = {"authorization": "Bearer secret1"}
PREFIXES = pytest.mark.parametrize("prefix", ["", "/team", "/team/a", "/v1", "/health"])


def application() -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, str]:
        return {"object": "list"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    return app


def below(prefix: str, app: ASGIApp) -> ASGIApp:
    """As Ray Serve mounts it: the path keeps the prefix, which `root_path` names."""

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": prefix}, receive, send)

    return mounted


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> ASGIApp:
    """The gates of a replica, with a key."""
    monkeypatch.setenv("PREFIX_KEY", "secret1")
    limited = LimitGate(WithPrefix(application()), Limits())
    gated = KeyGate(limited, KeyRing(ApiKeys(env="PREFIX_KEY")))
    return WithoutPrefix(front(gated, {"allowed_origins": ["*"]}))


@PREFIXES
def test_every_gate_works_below_a_prefix(stack: ASGIApp, prefix: str) -> None:
    client = TestClient(below(prefix, stack), follow_redirects=False)
    assert client.get(f"{prefix}/v1/models", headers=KEY).json() == {"object": "list"}
    assert client.get(f"{prefix}/v1//models", headers=KEY).json() == {"object": "list"}
    assert client.head(f"{prefix}/v1/models", headers=KEY).status_code == 200
    assert client.get(f"{prefix}/v1/models").status_code == 401
    assert client.get(f"{prefix}/health").status_code == 200
    assert client.get(f"{prefix}/nowhere", headers=KEY).status_code == 404
    asked = {"origin": "http://page.example", "access-control-request-method": "POST"}
    assert client.options(f"{prefix}/v1/chat/completions", headers=asked).status_code == 200
    refused = client.post(f"{prefix}/v1/messages", json={})
    assert refused.json()["error"]["type"] == "authentication_error"


@PREFIXES
def test_addresses_in_answers_have_the_prefix(stack: ASGIApp, prefix: str) -> None:
    client = TestClient(below(prefix, stack), follow_redirects=False)
    assert client.get(f"{prefix}/v1/models/", headers=KEY).json() == {"object": "list"}
    assert f"'{prefix}/openapi.json'" in client.get(f"{prefix}/docs", headers=KEY).text


@PREFIXES
async def test_an_engine_behind_a_gateway_knows_the_prefix(prefix: str) -> None:
    requests: list[Request] = []
    seen: list[Scope] = []

    async def gateway(scope: Scope, receive: Receive, send: Send) -> None:
        requests.append(Request.of(scope, b"", "x-session-id"))

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": f"{prefix}/v1/models"}
    scope |= {"root_path": prefix, "query_string": b"a=1"}
    scope["headers"] = [(b"x-route-prefix", b"/of-the-client")]
    await WithoutPrefix(gateway)(scope, _receive, _send)
    (request,) = requests
    assert request.path == "/v1/models?a=1"
    passed = [(name.encode(), value.encode()) for name, value in request.headers]
    asked = {"type": "http", "method": "GET", "path": "/v1/models", "root_path": ""}
    asked["headers"] = [*passed, (TOKEN_HEADER.encode(), b"secret")]  # type: ignore[assignment]
    await Backend(WithPrefix(engine), "secret")(asked, _receive, _send)
    assert seen[0]["root_path"] == prefix
    assert seen[0]["path"] == f"{prefix}/v1/models"


async def _receive() -> Message:
    await asyncio.sleep(3600)
    raise AssertionError


async def _send(message: Message) -> None:
    raise AssertionError(message)
