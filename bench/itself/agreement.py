"""Whether bench and other benchmarks measure the same of the same server.

    python -m bench agreement --url URL --model NAME [--rounds 5] [--users 8] [--requests 64]
        [--tools guidellm,aiperf,inference-perf,genai-bench --tokenizer FOLDER]

`vllm bench serve` sends the same prompts, output lengths and concurrency, in interleaved rounds;
the order is turned round each time, so that a machine that drifts favours neither. Compared are the
figures that both define in the same way (`measure.vllm_names`: from sent to received, the whole
run), ours over theirs: the median over rounds with the lowest and the highest. The last line is one
JSON object. Other tools take part in each round (`tools`), each with the nearest load that it can
send. The result says how they differ, and why a tool that could not be installed or run is absent.

    --fake starts the small server with known times instead of asking for a URL.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from bench import measure
from bench.errors import TargetFailed
from bench.itself import known_server, tools
from bench.itself.peer import Peer
from bench.itself.tools import Environment, Tool, ToolError
from bench.options import whole
from bench.result import Line
from bench.traffic import load, schedule, workload
from bench.traffic.target import Target

FIGURES = (
    "output_throughput",
    "request_throughput",
    "median_ttft_ms",
    "median_tpot_ms",
    "median_itl_ms",
    "median_e2el_ms",
)
OURS, VLLM = "ours", "vllm"
# How far a ratio may be from 1.
TOLERANCE = 0.03

# What one tool measured: numbers under the names of FIGURES, beside whatever else it reports.
Measured = Mapping[str, Any]
Measure = Callable[[int], Measured]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A figure by bench and by another tool: medians over rounds, in the figure's own unit.

    Attributes:
        ratio, min, max: ours over theirs, round by round; `agrees` if the median is within
            `TOLERANCE` of 1.
    """

    tool: str
    figure: str
    ours: float
    theirs: float
    ratio: float
    min: float
    max: float
    agrees: bool


def ours(options: argparse.Namespace) -> Measure:
    target = Target(
        url=options.url, model=options.model, extra={"temperature": 0.0, "ignore_eos": True}
    )

    def once(seed: int) -> Measured:
        plan = schedule.plan(
            workload.parse(options.workload, seed),
            schedule.Closed(options.users),
            options.requests,
            None,
            seed,
        )
        outcome = asyncio.run(load.run(plan, target, 1, lambda records, progress: None))
        _require_answers(OURS, options.url, [record.error for record in outcome.records])
        return measure.vllm_names(outcome.records, max_concurrency=options.users)

    return once


def theirs(options: argparse.Namespace, peer: Peer) -> Measure:
    arguments = ["--backend", "openai", "--base-url", options.url, "--model", options.model]
    arguments += ["--max-concurrency", str(options.users), "--ready-check-timeout-sec", "0"]
    arguments += ["--temperature", "0", "--ignore-eos"]

    def once(seed: int) -> Measured:
        requests = workload.parse(options.workload, seed).take(options.requests)
        result = peer.run(arguments, [(str(r.prompt), r.output_tokens) for r in requests])
        _require_answers(VLLM, options.url, result["errors"])
        return medians(result)

    return once


def _require_answers(tool: str, url: str, errors: Sequence[str | None]) -> None:
    """Figures are compared only where every request was answered.

    Raises:
        TargetFailed: one was not.
    """
    failed = [error for error in errors if error]
    if failed:
        problem = f"{len(failed)} of {len(errors)} requests failed: {failed[0].strip()[-300:]}"
        raise TargetFailed.of("url", url, f"{tool}: {problem}")


def medians(result: Measured) -> Measured:
    """vLLM's medians, from its own values for each request and by its own formulas.

    It prints none without a tokenizer, which would count tokens that the server has counted.
    """
    each = zip(result["ttfts"], result["latencies"], result["output_lens"], strict=True)
    tpots_s = [(latency - ttft) / (tokens - 1) for ttft, latency, tokens in each if tokens > 1]
    values_s = {
        "ttft": result["ttfts"],
        "tpot": tpots_s,
        "itl": [gap for gaps in result["itls"] for gap in gaps],
        "e2el": result["latencies"],
    }
    figures = {f"median_{name}_ms": statistics.median(v) * 1e3 for name, v in values_s.items()}
    return {**figures, **result}


def play(
    measures: Mapping[str, Measure], rounds: int
) -> tuple[list[dict[str, Measured]], dict[str, str]]:
    """Interleaved rounds: the figures of each, by name, and why some are not there.

    The order is turned round each time. Who fails once takes no further part.
    """
    absent: dict[str, str] = {}
    results = []
    for number in range(rounds):
        names = [name for name in measures if name not in absent]
        figures: dict[str, Measured] = {}
        for name in names if number % 2 == 0 else names[::-1]:
            # Other prompts for each: the second would find those of the first in a cache.
            seed = number * len(measures) + list(measures).index(name)
            try:
                figures[name] = measures[name](seed)
            except ToolError as error:
                absent[name] = str(error)
        results.append(figures)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return results, absent


def compare(rounds: Sequence[Mapping[str, Measured]], other: str) -> list[Row]:
    rows = []
    for figure in FIGURES:
        pairs = [
            (each[OURS][figure], each[other][figure])
            for each in rounds
            if figure in each[OURS] and figure in each[other]
        ]
        if not pairs:
            continue
        ratios = [mine / its for mine, its in pairs]
        rows.append(
            Row(
                tool=other,
                figure=figure,
                ours=round(statistics.median(mine for mine, _ in pairs), 3),
                theirs=round(statistics.median(its for _, its in pairs), 3),
                ratio=round(statistics.median(ratios), 4),
                min=round(min(ratios), 4),
                max=round(max(ratios), 4),
                agrees=abs(statistics.median(ratios) - 1) <= TOLERANCE,
            )
        )
    return rows


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench agreement`."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url")
    where.add_argument(
        "--fake",
        action="store_true",
        help="measure a small server with known latencies: TTFT 50 ms, ITL 10 ms",
    )
    add = parser.add_argument
    add("--model", default="fake")
    add("--workload", default="synthetic:input=50,output=64")
    add("--users", type=whole(1), default=8)
    add("--requests", type=whole(1), default=64)
    add("--rounds", type=whole(1), default=5)
    add("--tools", default="", help=f"other benchmarks to run: {', '.join(tools.TOOLS)}")
    add("--tokenizer", default="", help="folder of the model's tokenizer, for the other benchmarks")
    add(
        "--environments",
        default="results/tools",
        help="folder with one Python environment for each other benchmark",
    )


def command(options: argparse.Namespace) -> Line:
    """What `python -m bench agreement` does with its options; returns its last line.

    Raises:
        TargetFailed: the server does not answer every request of bench and of `vllm bench serve`.
        ToolError: an option names no tool, or a tokenizer is missing.
    """
    others = _tools(options)
    with ExitStack() as stack:
        if options.fake:
            served = known_server.Options(ttft_ms=50, itl_ms=10)
            options.url = stack.enter_context(known_server.launched(8868, served)).url
        load.connect()
        measures = {
            OURS: ours(options),
            VLLM: theirs(options, stack.enter_context(Peer())),
            **{tool.name: _measure(tool, options) for tool in others},
        }
        for name in (OURS, VLLM):
            measures[name](-1)  # What is done for the first time is not compared.
        rounds, absent = play(measures, options.rounds)
    rows = [
        row
        for name in measures
        if name != OURS and name not in absent
        for row in compare(rounds, name)
    ]
    differ = [row.figure for row in rows if row.tool == VLLM and not row.agrees]
    doubts = [f"{figure} differs by more than {TOLERANCE:.0%}" for figure in differ]
    beside = ", ".join([VLLM, *(tool.name for tool in others)])
    return {
        "benchmark": "agreement",
        "name": f"ours beside {beside}",
        "valid": not doubts,
        "doubts": doubts,
        "results": msgspec.to_builtins(rows),
        "how_others_differ": [{"tool": tool.name, "differs": tool.differs} for tool in others],
        "absent": [{"tool": name, "reason": reason} for name, reason in absent.items()],
    }


def _tools(options: argparse.Namespace) -> list[Tool]:
    """The tools that were asked for.

    Raises:
        ToolError: one is not known, or there is no tokenizer for them.
    """
    names = [name.strip() for name in options.tools.split(",") if name.strip()]
    for name in names:
        if name not in tools.TOOLS:
            raise ToolError.of("tools", name, "no such tool", tools.TOOLS)
    if names and not (options.tokenizer and Path(options.tokenizer).is_dir()):
        problem = "not a folder: these tools need the tokenizer of the model"
        raise ToolError.of("tokenizer", options.tokenizer, problem)
    return [tools.TOOLS[name] for name in names]


def _measure(tool: Tool, options: argparse.Namespace) -> Measure:
    environment = Environment(Path(options.environments).resolve())

    def once(seed: int) -> Measured:
        requests = workload.parse(options.workload, seed).take(options.requests)
        with tempfile.TemporaryDirectory(prefix=f"{tool.name}.") as folder:
            ask = tools.Ask(
                url=options.url,
                model=options.model,
                tokenizer=str(Path(options.tokenizer).resolve()),
                users=options.users,
                prompts=[(str(r.prompt), r.output_tokens) for r in requests],
                folder=Path(folder),
            )
            return dict(tools.measure(tool, environment, ask))

    return once
