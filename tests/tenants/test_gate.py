"""What the gate of tenants lets through, in front of an application that notes what reaches it."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serve_app.gates.front import front
from serve_app.gates.keys import KeyGate
from serve_app.gates.limits import LimitGate
from serve_app.settings import ApiKeys, Limits, Tenants
from serve_app.tenants.gate import gated
from serve_app.tenants.registry import Registry
from serve_app.tenants.tenant import digest

TENANTS = f"""
tenants:
  - {{name: ann, keys: [{{sha256: {digest(b"sk-ann")}}}]}}
  - {{name: bob, models: [small, an-adapter], keys: [{{sha256: {digest(b"sk-bob")}}}]}}
"""
ANN, BOB = {"authorization": "Bearer sk-ann"}, {"authorization": "Bearer sk-bob"}


async def answer(request: Request) -> JSONResponse:
    return JSONResponse({"asked": (await request.body()).decode()})


async def models(request: Request) -> JSONResponse:
    cards = [{"id": name} for name in ("large", "small", "an-adapter")]
    return JSONResponse({"object": "list", "data": cards})


@pytest.fixture
def client(tmp_path: Path) -> httpx.AsyncClient:
    (tmp_path / "tenants.yaml").write_text(TENANTS)
    keys = Registry(Tenants(file=str(tmp_path / "tenants.yaml")), ApiKeys())
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", answer, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name}", answer),
            Route("/health", answer),
        ]
    )
    stack = front(KeyGate(LimitGate(gated(app, keys, "large"), Limits()), keys), {})
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=stack), base_url="http://test")


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        (ANN, {"model": "large"}, 200, None),
        (ANN, {}, 200, None),
        (BOB, {"model": "small"}, 200, None),
        (BOB, {"model": "an-adapter"}, 200, None),
        (BOB, {"model": "large"}, 404, "model_not_found"),
        (BOB, {}, 404, "model_not_found"),  # It would be answered by `large`.
        ({"authorization": "Bearer sk-eve"}, {}, 401, "invalid_api_key"),
        ({}, {}, 401, "invalid_api_key"),
        (ANN, {"priority": 0}, 200, None),
        (ANN, {"priority": None}, 200, None),
        (ANN, {"priority": -5}, 400, "invalid_value"),
        (ANN, {"priority": "7"}, 400, "invalid_value"),
        (ANN, {"priority": 1.0}, 400, "invalid_value"),
        (ANN, {"priority": True}, 400, "invalid_value"),
    ],
)
async def test_what_a_tenant_may_ask_for(
    client: httpx.AsyncClient,
    headers: dict[str, str],
    body: dict[str, Any],
    status: int,
    code: str | None,
) -> None:
    response = await client.post("/v1/chat/completions", headers=headers, json=body)
    assert response.status_code == status
    if code is not None:
        assert response.json()["error"]["code"] == code


async def test_models_are_listed_that_a_tenant_may_use(client: httpx.AsyncClient) -> None:
    for headers, names in ((ANN, ["large", "small", "an-adapter"]), (BOB, ["small", "an-adapter"])):
        response = await client.get("/v1/models", headers=headers)
        assert [card["id"] for card in response.json()["data"]] == names
        assert (await client.head("/v1/models", headers=headers)).status_code == 200
    assert (await client.get("/v1/models/large", headers=BOB)).status_code == 404
    assert (await client.get("/v1/models/small", headers=BOB)).status_code == 200


async def test_health_asks_for_no_key(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200
