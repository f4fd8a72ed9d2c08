"""Ten times what one replica takes, slow clients and missing keys, over the real HAProxy."""

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server, configuration, launched

KEYS = {"authorization": "Bearer second"}
RUNNING, QUEUED = 4, 4
TOKENS = 128
LIMITS = {
    "max_running_requests": RUNNING,
    "max_queued_requests": QUEUED,
    "queue_timeout_s": 5.0,
    "request_timeout_s": 60.0,
    "body_timeout_s": 4.0,
    "retry_after_s": 2.0,
}
# /ping is the name that some platforms have for /health.
HEALTH = {"/health", "/ping"}


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = configuration(
        8720,
        model=str(tiny),
        template=True,
        limits=LIMITS,
        api_keys={"env": "SERVE_TEST_KEYS", "file": None},
        engine={"max_model_len": 16384},
    )
    folder = tmp_path_factory.mktemp("overload")
    with launched(config, folder, SERVE_TEST_KEYS="first, second") as running:
        assert running.ready(), running.output()
        yield running


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url, headers=KEYS, timeout=120, limits=limits
    ) as client:
        yield client


def body(tokens: int = TOKENS, **fields: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": "The quick brown fox",
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        **fields,
    }


async def ask(http: httpx.AsyncClient, stream: bool) -> tuple[httpx.Response, str, int]:
    """The response, its text and the tokens that it counts."""
    fields: dict[str, Any] = {"stream": stream}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    response = await http.post("/v1/completions", json=body(**fields))
    if response.status_code != 200:
        return response, "", 0
    if not stream:
        answer = response.json()
        return response, answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
    *events, done = [line for line in response.text.splitlines() if line]
    assert done == "data: [DONE]"
    parsed = [json.loads(line.removeprefix("data: ")) for line in events]
    text = "".join(choice["text"] for event in parsed for choice in event["choices"])
    return response, text, parsed[-1]["usage"]["completion_tokens"]


def assert_turned_away(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["retry-after"] == "2"
    error = response.json()["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["type"]


async def test_at_ten_times_capacity_everyone_let_in_is_served_whole(
    http: httpx.AsyncClient,
) -> None:
    _, text, _ = await ask(http, stream=False)
    sent = 10 * (RUNNING + QUEUED)
    answers = await asyncio.gather(*(ask(http, stream=bool(i % 2)) for i in range(sent)))
    accepted = [answer for answer in answers if answer[0].status_code == 200]
    refused = [answer[0] for answer in answers if answer[0].status_code != 200]
    for response in refused:
        assert_turned_away(response, 429, "queue_full")
    assert {answer[1:] for answer in accepted} == {(text, TOKENS)}
    # It took at least as many as it says, and did turn some away.
    assert len(accepted) >= RUNNING + QUEUED
    assert refused
    assert len(accepted) + len(refused) == sent


async def test_after_the_rush_there_is_room_for_as_many_as_before(http: httpx.AsyncClient) -> None:
    for _ in range(3):
        answers = await asyncio.gather(*(ask(http, stream=True) for _ in range(RUNNING + QUEUED)))
        assert Counter(answer[0].status_code for answer in answers) == {200: RUNNING + QUEUED}


async def test_a_wait_that_is_too_long_ends_in_503(server: Server, http: httpx.AsyncClient) -> None:
    # One more than run, each longer than the wait; leaving ends those that run.
    requested = [
        asyncio.create_task(http.post("/v1/completions", json=body(12000)))
        for _ in range(RUNNING + 1)
    ]
    done, pending = await asyncio.wait(requested, return_when=asyncio.FIRST_COMPLETED)
    for request in pending:
        request.cancel()
    (first,) = done
    assert_turned_away(first.result(), 503, "unavailable")
    assert await at_rest(server)
    assert (await ask(http, stream=False))[0].status_code == 200


async def at_rest(server: Server, timeout_s: float = 60) -> bool:
    """Whether the engine comes to run nothing."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if await asyncio.to_thread(server.metric, "vllm:num_requests_running", **KEYS) == 0:
            return True
        await asyncio.sleep(0.1)
    return False


def test_a_body_that_comes_a_byte_at_a_time_is_408(server: Server) -> None:
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer second\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as raw:
        raw.sendall(head.encode())
        answer = b""
        while not answer and sent < 200:
            raw.sendall(b" ")
            sent += 1
            try:
                answer = raw.recv(65536)
            except TimeoutError:
                continue
        raw.settimeout(30)
        while answer and not answer.endswith(b"}}"):
            answer += raw.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "timeout"


# --- keys -----------------------------------------------------------------------------------


async def routes(http: httpx.AsyncClient) -> list[tuple[str, str]]:
    described = (await http.get("/openapi.json")).json()["paths"]
    listed = [(method, path) for path, methods in described.items() for method in methods]
    # What the description leaves out.
    unlisted = ["/docs", "/redoc", "/openapi.json", "/metrics", "/metrics/", "/nothing", "/"]
    return listed + [("get", path) for path in unlisted]


async def test_nothing_but_health_answers_without_a_key(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as nobody:
        async with httpx.AsyncClient(base_url=server.url, headers=KEYS, timeout=60) as expected:
            all_routes = await routes(expected)
        assert ("post", "/v1/chat/completions") in all_routes
        assert ("post", "/tokenize") in all_routes
        wrong = {"authorization": "Bearer third"}
        for method, path in all_routes:
            for headers in ({}, wrong, {"x-api-key": "third"}):
                response = await nobody.request(method, path, headers=headers)
                if path in HEALTH:
                    assert response.status_code == 200
                    continue
                assert response.status_code == 401, (method, path)
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers", [KEYS, {"authorization": "bearer first"}, {"x-api-key": "first"}]
)
def test_every_key_opens(server: Server, headers: dict[str, str]) -> None:
    response = httpx.get(f"{server.url}/v1/models", headers=headers, timeout=30)
    assert [model["id"] for model in response.json()["data"]] == ["tiny"]


def test_a_key_is_asked_for_before_the_body(server: Server) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(head)
        assert raw.recv(65536).startswith(b"HTTP/1.1 401")
