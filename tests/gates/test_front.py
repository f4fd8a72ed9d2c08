"""What every client meets first: CORS, spelling, header lines, and Anthropic's errors."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from starlette.testclient import TestClient

from serve_app.gates.front import MAX_HEADER_BYTES, front
from serve_app.gates.keys import KeyGate, KeyRing
from serve_app.gates.limits import LimitGate
from serve_app.planning.placement import place
from serve_app.planning.plan import Plan
from serve_app.settings import ApiKeys, Limits, Settings

PAGE = "http://localhost:3000"
KEY = {"authorization": "Bearer secret1"}


def application() -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, str]:
        return {"object": "list"}

    @app.get("/v1/models/{model:path}")  # It takes an empty name as well.
    async def model(model: str) -> dict[str, str]:
        raise HTTPException(404, "no such model")

    @app.post("/v1/chat/completions")
    @app.post("/v1/messages")
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        if body.get("wrong"):
            raise HTTPException(400, "no such model")

        async def events() -> Any:
            yield "data: 1\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.exception_handler(HTTPException)
    async def failed(request: Any, error: HTTPException) -> Any:
        from fastapi.responses import JSONResponse

        body = {"error": {"message": error.detail, "type": "BadRequestError", "code": 400}}
        return JSONResponse(body, error.status_code)

    return app


def served(monkeypatch: pytest.MonkeyPatch, **engine: Any) -> TestClient:
    """The stack of a replica, with a key."""
    monkeypatch.setenv("FRONT_KEY", "secret1")
    gated = KeyGate(LimitGate(application(), Limits()), KeyRing(ApiKeys(env="FRONT_KEY")))
    return TestClient(front(gated, engine))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    with served(monkeypatch, allowed_origins=["*"]) as client:
        yield client


def preflight(client: TestClient, path: str = "/v1/chat/completions", origin: str = PAGE) -> Any:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    return client.options(path, headers=headers)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/models", "/health"])
def test_a_preflight_needs_no_key(client: TestClient, path: str) -> None:
    answer = preflight(client, path)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    allowed = answer.headers["access-control-allow-headers"]
    assert "x-stainless-os" in allowed
    assert "authorization" in allowed


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        (KEY, {}, 200),
        ({"authorization": "Bearer no"}, {}, 401),
        ({}, {}, 401),
        (KEY, {"n": 9}, 400),
        (KEY, {"wrong": True}, 400),
        (KEY | {"x-big": "a" * 20_000}, {}, 431),
    ],
)
def test_a_page_can_read_answers_and_errors(
    client: TestClient, headers: dict[str, str], body: dict[str, Any], status: int
) -> None:
    sent = {"origin": PAGE, **headers}
    answer = client.post("/v1/chat/completions", json=body, headers=sent)
    assert answer.status_code == status
    assert answer.headers.get_list("access-control-allow-origin") == ["*"]
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    if status >= 400:
        assert answer.json()["error"]["message"]


def test_an_origin_that_is_not_allowed_hears_what_allows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for engine in ({}, {"allowed_origins": ["https://other.example"]}):
        with served(monkeypatch, **engine) as client:
            answer = preflight(client)
            assert answer.status_code == 400
            assert "engine.allowed_origins" in answer.json()["error"]["message"]
            plain = client.get("/v1/models", headers={"origin": PAGE, **KEY})
            assert "access-control-allow-origin" not in plain.headers


@pytest.mark.parametrize("origins", [[PAGE], PAGE, f'["{PAGE}"]'])
def test_only_the_origins_of_the_setting_are_allowed(
    origins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(monkeypatch, allowed_origins=origins) as client:
        assert preflight(client).headers["access-control-allow-origin"] == PAGE
        assert preflight(client, origin="http://evil.example").status_code == 400


def test_vllm_adds_no_headers_a_second_time() -> None:
    settings = Settings.parse({"engine": {"allowed_origins": ["*"], "allow_credentials": True}})
    arguments = Plan("s3://bucket/m", "m", place(1, 1, 1), None).engine_arguments(settings)
    assert not {"allowed_origins", "allow_credentials"} & arguments.keys()


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "http://testserver//v1/models", "/v1//models", "/v1/models//", "/v1/models/"],
)
def test_a_doubled_slash_is_one(client: TestClient, path: str) -> None:
    answer = client.get(path, headers=KEY, follow_redirects=False)
    assert answer.json() == {"object": "list"}


def test_head_is_where_get_is(client: TestClient) -> None:
    got, head = client.get("/v1/models", headers=KEY), client.head("/v1/models", headers=KEY)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]
    assert client.head("/v1/chat/completions", headers=KEY).status_code == 405
    assert client.head("/v1/models").status_code == 401


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES, 20_000])
def test_header_lines_beyond_the_bound_are_refused_in_json(client: TestClient, size: int) -> None:
    answer = client.get("/v1/models", headers=KEY | {"x-big": "a" * size})
    assert answer.status_code == 431
    assert answer.json()["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize(
    ("headers", "body", "status", "kind"),
    [
        ({}, {}, 401, "authentication_error"),
        (KEY, {"wrong": True}, 400, "invalid_request_error"),
        (KEY, {"max_tokens": "x", "n": 99}, 400, "invalid_request_error"),
        (KEY | {"x-big": "a" * 20_000}, {}, 431, "invalid_request_error"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1//messages"])
def test_anthropics_clients_get_their_own_errors(
    client: TestClient,
    headers: dict[str, str],
    body: dict[str, Any],
    status: int,
    kind: str,
    path: str,
) -> None:
    answer = client.post(path, json=body, headers=headers)
    assert answer.status_code == status
    data = answer.json()
    assert data["type"] == "error"
    assert data["error"]["type"] == kind
    assert data["error"]["message"]
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_openais_errors_stay(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json={"n": 99}, headers=KEY)
    assert answer.json()["error"]["code"] == "invalid_value"


def test_streams_pass_as_they_are(client: TestClient) -> None:
    for path in ("/v1/chat/completions", "/v1/messages"):
        assert client.post(path, json={}, headers=KEY).text == "data: 1\n\n"
