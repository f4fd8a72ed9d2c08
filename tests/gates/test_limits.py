"""The bounds of one request: body, time to arrive, n and max_tokens."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serve_app.gates.limits import LimitGate, RequestSize
from serve_app.settings import Limits


def client(**limits: Any) -> httpx.AsyncClient:
    async def echo(request: Request) -> JSONResponse:
        size: RequestSize = request.scope["state"]["size"]
        return JSONResponse({"body": (await request.body()).decode(), "sequences": size.sequences})

    app = Starlette(routes=[Route("/v1/completions", echo, methods=["POST"])])
    gate = LimitGate(app, Limits(**limits))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=gate), base_url="http://test")


async def post(body: bytes | AsyncIterator[bytes], **limits: Any) -> httpx.Response:
    async with client(**limits) as http:
        return await http.post("/v1/completions", content=body)


async def test_the_body_reaches_the_application_whole() -> None:
    body = json.dumps({"prompt": "x" * 100_000, "n": 2}).encode()
    answer = (await post(body)).json()
    assert answer == {"body": body.decode(), "sequences": 2}


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b'{"prompt": "x', 400, "JSON"),
        (b"[1, 2]", 400, "object"),
        (b"\xff\xfe{}", 400, "JSON"),
        (b'{"prompt": "\xff"}', 400, "JSON"),
        (b'{"n": 9}', 400, "n is 9"),
        (b'{"max_tokens": 101}', 400, "max_tokens is 101"),
        (b'{"max_completion_tokens": 101}', 400, "max_completion_tokens"),
        (b'{"max_output_tokens": 101}', 400, "max_output_tokens"),
        (b"[" * 100_000, 400, "JSON"),
        (b"x" * 1001 + b" " * 200_000, 413, "larger"),
    ],
)
async def test_a_bad_body_is_refused(body: bytes, status: int, word: str) -> None:
    response = await post(body, max_n=8, max_tokens=100, max_body_bytes=150_000)
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


async def test_control_routes_are_not_there() -> None:
    async with client() as http:
        assert (await http.post("/scale_elastic_ep", content=b"{}")).status_code == 404
        assert (await http.post("/inference/v1/generate", content=b"{}")).status_code == 404


@pytest.mark.parametrize(
    ("fields", "sequences"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": "3"}, 1),
        ({"n": -3}, 1),
        ({"n": True}, 1),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1], [2]]}, 2),
        ({"prompt": []}, 1),
    ],
)
def test_sequences_of_a_request(fields: dict[str, Any], sequences: int) -> None:
    assert RequestSize(**fields).sequences == sequences
