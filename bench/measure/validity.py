"""Whether to trust the figures of a repeat."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from bench.measure.figures import Measures
from bench.measure.steady import Settling

_LAG_S, _LAG_OF_TTFT = 0.005, 0.05
_LATENCY_NAMES = {"ttft": "TTFT", "tpot": "time per token", "e2e": "end-to-end time"}
_CPU, _FAILED_SHARE = 0.9, 0.01
# Odd answers among the successes; output tokens, of those that were asked for; prompt tokens from
# the prefix cache that the workload does not explain.
_ODD_SHARE, _SHORT, _UNEXPLAINED = 0.01, 0.9, 0.01
_NOT_STEADY = (
    "no steady state: the run was too short, so its start and its end are measured too; send more "
    "requests (in a closed loop, six or more for each user)"
)


class Doubt(msgspec.Struct, frozen=True, kw_only=True):
    """One reason not to trust a repeat.

    Attributes:
        kind: what program logic may ask for; never the text.
        text: for people, one sentence.
    """

    kind: Literal["unsteady", "late", "busy", "failed", "answers", "behind"]
    text: str


# Of these bench or the answers are to blame, and not a rate that is too high for the server.
NOT_OF_RATE = ("late", "busy", "answers")


def doubts(
    measures: Measures,
    cpu: Mapping[Any, float] | None = None,
    whole: Measures | None = None,
    batch: bool = False,
) -> list[str]:
    """Why a repeat should not be trusted, one sentence each; empty where nothing is wrong."""
    return [doubt.text for doubt in find(measures, cpu, whole, batch)]


def find(
    measures: Measures,
    cpu: Mapping[Any, float] | None = None,
    whole: Measures | None = None,
    batch: bool = False,
) -> list[Doubt]:
    """Every doubt about a repeat by itself; `unsettled` is about all of them together.

    Args:
        measures: of the window, or of the whole where there was no steady state.
        cpu: for each load actor, CPU time over time; 1 is one core.
        whole: of the whole repeat, as failures outside the window count too.
        batch: all was sent at once, and the whole of it is what is measured.
    """
    doubts = [] if measures.steady or batch else [Doubt(kind="unsteady", text=_NOT_STEADY)]
    doubts += [Doubt(kind="late", text=text) for text in _late(measures)]
    doubts += [Doubt(kind="busy", text=text) for text in busy(cpu or {})]
    doubts += [Doubt(kind="failed", text=text) for text in _failed(whole or measures)]
    doubts += [Doubt(kind="answers", text=text) for text in answer_doubts(measures)]
    if falls_behind(measures):
        text = (
            f"the server fell behind: {measures.requests} requests were planned and "
            f"{measures.requests - measures.backlog} ended, so latencies depend on how long the "
            "run lasted"
        )
        doubts.append(Doubt(kind="behind", text=text))
    return doubts


def _late(measures: Measures) -> list[str]:
    lag = _doubtful_lag_s(measures)
    if lag is None:
        return []
    return [
        f"requests were sent late: lag p99 {lag * 1e3:.1f} ms, with a median TTFT of "
        f"{(measures.ttft_p50_s or 0) * 1e3:.1f} ms; bench itself held up the load"
    ]


def busy(cpu: Mapping[Any, float]) -> list[str]:
    """A sentence for each load actor that had too little of a CPU core left."""
    return [
        f"load actor {actor} used {used:.0%} of a CPU core: bench may be the bottleneck"
        for actor, used in cpu.items()
        if used > _CPU
    ]


def _failed(everything: Measures) -> list[str]:
    if not everything.ok:
        return [f"nothing succeeded: {_listed(everything.failures) or 'nothing was sent'}"]
    if (everything.failed_share or 0) <= _FAILED_SHARE:
        return []
    return [
        f"{everything.failed} of {everything.requests} requests failed: "
        f"{_listed(everything.failures)}"
    ]


def answer_doubts(measures: Measures) -> list[str]:
    """What is doubtful about answers that were counted as successes, one sentence each."""
    doubts, missing = [], measures.without_usage - measures.answers.odd.get("usage", 0)
    if missing > _ODD_SHARE * measures.ok:
        doubts.append(
            f"the server's usage is missing for {missing} of {measures.ok} answers, whose tokens "
            "are not counted"
        )
    doubts += [
        f"{count} of {measures.ok} answers cannot be believed: {measures.answers.odd_texts[what]}"
        for what, count in measures.answers.odd.items()
        if count > _ODD_SHARE * measures.ok
    ]
    given = measures.answers.given_output_share
    if given is not None and given < _SHORT:
        doubts.append(
            f"answers had {given:.0%} of the output tokens that were asked for, so this is another "
            "load than was planned: ask for exact=yes (vLLM), or for exact=no if the length is an "
            "upper limit"
        )
    unexplained = measures.answers.unexplained_cached_share
    if unexplained is not None and unexplained > _UNEXPLAINED:
        doubts.append(
            f"{unexplained:.0%} of the prompt tokens came from the server's prefix cache, and the "
            "workload does not share them: these prompts were sent before (leave out --salt, or "
            "ask for fresh=yes where they are those of a file)"
        )
    return doubts


def unsettled(settling: Mapping[str, Settling]) -> list[str]:
    """Of the latency that is known worst; empty where all have settled."""
    open_ = {name: of for name, of in settling.items() if not of.settled}
    if not open_:
        return []
    worst = max(open_, key=lambda name: open_[name].error_share)
    of = open_[worst]
    return [
        f"{_LATENCY_NAMES[worst]} did not settle: {of.requests} requests, which waited for the "
        f"same queue, say as much about its mean as {max(1, round(of.independent))} independent "
        f"ones, which is {of.error_share:.0%} at best; send more requests, or fewer a second"
    ]


def falls_behind(measures: Measures) -> bool:
    """Whether far more requests were planned in a window than ended in it.

    By more than a tenth, and than three standard deviations of a Poisson count. Users of a closed
    loop wait, so there it never is.
    """
    return measures.steady and measures.backlog > max(
        0.1 * measures.requests, 3 * math.sqrt(measures.requests)
    )


def _doubtful_lag_s(measures: Measures) -> float | None:
    """The 99th percentile of the lag, if that is too long: one late request of 200 is not."""
    lag = measures.lag_p99_s
    limit = max(_LAG_S, _LAG_OF_TTFT * (measures.ttft_p50_s or 0))
    return lag if lag is not None and lag > limit else None


def _listed(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in failures.items())
