"""Whether bench and `vllm bench serve` say the same of the same server.

    python -m bench agreement --url URL --model NAME [--rounds 5] [--users 8] [--requests 64]

The same prompts, output lengths and concurrency, in interleaved rounds; the order is turned round
each time, so that a machine that drifts favours neither. Compared are the figures that both define
in the same way (`measure.vllm_names`: from sent to received, the whole run), ours over theirs: the
median over rounds with the lowest and the highest. The last line is one JSON object.

    --fake starts the small server with known times instead of asking for a URL.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench import measure
from bench.itself import known_server
from bench.itself.peer import Peer
from bench.options import whole
from bench.traffic import load, schedule, workload
from bench.traffic.client import Target

FIGURES = (
    "output_throughput",
    "request_throughput",
    "median_ttft_ms",
    "median_tpot_ms",
    "median_itl_ms",
    "median_e2el_ms",
)
# How far a ratio may be from 1.
TOLERANCE = 0.03

Measure = Callable[[int], dict[str, Any]]


def ours(options: argparse.Namespace) -> Measure:
    target = Target(
        url=options.url, model=options.model, extra={"temperature": 0.0, "ignore_eos": True}
    )

    def once(seed: int) -> dict[str, Any]:
        plan = schedule.plan(
            workload.parse(options.workload, seed),
            schedule.Closed(options.users),
            options.requests,
            None,
            seed,
        )
        outcome = asyncio.run(load.run(plan, target, 1, lambda records, progress: None))
        return measure.vllm_names(outcome.records, max_concurrency=options.users)

    return once


def theirs(options: argparse.Namespace, peer: Peer) -> Measure:
    arguments = ["--backend", "openai", "--base-url", options.url, "--model", options.model]
    arguments += ["--max-concurrency", str(options.users), "--ready-check-timeout-sec", "0"]
    arguments += ["--temperature", "0", "--ignore-eos"]

    def once(seed: int) -> dict[str, Any]:
        requests = workload.parse(options.workload, seed).take(options.requests)
        return medians(peer.run(arguments, [(str(r.prompt), r.output_tokens) for r in requests]))

    return once


def medians(result: dict[str, Any]) -> dict[str, Any]:
    """vLLM's own medians, from its own values for each request and by its own formulas.

    Without a tokenizer, which would count tokens that the server has counted, it prints them not.
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
    return figures | result


def compare(rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each figure: the medians of both, and the ratio of each round."""
    rows = []
    for figure in FIGURES:
        ratios = [mine[figure] / its[figure] for mine, its in rounds]
        rows.append(
            {
                "figure": figure,
                "ours": round(statistics.median(mine[figure] for mine, _ in rounds), 3),
                "vllm": round(statistics.median(its[figure] for _, its in rounds), 3),
                "ratio": round(statistics.median(ratios), 4),
                "min": round(min(ratios), 4),
                "max": round(max(ratios), 4),
                "agrees": abs(statistics.median(ratios) - 1) <= TOLERANCE,
            }
        )
    return rows


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench agreement`."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url")
    where.add_argument("--fake", action="store_true", help="a small server of 50 and 10 ms")
    add = parser.add_argument
    add("--model", default="fake")
    add("--workload", default="synthetic:input=50,output=64")
    add("--users", type=whole(1), default=8)
    add("--requests", type=whole(1), default=64)
    add("--rounds", type=whole(1), default=5)


def command(options: argparse.Namespace) -> dict[str, Any]:
    """What `python -m bench agreement` does with its options; returns its last line."""
    with ExitStack() as stack:
        if options.fake:
            served = known_server.Options(ttft_ms=50, itl_ms=10)
            options.url = stack.enter_context(known_server.launched(8868, served)).url
        load.connect()
        peer = stack.enter_context(Peer())
        pair = [ours(options), theirs(options, peer)]
        for once in pair:
            once(-1)  # What is done for the first time is not compared.
        rounds = []
        for number in range(options.rounds):
            order = [0, 1] if number % 2 == 0 else [1, 0]
            # Other prompts for each: the second would find those of the first in a cache.
            answers = {which: pair[which](2 * number + which) for which in order}
            rounds.append((answers[0], answers[1]))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    rows = compare(rounds)
    differ = [row["figure"] for row in rows if not row["agrees"]]
    doubts = [f"{figure} differs by more than {TOLERANCE:.0%}" for figure in differ]
    return {
        "benchmark": "agreement",
        "name": "ours beside vllm bench serve",
        "valid": not doubts,
        "doubts": doubts,
        "results": rows,
    }
