"""`bench scale`: the GPUs of a host as one engine over all of them, or as a replica on each.

    python -m bench scale --model FOLDER --out DIR [--gpus 4] [--together] [--workload W ...]
    python -m bench scale ... --systems ours,rust,apis4 --saturation 256,512
    python -m bench scale ... --only TP=1,TP=4 --variant 'one_split={"attention_config": {...}}'

For 1, 2, 4, ... GPUs, tensor parallelism (TP) against replicas behind this application: one request
alone, 100 requests at once, and saturation. TP makes each step shorter, at the price of GPUs that
wait for each other twice a layer; replicas share nothing, so they add up, and shorten no step. The
result says which layout suits which goal, for each workload. A layout that does not start is a row
with its reason.

Each layout stands once for each system of `--systems` (names of `bench/engine/systems.py`), with
replicas for this application alone. Its figures have ratios, with intervals, to the strongest other
system in the same layout.

By default one layout is started, measured and ended after the other. With `--together` all stand
at once, spread over the GPUs, and are measured in turn, round after round, so that a host that
drifts drifts under all of them, and their starts take the time of one. Their engine arguments must
then fix the size of the KV cache (`kv_cache_memory_bytes`), since they share the memory.

With `--variant NAME=JSON` each engine (not the replicas) stands once more with these arguments
besides, as "TP=4 NAME". `--only` names the layouts.

At saturation a GPU has `--saturation` requests at once, or fewer where prompts are long: so many
that they hold as many tokens. Where that is fewer than 100 prompts, 100 at once is saturation. With
0 only one request alone is measured.

Without a GPU the engines are CPU engines, which shows that the command works and no more.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import pynvml

from bench import measure, result, run
from bench.engine import systems
from bench.engine.floor import Floor, Lengths
from bench.engine.knobs import Settings
from bench.engine.layouts import Layout, layouts, placed
from bench.engine.meters import Used, metered
from bench.engine.orders import LoadOutcome
from bench.engine.scaled import (
    ALONE,
    AT_ONCE,
    Load,
    OfWorkload,
    Row,
    Scaled,
    advice,
    in_short,
    table,
)
from bench.engine.served import Served, crowded
from bench.engine.trial import output_tokens_per_s
from bench.errors import BenchError
from bench.hardware import ceilings, gpu
from bench.records import Record
from bench.result import Header, Line
from bench.traffic import workload
from bench.traffic.crowd import Crowd

_ALONE, _AT_ONCE = 4, 100  # Requests of the first load, users of the second.
_FULL_TOKENS = 256  # Prompt tokens of a request up to which --saturation is meant as it is.
# Between the seeds of the loads of one repeat.
_SEEDS = 1000
_FORMATS = ("quantization", "kv_cache_dtype")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench scale`."""
    add = parser.add_argument
    add("--model", required=True, help="a local folder or a hub id")
    add("--engine", type=json.loads, default={}, help="vLLM arguments, as JSON")
    add("--systems", type=_words, default=["ours"], help="separated by commas; ours by default")
    add("--gpus", type=int, help="number to use; all by default")
    add("--workload", action="append", help="may be repeated; input=200,output=128 by default")
    add("--variant", action="append", type=_variant, default=[], help="NAME=JSON, may be repeated")
    add("--only", type=_words, default=[], help="names of the layouts to measure")
    add(
        "--saturation",
        type=_numbers,
        default=[256],
        help="concurrent requests per GPU, separated by commas; 0: none",
    )
    add("--roofline", type=Path, help="a result of `bench roofline`, to compare with")
    add("--repeats", type=int, default=3)
    add("--together", action="store_true", help="start all layouts, measure them in turn")
    add("--clients", type=int, help="client processes; one per 4 cores by default")
    add("--budget-s", type=float, default=3600.0, help="time limit in seconds")
    add("--port", type=int, default=8895)
    add("--out", type=Path, required=True, help="folder of the result")


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [number for word in text.split(",") if (number := int(word))]


def _variant(text: str) -> tuple[str, dict[str, Any]]:
    name, _, arguments = text.partition("=")
    return name, msgspec.json.decode(arguments, type=dict[str, Any])


def command(options: argparse.Namespace) -> Line:
    """What `python -m bench scale` does with its options; returns its last line."""
    if options.together and "kv_cache_memory_bytes" not in options.engine:
        raise BenchError.of(
            "engine", options.engine, "--together needs kv_cache_memory_bytes in it"
        )
    options.workload = options.workload or ["synthetic:input=200,output=128"]
    options.end_s = time.monotonic() + options.budget_s
    options.devices = _devices(options.gpus)
    wanted = layouts(len(options.devices), options.systems, dict(options.variant), options.only)
    rows = [Row(layout=layout, workload=what) for layout in wanted for what in options.workload]
    where = "GPUs" if gpu.present() else "engines on a CPU"
    head = result.header(f"{options.model} on {len(options.devices)} {where}")
    with Crowd(options.clients or max(1, min(16, (os.cpu_count() or 1) // 4))) as crowd:
        for measured in _rounds(rows, crowd, options):
            run.say(json.dumps(msgspec.to_builtins(measured)))
            # A run that is ended early keeps what was measured.
            output = result.write(options.out, _summary(head, rows, options))
    return result.line(output, options.out, "advice", **in_short(output.workloads))


def _devices(count: int | None) -> list[int]:
    """The GPUs to use, as NVML numbers them; without a GPU, one for each CPU engine.

    Raises:
        BenchError: there are not as many.
    """
    if not gpu.present():
        return list(range(count or 2))
    pynvml.nvmlInit()
    devices = gpu.visible()
    pynvml.nvmlShutdown()
    if count and count > len(devices):
        raise BenchError.of("gpus", count, f"this process may use {len(devices)}")
    return devices[:count]


def _summary(head: Header, rows: Sequence[Row], options: argparse.Namespace) -> Scaled:
    doubts = [f"{row.layout.title}, {row.workload}: {row.failure}" for row in rows if row.failure]
    workloads = []
    for what in options.workload:
        shown = table([row for row in rows if row.workload == what], options.together)
        workloads.append(OfWorkload(workload=what, table=shown, advice=advice(shown)))
    return Scaled(
        **head,
        model=options.model,
        engine=options.engine,
        together=options.together,
        valid=not doubts,
        doubts=doubts,
        rows=list(rows),
        workloads=workloads,
        table=workloads[0].table,
        advice=workloads[0].advice,
    )


# --- rounds ---------------------------------------------------------------------------------


@dataclass
class Group:
    """The rows of one layout, one for each workload, and the server that they are measured on.

    Attributes:
        devices: the GPUs of the layout.
        floor: what the hardware allows the engine, with `formats` of its weights and cache.
    """

    rows: list[Row]
    devices: list[int]
    server: Served
    floor: Floor
    formats: Settings

    @property
    def layout(self) -> Layout:
        return self.rows[0].layout


def _rounds(rows: list[Row], crowd: Crowd, options: argparse.Namespace) -> Iterator[Row]:
    """Measure; yields each row whenever it has grown."""
    rows_of = {row.layout.title: [r for r in rows if r.layout == row.layout] for row in rows}
    if options.together:
        with _started(list(rows_of.values()), options) as groups:
            yield from (row for row in rows if row.failure)
            for seed in range(-1, options.repeats):
                yield from _round(groups, seed, crowd, options)
        return
    took_s = 0.0
    for mine in rows_of.values():
        began_s = time.monotonic()
        if options.end_s - began_s < took_s:
            _failed(mine, "not run: the time was over")
            yield from mine
            continue
        with _started([mine], options) as groups:
            for seed in range(-1, options.repeats):
                yield from _round(groups, seed, crowd, options)
        yield from (row for row in mine if row.failure)
        took_s = max(took_s, time.monotonic() - began_s)


def _round(
    groups: Sequence[Group], seed: int, crowd: Crowd, options: argparse.Namespace
) -> Iterator[Row]:
    """Every layout under every workload, once. Seed -1: every path runs once before it counts."""
    for place in range(len(options.workload)):
        for group in groups:
            row = group.rows[place]
            if row.failure or (row.loads and time.monotonic() > options.end_s):
                continue
            try:
                if seed < 0:
                    _warm_up(group, row.workload, crowd, options)
                else:
                    _measure(group, row, seed, crowd, options)
            except BenchError as error:
                _failed([row], str(error))
            yield row


@contextlib.contextmanager
def _started(rows_of: Sequence[list[Row]], options: argparse.Namespace) -> Iterator[list[Group]]:
    """A server for each layout, started at once; one that does not start is noted in its rows."""
    places = placed([rows[0].layout for rows in rows_of], len(options.devices))
    left_s = max(30.0, options.end_s - time.monotonic())
    with contextlib.ExitStack() as stack:

        def start(index: int) -> Group | None:
            rows, layout = rows_of[index], rows_of[index][0].layout
            devices = [options.devices[place] for place in places[index]]
            # Said for one GPU too: the application would choose by what the model needs.
            arguments = {**options.engine, **layout.engine}
            arguments["tensor_parallel_size"] = layout.tensor_parallel
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}
            server = Served(
                layout.system,
                options.model,
                arguments,
                options.out / layout.title.replace(" ", "-"),
                options.port + 100 * index,  # Each has ranges of ports of its own.
                left_s,
                layout.replicas,
                visible if gpu.present() else {},
            )
            try:
                stack.push(server.__enter__())
            except BenchError as error:
                _failed(rows, str(error))
                return None
            for row in rows:
                row.load_s = server.load_s
            formats = {name: arguments[name] for name in _FORMATS if name in arguments}
            return Group(rows, devices, server, _floor(arguments, options), formats)

        with ThreadPoolExecutor(len(rows_of)) as pool:
            groups = list(pool.map(start, range(len(rows_of))))
        yield [group for group in groups if group is not None]


def _floor(arguments: dict[str, Any], options: argparse.Namespace) -> Floor:
    shape_and_limits = ceilings.shape_and_ceilings(options.roofline, options.model, arguments)
    shape, limits = shape_and_limits or (None, None)
    # The number of tokens in a step is the engine's choice, not a limit of the hardware.
    return Floor(shape=shape, ceilings=limits, tokens=10**9)


def _failed(rows: Sequence[Row], why: str) -> None:
    for row in rows:
        row.failure = why[:300]


# --- loads ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crowding:
    """A closed load: its name in the result, requests at once, and requests."""

    name: str
    users: int
    count: int


def loads(what: str, saturation: Sequence[int], gpus: int) -> list[Crowding]:
    """The loads of one repeat of a workload."""
    alone = Crowding(ALONE, 1, _ALONE)
    if not saturation:
        return [alone]
    at_once = Crowding(AT_ONCE, _AT_ONCE, _AT_ONCE)
    full = [
        Crowding(f"{each} a GPU", users, 2 * users)
        if (users := at_saturation(what, each, gpus))
        else replace(at_once, name=f"{each} a GPU")
        for each in saturation
    ]
    return [alone, at_once, *full]


def at_saturation(what: str, each: int, gpus: int) -> int | None:
    """How many requests at once; None where `_AT_ONCE` of such prompts are as many already."""
    if not _long(what):
        return each * gpus
    users = int(each * gpus / _long(what))
    return users if users > _AT_ONCE else None


def _long(what: str) -> float:
    """How many times longer than a short one a prompt of this workload is; 0 for a short one."""
    times = (workload.parse(what, 0).request(0).input_tokens or 0) / _FULL_TOKENS
    return times if times > 1 else 0.0


def _warm_up(group: Group, what: str, crowd: Crowd, options: argparse.Namespace) -> None:
    _load(crowd, group.server, what, 1, 1, -1)
    if options.saturation:
        count = _AT_ONCE // 4 if _long(what) else _AT_ONCE
        _load(crowd, group.server, what, _AT_ONCE, count, -1)


def _measure(group: Group, row: Row, seed: int, crowd: Crowd, options: argparse.Namespace) -> None:
    """All loads of one repeat. Loads that differ in their name only are measured once."""
    measured: dict[tuple[int, int], Load] = {}
    for place, each in enumerate(loads(row.workload, options.saturation, row.layout.gpus)):
        size = each.users, each.count
        if size not in measured:
            with metered(group.server.processes, group.devices) as used:
                outcome = _load(crowd, group.server, row.workload, *size, seed + _SEEDS * place)
            measured[size] = _loaded(outcome, each.users, used, group)
        row.loads.setdefault(each.name, []).append(measured[size])


def _loaded(outcome: LoadOutcome, users: int, used: Used, group: Group) -> Load:
    records = outcome.records
    tokens_per_s = output_tokens_per_s(outcome)
    tokens = sum(record.output_tokens or 0 for record in records)
    # Processor time is counted in steps of 10 ms, and of one request it is mostly idle work.
    in_front = systems.is_ours(group.layout.system) and users > 1
    return Load(
        users=users,
        tokens_per_s=tokens_per_s,
        ttft_s=_mean(records, measure.ttft_s),
        tpot_s=_mean(records, measure.tpot_s),
        joules_per_token=_each(used.joules, tokens),
        roofline=_share(records, users, tokens_per_s, group),
        haproxy_s=_each(used.haproxy_s, len(records)) if in_front else None,
        door_s=_each(used.door_s, len(records)) if in_front else None,
    )


def _share(
    records: Sequence[Record], users: int, tokens_per_s: float, group: Group
) -> float | None:
    """Tokens/s as a share of what the hardware allows for this number of requests at once."""
    if group.floor.shape is None:
        return None
    count, replicas = len(records), min(users, group.layout.replicas)
    lengths = Lengths(
        read=sum((each.input_tokens or 0) - (each.cached_tokens or 0) for each in records) / count,
        written=sum(each.output_tokens or 0 for each in records) / count,
    )
    floor = msgspec.structs.replace(group.floor, seqs=users // replicas)
    most = replicas * lengths.written * floor.requests_per_s(lengths, group.formats)
    return tokens_per_s / most


def _each(total: float | None, count: int) -> float | None:
    return None if total is None else total / count


def _load(
    crowd: Crowd, server: Served, what: str, users: int, count: int, seed: int
) -> LoadOutcome:
    answer = crowded(crowd, server, what, users, count, seed)
    failed = [record.error for record in answer.records if record.error]
    if failed:
        raise BenchError(f"{len(failed)} of {count} requests failed: {failed[0]}")
    return answer


def _mean(records: Sequence[Record], latency: Any) -> float:
    return fmean(value for record in records if (value := latency(record)) is not None)
