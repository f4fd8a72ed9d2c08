"""The figures of one repeat, and of several."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TypedDict

import msgspec
import numpy as np

from bench import interval
from bench.measure.answers import Answers, answers
from bench.measure.flow import (
    Window,
    per_second,
    rates,
    running_in,
    whole_span,
)
from bench.measure.latency import (
    PERCENTS,
    Values,
    e2e_s,
    gaps,
    lag_s,
    percentile,
    present,
    reason,
    tpot_s,
    ttft_s,
)
from bench.measure.slo import Slo
from bench.measure.steady import Settling, averaged, settling
from bench.records import Record

# The metrics of a system under load, and which way is better. Lag is not one: it is bench's own.
METRICS: Mapping[str, str] = {
    "requests_per_s": "higher",
    "output_tokens_per_s": "higher",
    "total_tokens_per_s": "higher",
    "user_tokens_per_s": "higher",
    "goodput_per_s": "higher",
    "good_share": "higher",
    "failed_share": "lower",
    **{
        f"{latency}_{statistic}_s": "lower"
        for latency in ("ttft", "tpot", "itl", "e2e")
        for statistic in ("mean", *(f"p{percent}" for percent in PERCENTS))
    },
}


_LATENCIES = ("ttft", "tpot", "itl", "e2e")


def _figure(latency: str, percent: int | None) -> str:
    """The name of a statistic of a latency; without a percentile its mean."""
    return f"{latency}_mean_s" if percent is None else f"{latency}_p{percent}_s"


_LATENCY_OF = {
    _figure(latency, percent): (latency, percent)
    for latency in _LATENCIES
    for percent in (None, *PERCENTS)
}


class Kind(msgspec.Struct, kw_only=True):
    """The figures of one class of requests, beside which others were served."""

    requests: int
    failed: int
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    e2e_p50_s: float | None = None
    user_tokens_per_s: float | None = None


class Measures(msgspec.Struct, kw_only=True):
    """The figures of one repeat; the package's docstring defines each.

    An older result may lack some of them: these are then None, or empty.

    Attributes:
        steady: whether this is a steady-state window; else it is the whole, with start and end.
        from_s, to_s: the window, on the records' clock.
        requests: planned in the window; each is one of `ok` and `failed`.
        sent: of those, how many were.
        planned_per_s: requests / duration: what was offered, in an open loop.
        backlog: requests minus those that ended in the window: by how much the queue grew.
        failures: how many for each reason; `failure_texts`: one error text of each.
        statuses: how many requests for each HTTP status; "0" is no response.
        finish_reasons: of successes.
        without_usage: successes for which the server's usage named no output tokens that can be.
        answers: how far the answers are those that were asked for.
        input_tokens, output_tokens, cached_tokens: sums over successes; None where no usage said.
        kinds: empty unless the workload has kinds.
        lag_p99_s: with few requests too, as it is no estimate: these are all that were late.
        settling: for ttft, tpot and e2e, how many independent requests they are worth; not where
            there are too few requests to say.
        intervals: 95% intervals for the means and percentiles of ttft, tpot and e2e by their
            names, of those that have one (`interval.of_series`, `interval.of_percentile`); not for
            itl, where one request has many.
    """

    steady: bool = False
    from_s: float = 0.0
    to_s: float = 0.0
    duration_s: float = 0.0
    requests: int = 0
    sent: int = 0
    ok: int = 0
    failed: int = 0
    planned_per_s: float | None = None
    backlog: int = 0
    failures: dict[str, int] = {}
    failure_texts: dict[str, str] = {}
    statuses: dict[str, int] = {}
    finish_reasons: dict[str, int] = {}
    without_usage: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    requests_per_s: float | None = None
    output_tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    user_tokens_per_s: float | None = None
    goodput_per_s: float | None = None
    good_share: float | None = None
    failed_share: float | None = None
    max_running: int = 0
    mean_running: float | None = None
    kinds: dict[str, Kind] = {}
    fairness: float | None = None
    ttft_mean_s: float | None = None
    ttft_std_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p90_s: float | None = None
    ttft_p95_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_mean_s: float | None = None
    tpot_std_s: float | None = None
    tpot_p50_s: float | None = None
    tpot_p90_s: float | None = None
    tpot_p95_s: float | None = None
    tpot_p99_s: float | None = None
    itl_mean_s: float | None = None
    itl_std_s: float | None = None
    itl_p50_s: float | None = None
    itl_p90_s: float | None = None
    itl_p95_s: float | None = None
    itl_p99_s: float | None = None
    e2e_mean_s: float | None = None
    e2e_std_s: float | None = None
    e2e_p50_s: float | None = None
    e2e_p90_s: float | None = None
    e2e_p95_s: float | None = None
    e2e_p99_s: float | None = None
    lag_p50_s: float | None = None
    lag_p99_s: float | None = None
    lag_max_s: float | None = None
    settling: dict[str, Settling] = {}
    intervals: dict[str, interval.Bounds] = {}
    answers: Answers = Answers()


def measure(
    records: Iterable[Record], slo: Slo | None = None, window: Window | None = None
) -> Measures:
    """The figures of one repeat, in `window` or, without one, of the whole.

    Rates are None for a duration of 0.
    """
    everything = list(records)
    from_s, to_s = window or whole_span(everything)
    counted = [record for record in everything if from_s <= record.planned_s <= to_s]
    counted.sort(key=lambda record: record.planned_s)  # Intervals need the order of time.
    ok = [record for record in counted if record.ok]
    latencies = _latencies(ok)
    ended = sum(from_s < record.end_s <= to_s for record in everything if record.end_s is not None)
    good = {id(record) for record in everything if slo and slo.met_by(record)}
    flow = rates(everything, (from_s, to_s), window is None, good if slo else None)
    good_share = sum(id(r) in good for r in counted) / len(counted) if counted else None
    lags = present(map(lag_s, counted))
    duration_s = to_s - from_s
    per_s = partial(per_second, duration_s=duration_s)
    max_running, mean_running = running_in(everything, from_s, to_s)
    kinds = _kinds(counted)
    return Measures(
        steady=window is not None,
        from_s=from_s,
        to_s=to_s,
        duration_s=duration_s,
        requests=len(counted),
        sent=sum(record.sent_s is not None for record in counted),
        ok=len(ok),
        failed=len(counted) - len(ok),
        planned_per_s=per_s(len(counted)),
        backlog=len(counted) - ended,
        failures=_counts(reason(record) for record in counted if not record.ok),
        failure_texts={reason(record): record.error for record in counted[::-1] if not record.ok},
        statuses=_counts(str(record.status) for record in counted),
        finish_reasons=_counts(record.finish_reason for record in ok if record.finish_reason),
        without_usage=sum(record.output_tokens is None for record in ok),
        input_tokens=_sum(record.input_tokens for record in ok),
        output_tokens=_sum(record.output_tokens for record in ok),
        cached_tokens=_sum(record.cached_tokens for record in ok),
        requests_per_s=flow.requests,
        output_tokens_per_s=flow.output_tokens,
        total_tokens_per_s=flow.total_tokens,
        user_tokens_per_s=_user_tokens_per_s(ok),
        goodput_per_s=flow.good,
        good_share=good_share if slo else None,
        failed_share=(len(counted) - len(ok)) / len(counted) if counted else None,
        max_running=max_running,
        mean_running=mean_running,
        kinds=kinds,
        fairness=_jain([kind.user_tokens_per_s for kind in kinds.values()]),
        lag_p50_s=percentile(lags, 50),
        lag_p99_s=float(np.percentile(lags, 99)) if len(lags) else None,
        lag_max_s=float(lags.max()) if len(lags) else None,
        settling=_settling(latencies, _users(counted)),
        intervals=_intervals(latencies),
        answers=answers(ok),
        **_statistics("ttft", latencies["ttft"]),
        **_statistics("tpot", latencies["tpot"]),
        **_statistics("itl", gaps(ok)),
        **_statistics("e2e", latencies["e2e"]),
    )


def settling_of_all(repeats: Sequence[tuple[Sequence[Record], Window]]) -> dict[str, Settling]:
    """How well each mean latency is known from all repeats together, each in its window."""
    counted = [
        sorted((r for r in records if from_s <= r.planned_s <= to_s), key=lambda r: r.planned_s)
        for records, (from_s, to_s) in repeats
    ]
    if not counted:
        return {}
    each = [_latencies([record for record in repeat if record.ok]) for repeat in counted]
    latencies = {name: averaged([of[name] for of in each]) for name in each[0]}
    return _settling(latencies, _users(counted[0]))


def _latencies(ok: Sequence[Record]) -> dict[str, Values]:
    latencies = {"ttft": ttft_s, "tpot": tpot_s, "e2e": e2e_s}
    return {name: present(map(of, ok)) for name, of in latencies.items()}


def _settling(latencies: Mapping[str, Values], users: int | None) -> dict[str, Settling]:
    return {name: of for name, values in latencies.items() if (of := settling(values, users))}


class Mean(TypedDict):
    """A mean over repeats, and its 95 % interval where there is one."""

    mean: float
    low: float | None
    high: float | None


def summary(repeats: Sequence[Measures]) -> dict[str, Mean]:
    """For every metric that each repeat has: its mean over repeats, and the interval for that.

    There is no interval for a single repeat, nor for a latency of which the repeats saw too little
    (`_trusted`).
    """
    summaries: dict[str, Mean] = {}
    for metric in METRICS:
        values = [getattr(measures, metric) for measures in repeats]
        if values and None not in values:
            bounds = interval.of_repeats(values) if _trusted(metric, repeats) else None
            low, high = bounds or (None, None)
            summaries[metric] = {"mean": float(np.mean(values)), "low": low, "high": high}
    return summaries


def _trusted(metric: str, repeats: Sequence[Measures]) -> bool:
    """Whether each repeat's figure is right on average, so that their spread says how sure it is.

    A tail is too low in every repeat of too few independent requests. The mean and the median are
    nearly right, but not where the queue was seen for a few of its ups and downs only.
    """
    latency = _LATENCY_OF.get(metric)
    if latency is None:
        return True
    name, percent = latency
    of = [m.settling.get("tpot" if name == "itl" else name) for m in repeats]
    if percent is None or percent <= 50:
        return all(each is None or each.settled for each in of)
    present = [each for each in of if each is not None]
    independent = sum(each.independent for each in present)
    correlated = independent * 1.5 < sum(each.requests for each in present)
    spare = 1.5 if correlated else 1.0
    return independent >= spare * interval.samples_needed(percent / 100)


def _sum(values: Iterable[int | None]) -> int | None:
    present = [value for value in values if value is not None]
    return sum(present) if present else None


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _statistics(latency: str, values: Values) -> dict[str, float | None]:
    """{"ttft_mean_s": .., "ttft_std_s": .., "ttft_p50_s": .., ..}"""
    statistics: dict[str, float | None] = {
        f"{latency}_mean_s": float(values.mean()) if len(values) else None,
        f"{latency}_std_s": float(values.std()) if len(values) else None,
    }
    for percent in PERCENTS:
        statistics[f"{latency}_p{percent}_s"] = percentile(values, percent)
    return statistics


def _intervals(latencies: Mapping[str, Values]) -> dict[str, interval.Bounds]:
    """{"ttft_mean_s": (low, high), "ttft_p99_s": .., ..} for each figure that has one."""
    intervals = {
        (latency, percent): interval.of_series(values)
        if percent is None
        else interval.of_percentile(values, percent / 100)
        for latency, values in latencies.items()
        for percent in (None, *PERCENTS)
    }
    return {_figure(*key): bounds for key, bounds in intervals.items() if bounds is not None}


def _users(counted: Sequence[Record]) -> int | None:
    """Of a closed loop; None for an open one."""
    return len({record.user for record in counted} - {None}) or None


def _user_tokens_per_s(ok: Sequence[Record]) -> float | None:
    answered = [(r.output_tokens, e2e_s(r)) for r in ok if r.output_tokens is not None]
    waited_s = sum(took or 0.0 for _, took in answered)
    return sum(tokens for tokens, _ in answered) / waited_s if waited_s > 0 else None


def _kinds(counted: Sequence[Record]) -> dict[str, Kind]:
    kinds = sorted({record.kind for record in counted})
    return {kind: _kind([r for r in counted if r.kind == kind]) for kind in kinds if any(kinds)}


def _kind(records: Sequence[Record]) -> Kind:
    ok = [record for record in records if record.ok]
    ttfts = present(map(ttft_s, ok))
    return Kind(
        requests=len(records),
        failed=len(records) - len(ok),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p95_s=percentile(ttfts, 95),
        e2e_p50_s=percentile(present(map(e2e_s, ok)), 50),
        user_tokens_per_s=_user_tokens_per_s(ok),
    )


def _jain(shares: Iterable[float | None]) -> float | None:
    each = present(shares)
    squares = float((each**2).sum())
    return float(each.sum()) ** 2 / len(each) / squares if len(each) > 1 and squares else None
