"""What came back: one record a request, with the raw times that every latency is derived from.

All times are seconds since the start of the run, on the one clock that the load was started by.
Nothing here is derived: `bench.measure` is the only place that turns times into latencies.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request, from the time it was planned for to its last byte or its failure.

    Attributes:
        index: place in the plan of its repeat, from 0.
        repeat: which repetition of the run, from 0.
        kind: class of the request in its workload ("short", "long", "group 3"), for fairness.
        actor: which load actor sent it.
        user: which user of a closed loop sent it; None in an open loop.
        planned_s: when it was to be sent. In a closed loop: when its user became free.
        sent_s: when its first byte was written; None if it never was.
        headers_s: when the status line and headers had arrived.
        chunk_s: when each event that carried output arrived; the first is the first token.
        end_s: when the response was complete, or had failed.
        status: HTTP status; 0 when there was no response.
        error: why it failed; empty for a success.
        asked_input_tokens, asked_output_tokens: what the workload meant to ask for.
        input_tokens, output_tokens: what the server's usage says; None if it said nothing.
        cached_tokens: prompt tokens that the server's usage says came from its prefix cache.
        reasoning_tokens: of the output tokens, those of a reasoning that may not be shown.
        shared: the share of the prompt that may be in a prefix cache, since other prompts of the
            workload begin with it.
        limit: whether `asked_output_tokens` was only an upper limit.
        finish_reason: of the first choice.
        text: what was generated; empty unless the run keeps texts.
        text_bytes: how long that was, in UTF-8.
        choices: how many answers came in one response.
        odd: what cannot be believed of a success: "usage: ..." where the token counts contradict
            what came, which are then None, or "one piece: ..." where a stream was asked for and
            the answer came all at once (`bench.traffic.verdict` has all). Empty where nothing
            is odd.
        session: which session of the plan it belongs to; None outside of sessions.
        turn: of its session, from 1; 0 outside of sessions.
    """

    index: int
    planned_s: float
    repeat: int = 0
    kind: str = ""
    actor: int = 0
    user: int | None = None
    sent_s: float | None = None
    headers_s: float | None = None
    chunk_s: list[float] = msgspec.field(default_factory=list)
    end_s: float | None = None
    status: int = 0
    error: str = ""
    asked_input_tokens: int | None = None
    asked_output_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int = 0
    shared: float = 0.0
    limit: bool = False
    finish_reason: str = ""
    text: str = ""
    text_bytes: int = 0
    choices: int = 1
    odd: str = ""
    session: int | None = None
    turn: int = 0

    @property
    def ok(self) -> bool:
        return not self.error


_encoder, _decoder = msgspec.json.Encoder(), msgspec.json.Decoder(Record)


def append(path: Path, records: Iterable[Record]) -> None:
    """Append records to a JSONL file at once, so that they survive a crash."""
    with open(path, "ab") as file:
        file.write(_encoder.encode_lines(list(records)))


class Journal:
    """A JSONL file to which records are added as they come. A disk that is full ends no run.

    What cannot be written is kept, and tried again with what comes next.

    Attributes:
        problem: why the file lacks the last records; empty where it has all of them.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._buffer = path, bytearray()
        self._whole = 0  # Bytes of the file that are whole lines.
        self.problem = ""

    def add(self, records: Iterable[Record]) -> None:
        self._buffer += _encoder.encode_lines(list(records))
        try:
            with open(self._path, "r+b" if self._path.exists() else "wb") as file:
                file.seek(self._whole)  # Over what was written in part, before the disk was full.
                file.write(self._buffer)
        except OSError as error:
            lines = self._buffer.count(b"\n")
            self.problem = f"{self._path.name} lacks the last {lines} records: {error.strerror}"
        else:
            self._whole += len(self._buffer)
            self._buffer.clear()
            self.problem = ""


def read(path: Path) -> Iterator[Record]:
    """The records of a JSONL file, without a last line that was cut off."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _decoder.decode(line)
