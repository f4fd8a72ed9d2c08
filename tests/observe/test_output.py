"""What an answer says of itself, in each API's words."""

import json
from typing import Any

import pytest

from serve_app.gateway.failures import WholeResponse
from serve_app.observe import output

OPENAI = {
    "prompt_tokens": 42,
    "completion_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 32},
}
RESPONSES = {
    "input_tokens": 42,
    "output_tokens": 8,
    "input_tokens_details": {"cached_tokens": 32},
}
# Anthropic: input_tokens are those that were neither read from the cache nor written to it.
ANTHROPIC = {
    "input_tokens": 10,
    "output_tokens": 8,
    "cache_read_input_tokens": 32,
    "cache_creation_input_tokens": 0,
}
WRITTEN = {**ANTHROPIC, "input_tokens": 4, "cache_creation_input_tokens": 6}


@pytest.mark.parametrize("usage", [OPENAI, RESPONSES, ANTHROPIC, WRITTEN])
@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_a_part_of_the_prompt(usage: dict[str, Any], stream: bool) -> None:
    data = json.dumps({"usage": usage}).encode()
    if stream:
        data = b"data: {}\n\nevent: message_delta\ndata: " + data + b"\n\ndata: [DONE]\n\n"
    assert output.usage(data) == (42, 32, 8)


@pytest.mark.parametrize(
    "text",
    [b'{"error": "\xff"}', b'{"error": {"code": "\xc3("}}', b"[" * 9999, b"1e", b""],
)
def test_what_cannot_be_read_breaks_nothing(text: bytes) -> None:
    """Bytes that are no UTF-8 are no msgspec.DecodeError."""
    assert output.failure_code(text) is None
    assert output.output_tokens(text) is None
    assert output.usage(text) is None
    assert output.begins_output(b"data: " + text + b"\n\n")
    assert WholeResponse(500, [], text).message == text[:200].decode("utf-8", "replace")


def test_an_answer_without_a_cache_has_no_cached_tokens() -> None:
    data = json.dumps({"usage": {"input_tokens": 42, "output_tokens": 8}}).encode()
    assert output.usage(data) == (42, 0, 8)
    assert output.usage(b"data: {}\n\n") is None
