"""The transcript of an answer: everything that a client received, repetitions included.

`sse.py` reads what latencies need, and keeps only the last finish reason and usage. A transcript
shows whether an answer was right, so it has every finish reason, usage and id of the answer, the
ids of the tokens, and events after the end.

Pure: it is given a response that has ended, with the arrival time of each piece.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from bench.records import Record
from bench.traffic.response import Response
from bench.traffic.sse import UNREADABLE, error_text, http_error
from serve_app.sse import DONE, Reader


class Transcript(Record, kw_only=True):
    """A record of one request, with the content of its answer.

    Attributes:
        prompt: the number of the prompt among the distinct ones.
        whole: whether the request was not streamed.
        token_ids: of the answer, in order; None if the server sends none.
        prompt_token_ids: the prompt as the server read it; None if it does not say.
        finish_reasons: all of them.
        usages: prompt and completion tokens of each usage.
        names: the distinct ids of the answer.
        roles: how often the answer began (a chat names its role first).
        dones: the number of [DONE] events.
        late: events with text or tokens after a finish reason.
    """

    prompt: int = 0
    whole: bool = False
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reasons: list[str] = msgspec.field(default_factory=list)
    usages: list[tuple[int | None, int | None]] = msgspec.field(default_factory=list)
    names: list[str] = msgspec.field(default_factory=list)
    roles: int = 0
    dones: int = 0
    late: int = 0


class _Message(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Message | None = None
    message: _Message | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct, gc=False):
    id: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    prompt_token_ids: list[int] | None = None
    error: Any = None
    object: str | None = None


_event = msgspec.json.Decoder(_Event)


def transcribe(record: Transcript, answer: Response) -> Transcript:
    """Fill in the record of a completed answer, and return it.

    Args:
        answer: from `Client.exchange`, not decoded.
    """
    if record.error or not record.status:
        return record
    if answer.streamed:
        _stream(record, answer)
    else:
        _one_piece(record, answer)
    return record


def _stream(record: Transcript, answer: Response) -> None:
    texts: list[str] = []
    for kind, data, at_s in events(answer.parts, answer.times):
        if data.strip() == DONE:
            record.dones += 1
        elif kind == b"error":
            _fail(record, f"error event: {error_text(data)}")
        else:
            _take(record, data, at_s, texts)
    record.text = "".join(texts)
    if record.error:
        return
    if not record.dones:
        record.error = answer.cut or "cut: the stream ended without [DONE]"
    elif not record.finish_reasons:
        record.error = "cut: the stream ended without a finish_reason"


def _one_piece(record: Transcript, answer: Response) -> None:
    body = b"".join(answer.parts)
    if record.status != 200:
        record.error = http_error(record.status, body)
    elif answer.cut:
        record.error = answer.cut
    else:
        texts: list[str] = []
        _take(record, body, answer.times[-1] if answer.times else 0.0, texts)
        record.text = "".join(texts)
        if not (record.error or record.finish_reasons):
            record.error = f"bad response: {error_text(body) or 'no finish_reason'}"


def events(parts: Sequence[bytes], times: Sequence[float]) -> Iterator[tuple[bytes, bytes, float]]:
    """Name, data and time of each event of a stream, without an incomplete last event.

    The time is the arrival of the piece that completed the event.
    """
    reader = Reader()
    for part, at_s in zip(parts, times, strict=True):
        for name, data in reader.feed(part):
            if data:
                yield name, data, at_s


def _take(record: Transcript, data: bytes, at_s: float, texts: list[str]) -> None:
    try:
        event = _event.decode(data)
    except UNREADABLE:
        _fail(record, f"bad event: {error_text(data)}")
        return
    if event.error or event.object == "error":
        _fail(record, f"error event: {error_text(data)}")
        return
    if event.id and event.id not in record.names:
        record.names.append(event.id)
    record.prompt_token_ids = record.prompt_token_ids or event.prompt_token_ids
    if event.choices:
        _choose(record, event.choices[0], at_s, texts)
    if event.usage:
        record.usages.append((event.usage.prompt_tokens, event.usage.completion_tokens))
        record.input_tokens, record.output_tokens = record.usages[-1]


def _choose(record: Transcript, choice: _Choice, at_s: float, texts: list[str]) -> None:
    message, text = choice.delta or choice.message, choice.text
    if message:
        text = message.content or message.reasoning_content or message.reasoning
        record.roles += bool(message.role) and choice.delta is not None
    record.prompt_token_ids = record.prompt_token_ids or choice.prompt_token_ids
    if text or choice.token_ids:
        record.late += bool(record.finish_reasons)
        record.chunk_s.append(at_s)
        texts.append(text or "")
    if choice.token_ids is not None:
        record.token_ids = [*(record.token_ids or []), *choice.token_ids]
    if choice.finish_reason:
        record.finish_reasons.append(choice.finish_reason)
        record.finish_reason = choice.finish_reason


def _fail(record: Transcript, error: str) -> None:
    """The first error is the cause."""
    record.error = record.error or error
