"""What Locust's users saw, as a result like that of any other run: the demo-day summary.

Pure. Locust's own percentiles are of rounded times; these are of the records, as `bench.measure`
defines them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bench.figures import Load
from bench.measure import Measures, doubts, e2e_s, measure, summary, ttft_s, unsettled, window
from bench.records import Record

_FIGURES = ["requests_per_s", "output_tokens_per_s", "user_tokens_per_s", "max_running"]
_FIGURES += [f"{of}_{what}_s" for of in ("e2e", "ttft") for what in ("mean", "p50", "p95", "p99")]


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why requests failed, how many, and the text of one of them."""

    reason: str
    count: int
    text: str


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked during the load, what was answered and how fast; an error is no answer."""

    prompt: str
    answer: str
    error: str = ""
    ttft_s: float | None = None
    e2e_s: float | None = None
    output_tokens: int | None = None


class Locust(Load, frozen=True, kw_only=True):
    """The result of a run of Locust: at the top what a demo shows, and the figures of a run.

    Attributes:
        users: how many were meant to be there at a time.
        steady: whether rates and latencies are of a steady state.
        requests, failed: of the whole run, as are `errors`, the most frequent first.
        examples_absent: why there are no examples; empty where there are.
        cpu: CPU time over time of each process of Locust.
        actors: processes that sent.
    """

    benchmark: str = "locust"
    users: int | None = None
    actors: int = 1
    steady: bool = False
    requests: int | None = None
    failed: int | None = None
    requests_per_s: float | None = None
    output_tokens_per_s: float | None = None
    user_tokens_per_s: float | None = None
    max_running: int | None = None
    e2e_mean_s: float | None = None
    e2e_p50_s: float | None = None
    e2e_p95_s: float | None = None
    e2e_p99_s: float | None = None
    ttft_mean_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    ttft_p99_s: float | None = None
    errors: list[Failure] = []
    examples: list[Example] = []
    examples_absent: str = "none were asked"
    cpu: dict[str, float] = {}


def result(
    heard: Sequence[Record],
    prompts: Mapping[int, str],
    users: int,
    cpu: Mapping[str, float],
    about: Mapping[str, Any],
    cut_short: str = "",
    all_there_s: float | None = None,
    ended_s: float = 0.0,
) -> Locust:
    """The result of a run.

    Args:
        heard: every record, on one clock.
        prompts: the prompt of each example, by the index of its record.
        users: how many were meant to be there at a time.
        cpu: CPU time over time of each process of Locust.
        about: fields that say what was run: the header, target, workload, actors.
        cut_short: why it is not the run that was asked for.
        all_there_s: when the last user was there; None where that never was.
        ended_s: when users were told to stop.
    """
    whole = measure(heard)
    steady = measure(heard, window=window(heard, users))
    shown = steady if steady.steady else whole
    doubts_of_run = [*doubts(shown, cpu, whole), *unsettled(shown.settling)]
    doubts_of_run += [cut_short] if cut_short else []
    return Locust(
        **about,
        **{name: getattr(shown, name) for name in _FIGURES},
        valid=not doubts_of_run,
        doubts=doubts_of_run,
        users=users,
        steady=shown.steady,
        requests=whole.requests,
        failed=whole.failed,
        errors=errors(whole),
        examples=examples(heard, prompts),
        examples_absent="" if prompts else _unasked(all_there_s, ended_s),
        cpu=dict(cpu),
        repeats=[shown],
        whole=[whole],
        summary=summary([shown]),
    )


def _unasked(all_there_s: float | None, ended_s: float) -> str:
    """Why no example was asked. Users of the first worker ask them, once all users are there."""
    if all_there_s is None:
        return "no example was asked: the run ended before all users were there"
    return (
        f"no example was asked: all users were there after {all_there_s:.1f} s, and no user of the "
        f"process that asks them began another request before the end after {ended_s:.1f} s"
    )


def errors(measures: Measures) -> list[Failure]:
    """Failures by reason, the most frequent first."""
    return [
        Failure(reason=reason, count=count, text=measures.failure_texts.get(reason, ""))
        for reason, count in measures.failures.items()
    ]


def examples(heard: Sequence[Record], prompts: Mapping[int, str]) -> list[Example]:
    return [
        Example(
            prompt=prompts[record.index],
            answer=record.text,
            error=record.error,
            ttft_s=ttft_s(record),
            e2e_s=e2e_s(record),
            output_tokens=record.output_tokens,
        )
        for record in sorted(heard, key=lambda record: record.planned_s)
        if record.kind == "example" and record.index in prompts
    ]
