"""`bench scheduler`: latencies of long prompts among short ones, by scheduling policy.

    python -m bench scheduler --model FOLDER --out DIR

The load is bursts of short prompts with a few long ones at their beginning. It runs under first
come first served and under priorities (short before long), each with and without chunked prefill.
For each kind of prompt the result has the time to the first token, how often a short prompt
overtook a long one that came before it, and how often a long prompt was overtaken.

With chunked prefill other prompts fit into a step only if its token budget is smaller than the long
prompt. So `--tokens` is the budget with chunks; without them it is the longest prompt.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from bench import measure, result, run
from bench.engine.trial import Engine
from bench.records import Record
from bench.result import EngineResult, Line

_KINDS = ("short", "long")


class Case(msgspec.Struct, kw_only=True):
    """One way to schedule.

    Attributes:
        ttft_p50_s, ttft_max_s: of each kind.
        jumped: share of the short ones, planned while a long one waited, that were answered first.
        overtaken: share of the long ones that some later short one passed.
        tokens_per_s: of all together.
    """

    policy: str
    chunked: bool
    ttft_p50_s: dict[str, float]
    ttft_max_s: dict[str, float]
    tpot_mean_s: dict[str, float]
    jumped: float | None
    overtaken: float | None
    tokens_per_s: float


def case(policy: str, chunked: bool, records: Sequence[Record], elapsed_s: float) -> Case:
    """The figures of one way; pure."""
    by_kind = {kind: [r for r in records if r.kind == kind and r.ok] for kind in _KINDS}
    ttft_s = {
        kind: [value for r in each if (value := measure.ttft_s(r)) is not None]
        for kind, each in by_kind.items()
    }
    tpot_s = {
        kind: [value for r in each if (value := measure.tpot_s(r)) is not None]
        for kind, each in by_kind.items()
    }
    jumped, overtaken = order(by_kind["long"], by_kind["short"])
    tokens = sum(record.output_tokens or 0 for record in records)
    return Case(
        policy=policy,
        chunked=chunked,
        ttft_p50_s={kind: float(np.median(each)) for kind, each in ttft_s.items() if each},
        ttft_max_s={kind: max(each) for kind, each in ttft_s.items() if each},
        tpot_mean_s={kind: float(np.mean(each)) for kind, each in tpot_s.items() if each},
        jumped=jumped,
        overtaken=overtaken,
        tokens_per_s=tokens / elapsed_s if elapsed_s > 0 else 0.0,
    )


def order(longs: Sequence[Record], shorts: Sequence[Record]) -> tuple[float | None, float | None]:
    """Of short ones that came behind a long one that had no token yet: the share answered first.
    And the share of the long ones that were passed. None where no short one came behind a long."""
    behind = passed = 0
    overtaken = set()
    for short in shorts:
        ahead = [
            long
            for long in longs
            if (long.planned_s, long.index) < (short.planned_s, short.index)
            and long.chunk_s
            and long.chunk_s[0] > short.planned_s
        ]
        if not ahead or not short.chunk_s:
            continue
        behind += 1
        later = [long.index for long in ahead if long.chunk_s[0] > short.chunk_s[0]]
        passed += bool(later)
        overtaken |= set(later)
    if not behind:
        return None, None
    return passed / behind, len(overtaken) / len(longs)


def advice(cases: Sequence[Case]) -> list[str]:
    """What the cases say, in sentences."""
    by_setting: dict[tuple[str, bool], Case] = {(each.policy, each.chunked): each for each in cases}
    sentences = []
    for policy in dict.fromkeys(each.policy for each in cases):
        on, off = by_setting.get((policy, True)), by_setting.get((policy, False))
        if on and off and "short" in on.ttft_p50_s and "short" in off.ttft_p50_s:
            times = off.ttft_p50_s["short"] / on.ttft_p50_s["short"]
            sentences.append(
                f"{policy}: without chunked prefill short prompts wait {times:.2f} times as long "
                f"for their first token (median), long ones "
                f"{_times(off.ttft_p50_s, on.ttft_p50_s, 'long')} times"
            )
    for chunked in (True, False):
        first, ranked = by_setting.get(("fcfs", chunked)), by_setting.get(("priority", chunked))
        if first and ranked:
            short, long = (_times(ranked.ttft_p50_s, first.ttft_p50_s, kind) for kind in _KINDS)
            sentences.append(
                f"chunked prefill {'on' if chunked else 'off'}: with priorities short prompts wait "
                f"{short} times as long as first come first served, long ones {long} times"
            )
    return sentences


def _times(over: Mapping[str, float], under: Mapping[str, float], kind: str) -> str:
    return f"{over[kind] / under[kind]:.2f}" if kind in over and under.get(kind) else "?"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench scheduler`."""
    add = parser.add_argument
    add("--model", required=True, help="a local folder or a hub id")
    add("--engine", type=json.loads, default={}, help="vLLM arguments, as JSON")
    add("--long", type=int, default=3000, help="tokens of a long prompt")
    add("--tokens", type=int, default=1024, help="token budget of a step, with chunks")
    add("--rounds", type=int, default=4, help="bursts of 2 long and 30 short prompts")
    add("--every", type=float, default=1.0, help="seconds between bursts")
    add("--policies", default="fcfs,priority")
    add("--out", type=Path, required=True, help="folder of the result")


class Schedules(EngineResult, frozen=True, kw_only=True):
    """The result of `bench scheduler`: every case, and the findings as sentences."""

    benchmark: str = "scheduler"
    cases: list[Case]
    advice: list[str]


def command(options: argparse.Namespace) -> Line:
    """What `python -m bench scheduler` does with its options; returns its last line."""
    head = result.header(f"who waits for whom, {options.model}")
    what = f"mixed:long={options.long},longs=2,short=50,shorts=30,output=64"
    # Without chunks vLLM wants room for the longest prompt there may be.
    whole_prompt_tokens = int(options.engine.get("max_model_len", 2 * options.long))
    cases: list[Case] = []
    doubts: list[str] = []
    # A policy is an engine of its own; the rest can be told to one that stands.
    for policy in options.policies.split(","):
        arguments = {
            **options.engine,
            "scheduling_policy": policy,
            "max_num_batched_tokens": whole_prompt_tokens,
        }
        arguments.setdefault("enable_chunked_prefill", True)
        arguments["max_num_seqs"] = min(int(arguments.get("max_num_seqs", 64)), options.tokens)
        with Engine(options.model, arguments, options.out) as engine:
            for chunked in (True, False):
                tokens = options.tokens if chunked else whole_prompt_tokens
                live = {"enable_chunked_prefill": int(chunked), "max_num_batched_tokens": tokens}
                for count, every in ((32, 1000.0), (32 * options.rounds, options.every)):
                    # The first burst warms the engine up and is not looked at.
                    answer = engine.load(
                        what,
                        f"burst:size=32,every={every}",
                        count=count,
                        seed=0 if count > 32 else 1,
                        live=live,
                        limit_s=90.0,
                        priorities={"short": 0, "long": 1},
                    )
                if answer.lost:
                    doubts.append(f"{policy}, chunks {chunked}: the load was broken off")
                cases.append(case(policy, chunked, answer.records, answer.elapsed_s))
                run.say(f"{policy}, chunks {'on' if chunked else 'off'}: {cases[-1]}")
                output = Schedules(
                    **head,
                    model=options.model,
                    engine=options.engine,
                    workload=what,
                    valid=not doubts,
                    doubts=doubts,
                    cases=cases,
                    advice=advice(cases),
                )
                output = result.write(options.out, output)
    return result.line(output, options.out, "cases", "advice")
