"""Traces of real traffic: when each request came, how long it was, and what it shared with others.

    azure     CSV: TIMESTAMP,ContextTokens,GeneratedTokens (Azure LLM inference traces 2023 and
              2024; LMM 2025, which has NumImages as well: its context tokens include the images)
    burstgpt  CSV: Timestamp,Model,Request tokens,Response tokens,.. in seconds; with the columns
              Session ID and Elapsed time a session's requests wait for one another
    mooncake  JSONL: {"timestamp": ms, "input_length", "output_length", "hash_ids": [...]}, where
              each hash stands for a block of 512 tokens
    vllm      JSONL with the same fields as `vllm bench serve --dataset-name timed_trace` reads by
              default: seconds, and 16 tokens a hash
    bailian   JSONL of Qwen-Bailian: seconds, 16 tokens a hash, and "chat_id", "parent_chat_id",
              "turn", "type": a request waits for the end of its parent

A trace holds lengths, not texts: `workload.py` makes texts of them. What cannot be read is named
with its file, line and column.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.errors import WorkloadError
from bench.traffic import textfile
from bench.traffic.lengths import clipped

CSV_FORMATS = ("azure", "burstgpt")
FORMATS = (*CSV_FORMATS, "mooncake", "vllm", "bailian")
BLOCK_TOKENS = {"mooncake": 512, "vllm": 16, "bailian": 16}
TICK_S = {"mooncake": 0.001, "vllm": 1.0, "bailian": 1.0}
_SIZES = tuple(1 << power for power in range(13, 2, -1))  # Blocks of 8192 to 8 tokens.
_NO_PARENT = -1
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")


class Row(msgspec.Struct, frozen=True):
    """One request of a trace.

    Attributes:
        at_s: seconds since the first request of the trace.
        input_tokens, output_tokens: its lengths.
        hashes: of the blocks its prompt begins with, in order; equal hashes are equal blocks.
        name: by which other rows call it; empty where none does.
        parent: the name of the row whose answer it waits for; empty for none.
        busy_s: how long its answer took in the trace; 0 where the trace does not say.
        kind: its class.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    hashes: tuple[int, ...] = ()
    name: str = ""
    parent: str = ""
    busy_s: float = 0.0
    kind: str = ""


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    chat_id: int | None = None
    parent_chat_id: int = _NO_PARENT
    type: str = ""


def read(kind: str, path: Path, tick_s: float | None = None) -> list[Row]:
    """All rows of a trace file of the format `kind`, in the order of their times.

    `tick_s` is what one unit of a JSONL timestamp is, in seconds; the format's own unless given.
    Raises WorkloadError, with file and line, for what is not of the format.
    """
    if kind == "azure":
        rows = list(_azure(path))
    elif kind == "burstgpt":
        rows = list(_burstgpt(path))
    else:
        rows = list(_jsonl(kind, path, TICK_S[kind] if tick_s is None else tick_s))
    if not rows:
        raise WorkloadError.of(kind, path, "holds no request")
    start_s = min(row.at_s for row in rows)
    moved = (msgspec.structs.replace(row, at_s=row.at_s - start_s) for row in rows)
    return sorted(moved, key=lambda row: row.at_s)


# --- tables ---------------------------------------------------------------------------------


def _azure(path: Path) -> Iterator[Row]:
    first: datetime | None = None
    for place, cells in _cells("azure", path, _AZURE):
        at = _instant(place, cells)
        first = first or at
        yield Row(
            (at - first).total_seconds(),
            _tokens(place, cells, "ContextTokens"),
            _tokens(place, cells, "GeneratedTokens"),
        )


def _burstgpt(path: Path) -> Iterator[Row]:
    """Failed requests, which have no response tokens, are left out: they were never served."""
    last: dict[str, str] = {}  # The last request of each session.
    for place, cells in _cells("burstgpt", path, _BURSTGPT):
        at_s = _number(place, cells, "Timestamp")
        read, written = (_tokens(place, cells, f"{of} tokens") for of in ("Request", "Response"))
        session = cells.get("Session ID", "")
        if not written:
            continue
        busy_s = _number(place, cells, "Elapsed time") if cells.get("Elapsed time") else 0.0
        kind = cells.get("Log Type", "")
        yield Row(at_s, read, written, (), place, last.get(session, ""), busy_s, kind)
        if session:
            last[session] = place


def _cells(
    kind: str, path: Path, columns: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The place and the cells of each line of a CSV file, which has at least these columns."""
    with textfile.text(path) as file:
        table = csv.DictReader(file, restval="")
        for name in columns:
            if name not in (table.fieldnames or ()):
                raise WorkloadError.of(kind, path, f"its first line has no column {name!r}")
        place = f"{kind} = '{path}:1'"
        try:
            for cells in table:
                place = f"{kind} = '{path}:{table.line_num}'"
                for name in columns:
                    if not cells[name].strip():
                        problem = f"column {name!r} is missing: the line was cut, or has a hole"
                        raise WorkloadError(f"{place}: not a request: {problem}")
                yield place, cells
        except csv.Error as error:
            raise WorkloadError(f"{place}: not a request: {error}") from error


def _instant(place: str, cells: Mapping[str, str]) -> datetime:
    text = cells["TIMESTAMP"].strip()
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise _bad(place, "TIMESTAMP", text, "not a date and time") from None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _number(place: str, cells: Mapping[str, str], column: str) -> float:
    text = cells[column].strip()
    try:
        number = float(text)
    except ValueError:
        raise _bad(place, column, text, "not a number") from None
    if not 0 <= number < float("inf"):
        raise _bad(place, column, text, "not a number of seconds")
    return number


def _tokens(place: str, cells: Mapping[str, str], column: str) -> int:
    text = cells[column].strip()
    try:
        number = float(text)
    except ValueError:
        raise _bad(place, column, text, "not a number of tokens") from None
    if number < 0:
        raise _bad(place, column, text, "a length is below 0")
    if number != int(number):
        raise _bad(place, column, text, "not a whole number of tokens")
    return int(number)


def _bad(place: str, column: str, text: str, problem: str) -> WorkloadError:
    return WorkloadError(f"{place}: not a request: column {column!r} is {text!r}: {problem}")


# --- lines of JSON --------------------------------------------------------------------------


def _jsonl(kind: str, path: Path, tick_s: float) -> Iterator[Row]:
    decoder = msgspec.json.Decoder(_Line)

    def parse(raw: bytes) -> Row:
        line = decoder.decode(raw)
        if line.input_length < 0 or line.output_length < 0:
            raise ValueError("a length is below 0")
        return Row(
            line.timestamp * tick_s,
            line.input_length,
            line.output_length,
            line.hash_ids,
            name="" if line.chat_id is None else str(line.chat_id),
            parent="" if line.parent_chat_id == _NO_PARENT else str(line.parent_chat_id),
            kind=line.type,
        )

    return textfile.parsed(kind, path, parse, "not a request: ")


# --- blocks ---------------------------------------------------------------------------------


def block_tokens(kind: str, path: Path, rows: Sequence[Row], requested: int | None) -> int:
    """How many tokens each hash of a trace stands for: `requested`, the format's own size, or what
    the lengths say.

    With a wrong size prompts that differ would become equal, or those that share would not. So a
    size must fit: a prompt of n tokens has n / size hashes, rounded up or down. Where the format's
    own does not fit, the largest power of two that does is taken.

    Raises WorkloadError where no size fits, or `requested` leaves hashes without tokens.
    """
    hashed = [row for row in rows if row.hashes]
    own = requested or BLOCK_TOKENS.get(kind, 1)
    if not hashed or (requested is None and _fits(own, hashed)):
        return own
    if requested is None:
        for size in _SIZES:
            if _fits(size, hashed):
                return size
    for row in hashed:
        if len(row.hashes) > -(-row.input_tokens // own):
            problem = (
                f"the request at {row.at_s:g} s has {len(row.hashes)} hashes for "
                f"{row.input_tokens} tokens, which are no blocks of {own}: say with block= how "
                "many tokens a hash stands for"
            )
            raise WorkloadError.of(kind, path, problem)
    return own


def _fits(size: int, rows: Sequence[Row]) -> bool:
    return all(
        row.input_tokens // size <= len(row.hashes) <= -(-row.input_tokens // size) for row in rows
    )


def shared_blocks(rows: Sequence[Row]) -> list[int]:
    """For each row, how many of its first blocks another row begins with as well."""
    seen: dict[int, int] = {}
    for row in rows:
        for key in _prefixes(row):
            seen[key] = seen.get(key, 0) + 1
    return [sum(seen[key] > 1 for key in _prefixes(row)) for row in rows]


def _prefixes(row: Row) -> Iterator[int]:
    key = 0
    for block in row.hashes:
        key = hash((key, block))
        yield key


# --- which part of a trace ------------------------------------------------------------------


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
            msgspec.structs.replace(
                row,
                at_s=(row.at_s - self.start_s) / self.speed,
                input_tokens=clipped(row.input_tokens * self.scale, self.max_input),
                output_tokens=clipped(row.output_tokens * self.scale, self.max_output),
                busy_s=row.busy_s / self.speed,
            )
            for row in part[: self.limit]
        ]


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


def families(rows: Sequence[Row]) -> list[list[int]]:
    """The rows of each session, by their place: a row and all that wait for it, in order.

    A row whose parent is not among those before it begins a session of its own.
    """
    place = {row.name: index for index, row in enumerate(rows) if row.name}
    session: list[int] = []
    families_of: list[list[int]] = []
    for index, row in enumerate(rows):
        parent = place.get(row.parent, index) if row.parent else index
        if parent < index:
            session.append(session[parent])
            families_of[session[index]].append(index)
        else:
            session.append(len(families_of))
            families_of.append([index])
    return families_of
