"""The share of a tenant is the gateway's to say, and the replica's queue goes by it."""

from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from serve_app.gateway.request import Request as Forwarded
from serve_app.replica.backend import SHARE_HEADER, Backend
from serve_app.tenants.fair import Share


def forwarded(state: dict[str, Any], *headers: tuple[bytes, bytes]) -> dict[str, str]:
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "state": state}
    return dict(Forwarded.of({**scope, "headers": list(headers)}, b"", "x-session-id").headers)


def test_a_client_does_not_choose_its_share() -> None:
    sent = (SHARE_HEADER.encode(), b"1000 0")
    assert SHARE_HEADER not in forwarded({}, sent)
    said = forwarded({"share": Share("ann", 0.3, 2)}, sent)
    assert said[SHARE_HEADER] == "0.3 2"


@pytest.mark.parametrize("share", [Share("Größe", 0.1 + 0.2, 0), None])
async def test_the_replica_has_the_share_that_the_gateway_sends(share: Share | None) -> None:
    seen: list[Share | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope.get("state", {}).get("share"))
        await JSONResponse({})(scope, receive, send)

    state = {} if share is None else {"share": share}
    headers = forwarded(state)
    if share is not None:
        headers["x-tenant"] = "Gr%C3%B6%C3%9Fe"
    transport = httpx.ASGITransport(app=Backend(app, "token"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        await http.post("/v1/completions", headers={**headers, "x-engine-token": "token"})
    assert seen == [share]
