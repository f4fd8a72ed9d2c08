"""The fast lane of the shipped configuration: what only HAProxy, door and engine show together."""

import random
from typing import Any

import httpx
import pytest

from tests.server import Server, wait

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Takes the full lane because of this header, and nothing else is different.
FULL = {"origin": "http://localhost"}
ASK: dict[str, Any] = {"model": MODEL, "prompt": "The sky is", "max_tokens": 4, "temperature": 0}


@pytest.mark.parametrize(("lane", "headers"), [("fast", {}), ("python", FULL)])
def test_an_id_of_the_client_is_in_the_answer_of_either_lane(
    server: Server, lane: str, headers: dict[str, str]
) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json=ASK,
        headers={**headers, "x-request-id": "mine-7"},
        timeout=60,
    )
    assert answer.headers["x-serve-lane"] == lane
    assert answer.headers["x-request-id"] == "mine-7"
    assert answer.json()["id"] == "cmpl-mine-7"


def test_a_client_that_leaves_the_fast_lane_ends_its_work(server: Server) -> None:
    body = {**ASK, "max_tokens": 1600, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.headers["x-serve-lane"] == "fast"
        lines = answer.iter_lines()  # An iterator that nobody holds closes the connection.
        next(lines)
        # HAProxy may still be leaving the door of the request before.
        assert wait(lambda: server.metric("serve_app_sequences_running") == 1)
        next(lines)
    assert wait(lambda: server.metric("serve_app_sequences_running") == 0)
    assert wait(lambda: server.metric("vllm:num_requests_running") == 0)


@pytest.mark.parametrize(
    "field",
    [{"n": 2}, {"prompt": ["a", "b"]}, {"tools": []}, {"priority": 3}, {"max_tokens": 100_000}],
)
def test_what_only_python_answers_is_answered_by_it(server: Server, field: dict[str, Any]) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={**ASK, **field}, timeout=60)
    assert answer.headers["x-serve-lane"] == "python"


def test_grammars_are_answered_in_any_order(server: Server) -> None:
    """The lanes name different compilers of grammars, and an engine keeps the first one."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    constraints: tuple[dict[str, Any], ...] = (
        {"json": schema},
        {"choice": ["Python", "C++"]},
        {"regex": "[ab]{3}"},
        {"grammar": 'root ::= "yes" | "no"'},
    )
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Choose."}], "max_tokens": 30}
    lanes: dict[str, list[str]] = {}
    for each in random.Random(5).sample(constraints * 4, 16):
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={**body, "structured_outputs": each},
            timeout=60,
        )
        assert answer.status_code == 200, (each, answer.text)
        text = answer.json()["choices"][0]["message"]["content"]
        lanes.setdefault(next(iter(each)), []).append(answer.headers["x-serve-lane"])
        if "choice" in each:
            assert text in each["choice"]
    assert lanes["json"][-1] == "fast"
    assert set(lanes["choice"]) == {"python"}


def test_a_header_that_asks_for_the_load_is_answered(server: Server) -> None:
    headers = {"endpoint-load-metrics-format": "JSON"}
    answer = httpx.post(f"{server.url}/v1/completions", json=ASK, headers=headers, timeout=60)
    assert answer.headers["x-serve-lane"] == "python"
    assert "named_metrics" in answer.headers["endpoint-load-metrics"]
