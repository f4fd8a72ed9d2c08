"""Model calls in OpenTelemetry traces, by the semantic conventions for generative AI.

    {"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": .., "attributes": [..]}, ..]}]}]}
    {"name": "chat m", "context": {"trace_id": ..}, "start_time": .., "attributes": {..}}

The first is a line as OTLP file exporters and the Collector write it, with any number of spans; the
second, a span a line, is what `ReadableSpan.to_json(indent=None)` of the Python SDK gives.

A model call is a span whose `gen_ai.operation.name` is chat, text_completion or generate_content,
or which has none, and which has `gen_ai.usage.input_tokens` (cached ones included, as the
conventions say). A span around other model calls only repeats theirs and is left out; so are calls
that failed and calls without usage, which are counted in the notes. Calls of one
`gen_ai.conversation.id`, or of one trace where there is none, are a session. An agent that another
agent invoked (a span `invoke_agent` within another) is a sub-agent with a conversation of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from bench.errors import WorkloadError
from bench.traffic import textfile
from bench.traffic.agents import Call

INFERENCE = ("chat", "text_completion", "generate_content")
# As the conventions name them, and as they did until version 1.27.
_INPUT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
_CACHED = ("gen_ai.usage.cache_read.input_tokens",)
_OPERATION, _CONVERSATION = "gen_ai.operation.name", "gen_ai.conversation.id"
_ERROR, _STATUS_ERROR = "error.type", (2, "STATUS_CODE_ERROR", "ERROR")


@dataclass(frozen=True)
class Log:
    """Sessions in the order of their starts, and what a reader should know of what was left out."""

    sessions: tuple[tuple[Call, ...], ...]
    notes: tuple[str, ...]


class _Value(msgspec.Struct, rename="camel"):
    """A value of OTLP's JSON, where whole numbers are texts."""

    string_value: str | None = None
    int_value: int | str | None = None
    double_value: float | None = None

    def plain(self) -> Any:
        values = (self.string_value, self.int_value, self.double_value)
        return next((value for value in values if value is not None), None)


class _Pair(msgspec.Struct):
    key: str
    value: _Value = msgspec.field(default_factory=_Value)


class _Status(msgspec.Struct):
    code: int | str = 0
    status_code: str = ""


class _OtlpSpan(msgspec.Struct, rename="camel"):
    trace_id: str
    span_id: str
    start_time_unix_nano: int | str
    end_time_unix_nano: int | str
    parent_span_id: str = ""
    attributes: list[_Pair] = []
    status: _Status = msgspec.field(default_factory=_Status)


class _ScopeSpans(msgspec.Struct):
    spans: list[_OtlpSpan] = []


class _ResourceSpans(msgspec.Struct, rename="camel"):
    scope_spans: list[_ScopeSpans] = []


class _Context(msgspec.Struct):
    trace_id: str
    span_id: str


class _Line(msgspec.Struct):
    """A line of either kind."""

    resource_spans: list[_ResourceSpans] | None = msgspec.field(default=None, name="resourceSpans")
    context: _Context | None = None
    parent_id: str | None = None
    start_time: str = ""
    end_time: str = ""
    attributes: dict[str, Any] = {}
    status: _Status = msgspec.field(default_factory=_Status)


@dataclass(frozen=True)
class _Span:
    trace: str
    name: str
    parent: str
    begun_s: float
    ended_s: float
    attributes: Mapping[str, Any]
    failed: bool

    def tokens(self, names: Sequence[str]) -> int | None:
        """Of the first of the attributes that is a whole number."""
        for name in names:
            value = self.attributes.get(name)
            if isinstance(value, float | int | str) and not isinstance(value, bool):
                try:
                    return max(0, int(value))
                except (ValueError, OverflowError):
                    continue
        return None

    @property
    def operation(self) -> str:
        return str(self.attributes.get(_OPERATION) or "")


def read(path: Path) -> Log:
    """The model calls of a file, by session.

    Raises WorkloadError, with file and line, for what is not a span, and for a file without a call.
    """
    spans = {(span.trace, span.name): span for span in _spans(path)}
    candidates = [span for span in spans.values() if _is_call(span)]
    around = {key for span in candidates for key in _above(span, spans)}
    alone = [span for span in candidates if (span.trace, span.name) not in around]
    failed = [span for span in alone if span.failed]
    counted = [s for s in alone if not s.failed and s.tokens(_INPUT)]
    if not counted:
        problem = f"holds no model call with {_INPUT[0]} among its {len(spans)} spans"
        raise WorkloadError.of("otel", path, problem)
    sessions: dict[str, list[Call]] = {}
    for span in sorted(counted, key=lambda span: span.begun_s):
        sessions.setdefault(_session(span, spans), []).append(_call(span, spans))
    calls = tuple(tuple(session) for session in sessions.values())
    return Log(calls, _notes(calls, len(failed), len(alone) - len(failed) - len(counted)))


def _notes(sessions: Sequence[Sequence[Call]], failed: int, without_usage: int) -> tuple[str, ...]:
    notes = []
    if failed:
        notes.append(f"{failed} model calls that failed were left out")
    if without_usage:
        notes.append(f"{without_usage} model calls without {_INPUT[0]} were left out")
    reporting = [c for calls in sessions for c in calls if c.cached_tokens is not None]
    if read := sum(call.input_tokens for call in reporting):
        share = sum(call.cached_tokens or 0 for call in reporting) / read
        notes.append(f"in the recording {share:.0%} of the prompt tokens came from a cache")
    return tuple(notes)


# --- what is a call, of which session and agent ---------------------------------------------


def _is_call(span: _Span) -> bool:
    if span.operation:
        return span.operation in INFERENCE
    return span.tokens(_INPUT) is not None


_Spans = Mapping[tuple[str, str], _Span]


def _above(span: _Span, spans: _Spans) -> Iterator[tuple[str, str]]:
    """The keys of the spans around it, from the inside out."""
    seen: set[tuple[str, str]] = set()
    key = (span.trace, span.parent)
    while key in spans and key not in seen:  # A broken file may name a span its own parent.
        seen.add(key)
        yield key
        key = (span.trace, spans[key].parent)


def _session(span: _Span, spans: _Spans) -> str:
    """Its conversation, or that of a span around it, or its trace."""
    for each in (span, *(spans[key] for key in _above(span, spans))):
        if each.attributes.get(_CONVERSATION):
            return f"conversation {each.attributes[_CONVERSATION]}"
    return f"trace {span.trace}"


def _call(span: _Span, spans: _Spans) -> Call:
    agents = [key for key in _above(span, spans) if spans[key].operation == "invoke_agent"]
    return Call(
        begun_s=span.begun_s,
        ended_s=max(span.begun_s, span.ended_s),
        input_tokens=span.tokens(_INPUT) or 0,
        output_tokens=span.tokens(_OUTPUT) or 0,
        # Each trace of a conversation has a span of its main agent; those within are sub-agents.
        agent="/".join(agents[0]) if len(agents) > 1 else "",
        cached_tokens=span.tokens(_CACHED),
    )


# --- lines ----------------------------------------------------------------------------------


def _spans(path: Path) -> Iterator[_Span]:
    decoder = msgspec.json.Decoder(_Line)

    def parse(line: bytes) -> list[_Span]:
        return list(_of_line(decoder.decode(line)))

    for spans in textfile.parsed("otel", path, parse, "not a span: "):
        yield from spans


def _of_line(line: _Line) -> Iterator[_Span]:
    if line.context is not None:
        yield _Span(
            line.context.trace_id,
            line.context.span_id,
            line.parent_id or "",
            _instant_s(line.start_time),
            _instant_s(line.end_time),
            line.attributes,
            line.status.status_code in _STATUS_ERROR or _ERROR in line.attributes,
        )
    elif line.resource_spans is None:
        raise ValueError("it has neither resourceSpans nor context")
    for resource in line.resource_spans or ():
        for scope in resource.scope_spans:
            yield from map(_of_otlp, scope.spans)


def _of_otlp(span: _OtlpSpan) -> _Span:
    attributes = {pair.key: pair.value.plain() for pair in span.attributes}
    return _Span(
        span.trace_id,
        span.span_id,
        span.parent_span_id,
        int(span.start_time_unix_nano) / 1e9,
        int(span.end_time_unix_nano) / 1e9,
        attributes,
        span.status.code in _STATUS_ERROR or _ERROR in attributes,
    )


def _instant_s(text: str) -> float:
    at = datetime.fromisoformat(text)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
