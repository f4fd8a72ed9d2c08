"""What an event of a stream means, in each of the three APIs that are streamed."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app import events


@pytest.mark.parametrize(
    "event",
    [
        b"data: [DONE]",
        b'event: response.completed\ndata: {"type": "response.completed"}',
        b'event: response.incomplete\ndata: {"type": "response.incomplete"}',
        b'event: message_stop\ndata: {"type": "message_stop"}',
    ],
)
def test_the_last_event_of_each_api(event: bytes) -> None:
    assert events.is_last(event)
    assert events.error_code(event) is None


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (b'data: {"error": {"message": "m", "type": "InternalServerError", "code": 500}}', None),
        (b'data: {"type":"error","error":{"message":"m","code":"cannot_continue"}}', None),
        (b'event: error\ndata: {"type": "error", "error": {"type": "api_error"}}', None),
        (b'event: error\ndata: {"type": "error", "code": "server_error"}', "server_error"),
        (
            b'event: response.failed\ndata: {"type": "response.failed", '
            b'"response": {"error": {"code": "server_error"}}}',
            "server_error",
        ),
        (b'data: {"error": "gone"}', "stream_error"),
        (b'data: {"error": {}}', "stream_error"),
        # The name says it, whatever the data is.
        (b"event: error", "stream_error"),
        (b"event: error\ndata: \xff", "stream_error"),
        (b'event: error\ndata: {"message": "m"}', "stream_error"),
        (b"event: response.failed\ndata: {}", "stream_error"),
        (
            b'event: response.failed\ndata: {"type": "response.failed", "response": 5}',
            "stream_error",
        ),
    ],
)
def test_an_error_of_each_api(event: bytes, code: str | None) -> None:
    result = events.error_code(event)
    assert result
    assert code is None or result == code
    assert not events.is_last(event)
    assert events.error_in(b'data: {"text": "x"}\n\n' + event + b"\n\ndata: [DONE]\n\n") == result


@pytest.mark.parametrize(
    "event", [b'data: {"error": "\xff"}', b'data: {"error": ' + b"[" * 9999, b'data: {"error": 1e']
)
def test_what_cannot_be_read_breaks_nobody(event: bytes) -> None:
    assert events.error_code(event) is None
    assert events.error_in(event + b"\n\n") is None


# What a model may write, with the words that mean something in events.
TEXT = st.lists(st.sampled_from(['"error"', "error", "[DONE]", "\n\n", "data: ", "{}", "é"])).map(
    "".join
)


@given(TEXT, st.sampled_from(["stop", "error", None]))
def test_no_text_of_an_answer_is_taken_for_an_error_or_an_end(
    text: str, finish: str | None
) -> None:
    chunks: list[Any] = [
        {"choices": [{"text": text, "finish_reason": finish}]},
        {"choices": [{"delta": {"content": text, "error": text}}]},
        {"type": "response.output_text.delta", "delta": text},
        {"type": "response.created", "response": {"error": None, "output": [text]}},
    ]
    for chunk in chunks:
        event = b"data: " + json.dumps(chunk).encode()
        assert events.is_event(event)
        assert not events.is_last(event)
        assert events.error_in(event) is None
