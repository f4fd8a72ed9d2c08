"""What the meter reads from an answer: whether output has begun, its length, and why it failed.

The content is not examined.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from serve_app import sse

# Events of /v1/responses and /v1/messages that are no output yet.
_BEFORE_OUTPUT = frozenset(
    {
        "ping",
        "message_start",
        "content_block_start",
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_part.added",
    }
)
# Of a choice of a stream, what a model may have written.
_OUTPUT = ("content", "reasoning", "reasoning_content", "refusal", "tool_calls", "function_call")


class Usage(msgspec.Struct):
    """Of OpenAI's and Anthropic's answers."""

    completion_tokens: Any = None
    output_tokens: Any = None


class _Answer(msgspec.Struct):
    """The fields of a non-streamed answer that are read."""

    usage: Usage | None = None
    error: Any = None
    type: Any = None


def begins_output(data: bytes) -> bool:
    """Whether a piece of a stream holds output: text, reasoning, a tool call, token ids, an end."""
    return any(_is_output(event) for event in _events(data))


def failure_code(body: bytes) -> str | None:
    """The code of the error in the body of a non-streamed answer."""
    answer = _answer(body)
    if answer is None or not isinstance(answer.error, dict):
        return None
    return _word(answer.error)


def output_tokens(body: bytes) -> int | None:
    """The number of tokens that a non-streamed answer states."""
    answer = _answer(body)
    if answer is None or answer.usage is None:
        return None
    for count in (answer.usage.completion_tokens, answer.usage.output_tokens):
        if isinstance(count, int):
            return count
    return None


def usage(data: bytes) -> tuple[int, int, int] | None:
    """Prompt, cached and output tokens, from an answer or the last events of a stream."""
    for text in (data, *reversed(list(sse.data_lines(data)))):
        try:
            parsed = msgspec.json.decode(text, type=_Counted)
        except (ValueError, RecursionError):
            continue
        counts = parsed.usage or (parsed.response.usage if parsed.response else None)
        if counts is None:
            continue
        output = counts.completion_tokens or counts.output_tokens
        return counts.prompt, counts.cached, output or 0
    return None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Counts(msgspec.Struct):
    """`usage` of OpenAI's and Anthropic's answers.

    Anthropic's `input_tokens` are those that were neither read from the cache nor written to it.
    """

    prompt_tokens: int | None = None
    input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    completion_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None

    @property
    def prompt(self) -> int:
        """Tokens of the prompt, cached ones among them."""
        if self.prompt_tokens:
            return self.prompt_tokens
        written = self.cache_creation_input_tokens or 0
        return (self.input_tokens or 0) + (self.cache_read_input_tokens or 0) + written

    @property
    def cached(self) -> int:
        details = self.prompt_tokens_details or self.input_tokens_details
        return (details.cached_tokens if details else self.cache_read_input_tokens) or 0


class _Response(msgspec.Struct):
    usage: _Counts | None = None


class _Counted(msgspec.Struct):
    """A non-streamed answer, an event of a stream, or an event of the Responses API."""

    usage: _Counts | None = None
    response: _Response | None = None


def _events(data: bytes) -> Iterator[Any]:
    """The decoded `data:` lines; None for one that is not JSON, as `[DONE]`."""
    for line in sse.data_lines(data):
        try:
            yield msgspec.json.decode(line)
        except (ValueError, RecursionError):  # No JSON, or no UTF-8.
            yield None


def _is_output(event: Any) -> bool:
    if not isinstance(event, dict):
        return True  # Whatever it is, it is no introduction.
    if isinstance(kind := event.get("type"), str):
        return kind not in _BEFORE_OUTPUT
    choices = event.get("choices")
    if not isinstance(choices, list):
        return True
    return any(_has_output(choice) for choice in choices if isinstance(choice, dict))


def _has_output(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    parts = delta if isinstance(delta, dict) else choice
    if any(parts.get(name) for name in _OUTPUT) or choice.get("finish_reason"):
        return True
    return bool(choice.get("text") or choice.get("token_ids"))


def _word(error: dict[str, Any]) -> str:
    """A stable name of an error: its code if it is one word, or its type."""
    for value in (error.get("code"), error.get("type")):
        if isinstance(value, str) and value.replace("_", "").isalnum() and len(value) < 64:
            return value
    return "error"


def _answer(body: bytes) -> _Answer | None:
    try:
        return msgspec.json.decode(body, type=_Answer)
    except (ValueError, RecursionError):
        return None
