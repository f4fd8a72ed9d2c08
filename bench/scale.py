"""`bench scale`: the GPUs of a host as one engine over all of them, or as a replica on each.

    python -m bench scale --model FOLDER --out DIR [--gpus 2] [--system ours]

For 1, 2, 4, ... GPUs, tensor parallelism (TP) against replicas behind this application: the latency
of one request alone, tokens/s with 100 prompts at once, and at saturation. Efficiency is against
so many times the single GPU. TP makes each step shorter, at the price of GPUs that wait for each
other twice a layer; replicas share nothing, so they add up, and shorten no step. What to take for
which goal follows (`advice`). A layout that does not start is a row with its reason.

Without a GPU the engines are CPU engines, which shows that the command works and no more.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from bench import gpu, interval, machine, measure, result, run
from bench.errors import BenchError
from bench.served import Served
from bench.trial import Answer

_ALONE, _AT_ONCE = 8, 100


class Row(msgspec.Struct, kw_only=True):
    """A layout and its figures, each a list over repeats.

    Attributes:
        ttft_s, tpot_s: of one request alone.
        tokens_per_s: output tokens with 100 prompts at once; `saturated` with as many as it takes.
        failure: why there are none.
    """

    tensor_parallel: int
    replicas: int
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
        return f"TP={self.tensor_parallel}"


# --- what follows from the figures ----------------------------------------------------------


def layouts(gpus: int) -> list[tuple[int, int]]:
    """(TP, replicas): one GPU, then each power of two as TP and as replicas, and all of them."""
    sizes = [2**power for power in range(1, gpus.bit_length()) if 2**power <= gpus]
    if gpus > 1 and gpus not in sizes:
        sizes.append(gpus)
    return [(1, 1), *(layout for size in sizes for layout in ((size, 1), (1, size)))]


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each layout beside one GPU: shares and efficiency, with intervals over repeats."""
    single = next((row for row in rows if row.gpus == 1 and not row.failure), None)
    return [_beside(row, single) for row in rows]


def _beside(row: Row, single: Row | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": row.name,
        "gpus": row.gpus,
        "tensor_parallel": row.tensor_parallel,
        "replicas": row.replicas,
        "load_s": row.load_s,
        "failure": row.failure,
    }
    for metric in ("ttft_s", "tpot_s", "tokens_per_s", "saturated"):
        values = getattr(row, metric)
        found[metric] = fmean(values) if values else None
        base = getattr(single, metric) if single else []
        found[f"{metric}_times"] = fmean(values) / fmean(base) if values and base else None
        found[f"{metric}_bounds"] = interval.of_ratio(values, base) if row is not single else None
    for metric in ("tokens_per_s", "saturated"):
        times = found[f"{metric}_times"]
        found[f"{metric}_efficiency"] = times / row.gpus if times is not None else None
    return found


def advice(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which layout to take for which goal."""
    said = []
    for gpus in sorted({row["gpus"] for row in rows if row["gpus"] > 1}):
        same = [row for row in rows if row["gpus"] == gpus and not row["failure"]]
        fast = min((r for r in same if r["tpot_s"]), key=lambda r: r["tpot_s"], default=None)
        wide = max((r for r in same if r["saturated"]), key=lambda r: r["saturated"], default=None)
        if fast is None or wide is None:
            said.append(f"{gpus} GPUs: not measured")
            continue
        one, many = _of(fast["tpot_s_times"]), _of(wide["saturated_times"])
        said.append(
            f"{gpus} GPUs: for the latency of one request {fast['name']} ({one} of one GPU's time "
            f"per token); for throughput {wide['name']} ({many} times one GPU, "
            f"{_of(wide['saturated_efficiency'])} of linear)"
        )
    return said


def _of(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


# --- measuring ------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench scale`."""
    add = parser.add_argument
    add("--model", required=True, help="a local folder or a hub id")
    add("--engine", type=json.loads, default={}, help="vLLM arguments, as JSON")
    add("--gpus", type=int, help="how many to use; all there are by default")
    add("--workload", default="synthetic:input=200,output=128")
    add("--saturation", type=int, default=256, help="requests at once, for each GPU")
    add("--repeats", type=int, default=3)
    add("--budget-s", type=float, default=3600.0, help="seconds of the whole")
    add("--port", type=int, default=8895)
    add("--out", type=Path, required=True, help="folder of the result")


def command(options: argparse.Namespace) -> dict[str, Any]:
    """What `python -m bench scale` does with its options; returns its last line."""
    gpus = options.gpus or (len(machine.gpus()) if gpu.present() else 2)
    where = "GPUs" if gpu.present() else "engines on a CPU"
    head = result.header("scale", f"{options.model} on {gpus} {where}")
    end_s = time.monotonic() + options.budget_s
    rows: list[Row] = []
    doubts: list[str] = []
    took_s = 0.0
    for parallel, replicas in layouts(gpus):
        row = Row(tensor_parallel=parallel, replicas=replicas)
        began_s = time.monotonic()
        if end_s - began_s < took_s:
            row.failure = "not run: the time was over"
        else:
            _measure(row, options, end_s)
            took_s = max(took_s, time.monotonic() - began_s)
        rows.append(row)
        if row.failure:
            doubts.append(f"{row.name}: {row.failure}")
        shown = table(rows)
        run.say(json.dumps(shown[-1]))
        told = head | {
            "model": options.model,
            "engine": options.engine,
            "workload": options.workload,
            "valid": not doubts,
            "doubts": doubts,
            "rows": msgspec.to_builtins(rows),
            "table": shown,
            "advice": advice(shown),
        }
        result.write(options.out, told)
    keys = ("benchmark", "name", "valid", "doubts", "table", "advice")
    return {key: told[key] for key in keys} | {"out": str(options.out)}


def _measure(row: Row, options: argparse.Namespace, end_s: float) -> None:
    """Fill a row in; what keeps it from being measured is noted in it."""
    arguments = dict(options.engine)
    if row.tensor_parallel > 1:
        arguments["tensor_parallel_size"] = row.tensor_parallel
    folder = options.out / f"tp{row.tensor_parallel}-replicas{row.replicas}"
    left_s = max(30.0, end_s - time.monotonic())
    saturation = options.saturation * row.gpus
    try:
        with Served(
            "ours", options.model, arguments, folder, options.port, left_s, row.replicas
        ) as server:
            row.load_s = server.load_s
            for seed in range(-1, options.repeats):
                alone = _load(server, options.workload, 1, _ALONE, seed)
                at_once = _load(server, options.workload, _AT_ONCE, _AT_ONCE, seed + 1000)
                full = _load(server, options.workload, saturation, 2 * saturation, seed + 2000)
                if seed < 0:
                    continue  # Every path runs once before it counts.
                row.ttft_s.append(_mean(alone, measure.ttft_s))
                row.tpot_s.append(_mean(alone, measure.tpot_s))
                row.tokens_per_s.append(_tokens_per_s(at_once))
                row.saturated.append(_tokens_per_s(full))
                if time.monotonic() > end_s:
                    break
    except BenchError as error:
        row.failure = str(error)[:300]


def _load(server: Served, what: str, users: int, count: int, seed: int) -> Answer:
    answer = server.load(what, f"users={users}", count=count, seed=seed)
    failed = [record.error for record in answer.records if record.error]
    if failed:
        raise BenchError(f"{len(failed)} of {count} requests failed: {failed[0]}")
    return answer


def _mean(answer: Answer, latency: Any) -> float:
    return fmean(value for r in answer.records if (value := latency(r)) is not None)


def _tokens_per_s(answer: Answer) -> float:
    return sum(record.output_tokens or 0 for record in answer.records) / answer.elapsed_s
