"""Both lanes of one engine are asked the same, and must answer the same.

What may take the fast lane is `capability.FIELDS`; a new vLLM that changes either front end's
answer to one of these requests fails here. Not compared are fields that say nothing of the answer:
`created`, `system_fingerprint`, and nulls that one of the two leaves out. Port 8795.
"""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.replica import frontends
from tests.server import Server, configuration, launched

pytestmark = [pytest.mark.server, pytest.mark.slow]
KEY = {"authorization": "Bearer sk-ann"}
# Takes the full lane because of this header, and nothing else is different.
FULL = {"origin": "http://localhost"}

CHAT = {"messages": [{"role": "user", "content": "Tell me something."}]}
CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello, 世界!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "More\n\n please"},
    ]
}
PROMPTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "hello"}),
    ("/v1/completions", {"prompt": "été 世界 🙂 \n x"}),
    ("/v1/completions", {"prompt": [261, 78, 78, 81]}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CONVERSATION),
)
PARAMETERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "max_tokens": 1},
    {"temperature": 0, "stop": ["e", "o"]},
    {"temperature": 0, "stop": "a", "min_tokens": 4},
    {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 0, "repetition_penalty": 1.3, "ignore_eos": True},
    {"temperature": 0.8, "seed": 11, "top_p": 0.9, "top_k": 20},
    {"temperature": 1.0, "seed": 12, "min_p": 0.05, "n": 1},
    {"temperature": 0, "seed": None, "stop": None, "top_p": None},
    {"seed": 5, "temperature": None},
    {"temperature": 0, "stop": "a", "return_token_ids": True},
)


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if frontends.binary() is None:
        pytest.skip("vllm-rs is not installed")
    folder = tmp_path_factory.mktemp("lanes")
    (folder / "keys").write_text("ann sk-ann\nbob sk-bob\n")
    config = configuration(
        8795,
        model=str(tiny),
        served_model_name="tiny",
        lane="auto",
        api_keys={"file": str(folder / "keys")},
        engine={"dtype": "float32", "enforce_eager": True},
    )
    with launched(config, folder) as running:
        assert running.ready(), running.output()
        yield running


def answer_of(server: Server, path: str, body: dict[str, Any], lane: str, **headers: str) -> Any:
    """The answer of one lane, with the events of a stream joined."""
    sent = {"model": "tiny", "max_tokens": 12, **body}
    more = FULL if lane == "python" else {}
    answer = httpx.post(
        server.url + path, json=sent, headers={**KEY, **more, **headers}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-serve-lane"] == lane
    if not sent.get("stream"):
        return _essence(answer.json())
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return _joined([json.loads(event) for event in events[:-1]])


def _essence(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    return {
        "id": re.sub("[0-9a-f-]{8,}$", "", answer["id"]),
        "object": answer["object"],
        "model": answer["model"],
        "index": choice["index"],
        "text": choice.get("text") or (choice.get("message") or {}).get("content") or "",
        "role": (choice.get("message") or {}).get("role"),
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice.get("stop_reason"),
        "token_ids": choice.get("token_ids"),
        "prompt_token_ids": _prompt_ids(answer),
        "usage": _counts(answer["usage"]),
    }


def _joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice.get("delta") or {} for choice in choices]
    text = [choice.get("text") or "" for choice in choices]
    text += [delta.get("content") or "" for delta in deltas]
    ends = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    usages = [_counts(event["usage"]) for event in events if event.get("usage")]
    return {
        "ids": {re.sub("[0-9a-f-]{8,}$", "", event["id"]) for event in events},
        "object": {event["object"] for event in events},
        "role": next((delta["role"] for delta in deltas if delta.get("role")), None),
        "text": "".join(text),
        "finish_reason": ends,
        "token_ids": [id_ for choice in choices for id_ in choice.get("token_ids") or []],
        "prompt_token_ids": [ids for event in events if (ids := _prompt_ids(event))],
        "usage": usages,
    }


def _prompt_ids(answer: dict[str, Any]) -> list[int] | None:
    """Chat has them beside its choices, completions within."""
    places = [answer, *answer["choices"]]
    return next((ids for each in places if (ids := each.get("prompt_token_ids"))), None)


def _counts(usage: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in usage.items() if isinstance(value, int)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", range(len(PROMPTS)))
def test_both_lanes_answer_alike(server: Server, place: int, stream: bool) -> None:
    path, prompt = PROMPTS[place]
    different = []
    for parameters in PARAMETERS:
        body = {**prompt, **parameters}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        fast = answer_of(server, path, body, "fast")
        full = answer_of(server, path, body, "python")
        # An answer that ends inside a character: one lane shows that, and the other drops it.
        for each in (fast, full):
            each["text"] = each["text"].rstrip("\ufffd")
        if fast != full:
            different.append((parameters, fast, full))
    assert not different, different[:2]


def test_an_id_of_the_client_is_in_both_answers(server: Server) -> None:
    for lane, more in (("fast", {}), ("python", FULL)):
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json={"model": "tiny", "prompt": "x", "max_tokens": 1},
            headers={**KEY, **more, "x-request-id": "mine-7"},
            timeout=60,
        )
        assert answer.headers["x-serve-lane"] == lane
        assert answer.headers["x-request-id"] == "mine-7"
        assert answer.json()["id"] == "cmpl-mine-7"


def tokens(server: Server, who: str) -> tuple[float, float]:
    """Prompt and generated tokens of a tenant, whose key alone shows them."""
    key = {"authorization": f"Bearer sk-{who}"}
    text = httpx.get(f"{server.url}/metrics", headers=key, timeout=30).text
    collected = []
    for name in ("prompt", "generated"):
        pattern = rf'^serve_app_{name}_tokens_total\{{.*tenant="{who}"\}} (\S+)$'
        match = re.search(pattern, text, re.MULTILINE)
        collected.append(float(match[1]) if match else 0.0)
    return collected[0], collected[1]


def test_tokens_of_each_tenant_are_exact_in_the_fast_lane(server: Server) -> None:
    before = tokens(server, "bob")
    bob = {"authorization": "Bearer sk-bob"}
    expected = [0, 0]
    for length in (1, 5, 9):
        body = {"prompt": [7] * length, "max_tokens": 3 + length, "temperature": 0}
        answer = answer_of(server, "/v1/completions", body, "fast", **bob)
        expected[0] += answer["usage"]["prompt_tokens"]
        expected[1] += answer["usage"]["completion_tokens"]
    after = tokens(server, "bob")
    assert [after[0] - before[0], after[1] - before[1]] == expected


def test_a_client_that_leaves_ends_the_work(server: Server) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1600, "stream": True, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, headers=KEY, timeout=60
    ) as answer:
        assert answer.headers["x-serve-lane"] == "fast"
        next(answer.iter_lines())
    deadline_s = time.monotonic() + 30
    while server.metric("vllm:num_requests_running", **KEY) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running", **KEY) == 0


def test_a_rust_front_end_that_dies_is_replaced(server: Server) -> None:
    (process,) = server.named("vllm-rs")
    process.send_signal(signal.SIGKILL)
    deadline_s = time.monotonic() + 240
    lane = None
    while lane != "fast" and time.monotonic() < deadline_s:
        try:
            answer = httpx.post(
                f"{server.url}/v1/completions",
                json={"model": "tiny", "prompt": "x", "max_tokens": 1},
                headers=KEY,
                timeout=30,
            )
            lane = answer.headers.get("x-serve-lane") if answer.is_success else None
        except httpx.HTTPError:
            lane = None
        time.sleep(0.5)
    assert lane == "fast", server.output()
    assert process.pid not in {each.pid for each in server.named("vllm-rs")}
