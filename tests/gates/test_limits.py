"""The bounds of one request: body, time to arrive, n and max_tokens."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request as Asked
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from serve_app.gates.limits import LimitGate
from serve_app.gates.reading import Reading
from serve_app.lanes.door import Request
from serve_app.settings import Limits


def client(**limits: Any) -> httpx.AsyncClient:
    async def echo(request: Asked) -> JSONResponse:
        requested: Reading = request.scope["state"]["reading"]
        return JSONResponse(
            {"body": (await request.body()).decode(), "sequences": requested.sequences}
        )

    methods = ["POST", "PUT", "PATCH", "DELETE", "GET"]
    app = Starlette(routes=[Route("/{path:path}", echo, methods=methods)])
    gate = LimitGate(app, Limits(**limits))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=gate), base_url="http://test")


async def post(
    body: bytes | AsyncIterator[bytes],
    path: str = "/v1/completions",
    method: str = "POST",
    **limits: Any,
) -> httpx.Response:
    async with client(**limits) as http:
        return await http.request(method, path, content=body)


async def test_the_body_reaches_the_application_whole() -> None:
    body = json.dumps({"prompt": "x" * 100_000, "n": 2}).encode()
    answer = (await post(body)).json()
    assert answer == {"body": body.decode(), "sequences": 2}


@pytest.mark.parametrize(("bound", "status"), [(21, 200), (20, 413)])
async def test_a_body_that_the_door_has_read_is_bounded_as_well(bound: int, status: int) -> None:
    body = b'{"prompt": "0123456"}'
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["state"]["reading"].body_bytes, (await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            seen.append(message["status"])

    request = Request("POST", "/v1/completions", (), body)
    await LimitGate(app, Limits(max_body_bytes=bound))(request.scope, receive, send)
    assert seen == ([(len(body), body), 200] if status == 200 else [413])


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b'{"prompt": "x', 400, "JSON"),
        (b"[1, 2]", 400, "object"),
        (b"\xff\xfe{}", 400, "JSON"),
        (b'{"prompt": "\xff"}', 400, "JSON"),
        (b'{"n": 9}', 400, "n is 9"),
        (b'{"n": "9"}', 400, "n is 9"),
        (b'{"n": 9.0}', 400, "n is 9"),
        (b'{"n": 1e2}', 400, "n is 100"),
        (b'{"best_of": "9"}', 400, "best_of is 9"),
        (b'{"max_tokens": "101"}', 400, "max_tokens is 101"),
        (b'{"prompt": ["x", "x", "x", "x", "x"], "n": 4}', 400, "20 sequences"),
        (b'{"structured_outputs": {"regex": "[a-z]{2,90}[0-9]{99}[A-Z]{900}"}}', 400, "grammar"),
        (b'{"max_tokens": 101}', 400, "max_tokens is 101"),
        (b'{"max_completion_tokens": 101}', 400, "max_completion_tokens"),
        (b'{"max_output_tokens": 101}', 400, "max_output_tokens"),
        (b"[" * 100_000, 400, "JSON"),
        (b"x" * 1001 + b" " * 200_000, 413, "larger"),
    ],
)
async def test_a_bad_body_is_refused(body: bytes, status: int, word: str) -> None:
    more = {"max_sequences": 19, "max_grammar_bytes": 2000}
    response = await post(body, max_n=8, max_tokens=100, max_body_bytes=150_000, **more)
    assert response.status_code == status
    assert word in response.json()["error"]["message"]


async def test_a_body_without_a_length_is_counted() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    assert (await post(chunks(), max_body_bytes=1999)).status_code == 413
    assert (await post(chunks(), max_body_bytes=2000)).status_code == 400  # Blank, but taken.


async def test_a_body_that_trickles_is_given_up() -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    response = await post(trickle(), body_timeout_s=0.1)
    assert response.status_code == 408


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "GET"])
async def test_a_body_of_any_method_is_bounded(method: str) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(10_000):
            taken += 1000
            yield b"x" * 1000

    assert (await post(endless(), "/v1/models", method, max_body_bytes=50_000)).status_code == 413
    assert taken < 60_000


@pytest.mark.parametrize(
    "path",
    [
        "/scale_elastic_ep",
        "/inference/v1/abort_requests",
        "/invocations",
        "/v1/load_lora_adapter",
        "/kv_event_sources",
        "/collective_rpc",
        "/v1/audio/transcriptions",
        "/v1/responses/one/two/three",
        "/",
        "/v1",
        "/static/x.js",
    ],
)
async def test_only_routes_that_are_listed_are_there(path: str) -> None:
    for method in ("GET", "POST"):
        response = await post(b"{}", path, method)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"


async def test_a_path_that_is_nearly_right_gets_a_hint() -> None:
    response = await post(b"{}", "/v1//chat/completions")
    assert "Did you mean '/v1/chat/completions'?" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/", "/v1/models/org/name", "/v1/responses/resp_1/cancel"]
)
async def test_routes_with_names_in_them_are_there(path: str) -> None:
    assert (await post(b"{}", path)).status_code == 200


async def test_a_batch_is_counted_and_bounded() -> None:
    def batch(count: int) -> bytes:
        return json.dumps({"messages": [[{"role": "user", "content": "x"}]] * count}).encode()

    path = "/v1/chat/completions/batch"
    assert (await post(batch(12), path)).json()["sequences"] == 12
    assert (await post(batch(5000), path)).status_code == 400


async def test_token_ids_are_counted_against_the_bound_of_a_prompt() -> None:
    body = json.dumps({"token_ids": [5] * 11, "sampling_params": {}}).encode()
    path = "/inference/v1/generate"
    assert (await post(body, path, max_prompt_tokens=11)).status_code == 200
    response = await post(body, path, max_prompt_tokens=10)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "token_ids"


@pytest.mark.parametrize(
    ("path", "field", "item"),
    [
        ("/v1/chat/completions", "messages", {"role": "user", "content": "x"}),
        ("/v1/messages", "messages", {"role": "user", "content": "x"}),
        ("/v1/responses", "input", {"role": "user", "content": "x"}),
        ("/v1/chat/completions/render", "messages", {"role": "user", "content": "x"}),
    ],
)
async def test_the_number_of_messages_is_bounded(
    path: str, field: str, item: dict[str, str]
) -> None:
    assert (await post(json.dumps({field: [item] * 9}).encode(), path, max_messages=9)).is_success
    refused = await post(json.dumps({field: [item] * 10}).encode(), path, max_messages=9)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"


TEXT = {"type": "text", "text": "x"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


@pytest.mark.parametrize(
    ("path", "of"),
    [
        (CHAT, lambda n: {"messages": [{"role": "user", "content": [TEXT] * n}]}),
        (CHAT, lambda n: {"messages": [{"role": "user", "content": ["x"] * n}]}),
        (CHAT, lambda n: {"messages": [{"role": "assistant", "tool_calls": [CALL] * n}]}),
        (CHAT, lambda n: {"messages": [], "tools": [TOOL] * (n + 1)}),
        (f"{CHAT}/batch", lambda n: {"messages": [[{"role": "user", "content": [TEXT] * n}]]}),
        (f"{CHAT}/render", lambda n: {"messages": [{"role": "user", "content": [TEXT] * n}]}),
        (MESSAGES, lambda n: {"messages": [], "system": [TEXT] * (n + 1)}),
        (
            f"{MESSAGES}/count_tokens",
            lambda n: {
                "messages": [{"content": [{"type": "tool_result", "content": [TEXT] * n}]}],
            },
        ),
        (RESPONSES, lambda n: {"input": [{"role": "user", "content": [TEXT] * n}]}),
        (RESPONSES, lambda n: {"input": [{"type": "function_call_output", "output": [TEXT] * n}]}),
        (RESPONSES, lambda n: {"input": [{"type": "reasoning", "summary": [TEXT] * n}]}),
    ],
)
async def test_the_parts_of_messages_are_bounded(
    path: str, of: Callable[[int], dict[str, Any]]
) -> None:
    nested = path.endswith(("batch", "count_tokens"))
    most = 4 * 9 - 1 - nested
    assert (await post(json.dumps(of(most)).encode(), path, max_messages=9)).is_success
    refused = await post(json.dumps(of(most + 1)).encode(), path, max_messages=9)
    assert refused.status_code == 400
    assert "content parts" in refused.json()["error"]["message"]


async def test_the_messages_of_a_batch_are_bounded() -> None:
    message = {"role": "user", "content": "x"}
    for conversations in ([[message] * 10], [[message] * 5] * 2):
        body = json.dumps({"messages": conversations}).encode()
        assert (await post(body, f"{CHAT}/batch", max_messages=10)).is_success
        assert (await post(body, f"{CHAT}/batch", max_messages=9)).status_code == 400


@pytest.mark.parametrize(
    ("path", "of"),
    [
        (CHAT, lambda words: {"messages": [], "bad_words": words}),
        ("/v1/completions", lambda words: {"prompt": "x", "bad_words": words}),
        (
            "/inference/v1/generate",
            lambda words: {"token_ids": [1], "sampling_params": {"bad_words": words}},
        ),
    ],
)
async def test_bad_words_are_bounded(path: str, of: Callable[[Any], dict[str, Any]]) -> None:
    """vLLM tokenizes each on the event loop, a text of 4 MiB for seconds."""
    for words in (["x" * 65_536], ["x" * 32_768] * 2, ["word"] * 100, None, 5, "x" * 99_999, [1]):
        assert (await post(json.dumps(of(words)).encode(), path)).is_success, words
    for words in (["x" * 65_537], ["x" * 32_768, "x" * 32_769], ["word"] * 20_000):
        refused = await post(json.dumps(of(words)).encode(), path)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "bad_words"
