"""Bad input against the real server: each gets its 4xx, and nobody else notices.

By hand first, then fuzzed from the server's own OpenAPI description.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from tests.server import Server, wait

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
NONSENSE = {"type": "nonsense"}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "The sky is", "max_tokens": 2, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": MODEL, "messages": messages, "max_tokens": 2, **fields}


def schema(of: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}


def tool(parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}


# Of an answer before, as an input.
EMPTY = {"type": "message", "role": "assistant", "id": "", "status": "completed", "content": []}
REFUSAL = {**EMPTY, "content": [{"type": "refusal", "refusal": "No."}]}
# What is sent, and the status that it gets.
BAD: dict[str, tuple[str, dict[str, Any] | bytes, int]] = {
    "broken JSON": (COMPLETIONS, b'{"model": "x", "prompt":', 400),
    "no body": (COMPLETIONS, b"", 400),
    "not an object": (CHAT, b"[1, 2]", 400),
    "invalid UTF-8": (COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400),
    "half a surrogate pair": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "deep nesting": (CHAT, b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "body too big": (COMPLETIONS, completion(prompt="x" * 5_000_000), 413),
    "no prompt": (COMPLETIONS, {"model": MODEL}, 400),
    "prompt of a wrong type": (COMPLETIONS, completion(prompt={"a": 1}), 400),
    "empty prompt": (COMPLETIONS, completion(prompt=""), 400),
    "tokens outside the vocabulary": (COMPLETIONS, completion(prompt=[10**9]), 400),
    "negative tokens": (COMPLETIONS, completion(prompt=[-1]), 400),
    "prompt too long": (COMPLETIONS, completion(prompt=[1] * 5000), 400),
    "chat too long": (CHAT, chat(messages=[{"role": "user", "content": "hi " * 5000}]), 400),
    "more tokens than fit": (COMPLETIONS, completion(max_tokens=10**6), 400),
    "messages of a wrong type": (CHAT, chat(messages="Hello"), 400),
    "messages that are null": (CHAT, chat(messages=None), 400),
    "no messages": (CHAT, chat(messages=[]), 400),
    "message without a role": (CHAT, chat(messages=[{"content": "x"}]), 400),
    "an image for a text model": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
    ),
    "a template of the client's": (CHAT, chat(chat_template="{{ 1/0 }}"), 400),
    "unknown model": (COMPLETIONS, completion(model="nobody"), 404),
    "unknown model in chat": (CHAT, chat(model="nobody"), 404),
    "unknown adapter": (CHAT, chat(model=f"{MODEL}-lora"), 404),
    "unknown model in responses": (RESPONSES, {"model": "nobody", "input": "x"}, 404),
    "unknown model in messages": (MESSAGES, chat(model="nobody"), 404),
    "unknown model in tokenize": ("/tokenize", {"model": "nobody", "prompt": "x"}, 404),
    "max_tokens -1": (COMPLETIONS, completion(max_tokens=-1), 400),
    "max_tokens -1 in chat": (CHAT, chat(max_tokens=-1), 400),
    "max_tokens -1 in messages": (MESSAGES, chat(max_tokens=-1), 400),
    "max_output_tokens -1": (RESPONSES, {"input": "x", "max_output_tokens": -1}, 400),
    "max_tokens of a wrong type": (COMPLETIONS, completion(max_tokens="many"), 400),
    "n -1": (CHAT, chat(n=-1), 400),
    "n 0": (COMPLETIONS, completion(n=0), 400),
    "huge n": (CHAT, chat(n=10**9), 400),
    "huge best_of": (COMPLETIONS, completion(best_of=10**9), 400),
    "top_k -5": (COMPLETIONS, completion(top_k=-5), 400),
    "temperature -1": (CHAT, chat(temperature=-1), 400),
    "top_p 2": (CHAT, chat(top_p=2), 400),
    "min_tokens -1": (COMPLETIONS, completion(min_tokens=-1), 400),
    "logprobs without end": (COMPLETIONS, completion(logprobs=10**6), 400),
    "seed beyond 64 bits": (COMPLETIONS, completion(seed=2**70), 400),
    "empty stop": (COMPLETIONS, completion(stop=[""]), 400),
    "bias of no token": (COMPLETIONS, completion(logit_bias={"x": 1}), 400),
    "tools of a wrong type": (CHAT, chat(tools=5), 400),
    "tool without a name": (CHAT, chat(tools=[{"type": "function", "function": {}}]), 400),
    "tool parameters of a wrong type": (CHAT, chat(tools=[tool(5)]), 400),
    "bad tool schema": (CHAT, chat(tools=[tool(NONSENSE, strict=True)]), 400),
    "tool choice without tools": (CHAT, chat(tool_choice="required"), 400),
    "choice of an unknown tool": (
        CHAT,
        chat(tools=[tool({})], tool_choice={"type": "function", "function": {"name": "g"}}),
        400,
    ),
    "bad json_schema": (CHAT, chat(response_format=schema(NONSENSE)), 400),
    "json_schema that leads nowhere": (CHAT, chat(response_format=schema({"$ref": "#/x"})), 400),
    "json_schema of a wrong type": (CHAT, chat(response_format=schema(5)), 400),
    "bad regex": (COMPLETIONS, completion(structured_outputs={"regex": "("}), 400),
    "unknown format": (CHAT, chat(response_format={"type": "poem"}), 400),
    "input of a wrong type": (RESPONSES, {"model": MODEL, "input": 5}, 400),
    "input message without content": (RESPONSES, {"model": MODEL, "input": [EMPTY]}, 400),
    "input message that refuses": (RESPONSES, {"model": MODEL, "input": [REFUSAL]}, 400),
    "messages without max_tokens": (MESSAGES, {"model": MODEL, "messages": []}, 400),
    "tokens of a wrong type": ("/detokenize", {"model": MODEL, "tokens": "x"}, 400),
    "negative token": ("/detokenize", {"model": MODEL, "tokens": [-1]}, 400),
    "unknown route": ("/v1/nothing", {}, 404),
    "route of another kind of model": ("/v1/embeddings", {"model": MODEL, "input": "x"}, 404),
    "route that steers the engine": ("/scale_elastic_ep", {}, 404),
    "wrong method": ("/v1/models", {}, 405),
}


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def send(http: httpx.Client, name: str) -> httpx.Response:
    path, body, _ = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(path, content=content, headers={"content-type": "application/json"})


def streamed(
    http: httpx.Client, tokens: int, began: Callable[[], None] = lambda: None
) -> tuple[str, int]:
    """The text of one greedy stream, and the tokens that its usage counts."""
    body = completion(
        max_tokens=tokens,
        ignore_eos=True,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, counted = "", 0
    with http.stream("POST", COMPLETIONS, json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
            began()
    return text, counted


# --- by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_an_error_that_names_the_mistake(http: httpx.Client, name: str) -> None:
    response = send(http, name)
    path, _, status = BAD[name]
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["type"]
    # Anthropic's own errors have no code.
    assert path == MESSAGES or error["code"]
    assert "Traceback" not in response.text
    # Small, whatever was sent.
    assert len(response.content) < 20_000


def test_an_innocent_stream_notices_nothing(http: httpx.Client) -> None:
    tokens = 150
    undisturbed = streamed(http, tokens)
    assert undisturbed[1] == tokens
    result: list[tuple[str, int]] = []
    began = threading.Event()
    innocent = threading.Thread(target=lambda: result.append(streamed(http, tokens, began.set)))
    innocent.start()
    assert began.wait(60)
    for name in BAD:
        assert innocent.is_alive(), f"the stream was over before {name!r} was thrown at its server"
        assert 400 <= send(http, name).status_code < 500, name
    innocent.join()
    assert result == [undisturbed]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nBad Header: y\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
    ids=["nonsense", "bad header", "negative length", "bad chunk", "long header"],
)
def test_what_is_not_http_is_refused(server: Server, request_bytes: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(request_bytes)
        answer = raw.recv(65536)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))


def test_a_client_that_leaves_before_its_body_is_whole_is_forgotten(
    server: Server, http: httpx.Client
) -> None:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
            raw.sendall(head + b'{"model":')
    assert http.post(COMPLETIONS, json=completion()).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_work(
    server: Server, http: httpx.Client, stream: bool
) -> None:
    assert settled(server)
    tokens = 1900
    before = server.metric("serve_app_generated_tokens_total")
    body = completion(max_tokens=tokens, ignore_eos=True, temperature=0, stream=stream)
    request = http.build_request("POST", COMPLETIONS, json=body)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\ncontent-type: application/json\r\n"
        raw.sendall(f"{head}content-length: {len(request.content)}\r\n\r\n".encode())
        raw.sendall(request.content)
        assert wait(lambda: server.metric("vllm:num_requests_running") == 1)
    assert settled(server)
    # Had it run to its end, all of them would be there.
    assert server.metric("serve_app_generated_tokens_total") - before < tokens / 2


def settled(server: Server) -> bool:
    """Whether the engine comes to rest."""
    return wait(lambda: server.metric("vllm:num_requests_running") == 0)


# --- fuzzed ---------------------------------------------------------------------------------

# The most that one fuzzed request may generate; more shows nothing and takes long.
_TOKENS = 4
_GENERATE = {
    CHAT: "max_tokens",
    f"{CHAT}/batch": "max_tokens",
    COMPLETIONS: "max_tokens",
    RESPONSES: "max_output_tokens",
    MESSAGES: "max_tokens",
}
FUZZED = [
    *(("POST", path) for path in _GENERATE),
    ("POST", f"{MESSAGES}/count_tokens"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/generative_scoring"),
    ("GET", f"{RESPONSES}/{{response_id}}"),
    ("POST", f"{RESPONSES}/{{response_id}}/cancel"),
    ("GET", "/v1/models"),
]


@pytest.fixture(scope="module")
def description(server: Server) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", timeout=120)


def bounded(body: Any, path: str) -> Any:
    """The same body for a model that exists and with few tokens: it reaches further, and ends."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if isinstance(body.get("model", ""), str | None):
        body["model"] = MODEL
    if path in _GENERATE and body.get(_GENERATE[path]) is None:
        body[_GENERATE[path]] = _TOKENS
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(field), int | float):
            body[field] = min(body[field], _TOKENS)
    return body


@pytest.mark.parametrize(("method", "path"), FUZZED, ids=lambda word: word)
def test_fuzzed_input_is_never_the_servers_fault(
    server: Server, description: schemathesis.BaseSchema, method: str, path: str
) -> None:
    operation = description[path][method]
    good = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    cases = good
    if operation.body or list(operation.iter_parameters()):
        cases = st.one_of(good, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))

    # The same cases each time: a test that fails must fail again.
    @settings(
        max_examples=10,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def fuzz(case: Case[Any]) -> None:
        case.body = bounded(case.body, path)
        response = case.call(timeout=60)
        assert response.status_code < 500, (response.text, case.body)

    fuzz()
    assert settled(server)
    assert server.answers(timeout_s=60)
