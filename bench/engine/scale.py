"""`bench scale`: the GPUs of a host as one engine over all of them, or as a replica on each.

    python -m bench scale --model FOLDER --out DIR [--gpus 4] [--together] [--workload W ...]
    python -m bench scale ... --only TP=1,TP=4 --variant 'one_split={"attention_config": {...}}'

For 1, 2, 4, ... GPUs, tensor parallelism (TP) against replicas behind this application: the latency
of one request alone, tokens/s with 100 prompts at once, and at saturation. Efficiency is against
so many times the single GPU. TP makes each step shorter, at the price of GPUs that wait for each
other twice a layer; replicas share nothing, so they add up, and shorten no step. What to take for
which goal follows (`advice`), for each workload. A layout that does not start is a row with its
reason.

By default one layout is started, measured and ended after the other. With `--together` all stand
at once, spread over the GPUs, and are measured in turn, round after round, so that a host that
drifts drifts under all of them, and their starts take the time of one. Their engine arguments must
then fix the size of the KV cache (`kv_cache_memory_bytes`), since they share the memory.

With `--variant NAME=JSON` each engine (not the replicas) stands once more with these arguments
besides, as TP=4 NAME: what they are worth beside the same single GPU. `--only` names the layouts.

At saturation a GPU has `--saturation` requests at once, or fewer where prompts are long: so many
that they hold as many tokens. Where that is fewer than 100 prompts, 100 at once is saturation. With
0 only the latency of one request is measured.

Without a GPU the engines are CPU engines, which shows that the command works and no more.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from bench import interval, machine, measure, result, run
from bench.engine.served import Served, crowded
from bench.engine.trial import LoadOutcome
from bench.errors import BenchError
from bench.hardware import gpu
from bench.result import EngineResult, Line
from bench.traffic import workload
from bench.traffic.crowd import Crowd

_ALONE, _AT_ONCE = 4, 100
_FULL_TOKENS = 256  # Prompt tokens of a request up to which --saturation is meant as it is.


class Row(msgspec.Struct, kw_only=True):
    """A layout under a workload, and its figures, each a list over repeats.

    Attributes:
        variant, engine: a name, and the engine arguments that make it another one.
        ttft_s, tpot_s: of one request alone.
        tokens_per_s: output tokens with 100 prompts at once; `saturated` with as many as it takes.
        failure: why there are none, or no more.
    """

    tensor_parallel: int
    replicas: int
    workload: str = ""
    variant: str = ""
    engine: dict[str, Any] = {}
    ttft_s: list[float] = []
    tpot_s: list[float] = []
    tokens_per_s: list[float] = []
    saturated: list[float] = []
    load_s: float = 0.0
    failure: str = ""

    @property
    def gpus(self) -> int:
        return self.tensor_parallel * self.replicas

    @property
    def name(self) -> str:
        if self.replicas > 1:
            return f"{self.replicas} replicas"
        return f"TP={self.tensor_parallel} {self.variant}".rstrip()


# --- what follows from the figures ----------------------------------------------------------


def layouts(gpus: int) -> list[tuple[int, int]]:
    """(TP, replicas): one GPU, then each power of two as TP and as replicas, and all of them."""
    sizes = [2**power for power in range(1, gpus.bit_length()) if 2**power <= gpus]
    if gpus > 1 and gpus not in sizes:
        sizes.append(gpus)
    return [(1, 1), *(layout for size in sizes for layout in ((size, 1), (1, size)))]


def rows_of(
    gpus: int, workloads: Sequence[str], variants: dict[str, dict[str, Any]], only: Sequence[str]
) -> list[Row]:
    """What is to be measured: every layout, those of one engine in each variant too.

    Raises BenchError for a name in `only` that no layout has.
    """
    each: list[tuple[str, dict[str, Any]]] = [("", {}), *variants.items()]
    rows = [
        Row(tensor_parallel=parallel, replicas=replicas, workload=what, variant=name, engine=more)
        for parallel, replicas in layouts(gpus)
        for name, more in (each if replicas == 1 else each[:1])
        for what in workloads
    ]
    names = list(dict.fromkeys(row.name for row in rows))
    for name in only:
        if name not in names:
            raise BenchError.of("only", name, "no such layout", names)
    return [row for row in rows if not only or row.name in only]


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """A layout beside one GPU: means over repeats; None where there are none.

    Attributes:
        load_s: of the start.
        ttft_s, tpot_s: of one request alone.
        tokens_per_s: output tokens with 100 prompts at once; `saturated`: at saturation.
        *_times: the same over that of one GPU, with `*_bounds`, its 95 % interval.
        *_efficiency: of the linear gain, so many times one GPU.
        failure: why there are no figures, or no more.
    """

    name: str
    gpus: int
    tensor_parallel: int
    replicas: int
    load_s: float = 0.0
    failure: str = ""
    ttft_s: float | None = None
    ttft_s_times: float | None = None
    ttft_s_bounds: interval.Bounds | None = None
    tpot_s: float | None = None
    tpot_s_times: float | None = None
    tpot_s_bounds: interval.Bounds | None = None
    tokens_per_s: float | None = None
    tokens_per_s_times: float | None = None
    tokens_per_s_bounds: interval.Bounds | None = None
    tokens_per_s_efficiency: float | None = None
    saturated: float | None = None
    saturated_times: float | None = None
    saturated_bounds: interval.Bounds | None = None
    saturated_efficiency: float | None = None


class OfWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """The layouts under one workload, and which of them to take."""

    workload: str = ""
    table: list[Layout]
    advice: list[str]


class Scaled(EngineResult, frozen=True, kw_only=True):
    """The result of `bench scale`.

    Attributes:
        together: whether all layouts stood at once and were measured in turn.
        rows: every repeat; `table` and `advice` are those of the first workload.
    """

    benchmark: str = "scale"
    together: bool = False
    rows: list[Row] = []
    workloads: list[OfWorkload] = []
    table: list[Layout] = []
    advice: list[str] = []


def table(rows: Sequence[Row]) -> list[Layout]:
    """Each layout beside one GPU: shares and efficiency, with intervals over repeats."""
    plain = (row for row in rows if row.gpus == 1 and not row.variant and not row.failure)
    single = next(plain, None)
    return [_beside(row, single) for row in rows]


def _beside(row: Row, single: Row | None) -> Layout:
    ratios: dict[str, Any] = {}
    for metric in ("ttft_s", "tpot_s", "tokens_per_s", "saturated"):
        values = getattr(row, metric)
        ratios[metric] = fmean(values) if values else None
        base = getattr(single, metric) if single else []
        ratios[f"{metric}_times"] = fmean(values) / fmean(base) if values and base else None
        ratios[f"{metric}_bounds"] = interval.of_ratio(values, base) if row is not single else None
    for metric in ("tokens_per_s", "saturated"):
        times = ratios[f"{metric}_times"]
        ratios[f"{metric}_efficiency"] = times / row.gpus if times is not None else None
    return Layout(
        name=row.name,
        gpus=row.gpus,
        tensor_parallel=row.tensor_parallel,
        replicas=row.replicas,
        load_s=row.load_s,
        failure=row.failure,
        **ratios,
    )


def advice(rows: Sequence[Layout]) -> list[str]:
    """Which layout to take for which goal."""
    sentences = []
    for gpus in sorted({row.gpus for row in rows if row.gpus > 1}):
        same = [row for row in rows if row.gpus == gpus and not row.failure]
        fast = min((r for r in same if r.tpot_s), key=lambda r: r.tpot_s or 0.0, default=None)
        wide = max((r for r in same if r.saturated), key=lambda r: r.saturated or 0.0, default=None)
        if fast is None:
            sentences.append(f"{gpus} GPUs: not measured")
            continue
        single = _of(fast.tpot_s_times)
        goals = f"for the latency of one request {fast.name} ({single} of one GPU's time per token)"
        if wide is not None:
            many, linear = _of(wide.saturated_times), _of(wide.saturated_efficiency)
            goals += f"; for throughput {wide.name} ({many} times one GPU, {linear} of linear)"
        sentences.append(f"{gpus} GPUs: {goals}")
    return sentences


def _of(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


# --- measuring ------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench scale`."""
    add = parser.add_argument
    add("--model", required=True, help="a local folder or a hub id")
    add("--engine", type=json.loads, default={}, help="vLLM arguments, as JSON")
    add("--gpus", type=int, help="number to use; all by default")
    add("--workload", action="append", help="may be repeated; input=200,output=128 by default")
    add("--variant", action="append", type=_variant, default=[], help="NAME=JSON, may be repeated")
    add(
        "--only",
        type=lambda text: text.split(","),
        default=[],
        help="names of the layouts to measure",
    )
    add("--saturation", type=int, default=256, help="concurrent requests per GPU; 0: none")
    add("--repeats", type=int, default=3)
    add("--together", action="store_true", help="start all layouts, measure them in turn")
    add("--clients", type=int, help="client processes; one per 4 cores by default")
    add("--budget-s", type=float, default=3600.0, help="time limit in seconds")
    add("--port", type=int, default=8895)
    add("--out", type=Path, required=True, help="folder of the result")


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
    gpus = options.gpus or (len(machine.gpus()) if gpu.present() else 2)
    where = "GPUs" if gpu.present() else "engines on a CPU"
    head = result.header(f"{options.model} on {gpus} {where}")
    rows = rows_of(gpus, options.workload, dict(options.variant), options.only)
    with Crowd(options.clients or max(1, min(16, (os.cpu_count() or 1) // 4))) as crowd:
        for measured in _rounds(rows, gpus, crowd, options):
            run.say(json.dumps(msgspec.to_builtins(measured)))
            # What there is so far, in case there is no more.
            output = result.write(options.out, _summary(head, rows, options))
    return result.line(output, options.out, "table", "advice", "workloads")


def _summary(head: Line, rows: Sequence[Row], options: argparse.Namespace) -> Scaled:
    doubts = [f"{row.name}, {row.workload}: {row.failure}" for row in rows if row.failure]
    workloads = []
    for what in options.workload:
        shown = table([row for row in rows if row.workload == what])
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


def _rounds(rows: list[Row], gpus: int, crowd: Crowd, options: argparse.Namespace) -> Iterator[Row]:
    """Measure; yields each row whenever it has grown."""
    layouts_of = {row.name: [other for other in rows if other.name == row.name] for row in rows}
    if not options.together:
        took_s = 0.0
        for mine in layouts_of.values():
            began_s = time.monotonic()
            if options.end_s - began_s < took_s:
                _failed(mine, "not run: the time was over")
                yield from mine
                continue
            with _started([mine], gpus, options) as servers:
                for seed in range(-1, options.repeats):
                    yield from _round(servers, seed, crowd, options)
            yield from (row for row in mine if row.failure)
            took_s = max(took_s, time.monotonic() - began_s)
        return
    with _started(list(layouts_of.values()), gpus, options) as servers:
        yield from (row for row in rows if row.failure)
        for seed in range(-1, options.repeats):
            yield from _round(servers, seed, crowd, options)


def _round(
    servers: Sequence[tuple[list[Row], Served]],
    seed: int,
    crowd: Crowd,
    options: argparse.Namespace,
) -> Iterator[Row]:
    """Every layout under every workload, once. Seed -1: every path runs once before it counts."""
    for place in range(len(options.workload)):
        for rows, server in servers:
            row = rows[place]
            if row.failure or (row.tpot_s and time.monotonic() > options.end_s):
                continue
            try:
                _measure(row, server, seed, crowd, options)
            except BenchError as error:
                row.failure = str(error)[:300]
            yield row


def _measure(
    row: Row, server: Served, seed: int, crowd: Crowd, options: argparse.Namespace
) -> None:
    what = row.workload
    if seed < 0:
        _load(crowd, server, what, 1, 1, seed)
        if options.saturation:
            _load(crowd, server, what, _AT_ONCE, _AT_ONCE // 4 if _long(what) else _AT_ONCE, seed)
        return
    alone = _load(crowd, server, what, 1, _ALONE, seed)
    row.ttft_s.append(_mean(alone, measure.ttft_s))
    row.tpot_s.append(_mean(alone, measure.tpot_s))
    if not options.saturation:
        return
    at_once = _load(crowd, server, what, _AT_ONCE, _AT_ONCE, seed + 1000)
    users = at_saturation(what, options.saturation, row.gpus)
    full = _load(crowd, server, what, users, 2 * users, seed + 2000) if users else at_once
    row.tokens_per_s.append(_tokens_per_s(at_once))
    row.saturated.append(_tokens_per_s(full))


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


@contextlib.contextmanager
def _started(
    groups: Sequence[list[Row]], gpus: int, options: argparse.Namespace
) -> Iterator[list[tuple[list[Row], Served]]]:
    """A server for each layout, started at once; one that does not start is noted in its rows."""
    places = placed([(rows[0].tensor_parallel, rows[0].replicas) for rows in groups], gpus)
    left_s = max(30.0, options.end_s - time.monotonic())
    with contextlib.ExitStack() as stack:

        def start(index: int) -> Served | None:
            rows, row = groups[index], groups[index][0]
            # Said for one GPU too: the application would choose by what the model needs.
            arguments = {**options.engine, **row.engine}
            arguments["tensor_parallel_size"] = row.tensor_parallel
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, places[index]))}
            server = Served(
                "ours",
                options.model,
                arguments,
                options.out / f"tp{row.tensor_parallel}-replicas{row.replicas}{row.variant}",
                options.port + 100 * index,  # Each has ranges of ports of its own.
                left_s,
                row.replicas,
                visible if gpu.present() else {},
            )
            try:
                started = server.__enter__()
            except BenchError as error:
                _failed(rows, str(error))
                return None
            stack.push(server)
            for each in rows:
                each.load_s = started.load_s
            return started

        with ThreadPoolExecutor(len(groups)) as pool:
            servers = list(pool.map(start, range(len(groups))))
        yield [
            (rows, server)
            for rows, server in zip(groups, servers, strict=True)
            if server is not None
        ]


def placed(wanted: Sequence[tuple[int, int]], gpus: int) -> list[list[int]]:
    """Which GPUs each (TP, replicas) gets, so that the fullest holds the fewest weights."""
    used = [0.0] * gpus
    places: list[list[int]] = [[] for _ in wanted]
    for index in sorted(range(len(wanted)), key=lambda i: -wanted[i][0] * wanted[i][1]):
        parallel, replicas = wanted[index]
        order = sorted(range(gpus), key=lambda place: used[place])
        places[index] = sorted(order[: parallel * replicas])
        for place in places[index]:
            used[place] += 1 / parallel
    return places


def _failed(rows: Sequence[Row], why: str) -> None:
    for row in rows:
        row.failure = why[:300]


def _load(
    crowd: Crowd, server: Served, what: str, users: int, count: int, seed: int
) -> LoadOutcome:
    answer = crowded(crowd, server, what, users, count, seed)
    failed = [record.error for record in answer.records if record.error]
    if failed:
        raise BenchError(f"{len(failed)} of {count} requests failed: {failed[0]}")
    return answer


def _mean(answer: LoadOutcome, latency: Any) -> float:
    return fmean(value for r in answer.records if (value := latency(r)) is not None)


def _tokens_per_s(answer: LoadOutcome) -> float:
    return sum(record.output_tokens or 0 for record in answer.records) / answer.elapsed_s
