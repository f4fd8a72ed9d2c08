"""A result: what a run writes beside its records, and what reports and comparisons read.

DIR/result.json is a superset of what `vllm bench serve --save-result` writes, so tools that read
that read this. DIR/records.csv is records.jsonl for spreadsheets, without the time of each chunk.
"""

import csv
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import machine, measure
from bench.errors import ResultError
from bench.figures import Figures
from bench.records import Record

# Goes up when a field of a result changes its meaning or its type, not when there are more of them.
SCHEMA = 1
RESULT, RECORDS, CSV, REPORT = "result.json", "records.jsonl", "records.csv", "report.html"


def header(benchmark: str, name: str) -> dict[str, Any]:
    """What every result begins with: what was measured, where, when and by which command."""
    return {
        "benchmark": benchmark,
        "schema": SCHEMA,
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


def _is_of_another_run(folder: Path, result: dict[str, Any]) -> bool:
    """Whether the folder has the result of a run that began at another time than this one."""
    try:
        return read(folder).get("started") != result.get("started")
    except ResultError:
        return (folder / RESULT).is_file()  # Of another schema, or damaged: not ours to replace.


def write(folder: Path, result: dict[str, Any], records: Sequence[Record] | None = None) -> None:
    """Write DIR/result.json and, from `records`, DIR/records.csv.

    Where that is not possible, the disk being full, the figures are not lost: the result says so
    in a doubt, and goes to standard error.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _is_of_another_run(folder, result):  # One that had no records, such as a matrix.
            _set_aside(folder, (RESULT, CSV, REPORT))
        _replace(folder / RESULT, _text(result))
        if records is not None:
            _write_csv(folder / CSV, records)
    except OSError as error:
        result["doubts"] = [
            *result.get("doubts", []),
            f"the result could not be written: {error.filename}: {error.strerror}",
        ]
        result["valid"] = False
        sys.stderr.write(_text(result).decode())


def _text(result: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"


def read(folder: Path) -> dict[str, Any]:
    """The result of a folder.

    Raises:
        ResultError: there is none, or it is not one.
    """
    path = folder / RESULT if folder.is_dir() else folder
    try:
        result = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ResultError(f"{path}: not JSON: {error}") from None
    if not isinstance(result, dict) or "benchmark" not in result:
        raise ResultError(f"{path}: not a result of bench")
    # The first results did not state their schema, which was this one.
    schema = result.get("schema", SCHEMA)
    if schema != SCHEMA:
        age = "a newer" if isinstance(schema, int) and schema > SCHEMA else "an older"
        raise ResultError(
            f"{path}: schema {schema!r}, written by {age} version of bench; this one reads "
            f"schema {SCHEMA}. Read it with the bench that wrote it, or measure again"
        )
    return result


def read_figures(folder: Path) -> Figures:
    """The figures of a run's result.

    Raises:
        ResultError: there is none, it is not one, or it lacks figures that a run has.
    """
    try:
        return msgspec.convert(read(folder), Figures, str_keys=True)
    except msgspec.ValidationError as error:
        raise ResultError(
            f"{folder}: the figures of a run cannot be read from it, as an older version of "
            f"bench wrote it, or it is another kind of result: {error}"
        ) from None


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: on a full disk what was there stays."""
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
