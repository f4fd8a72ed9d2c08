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
from bench.hardware import gpu
from bench.hardware.gpu import GpuSample
from bench.measure import Measures, Slo
from bench.records import Record
from bench.scrape import Sample
from bench.traffic.load import Outcome

SCHEMA = 1
# What blocks, and requests that others send meanwhile, explain of a hit rate.
_CACHE_SLACK = 0.05
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
        return False


class Repeat(msgspec.Struct, kw_only=True):
    """One repetition: its outcome, and what the server said meanwhile.

    Attributes:
        session_sizes: of a workload of sessions, how many requests each has.
        gpu: what the GPUs of this machine did, on the clock of the records.
    """

    outcome: Outcome
    server: list[Sample] = []
    session_sizes: dict[int, int] = {}
    gpu: list[GpuSample] = []


def figures(
    repeats: Sequence[Repeat],
    slo: Slo | None,
    users: int | None,
    ramp_s: float = 0.0,
    batch: bool = False,
) -> dict[str, Any]:
    """What is said of a run that was repeated: its figures, its doubts and whether it is valid.

    A run is valid if it was not interrupted, lost no actor and no repeat gives cause for doubt. A
    batch, which is all sent at once, is measured whole: it has no steady state to be away from.
    """
    steady: list[Measures] = []
    whole: list[Measures] = []
    doubts: list[str] = []
    events: list[dict[str, Any]] = []
    for number, repeat in enumerate(repeats):
        outcome = repeat.outcome
        everything = measure.measure(outcome.records, slo)
        window = None if batch else measure.window(outcome.records, users, ramp_s)
        inside = measure.measure(outcome.records, slo, window) if window else everything
        whole.append(everything)
        steady.append(inside)
        reasons = measure.doubts(inside, outcome.cpu, everything, batch)
        reasons += _cache_doubts(inside, repeat)
        reasons += outcome.lost_actors
        if outcome.interrupted:
            reasons.append("interrupted: the rest of the load was not sent")
        doubts += [f"repeat {number + 1}: {doubt}" for doubt in reasons]
        events += [{"repeat": number, "at_s": e.at_s, "what": e.what} for e in outcome.events]
    return {
        "batch": batch,
        "valid": bool(repeats) and not doubts,
        "doubts": doubts,
        "events": events,
        "repeats": msgspec.to_builtins(steady),
        "whole": msgspec.to_builtins(whole),
        "summary": measure.summary(steady),
        "actors": [
            {
                "where": repeat.outcome.actors,
                "cpu": repeat.outcome.cpu,
                "cpu_peak": repeat.outcome.cpu_peak,
                "clock_offset_s": repeat.outcome.clock_offset_s,
                "clock_error_s": repeat.outcome.clock_error_s,
            }
            for repeat in repeats
        ],
        "sessions": [
            msgspec.to_builtins(measure.sessions(repeat.outcome.records, repeat.session_sizes))
            for repeat in repeats
            if repeat.session_sizes
        ],
        "server": [msgspec.to_builtins(repeat.server) for repeat in repeats],
    }


def _cache_doubts(measures: Measures, repeat: Repeat) -> list[str]:
    """What the server's metrics say of its prefix cache, where its answers say nothing of it."""
    rates = [sample.prefix_hit_rate for sample in repeat.server]
    present = [rate for rate in rates if rate is not None]
    ok = [record for record in repeat.outcome.records if record.ok]
    may_be = measure.may_be_cached_share(ok)
    if measures.answers.cached_share is not None or not present or may_be is None:
        return []
    last = present[-1]
    if last <= may_be + _CACHE_SLACK:
        return []
    return [
        f"by the server's metrics {last:.0%} of the prompt tokens came from its prefix "
        f"cache, and the workload shares only {may_be:.0%}: these prompts were sent before, or "
        "other clients use the server"
    ]


def with_efficiency(
    output: dict[str, Any],
    repeats: Sequence[Repeat],
    gpus: int | None,
    usd_per_gpu_hour: float | None,
) -> dict[str, Any]:
    """A result with what its tokens cost, as far as energy, GPUs and their price are known."""
    each = [
        measure.efficiency(
            msgspec.convert(measures, Measures), gpu.energy(repeat.gpu), gpus, usd_per_gpu_hour
        )
        for repeat, measures in zip(repeats, output["repeats"], strict=True)
    ]
    return output | {
        "gpu": [msgspec.to_builtins(repeat.gpu) for repeat in repeats],
        "gpus": gpus,
        "usd_per_gpu_hour": usd_per_gpu_hour,
        "efficiency": measure.efficiency_summary(each),
    }


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
    return result


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
