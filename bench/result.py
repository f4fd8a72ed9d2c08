"""Results: what every command writes to DIR/result.json, and what reports and comparisons read.

Each kind of result is a subclass of `Result`, beside the command that measures it. The fields have
the names that the file has. `write` and `read` are the only way into a file and out of it:

    result.write(folder, Run(**result.header("name"), ...))
    result.read(folder, run=Run)

Fields may be added to a kind if they have a default; `SCHEMA` goes up when one changes its meaning
or its type. The result of a run also has what `vllm bench serve --save-result` writes, so tools
that read that read this. DIR/records.csv is records.jsonl for spreadsheets, without the time of
each chunk.
"""

import csv
import datetime
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import msgspec

from bench import machine, measure
from bench.errors import ResultError
from bench.machine import Machine
from bench.measure import Slo
from bench.records import Record

SCHEMA = 1
RESULT, RECORDS, CSV, REPORT = "result.json", "records.jsonl", "records.csv", "report.html"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What the results of all commands have.

    Attributes:
        benchmark: the kind of result, which is the name of the command.
        schema: version of the fields; the first results did not state it.
        name: of the result, in reports.
        command: the command line, without keys.
        started: in UTC, as ISO 8601.
        commit: of bench; "+" after it where the tree differed.
        machine: that bench ran on; None where the result does not say.
        valid: whether the figures can be trusted.
        doubts: why they cannot be, or what limits them, each a sentence.
    """

    benchmark: str = ""
    schema: int = SCHEMA
    name: str = ""
    command: str = ""
    started: str = ""
    commit: str = ""
    machine: Machine | None = None
    valid: bool = True
    doubts: list[str] = []


class TargetName(msgspec.Struct, frozen=True, kw_only=True):
    """The server that was measured: no key and no header of it."""

    url: str = ""
    model: str = ""
    endpoint: str = ""


class Asked(Result, frozen=True, kw_only=True):
    """The result of a load, with the description of the load.

    Attributes:
        workload, load: what was sent and when, as specs.
        count, duration_s: what ended a repeat; None for the workload's or the load's own end.
        seed: of the first repeat.
        salt: of all texts.
        slo: what counted as good; None where nothing was said.
    """

    target: TargetName = TargetName()
    workload: str = ""
    load: str = ""
    count: int | None = None
    duration_s: float | None = None
    seed: int | None = None
    salt: str = ""
    slo: Slo | None = None


class EngineResult(Asked, frozen=True, kw_only=True):
    """The result of engines that bench starts: the model, and vLLM's arguments."""

    model: str = ""
    engine: dict[str, Any] = {}


R = TypeVar("R", bound=Result)
Line = dict[str, Any]  # The last line of a command: its result in short, as JSON.


class Header(TypedDict):
    """The fields of a `Result` that say what was measured, where, when and by which command."""

    name: str
    command: str
    started: str
    commit: str
    machine: Machine


def header(name: str) -> Header:
    """The first fields of a result that begins now."""
    return {
        "name": name,
        "command": machine.command(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.machine(),
    }


def prepare(folder: Path) -> Path:
    """Make the folder, with an empty DIR/records.jsonl, which is returned.

    What an earlier run left there is moved to DIR/earlier-N: a result is never written over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORDS
    _set_aside(folder, (RESULT, RECORDS, CSV, REPORT))
    path.write_bytes(b"")
    return path


def _set_aside(folder: Path, names: Sequence[str]) -> None:
    """Move those of the files that are there, and not all empty, to a folder of their own."""
    left = [folder / name for name in names if (folder / name).exists()]
    if not any(each.stat().st_size for each in left):
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for each in left:
        each.rename(aside / each.name)


def doubted(result: R, *doubts: str) -> R:
    """The result with more doubts, which make it invalid."""
    if not doubts:
        return result
    return msgspec.structs.replace(result, doubts=[*result.doubts, *doubts], valid=False)


def write(
    folder: Path,
    result: R,
    records: Sequence[Record] | None = None,
    more: Mapping[str, object] | None = None,
) -> R:
    """Write DIR/result.json and, from `records`, DIR/records.csv; returns the result.

    Where that is not possible, the disk being full, the figures are not lost: the result is
    returned with a doubt that says so, and goes to standard error.

    Args:
        more: fields for tools that know other names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _is_of_another_run(folder, result):  # One that had no records, such as a matrix.
            _set_aside(folder, (RESULT, CSV, REPORT))
        _replace(folder / RESULT, _text(result, more))
        if records is not None:
            _write_csv(folder / CSV, records)
    except OSError as error:
        problem = f"the result could not be written: {error.filename}: {error.strerror}"
        result = doubted(result, problem)
        sys.stderr.write(_text(result, more).decode())
    return result


def line(result: Result, out: Path, *names: str, **more: object) -> Line:
    """The last line of a command: these fields of its result; the whole is in the folder."""
    fields = {name: getattr(result, name) for name in ("benchmark", "name", "valid", "doubts")}
    fields |= {"out": str(out)} | {name: getattr(result, name) for name in names} | more
    shown: Line = msgspec.json.decode(msgspec.json.encode(fields))
    return shown


def _is_of_another_run(folder: Path, result: Result) -> bool:
    """Whether the folder has the result of a run that began at another time than this one."""
    try:
        return _stamp(folder / RESULT)[1].started != result.started
    except ResultError:
        return (folder / RESULT).is_file()  # Of another schema, or damaged: not ours to replace.


def _text(result: Result, more: Mapping[str, object] | None) -> bytes:
    fields = msgspec.to_builtins(result, str_keys=True) | (more or {})
    return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"


class _Stamp(msgspec.Struct):
    benchmark: str
    schema: object = SCHEMA
    started: str = ""


def read(path: Path, **kinds: type[R]) -> R:
    """The result in a folder or a file.

    Args:
        kinds: those that are wanted, by the name of their command.

    Raises:
        ResultError: there is none, it is of another kind or schema, or a field has another type.
    """
    path = path / RESULT if path.is_dir() else path
    data, stamp = _stamp(path)
    if stamp.benchmark not in kinds:
        raise ResultError(
            f"{path}: a result of `bench {stamp.benchmark}` (schema {stamp.schema}); wanted is "
            f"one of {', '.join(f'`bench {kind}`' for kind in kinds)} (schema {SCHEMA})"
        )
    try:
        return msgspec.json.decode(data, type=kinds[stamp.benchmark])
    except msgspec.ValidationError as error:
        raise ResultError(
            f"{path}: not as this version of bench writes schema {SCHEMA}: {error}"
        ) from None


def _stamp(path: Path) -> tuple[bytes, _Stamp]:
    """The text of a result, and the fields that decide whether it can be read."""
    try:
        data = path.read_bytes()
        stamp = msgspec.json.decode(data, type=_Stamp)
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None
    except msgspec.ValidationError:
        raise ResultError(f"{path}: not a result of bench") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: not JSON: {error}") from None
    if stamp.schema != SCHEMA:
        age = "a newer" if isinstance(stamp.schema, int) and stamp.schema > SCHEMA else "an older"
        raise ResultError(
            f"{path}: schema {stamp.schema!r}, written by {age} version of bench; this one reads "
            f"schema {SCHEMA}. Read it with the bench that wrote it, or measure again"
        )
    return data, stamp


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: on a full disk the old content stays."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _write_csv(path: Path, records: Sequence[Record]) -> None:
    names = [name for name in Record.__struct_fields__ if name not in ("chunk_s", "text")]
    latencies = {
        "ttft_s": measure.ttft_s,
        "tpot_s": measure.tpot_s,
        "e2e_s": measure.e2e_s,
        "lag_s": measure.lag_s,
    }
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "chunks", *latencies])
        for record in records:
            row = [getattr(record, name) for name in names]
            writer.writerow([*row, len(record.chunk_s), *(of(record) for of in latencies.values())])


def __getattr__(name: str) -> Any:
    """What `bench.figures` has now: programs outside of the project ask for it here."""
    if name not in ("Repeat", "figures"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # No import of this module's own: `bench.figures` rests on it.
    return getattr(importlib.import_module("bench.figures"), name)
