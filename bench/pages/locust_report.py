"""What Locust's users saw, as a result like that of any other run: the demo-day summary.

Pure. Locust's own percentiles are of rounded times; these are of the records, as `bench.measure`
defines them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bench.measure import Measures, doubts, e2e_s, measure, summary, ttft_s, window
from bench.records import Record

_SHOWN = ("requests_per_s", "output_tokens_per_s", "user_tokens_per_s", "max_running")
_LATENCIES = [f"{of}_{what}_s" for of in ("e2e", "ttft") for what in ("mean", "p50", "p95", "p99")]
_UNASKED = "no example was asked: the run ended before all users were there"


def result(
    heard: Sequence[Record],
    prompts: Mapping[int, str],
    users: int,
    cpu: Mapping[str, float],
    about: Mapping[str, Any],
    cut_short: str = "",
) -> dict[str, Any]:
    """The result.json of a run.

    Args:
        heard: every record, on one clock.
        asked: the prompt of each example, by the index of its record.
        users: how many were meant to be there at a time.
        cpu: CPU time over time of each process of Locust.
        about: what was run: command, machine, target, workload.
        cut_short: why it is not the run that was asked for.

    Returns:
        `about`; at the top what a demo shows, of the steady state where there was one;
        `errors`, of the whole run; `examples`; and `repeats`, `whole` and `summary` of a run.
    """
    whole = measure(heard)
    steady = measure(heard, window=window(heard, users))
    shown = steady if steady.steady else whole
    doubts_of_run = doubts(shown, cpu, whole) + ([cut_short] if cut_short else [])
    return {
        "benchmark": "locust",
        "schema": 1,
        **about,
        "users": users,
        "valid": not doubts_of_run,
        "doubts": doubts_of_run,
        "steady": shown.steady,
        "requests": whole.requests,
        "failed": whole.failed,
        **{name: getattr(shown, name) for name in (*_SHOWN, *_LATENCIES)},
        "errors": errors(whole),
        "examples": examples(heard, prompts),
        "examples_absent": "" if prompts else _UNASKED,
        "cpu": dict(cpu),
        "slo": None,
        "events": [],
        "repeats": [msgspec.to_builtins(shown)],
        "whole": [msgspec.to_builtins(whole)],
        "summary": summary([shown]),
        "server": [],
    }


def errors(measures: Measures) -> list[dict[str, Any]]:
    """Failures by reason, the most frequent first, each with the text of one of them."""
    return [
        {"reason": reason, "count": count, "text": measures.failure_texts.get(reason, "")}
        for reason, count in measures.failures.items()
    ]


def examples(heard: Sequence[Record], prompts: Mapping[int, str]) -> list[dict[str, Any]]:
    """What was asked during the load, what was answered and how fast; an error is no answer."""
    return [
        {
            "prompt": prompts[record.index],
            "answer": record.text,
            "error": record.error,
            "ttft_s": ttft_s(record),
            "e2e_s": e2e_s(record),
            "output_tokens": record.output_tokens,
        }
        for record in sorted(heard, key=lambda record: record.planned_s)
        if record.kind == "example" and record.index in prompts
    ]
