"""The APIs that are asked: their bodies, and what their answers say, streamed and whole."""

import json
from typing import Any

import pytest

from bench import measure
from bench.records import Record
from bench.traffic.request import Request
from bench.traffic.sse import Events, read_unstreamed
from bench.traffic.target import PAGES, Target, encode

SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def body(endpoint: Any, prompt: Any = "Hi", **extra: Any) -> dict[str, Any]:
    target = Target(url="http://h", model="m", endpoint=endpoint, extra={"temperature": 0.0})
    request = Request(prompt=prompt, output_tokens=7, extra=extra)
    data: dict[str, Any] = json.loads(encode(target, request))
    assert data.pop("model") == "m"
    return data


def test_each_api_has_its_page_and_its_body() -> None:
    assert list(PAGES) == ["completions", "chat", "responses", "messages", "embeddings"]
    streamed = {"temperature": 0.0, "stream": True}
    assert body("responses") == {"input": "Hi", "max_output_tokens": 7, **streamed}
    assert body("responses", SYSTEM)["input"] == SYSTEM
    output = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 7, **streamed}
    assert body("messages") == output
    assert body("messages", SYSTEM) == {"system": "Be brief.", **output}
    assert body("embeddings", ignore_eos=True) == {"input": "Hi"}
    assert body("embeddings", [1, 2]) == {"input": [1, 2]}
    for endpoint in ("completions", "embeddings"):
        with pytest.raises(ValueError, match="not messages"):
            body(endpoint, SYSTEM)
    for endpoint in ("chat", "responses", "messages"):
        with pytest.raises(ValueError, match="not token ids"):
            body(endpoint, [1, 2])


def read(*events: dict[str, Any]) -> Record:
    """A stream whose events come a tenth of a second apart, each named by its type."""
    record = Record(index=0, planned_s=0.0, status=200, asked_output_tokens=8)
    reader = Events(record, keep_text=True)
    for number, event in enumerate(events, 1):
        text = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        reader.feed(text.encode(), number / 10)
    reader.end()
    return record


def delta(text: str, kind: str = "response.output_text.delta") -> dict[str, Any]:
    return {"type": kind, "delta": text, "sequence_number": 4, "item_id": "x", "output_index": 0}


def completed(**more: Any) -> dict[str, Any]:
    usage = {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 16},
        "output_tokens": 8,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 28,
    }
    response = {"object": "response", "status": "completed", "usage": usage, **more}
    return {"type": "response.completed", "response": response}


CREATED = {"type": "response.created", "response": {"object": "response", "status": "in_progress"}}


def test_responses_are_read_from_their_events() -> None:
    record = read(
        CREATED,
        delta("think", "response.reasoning_text.delta"),
        delta("one "),
        {"type": "response.output_text.done", "text": "one two"},
        delta("two"),
        completed(),
    )
    assert (record.error, record.odd, record.finish_reason) == ("", "", "stop")
    assert record.text == "thinkone two"
    assert (record.input_tokens, record.output_tokens, record.cached_tokens) == (20, 8, 16)
    assert record.chunk_s == pytest.approx([0.2, 0.3, 0.5])


def test_the_arguments_of_a_call_are_output() -> None:
    kind = "response.function_call_arguments.delta"
    record = read(CREATED, delta('{"a"', kind), delta(": 1}", kind), completed())
    assert (record.error, len(record.chunk_s), record.text_bytes) == ("", 2, 8)


def test_a_response_that_ends_otherwise_says_so() -> None:
    short = completed(status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    short["type"] = "response.incomplete"
    assert read(CREATED, delta("one"), delta("two"), short).finish_reason == "length"
    failed = completed(status="failed", error={"code": "server_error", "message": "it broke"})
    failed["type"] = "response.failed"
    assert read(CREATED, delta("one"), failed).error == "error event: it broke"
    assert read(CREATED, delta("one")).error.startswith("cut: ")
    assert read(CREATED, completed()).error.startswith("empty: ")


def test_messages_are_read_from_their_events() -> None:
    usage = {"input_tokens": 4, "cache_read_input_tokens": 16, "output_tokens": 1}
    start = {"type": "message_start", "message": {"id": "m", "role": "assistant", "usage": usage}}
    block = {"type": "content_block_delta", "index": 0}
    record = read(
        start,
        {"type": "ping"},
        {**block, "delta": {"type": "thinking_delta", "thinking": "hm "}},
        {**block, "delta": {"type": "text_delta", "text": "Hi"}},
        {**block, "delta": {"type": "input_json_delta", "partial_json": "{}"}},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "max_tokens"},
            "usage": {"output_tokens": 8},
        },
        {"type": "message_stop"},
    )
    assert (record.error, record.odd, record.finish_reason) == ("", "", "length")
    assert (record.text, len(record.chunk_s)) == ("hm Hi", 3)
    assert (record.input_tokens, record.output_tokens, record.cached_tokens) == (20, 8, 16)


def test_an_error_of_messages_is_a_failure() -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    assert read({"type": "message_start", "message": {}}, error).error == "error event: Overloaded"


def whole(answer: dict[str, Any]) -> Record:
    record = Record(index=0, planned_s=0.0, status=200, end_s=0.5)
    read_unstreamed(record, json.dumps(answer).encode(), 0.5, keep_text=True)
    return record


def test_whole_answers_of_each_api() -> None:
    part = {"type": "output_text", "text": "one two"}
    answer = completed(output=[{"type": "message", "content": [part]}])["response"]
    result = whole(answer)
    assert (result.error, result.text, result.output_tokens) == ("", "one two", 8)
    result = whole(
        {
            "type": "message",
            "content": [{"type": "text", "text": "one two"}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 9, "output_tokens": 2},
        }
    )
    assert (result.error, result.text, result.finish_reason) == ("", "one two", "stop")
    assert whole({"choices": []}).error.startswith("bad response")


def test_an_embedding_has_a_latency_and_no_output_tokens() -> None:
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "embedding": [0.1], "index": 0}],
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
    }
    record = whole(answer)
    assert (record.error, record.odd, record.input_tokens, record.output_tokens) == ("", "", 12, 0)
    measures = measure.measure([record])
    assert measures.e2e_mean_s == 0.5
    assert measures.tpot_mean_s is None
    assert measure.answer_doubts(measures) == []
    assert whole({**answer, "data": []}).error.startswith("empty")
