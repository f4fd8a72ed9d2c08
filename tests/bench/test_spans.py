"""OpenTelemetry spans of agents become sessions: which calls count, whose they are, who waits."""

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToJson
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Status, StatusCode, set_span_in_context

from bench.errors import WorkloadError
from bench.traffic import agents, schedule, spans
from bench.traffic.agents import Call, Replay
from bench.traffic.workload import parse

START_S = 1_800_000_000


class Recorder:
    """Spans of the real SDK, at times that are said."""

    def __init__(self) -> None:
        self._memory, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self._tracer = provider.get_tracer("test")

    def span(
        self, operation: str, begun_s: float, ended_s: float, parent: Any = None, **usage: Any
    ) -> Any:
        """A span that is over; keyword arguments are `gen_ai.` attributes, `error` its error."""
        error = usage.pop("error", "")
        names = {"input": "usage.input_tokens", "output": "usage.output_tokens"}
        names |= {"cached": "usage.cache_read.input_tokens", "conversation": "conversation.id"}
        attributes = {f"gen_ai.{names[name]}": value for name, value in usage.items()}
        if operation:
            attributes["gen_ai.operation.name"] = operation
        span = self._tracer.start_span(
            f"{operation} m",
            context=set_span_in_context(parent) if parent else None,
            start_time=int((START_S + begun_s) * 1e9),
            attributes=attributes,
        )
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(int((START_S + ended_s) * 1e9))
        return span

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._memory.get_finished_spans())


def otlp(path: Path, each: list[ReadableSpan]) -> Path:
    """As OTLP's file exporters write them: several spans a line, in no order."""
    halves = [half for half in (each[1::2], each[::2]) if half]
    lines = [MessageToJson(encode_spans(half), indent=None) for half in halves]
    path.write_text("\n".join(lines))
    return path


def sdk(path: Path, each: list[ReadableSpan]) -> Path:
    path.write_text("".join(f"{span.to_json(indent=None)}\n" for span in reversed(each)))
    return path


@pytest.fixture(params=[otlp, sdk])
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two traces of one conversation, one of them with a sub-agent; and a trace of its own."""
    recorder = Recorder()
    main = recorder.span("invoke_agent", 0, 20, conversation="c", input=900, output=90)
    recorder.span("chat", 0, 2, main, input=100, output=10, cached=0)
    recorder.span("execute_tool", 2, 5, main)
    recorder.span("chat", 5, 6, main, input=150, output=20, cached=100)
    sub = recorder.span("invoke_agent", 6, 12, main, input=70, output=5)
    recorder.span("chat", 6, 9, sub, input=40, output=5)
    recorder.span("chat", 9.5, 12, sub, input=60, output=5)
    recorder.span("chat", 13, 14, main, input=80, output=5)  # The agent has summed up.
    recorder.span("chat", 14, 15, main, input=80, error="overloaded")
    again = recorder.span("invoke_agent", 60, 70, conversation="c")
    recorder.span("chat", 60, 64, again, input=120, output=7)
    recorder.span("", 90, 91, input=30, output=3)  # Of an older instrumentation.
    recorder.span("chat", 92, 93)  # Streamed, without usage.
    recorder.span("embeddings", 94, 95, input=30)
    return request.param(tmp_path / "spans.jsonl", recorder.spans)  # type: ignore[no-any-return]


def test_calls_are_sessions_and_wait_for_what_ended_before(recorded: Path) -> None:
    workload = parse(f"otel:{recorded}", 0)
    assert workload.count == 2
    turns = workload.turns(0)
    assert [turn.input_tokens for turn in turns] == [100, 40, 40, 15, 80, 35]
    assert [turn.output_tokens for turn in turns] == [10, 20, 5, 5, 5, 7]
    assert [turn.context for turn in turns] == [None, 0, None, 2, None, 4]
    assert [turn.after for turn in turns] == [(), (0,), (1,), (2,), (3,), (4,)]
    assert [turn.gap_s for turn in turns] == pytest.approx([0, 3, 0, 0.5, 1, 46])
    assert [turn.kind == agents.SUB_AGENT for turn in turns] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert [turn.turn for turn in turns] == [1, 2, 1, 2, 3, 4]
    (alone,) = workload.turns(1)
    assert (alone.input_tokens, alone.output_tokens) == (30, 3)


def test_what_was_left_out_and_what_a_cache_answered_is_noted(recorded: Path) -> None:
    notes = " ".join(parse(f"otel:{recorded}", 0).notes)
    assert "1 model calls that failed" in notes
    assert "1 model calls without gen_ai.usage.input_tokens" in notes
    assert "40% of the prompt tokens came from a cache" in notes


def test_sessions_start_when_they_did(recorded: Path) -> None:
    workload = parse(f"otel:{recorded},speed=2,scale=0.5,max_output=4", 0)
    plan = schedule.plan(workload, schedule.parse("trace:speed=3"), None, None, 0)
    first = [item for item in plan.planned if not item.after]
    assert [item.at_s for item in first] == pytest.approx([0, 15])
    assert [item.request.input_tokens for item in first] == [50, 15]
    assert {item.request.output_tokens for item in plan.planned} <= {2, 4}
    assert plan.planned[1].request.gap_s == pytest.approx(1.5)


def test_a_call_inside_a_call_is_one_call(tmp_path: Path) -> None:
    """A framework and the client below it both record a chat."""
    recorder = Recorder()
    outer = recorder.span("chat", 0, 2, input=100, output=10)
    recorder.span("chat", 0.1, 1.9, outer, input=100, output=10)
    log = spans.read(otlp(tmp_path / "s.jsonl", recorder.spans))
    assert [len(calls) for calls in log.sessions] == [1]


def test_the_names_of_older_conventions_and_numbers_as_text_are_read(tmp_path: Path) -> None:
    usage = {"gen_ai.usage.prompt_tokens": "12", "gen_ai.usage.completion_tokens": 3.0}
    line = {
        "context": {"trace_id": "0x1", "span_id": "0x2"},
        "start_time": "2026-06-01T00:00:00.000000Z",
        "end_time": "2026-06-01T00:00:01.500000Z",
        "attributes": usage,
    }
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(line))
    (((call,),), notes) = (spans.read(path).sessions, spans.read(path).notes)
    assert (call.input_tokens, call.output_tokens, notes) == (12, 3, ())
    assert call.ended_s - call.begun_s == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no model call"),
        ('{"resourceSpans": []}', "holds no model call"),
        ('\n{"resourceSpans": [', r":2'.*not a span"),
        ('{"resourceLogs": []}', r":1'.*neither resourceSpans nor context"),
        ('{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "a"}]}]}]}', r":1'.*spanId"),
        (
            '{"context": {"trace_id": "a", "span_id": "b"}, "start_time": "noon"}',
            r":1'.*not a span.*noon",
        ),
    ],
)
def test_what_is_no_trace_is_named_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=problem):
        parse(f"otel:{path}", 0)


def test_spans_around_one_another_in_a_circle_end(tmp_path: Path) -> None:
    spans_of = [
        {
            "traceId": "t",
            "spanId": mine,
            "parentSpanId": other,
            "startTimeUnixNano": "1",
            "endTimeUnixNano": "2",
            "attributes": [{"key": "gen_ai.usage.input_tokens", "value": {"intValue": "5"}}],
        }
        for mine, other in (("a", "b"), ("b", "a"), ("c", "a"))
    ]
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans_of}]}]}))
    assert [len(calls) for calls in spans.read(path).sessions] == [1]


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 6), st.integers(1, 40), st.sampled_from("ab")),
        min_size=1,
        max_size=12,
    )
)
def test_in_any_log_a_call_waits_for_all_that_ended_before_it(
    drawn: list[tuple[int, int, int, str]],
) -> None:
    """Calls of two agents that overlap as they like: replayed by a server as quick as the recorded
    one, each begins when it did, except that all wait for the first."""
    calls = sorted(
        (
            Call(begun_s=at, ended_s=at + took, input_tokens=read, output_tokens=1, agent=agent)
            for at, took, read, agent in drawn
        ),
        key=lambda call: call.begun_s,
    )
    requests = agents.session(calls, 0, "salt", Replay())
    first, ends_s = calls[0], [calls[0].ended_s]
    for place, (call, request) in enumerate(zip(calls[1:], requests[1:], strict=True), 1):
        assert request.after
        assert all(before < place for before in request.after)
        begins_s = max(ends_s[before] for before in request.after) + request.gap_s
        assert begins_s >= call.begun_s
        if call.begun_s >= first.ended_s:
            assert begins_s >= max(
                calls[n].ended_s for n in range(place) if calls[n].ended_s <= call.begun_s
            )
        ends_s.append(begins_s + call.ended_s - call.begun_s)
        if request.context is not None:
            assert calls[request.context].agent == call.agent
            assert calls[request.context].ended_s <= call.begun_s
        read = request.input_tokens or 0
        before = calls[request.context] if request.context is not None else None
        assert read + (before.input_tokens + 1 if before else 0) == call.input_tokens
