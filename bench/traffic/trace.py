"""Traces of real traffic: when each request came, how long it was, and which blocks it shared.

Three formats, read into the same rows:

    azure     CSV: TIMESTAMP,ContextTokens,GeneratedTokens (Azure LLM inference traces 2023, 2024)
    mooncake  JSONL: {"timestamp": ms, "input_length", "output_length", "hash_ids": [...]}, where
              each hash stands for 512 tokens
    vllm      JSONL with the same fields as `vllm bench serve --dataset-name timed_trace` reads by
              default: seconds, and 16 tokens a hash

A trace holds lengths, not texts: `workload.py` makes texts of them.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.errors import WorkloadError

FORMATS = ("azure", "mooncake", "vllm")
BLOCK_TOKENS = {"mooncake": 512, "vllm": 16}
TICK_S = {"mooncake": 0.001, "vllm": 1.0}
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Row(msgspec.Struct, frozen=True):
    """One request of a trace.

    Attributes:
        at_s: seconds since the first request of the trace.
        input_tokens, output_tokens: its lengths.
        hashes: of the blocks its prompt begins with, in order; equal hashes are equal blocks.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    hashes: tuple[int, ...] = ()


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read(kind: str, path: Path, tick_s: float | None = None) -> list[Row]:
    """All rows of a trace file of the format `kind`, in the order of their times.

    `tick_s` is what one unit of a JSONL timestamp is, in seconds; the format's own unless given.
    Raises WorkloadError, with file and line, for what is not of the format.
    """
    if kind == "azure":
        rows = list(_azure(path))
    else:
        rows = list(_jsonl(kind, path, TICK_S[kind] if tick_s is None else tick_s))
    if not rows:
        raise WorkloadError.of(kind, path, "holds no request")
    start_s = min(row.at_s for row in rows)
    moved = (msgspec.structs.replace(row, at_s=row.at_s - start_s) for row in rows)
    return sorted(moved, key=lambda row: row.at_s)


def _azure(path: Path) -> Iterator[Row]:
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        lines = csv.DictReader(file)
        for name in _AZURE:
            if name not in (lines.fieldnames or ()):
                raise WorkloadError.of("azure", path, f"its first line has no column {name!r}")
        first: datetime | None = None
        try:
            for line in lines:
                at = _instant(line["TIMESTAMP"])
                first = first or at
                lengths = int(line["ContextTokens"]), int(line["GeneratedTokens"])
                yield _checked(Row((at - first).total_seconds(), *lengths))
        except (TypeError, ValueError, csv.Error) as error:
            place = f"{path}:{lines.line_num}"
            raise WorkloadError.of("azure", place, f"not a request: {error}") from error


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _jsonl(kind: str, path: Path, tick_s: float) -> Iterator[Row]:
    decoder = msgspec.json.Decoder(_Line)
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            line = decoder.decode(raw)
            lengths = line.input_length, line.output_length
            yield _checked(Row(line.timestamp * tick_s, *lengths, line.hash_ids))
        except ValueError as error:  # msgspec's errors are such.
            problem = f"not a request: {error}"
            raise WorkloadError.of(kind, f"{path}:{number}", problem) from error


def _checked(row: Row) -> Row:
    if row.input_tokens < 0 or row.output_tokens < 0:
        raise ValueError("a length is below 0")
    return row


@dataclass(frozen=True)
class Cut:
    """What of a trace is replayed, and how. Applied in the order of the attributes.

    Attributes:
        start_s, duration_s: the part to replay, in the trace's own time.
        limit: at most so many requests.
        scale: factor of every length and of the block size, so that sharing keeps its shape.
        max_input, max_output: longer ones are clipped to so many tokens; a clipped prompt still
            begins with the blocks it began with.
        speed: factor of the time: at 2 the gaps are half as long.
    """

    start_s: float = 0.0
    duration_s: float | None = None
    limit: int | None = None
    scale: float = 1.0
    max_input: int | None = None
    max_output: int | None = None
    speed: float = 1.0

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """The rows to replay, with `at_s` from the start of the part, speed-up applied.

        Lengths are at least 1: a server refuses to read or to write nothing.
        """
        end_s = float("inf") if self.duration_s is None else self.start_s + self.duration_s
        part = [row for row in rows if self.start_s <= row.at_s < end_s]
        return [
            Row(
                at_s=(row.at_s - self.start_s) / self.speed,
                input_tokens=_clipped(row.input_tokens * self.scale, self.max_input),
                output_tokens=_clipped(row.output_tokens * self.scale, self.max_output),
                hashes=row.hashes,
            )
            for row in part[: self.limit]
        ]


def _clipped(tokens: float, most: int | None) -> int:
    whole = max(1, round(tokens))
    return whole if most is None else min(whole, most)


def blocks(row: Row, block_tokens: float) -> Iterator[tuple[int | None, int]]:
    """What the prompt of a row is put together from: (hash, tokens) in order, as long as it is.

    The last block is cut where the prompt ends. Tokens that no hash speaks for come last, with
    None: nobody shares those. `block_tokens` may be broken, of a scaled trace: then a block is a
    token longer or shorter, by its place alone.
    """
    done = 0
    for place, block in enumerate(row.hashes, 1):
        end = min(int(place * block_tokens), row.input_tokens)
        if end > done:
            yield block, end - done
            done = end
    if done < row.input_tokens:
        yield None, row.input_tokens - done
