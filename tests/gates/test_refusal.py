"""What is refused before its first token has its status, streamed too."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from serve_app.errors import BadRequest
from serve_app.gates import routes
from serve_app.gates.anthropic import WithoutThinking
from serve_app.gates.reading import read
from serve_app.gates.refusal import RefusalGate


def error(code: Any) -> str:
    body = {"error": {"message": "no such type", "type": "BadRequestError", "code": code}}
    return f"data: {json.dumps(body)}\n\n"


def served(events: Iterable[str]) -> TestClient:
    app = FastAPI()

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        async def body() -> Any:
            for event in events:
                yield event

        return StreamingResponse(
            body(), media_type="text/event-stream", headers={"x-request-id": "r"}
        )

    @app.post("/plain")
    async def plain() -> JSONResponse:
        return JSONResponse({"ok": 1})

    return TestClient(RefusalGate(app))


@pytest.mark.parametrize("code", [400, "400", 404, 422])
def test_a_first_event_that_refuses_is_the_status(code: Any) -> None:
    answer = served([error(code), "data: [DONE]\n\n"]).post("/stream")
    assert answer.status_code == int(code)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == "r"
    assert answer.json()["error"]["message"] == "no such type"


@pytest.mark.parametrize(
    "events",
    [
        ['data: {"choices": []}\n\n', error(400), "data: [DONE]\n\n"],
        ['data: {"choices": []}\n\n', "data: [DONE]\n\n"],
        [error(500), "data: [DONE]\n\n"],
        [error("none"), "data: [DONE]\n\n"],
        ['data: {"error"', ": 1}\n\n"],
        ["event: error\ndata: {}\n\n"],
    ],
)
def test_any_other_stream_passes_as_it_is(events: list[str]) -> None:
    answer = served(events).post("/stream")
    assert answer.status_code == 200
    assert answer.text == "".join(events)


def test_an_answer_in_one_piece_passes() -> None:
    assert served([]).post("/plain").json() == {"ok": 1}


def test_an_empty_stream_still_begins() -> None:
    answer = served([]).post("/stream")
    assert (answer.status_code, answer.text) == (200, "")


@pytest.mark.parametrize("name", ["guided_json", "guided_regex", "guided_choice", "guided_grammar"])
def test_a_grammar_that_vllm_would_ignore_is_refused(name: str) -> None:
    route = routes.find("/v1/chat/completions")
    assert route is not None
    with pytest.raises(BadRequest, match="structured_outputs"):
        read(route, json.dumps({name: {"type": "object"}, "messages": []}).encode())
    assert read(route, json.dumps({name: None}).encode()).sequences == 1


@pytest.mark.parametrize(
    ("thinking", "remaining"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, False),
        ({"type": "disabled"}, True),
        ("x", True),
        (None, True),
    ],
)
def test_a_wish_to_think_is_no_error_of_a_model_that_does_not(
    thinking: Any, remaining: bool
) -> None:
    app = FastAPI()

    @app.post("/v1/messages")
    @app.post("/v1/other")
    async def messages(body: dict[str, Any]) -> dict[str, Any]:
        return body

    client = TestClient(WithoutThinking(app))
    body = {"max_tokens": 5, "thinking": thinking, "text": 'größe "thinking"'}
    assert client.post("/v1/other", json=body).json() == body
    data = client.post("/v1/messages", json=body).json()
    assert ("thinking" in data) == remaining
    assert data["text"] == body["text"]
