"""What browsers and SDKs send: on a real server, through HAProxy, with real weights."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from serve_app.replica.toolcalls import END, START
from tests.server import Server

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHAT = "/v1/chat/completions"
NONSENSE = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "no"}},
    }
}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("now"), tool("run", command={"type": "string"})]
CALLS = {
    "no arguments": (f'{START}\n{{"name": "now", "arguments": {{}}}}\n{END}', [("now", {})]),
    "no key": (f'{START}\n{{"name": "now"}}\n{END}', [("now", {})]),
    "an end inside": (
        f'{START}\n{{"name": "run", "arguments": {{"command": "echo {END} done"}}}}\n{END}',
        [("run", {"command": f"echo {END} done"})],
    ),
    "other order": (
        f'{START}{{"arguments": {{"command": "größe 😀"}}, "name": "run"}}{END}',
        [("run", {"command": "größe 😀"})],
    ),
}


def body(**more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "A"}
    return {"model": MODEL, "max_tokens": 40, "temperature": 0, "messages": [message], **more}


def post(server: Server, path: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body(**more), timeout=120)


def streamed(answer: httpx.Response) -> tuple[list[list[str]], str | None]:
    """Name and arguments of each call, and the finish reason."""
    calls: dict[int, list[str]] = {}
    finish = None
    for line in answer.text.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            finish = choice["finish_reason"] or finish
            for each in choice["delta"].get("tool_calls") or []:
                result = calls.setdefault(each["index"], ["", ""])
                result[0] += each["function"].get("name") or ""
                result[1] += each["function"].get("arguments") or ""
    return [calls[index] for index in sorted(calls)], finish


@pytest.fixture(scope="module")
def calling(server: Server) -> dict[tuple[str, bool], httpx.Response]:
    """The answer to each case, plain and streamed. Together they take little longer than one."""
    asked = [(case, stream) for case in CALLS for stream in (False, True)]

    def answer(case: str, stream: bool) -> httpx.Response:
        forced = {"structured_outputs": {"choice": [CALLS[case][0]]}}
        return post(server, CHAT, tools=TOOLS, max_tokens=200, stream=stream, **forced)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(answer, *zip(*asked, strict=True)))
    return dict(zip(asked, answers, strict=True))


@pytest.mark.parametrize("case", CALLS)
def test_tool_calls_are_the_same_streamed_and_not(
    calling: dict[tuple[str, bool], httpx.Response], case: str
) -> None:
    expected = CALLS[case][1]
    choice = calling[case, False].json()["choices"][0]
    plain = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in choice["message"]["tool_calls"]
    ]
    calls, finish = streamed(calling[case, True])
    assert plain == [(name, json.loads(arguments)) for name, arguments in calls] == expected
    assert choice["finish_reason"] == finish == "tool_calls"


def test_a_forced_call_has_arguments_that_fit(server: Server) -> None:
    city = {"type": "string", "maxLength": 20}
    request = {"tools": [tool("get_weather", city=city)], "tool_choice": "required"}
    answer = post(server, CHAT, parallel_tool_calls=False, max_tokens=200, **request).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert set(json.loads(call["function"]["arguments"])) == {"city"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_compiled_is_refused_at_once(server: Server, stream: bool) -> None:
    answer = post(server, CHAT, stream=stream, **NONSENSE)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_more_stop_strings_than_openai_takes(server: Server) -> None:
    assert post(server, CHAT, stop=[f"a{n}" for n in range(9)], max_tokens=4).status_code == 200


def test_a_grammar_of_earlier_versions_is_refused(server: Server) -> None:
    answer = post(server, CHAT, guided_json={"type": "object"})
    assert answer.status_code == 400
    assert "structured_outputs" in answer.json()["error"]["message"]


def test_a_wish_to_think_is_no_error(server: Server) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    answer = post(server, "/v1/messages", thinking=thinking, max_tokens=8)
    assert answer.status_code == 200
    assert answer.json()["type"] == "message"


def test_errors_of_anthropics_route_have_its_shape(server: Server) -> None:
    answer = post(server, "/v1/messages", max_tokens="x")
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_page_that_is_not_allowed_hears_what_allows_it(server: Server) -> None:
    headers = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    answer = httpx.options(f"{server.url}{CHAT}", headers=headers)
    assert answer.status_code == 400
    assert "engine.allowed_origins" in answer.json()["error"]["message"]


def test_long_header_lines_are_refused_in_json(server: Server) -> None:
    port = httpx.URL(server.url).port
    with socket.create_connection(("127.0.0.1", port or 80), timeout=30) as connection:
        lines = [
            "GET /v1/models HTTP/1.1",
            "Host: x",
            f"X-Big: {'a' * 20_000}",
            "Connection: close",
        ]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b" 431 " in head.splitlines()[0]
    assert json.loads(content)["error"]["message"]


def test_a_doubled_slash_is_one_and_head_is_where_get_is(server: Server) -> None:
    assert httpx.get(f"{server.url}//v1//models").json()["data"]
    head = httpx.head(f"{server.url}/v1/models")
    assert (head.status_code, head.content) == (200, b"")
