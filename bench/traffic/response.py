"""A response that has ended: its bytes with their arrival times, and how they are decoded.

Decoding begins when a response has ended, so that it neither delays the reading of another response
nor shifts its times.
"""

from collections.abc import Iterator
from typing import Any

from bench.records import Record
from bench.traffic.request import Request
from bench.traffic.sse import Events, http_error, read_unstreamed

# Events decoded before the event loop may handle new ones: a fraction of a millisecond.
_SLICE = 256


class Response:
    """A response that is not decoded yet: its bytes, and the arrival time of each piece."""

    __slots__ = (
        "_answers",
        "_asked_stream",
        "_keep_text",
        "cut",
        "parts",
        "record",
        "streamed",
        "times",
    )

    def __init__(self, record: Record, keep_text: bool) -> None:
        self.record = record
        self.parts: list[bytes] = []
        self.times: list[float] = []
        self.streamed = False
        self.cut = ""  # What ended the response before its end.
        self._keep_text = keep_text
        self._asked_stream, self._answers = True, 1

    def begin(self, request: Request, extra: dict[str, Any]) -> None:
        """Note the request; `extra` has the fields of its body besides the prompt."""
        record = self.record
        record.asked_input_tokens = request.input_tokens
        record.asked_output_tokens = request.output_tokens
        record.limit, record.shared = request.limit, request.shared
        record.kind, record.turn = request.kind, request.turn
        self._asked_stream = bool(extra.get("stream", True))
        answers = extra.get("n") or 1
        self._answers = answers if isinstance(answers, int) else 1

    def fail(self, error: str, at_s: float) -> None:
        """It is over without an end; the part of a response that came is still decoded."""
        self.record.end_s = at_s
        if self.record.status:
            self.cut = error
        else:
            self.record.error = error

    def read(self) -> Record:
        """Decode everything at once; returns the record, which is complete."""
        for _ in self.slices():
            continue
        return self.record

    def slices(self) -> Iterator[None]:
        """Decode step by step. The record is complete when this ends."""
        record = self.record
        if record.error or not record.status:
            return
        if self.streamed:
            yield from self._stream()
            return
        body = b"".join(self.parts)
        if record.status != 200:
            record.error = http_error(record.status, body)
        elif self.cut:
            record.error = self.cut
        else:
            at_s = self.times[-1] if self.times else 0.0
            expected = self._asked_stream, self._answers
            read_unstreamed(record, body, at_s, self._keep_text, *expected)

    def _stream(self) -> Iterator[None]:
        events = Events(self.record, self._keep_text, self._answers)
        for number, (part, at_s) in enumerate(zip(self.parts, self.times, strict=True), 1):
            events.feed(part, at_s)
            if number % _SLICE == 0:
                yield
        self.parts, self.times = [], []
        if self.cut and not (events.done or self.record.error):
            self.record.error = self.cut
        events.end()
