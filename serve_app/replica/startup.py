"""Notes what a start is doing, in the replica and in the processes of its engine.

A replica notes its own phases (`Startup.phase`). vLLM marks those of an engine with spans of
OpenTelemetry, which nobody records unless somebody asks: `record` has each process of an engine
write its spans into one file, which the replica reads once the engine is ready.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from serve_app.observe import phases
from serve_app.observe.phases import Span

# The file that the processes of an engine write their spans into.
FILE_VARIABLE = "SERVE_APP_STARTUP_SPANS"


class Startup:
    """The phases of one start, from the creation of this process on.

    Args:
        dedicated: whether this process was started for this replica. Ray's idle workers were not,
            and their age says nothing.
    """

    def __init__(self, dedicated: bool) -> None:
        self._began_s = now_s = time.time()
        self._spans: list[Span] = []
        if dedicated:
            self._began_s = min(now_s, psutil.Process().create_time())
            self._spans.append(Span("process", self._began_s, now_s))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record this block as the phase, except for the phases recorded inside it."""
        began_s = time.time()
        try:
            yield
        finally:
            self._spans.append(Span(name, began_s, time.time()))

    @contextlib.contextmanager
    def configuration(self) -> Iterator[None]:
        """Record the phase in which vLLM reads its arguments, and the inspection of the model's
        class.
        """
        from vllm.model_executor.models.registry import ModelRegistry

        inspect = ModelRegistry.inspect_model_cls

        def inspect_model_cls(*args: Any, **kwargs: Any) -> Any:
            with self.phase("inspection"):
                return inspect(*args, **kwargs)

        ModelRegistry.inspect_model_cls = inspect_model_cls
        try:
            with self.phase("configuration"):
                yield
        finally:
            del ModelRegistry.inspect_model_cls

    @contextlib.contextmanager
    def engine(self) -> Iterator[None]:
        """Note also what the processes of an engine say that are started within."""
        with tempfile.NamedTemporaryFile(prefix="serve_app.start.") as file:
            os.environ[FILE_VARIABLE] = file.name
            try:
                yield
            finally:
                del os.environ[FILE_VARIABLE]
                self._spans += read(Path(file.name))

    def write(self, path: Path) -> None:
        """Write the records so far to the file that `read` reads."""
        spans = [(span.phase, span.began_s * 1e9, span.ended_s * 1e9) for span in self._spans]
        _append(path, [json.dumps(span) for span in spans])

    def segments(self) -> list[Span]:
        """The start so far, without overlaps and gaps."""
        whole = Span("other", self._began_s, time.time())
        return phases.segments([whole, *self._spans])


def record() -> None:
    """Write the spans of this process and of those forked from it, where a replica asks for it."""
    path = os.environ.get(FILE_VARIABLE)
    # A process has one provider: where traces are collected, it is vLLM's.
    if path and not os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(_Writer(Path(path)))
        trace.set_tracer_provider(provider)


def read(path: Path) -> list[Span]:
    """The records that were written, without lines that were cut off."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, TypeError):
            if span := phases.of_vllm(*json.loads(line)):
                events.append(span)
    return events


class _Writer(SpanProcessor):
    """Appends each span that ends to a file. A line is written in one piece."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_end(self, span: ReadableSpan) -> None:
        if span.name not in phases.VLLM_SPANS:
            return
        _append(self._path, [json.dumps([span.name, span.start_time, span.end_time])])


def _append(path: Path, lines: list[str]) -> None:
    # Without O_CREAT: a replica that has its start deletes the file.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, "".join(f"{line}\n" for line in lines).encode())
        finally:
            os.close(descriptor)
