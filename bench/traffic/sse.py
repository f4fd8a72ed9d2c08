"""Reads a response into a record: events of a stream, a whole answer, an error.

One reader for the APIs that servers of language models have: OpenAI's completions, chat and
Responses, and Anthropic's messages; each event says by its fields which of them it is of.

Pure: it is given bytes with the time at which they arrived, cut anywhere, and keeps what
`records.Record` has a place for. An event counts as output when it shows the user something: text,
reasoning or a part of a tool call; the first event of a chat, which names only the role, does not.
"""

from typing import Any

import msgspec

from bench.records import Record
from bench.traffic import verdict
from serve_app.sse import DONE, Reader

# Enough to tell errors apart in a table; servers answer with whole tracebacks.
_SHORT = 200


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # What vLLM calls it since 0.12.
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None  # What tool calls were before 2023-11.


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    """Completions and chat say prompt and completion, Responses and messages input and output."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None
    message: Any = None
    detail: Any = None
    type: str | None = None
    delta: Any = None
    response: Any = None
    status: str | None = None
    output: list[Any] | None = None
    content: Any = None
    stop_reason: str | None = None
    data: Any = None


_event = msgspec.json.Decoder(_Event)
EMBEDDING = "embedding"  # The finish reason of what is no text.
# What it raises: for what is not JSON or another JSON, for text that is not UTF-8, for an abyss.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Events:
    """The events of one streamed response. `feed` it with its bytes, then `end` it."""

    __slots__ = ("_answers", "_done", "_reader", "_record", "_text")

    def __init__(self, record: Record, keep_text: bool, answers: int = 1) -> None:
        self._answers = answers  # How many were asked for.
        self._record = record
        self._text: list[str] | None = [] if keep_text else None
        self._reader = Reader()
        self._done = False

    def feed(self, data: bytes, at_s: float) -> None:
        """Add what arrived at `at_s`: it is the time of every event that this completes."""
        if data.startswith(b"data: {") and self._reader.between_events:
            # Nearly every read is one whole event. JSON allows the blank line after it, and
            # nothing else: several events, or a part of one, do not pass for one.
            try:
                event = _event.decode(data[6:])
            except UNREADABLE:
                self._read(data, at_s)
            else:
                if data.endswith(b"\n\n"):
                    self._take(event, at_s)
                else:
                    self._read(data, at_s)
        else:
            self._read(data, at_s)

    def end(self) -> None:
        """The response is over: it was cut unless it said that it is done."""
        record = self._record
        if self._text:
            record.text = "".join(self._text)
        if record.error:
            return
        if not self._done:
            record.error = "cut: the stream ended without [DONE]"
        elif not record.finish_reason:
            record.error = "cut: the stream ended without a finish_reason"
        verdict.judge(record, answers=self._answers)

    @property
    def done(self) -> bool:
        """Whether [DONE] has come."""
        return self._done

    def _read(self, data: bytes, at_s: float) -> None:
        """Any bytes, by the rules of server-sent events."""
        for name, text in self._reader.feed(data):
            if text.strip() == DONE:
                self._done = True
            elif name == b"error":
                self._fail(f"error event: {error_text(text)}")
            elif text:
                try:
                    event = _event.decode(text)
                except UNREADABLE:
                    self._fail(f"bad event: {_short(text.decode(errors='replace'))}")
                else:
                    self._take(event, at_s)

    def _take(self, event: _Event, at_s: float) -> None:
        for choice in event.choices or ():
            text, size = _output(choice.text, choice.delta)
            if size:
                if self._record.finish_reason and self._answers == 1:
                    self._record.odd = verdict.LATE_OUTPUT
                _count(self._record, at_s, size, choice.index)
                if text and self._text is not None:
                    self._text.append(text)
            if choice.finish_reason:
                self._record.finish_reason = choice.finish_reason
        if event.type is not None and not event.choices:
            self._take_typed(event, at_s)
        if event.usage:
            _use(self._record, event.usage)
        if event.error or event.object == "error":
            self._fail(f"error event: {_message(event) or 'without a message'}")

    def _take_typed(self, event: _Event, at_s: float) -> None:
        """An event of Responses or of messages, whose type says what is in it."""
        record, kind = self._record, event.type or ""
        text, size = _typed_output(kind, event.delta)
        if size:
            _count(record, at_s, size, 0)
            if text and self._text is not None:
                self._text.append(text)
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            _finish_response(record, event.response)
            self._done = True
        elif kind == "message_start":
            _use(record, _converted(_member(event.message, "usage"), _Usage))
        elif kind == "message_delta":
            record.finish_reason = _reason(_member(event.delta, "stop_reason"))
        elif kind == "message_stop":
            self._done = True
        elif kind == "error":
            self._fail(f"error event: {_message(event) or 'without a message'}")

    def _fail(self, error: str) -> None:
        """The first error is the cause."""
        self._record.error = self._record.error or error


def read_unstreamed(
    record: Record,
    body: bytes,
    at_s: float,
    keep_text: bool,
    streamed: bool = False,
    answers: int = 1,
) -> None:
    """Read an answer with status 200 that is not streamed: all its output arrived at `at_s`.

    `streamed`: whether the request asked for a stream; `answers`: the requested number.
    """
    try:
        answer = _event.decode(body)
    except UNREADABLE:
        record.error = f"bad response: {_short(body.decode(errors='replace')) or 'empty'}"
        return
    if answer.usage:
        _use(record, answer.usage)
    if answer.error is None and answer.choices is None and _read_other_api(record, answer, at_s):
        if keep_text:
            record.text = _answer_text(answer)
        if record.finish_reason != EMBEDDING:
            verdict.judge(record, streamed, answers)
        return
    if answer.error or not answer.choices:
        record.error = f"bad response: {_message(answer) or 'no choices'}"
        return
    for choice in answer.choices:
        text, size = _output(choice.text, choice.message)
        if size:
            _count(record, at_s, size, choice.index)
        record.finish_reason = record.finish_reason or choice.finish_reason or ""
        if keep_text:
            record.text += text
    record.chunk_s = record.chunk_s[:1]
    verdict.judge(record, streamed, answers)


def error_text(body: bytes) -> str:
    """What the body of an error says, in one short line; empty where it says nothing."""
    try:
        text = _message(_event.decode(body))
    except UNREADABLE:
        text = ""
    return text or _short(body.decode(errors="replace"))


def http_error(status: int, body: bytes) -> str:
    """The error of a response whose status is not 200."""
    text = error_text(body)
    return f"http {status}: {text}" if text else f"http {status}"


def _output(text: str | None, delta: _Delta | None) -> tuple[str, int]:
    """The text that an event shows, and how many bytes of output it has in all."""
    if delta is None:
        return text or "", len((text or "").encode())
    text = delta.content or delta.reasoning_content or delta.reasoning or delta.refusal or ""
    calls = [call.get("function") for call in delta.tool_calls or () if isinstance(call, dict)]
    return text, len(text.encode()) + sum(map(_called_bytes, [*calls, delta.function_call]))


def _typed_output(kind: str, delta: Any) -> tuple[str, int]:
    """The text of an event of Responses or messages, and how many bytes of output it has."""
    if kind.startswith("response."):
        if not kind.endswith(".delta") or not isinstance(delta, str):
            return "", 0
        text = "" if "arguments" in kind else delta
        return text, len(delta.encode())
    if kind == "content_block_delta" and isinstance(delta, dict):
        shown = str(delta.get("text") or delta.get("thinking") or "")
        return shown, len(shown.encode()) + len(str(delta.get("partial_json") or "").encode())
    return "", 0


def _finish_response(record: Record, response: Any) -> None:
    """The end of a Response: its usage, and why it ended."""
    _use(record, _converted(_member(response, "usage"), _Usage))
    if error := _member(response, "error"):
        record.error = record.error or f"error event: {_text_of(error)}"
    why = _member(_member(response, "incomplete_details"), "reason")
    record.finish_reason = _reason(why or _member(response, "status") or "completed")


def _read_other_api(record: Record, answer: _Event, at_s: float) -> bool:
    """Read an unstreamed answer of Responses, messages or embeddings; False if it is another."""
    if isinstance(answer.data, list) and answer.object == "list":
        record.chunk_s, record.finish_reason, record.output_tokens = [at_s], EMBEDDING, 0
        record.error = "" if answer.data else "empty: the answer has no embedding"
        return True
    if answer.object == "response":
        record.finish_reason = _reason(answer.status or "completed")
    elif answer.type == "message":
        record.finish_reason = _reason(answer.stop_reason)
    else:
        return False
    if size := len(_answer_text(answer).encode()):
        _count(record, at_s, size, 0)
    return True


def _answer_text(answer: _Event) -> str:
    """The content of an unstreamed answer: texts, and the arguments of calls."""
    blocks = [block for item in answer.output or () for block in _blocks(item)]
    blocks += answer.content if isinstance(answer.content, list) else []
    parts = [
        _member(block, "text") or _member(block, "thinking") or _member(block, "arguments") or ""
        for block in blocks
    ]
    parts += [_text_of(_member(block, "input")) for block in blocks if _member(block, "input")]
    return "".join(map(str, parts))


def _blocks(item: Any) -> list[Any]:
    content = _member(item, "content")
    return content if isinstance(content, list) else [item]


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _converted(value: Any, of: type[_Usage]) -> _Usage:
    try:
        return msgspec.convert(value or {}, of)
    except msgspec.ValidationError:
        return of()


def _text_of(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        return _short(value["message"])
    return _short(value if isinstance(value, str) else msgspec.json.encode(value).decode())


def _reason(reason: Any) -> str:
    """Why an answer ended, in the words of the chat API."""
    same = {
        "completed": "stop",
        "end_turn": "stop",
        "stop_sequence": "stop",
        "max_output_tokens": "length",
        "max_tokens": "length",
        "tool_use": "tool_calls",
        "failed": "error",
    }
    return same.get(str(reason), str(reason)) if reason else ""


def _called_bytes(function: Any) -> int:
    """How much of a function's name and arguments there is."""
    if not isinstance(function, dict):
        return 0
    return sum(len(str(function.get(key) or "")) for key in ("name", "arguments"))


def _count(record: Record, at_s: float, size: int, choice: int) -> None:
    record.chunk_s.append(at_s)
    record.text_bytes += size
    record.choices = max(record.choices, choice + 1)


def _use(record: Record, usage: _Usage) -> None:
    """Take what a usage says; what a later one leaves out is kept."""
    if usage.input_tokens is not None:
        # Messages leave out what came from the cache, or went to it.
        cached, stored = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        record.input_tokens = usage.input_tokens + (cached or 0) + (stored or 0)
        record.cached_tokens = record.cached_tokens if cached is None else cached
    if usage.output_tokens is not None:
        record.output_tokens = usage.output_tokens
    if usage.input_tokens_details and usage.input_tokens_details.cached_tokens is not None:
        record.cached_tokens = usage.input_tokens_details.cached_tokens
    if usage.output_tokens_details:
        record.reasoning_tokens = usage.output_tokens_details.reasoning_tokens or 0
    if usage.prompt_tokens is not None:
        record.input_tokens = usage.prompt_tokens
    if usage.completion_tokens is not None:
        record.output_tokens = usage.completion_tokens
    if usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens is not None:
        record.cached_tokens = usage.prompt_tokens_details.cached_tokens
    if usage.completion_tokens_details:
        record.reasoning_tokens = usage.completion_tokens_details.reasoning_tokens or 0


def _message(event: _Event) -> str:
    """The message of an error as OpenAI, older vLLM, FastAPI and others write it."""
    error = event.error or event.message or event.detail
    if isinstance(error, dict):
        error = error.get("message") or error
    if not error:
        return ""
    return _short(error if isinstance(error, str) else msgspec.json.encode(error).decode())


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHORT else line[: _SHORT - 1] + "…"
