"""What the gate of tenants lets through, in front of an application that notes what reaches it."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from serve_app.gates.front import front
from serve_app.gates.keys import KeyGate
from serve_app.gates.limits import LimitGate
from serve_app.observe.timeline import Timeline
from serve_app.settings import ApiKeys, Limits, Observe, Settings, Tenants
from serve_app.tenants import gate as gate_module
from serve_app.tenants.book import Book
from serve_app.tenants.fair import Share
from serve_app.tenants.gate import book_of, gated
from serve_app.tenants.ledger import COLUMNS
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
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    (tmp_path / "tenants.yaml").write_text(TENANTS)
    settings = Settings(tenants=Tenants(file=str(tmp_path / "tenants.yaml")))
    keys = Registry(settings.tenants, ApiKeys())
    book = book_of(settings)
    assert book is not None
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", answer, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name}", answer),
            Route("/health", answer),
        ]
    )
    stack = front(KeyGate(LimitGate(gated(app, keys, "large", book, settings), Limits()), keys), {})
    yield httpx.AsyncClient(transport=httpx.ASGITransport(app=stack), base_url="http://test")
    await book.close()


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
        (ANN | {"x-vllm-priority": "0"}, {}, 200, None),
        (ANN | {"x-vllm-priority": "-5"}, {}, 400, "invalid_value"),
        (ANN | {"X-Vllm-Priority": "7"}, {"priority": 0}, 400, "invalid_value"),
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


@pytest.mark.parametrize("name", ["an\0adapter", "x" * 10**5, "half \ud800"])
def test_a_row_of_the_ledger_holds_any_name(name: str) -> None:
    """PostgreSQL takes no NUL, and a row that no database takes would hold up all others."""
    plain = gate_module._plain(name)
    assert len(plain) <= 256
    assert "\0" not in plain
    plain.encode()


async def test_health_asks_for_no_key(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200


# --- what is counted ---


QUOTAS = f"""
tenants:
  - {{name: ann, keys: [{{sha256: {digest(b"sk-ann")}}}],
      quota: {{requests_per_minute: 3, tokens_per_minute: 100000}}}}
  - {{name: bob, keys: [{{sha256: {digest(b"sk-bob")}}}], quota: {{tokens_per_month: 1000}}}}
"""


class Engine:
    """What an engine's application does: it says what it did, or only the answer does."""

    def __init__(self, says: bool = True) -> None:
        self.says = says
        self.shares: list[Share] = []

    async def answer(self, request: Request) -> Response:
        self.shares.append(request.scope["state"]["share"])
        asked = json.loads(await request.body())
        if asked.get("fail"):
            return JSONResponse({"error": {}}, status_code=400)
        if self.says:
            done = request.scope["state"]["work"]
            done.has_counts = True
            done.prompt_tokens, done.cached_tokens, done.output_tokens = 600, 100, 50
            done.gpu_s = 3.6
        usage = {"prompt_tokens": 600, "completion_tokens": 50}
        usage["prompt_tokens_details"] = {"cached_tokens": 100}  # type: ignore[assignment]
        if not asked.get("stream"):
            return JSONResponse({"choices": [], "usage": usage})

        async def events() -> AsyncIterator[str]:
            yield 'data: {"choices": []}\n\n'
            if asked.get("break"):
                raise RuntimeError("the engine broke")
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


@contextlib.asynccontextmanager
async def counted(folder: Path, engine: Engine) -> AsyncIterator[tuple[httpx.AsyncClient, Book]]:
    (folder / "tenants.yaml").write_text(QUOTAS)
    settings = Settings(
        tenants=Tenants(file=str(folder / "tenants.yaml")),
        observe=Observe(price_per_gpu_hour=10.0),
    )
    keys, book = Registry(settings.tenants, ApiKeys()), book_of(settings)
    assert book is not None
    app = Starlette(routes=[Route("/v1/completions", engine.answer, methods=["POST"])])
    stack = KeyGate(LimitGate(gated(app, keys, "m", book, settings), Limits()), keys)
    transport = httpx.ASGITransport(app=stack, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http, book
    await book.close()


def ledger(book: Book) -> list[dict[str, Any]]:
    return [dict(zip(COLUMNS, each, strict=True)) for each in book._ledger.rows(0, 1e12)]


def written(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_is_a_row_with_what_the_engine_did(
    tmp_path: Path, stream: bool, says: bool
) -> None:
    """Also where the engine is in another process, as behind the gateway."""
    engine = Engine(says)
    async with counted(tmp_path, engine) as (http, book):
        for _ in range(3):
            response = await http.post(
                "/v1/completions",
                headers={**ANN, "x-request-id": "the same"},
                json={"stream": stream, "prompt": "secret words", "model": "an-adapter"},
            )
            assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        refused = await http.post("/v1/completions", headers=ANN, json={})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert engine.shares[0] == Share("ann")
    rows = ledger(book)
    assert len(rows) == 3  # One for each, though all had the same request id.
    for row in rows:
        assert (row["tenant"], row["model"], row["adapter"]) == ("ann", "m", "an-adapter")
        assert (row["prompt_tokens"], row["cached_tokens"], row["output_tokens"]) == (600, 100, 50)
        assert (row["outcome"], row["status"], row["estimated"]) == ("ok", 200, 0)
        assert row["began_s"] <= row["first_s"] <= row["ended_s"]
        assert row["dollars"] == pytest.approx(0.01 if says else 0.0)
    assert b"secret words" not in written(tmp_path)


async def test_a_budget_is_used_up(tmp_path: Path) -> None:
    async with counted(tmp_path, Engine()) as (http, book):
        statuses = []
        for _ in range(4):
            response = await http.post("/v1/completions", headers=BOB, json={"max_tokens": 10})
            statuses.append(response.status_code)
        assert statuses == [200, 200, 402, 402]
        assert response.json()["error"]["code"] == "insufficient_quota"
    assert len(ledger(book)) == 2


async def test_what_never_reached_the_engine_costs_nothing(tmp_path: Path) -> None:
    async with counted(tmp_path, Engine()) as (http, book):
        for _ in range(5):
            answer = await http.post("/v1/completions", headers=BOB, json={"fail": True})
            assert answer.status_code == 400
        assert (await http.post("/v1/completions", headers=BOB, json={})).status_code == 200
    assert len(ledger(book)) == 1


async def test_a_stream_that_breaks_is_charged(tmp_path: Path) -> None:
    async with counted(tmp_path, Engine()) as (http, book):
        with contextlib.suppress(Exception):
            await http.post("/v1/completions", headers=ANN, json={"stream": True, "break": True})
    (row,) = ledger(book)
    assert row["outcome"] == "left"
    assert row["output_tokens"] == 50


async def test_a_tenant_sees_only_itself(tmp_path: Path) -> None:
    async with counted(tmp_path, Engine()) as (http, book):
        for headers in (ANN, BOB):
            assert (await http.post("/v1/completions", headers=headers, json={})).is_success
        await book._exchange()
        used = (await http.get("/tenant/usage", headers=BOB)).json()
        assert used["tenant"] == "bob"
        assert used["limits"]["tokens_per_month"]["limit"] == 1000
        assert used["limits"]["tokens_per_month"]["remaining"] == 350
        assert used["models"]["m"]["requests"] == 1
        assert used["models"]["m"]["prompt_tokens"] == 600
        # A browser asks for the key, and sends it as a password.
        asked = await http.get("/tenant")
        assert asked.status_code == 401
        assert "Basic" in asked.headers["www-authenticate"]
        shown = await http.get("/tenant", auth=("", "sk-bob"))
        assert shown.headers["content-type"].startswith("text/html")
        assert "350 of 1,000 left" in shown.text
        assert "ann" not in shown.text
        for wrong in (("", "sk-eve"), ("sk-bob", "")):
            assert (await http.get("/tenant", auth=wrong)).status_code == 401
        # Nowhere else.
        assert (await http.get("/tenant/usage", auth=("", "sk-bob"))).status_code == 401


async def test_an_answer_of_the_fast_lane_that_the_engine_says_nothing_of_is_charged(
    tmp_path: Path,
) -> None:
    async def granted(request: Request) -> Response:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send(
                {"type": "http.response.body", "body": b"", "timeline": Timeline(200, broken=True)}
            )

        return app  # type: ignore[return-value]

    engine = Engine()
    engine.answer = granted  # type: ignore[method-assign]
    async with counted(tmp_path, engine) as (http, book):
        await http.post("/v1/completions", headers=ANN, json={"max_tokens": 40})
    (row,) = ledger(book)
    assert (row["lane"], row["outcome"], row["estimated"]) == ("fast", "error", 1)
    assert row["output_tokens"] == 40
