"""Where the time of a start goes: every moment counts once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.observe.phases import (
    PHASES,
    VLLM_SPANS,
    Logged,
    Span,
    durations,
    segments,
    sentence,
)

spans = st.lists(
    st.builds(
        lambda phase, began, took: Span(phase, float(began), float(began + took)),
        st.sampled_from([*PHASES]),
        st.integers(0, 50),
        st.integers(0, 20),
    ),
    max_size=12,
)


@given(spans)
def test_each_covered_moment_counts_once(found: list[Span]) -> None:
    pieces = segments(found)
    covered = {s for span in found for s in range(int(span.began_s), int(span.ended_s))}
    counted = [s for piece in pieces for s in range(int(piece.began_s), int(piece.ended_s))]
    assert sorted(counted) == sorted(covered)
    assert sum(durations(pieces).values()) == pytest.approx(len(covered))


@given(spans)
def test_a_moment_belongs_to_a_span_that_covers_it_and_began_last(found: list[Span]) -> None:
    for piece in segments(found):
        for second in range(int(piece.began_s), int(piece.ended_s)):
            over = [s for s in found if s.began_s <= second < s.ended_s]
            last_s = max(s.began_s for s in over)
            assert piece.phase in {s.phase for s in over if s.began_s == last_s}


def test_a_start_with_an_engine_inside() -> None:
    found = [
        Span("other", 0, 20),
        Span("imports", 0, 5),
        Span("engine process", 6, 16),
        Span("configuration", 6, 8),
        Span("inspection", 7, 8),
        # Two workers, one of which is slower.
        Span("weights", 10, 12),
        Span("weights", 10, 13),
        Span("profile", 13, 16),
        Span("compile", 14, 15),
    ]
    took_s = durations(segments(found))
    assert took_s == {
        "imports": 5,
        "configuration": 1,
        "inspection": 1,
        "engine process": 2,
        "weights": 3,
        "profile": 2,
        "compile": 1,
        "other": 5,
    }
    assert sentence("start", took_s).startswith("start: 20.0 s: imports 5.0, configuration 1.0")
    assert Logged.of(segments(found)[1]) == Logged("other", began_s=5, took_s=1)


def test_phases_of_vllm_are_phases() -> None:
    assert set(VLLM_SPANS.values()) <= PHASES.keys()


# What a process of an engine does: it notes its spans, and what is forked from it does as well.
_ENGINE = """
import os, sys
from serve_app.replica import startup
from opentelemetry import trace
startup.record()
tracer = trace.get_tracer("vllm")
with tracer.start_as_current_span("EngineCoreProc init"):
    if not (pid := os.fork()):
        with tracer.start_as_current_span("Load weights"):
            pass
        os._exit(0)
    os.waitpid(pid, 0)
    with tracer.start_as_current_span("of a request"):
        pass
"""


def _engine(**environment: str) -> None:
    subprocess.run(
        [sys.executable, "-c", _ENGINE], env={**os.environ, **environment}, check=True, timeout=120
    )


def test_what_processes_of_an_engine_write_is_read() -> None:
    from serve_app.replica.startup import FILE_VARIABLE, Startup

    startup = Startup(dedicated=False)
    with startup.phase("engine process"), startup.engine():
        path = Path(os.environ[FILE_VARIABLE])
        _engine()
        with path.open("a") as file:
            file.write('["Load weights", 17')  # It was killed as it wrote.
        written = [json.loads(line)[0] for line in path.read_text().splitlines()[:-1]]
    assert sorted(written) == ["EngineCoreProc init", "Load weights"]
    assert not path.exists()
    took_s = durations(startup.segments())
    assert took_s["weights"] > 0
    assert took_s["engine process"] > took_s["weights"]


def test_traces_of_an_engine_go_to_the_collector_that_was_asked_for(tmp_path: Path) -> None:
    from serve_app.replica.startup import FILE_VARIABLE

    path = tmp_path / "spans"
    path.touch()
    variables = {
        FILE_VARIABLE: str(path),
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9",
    }
    _engine(**variables)
    assert path.read_text() == ""
