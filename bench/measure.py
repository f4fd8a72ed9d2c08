"""What came back, in figures: the one place that defines every metric.

Pure: records in, figures out. All latencies count from the time a request was planned for, so that
a client or a server that holds up the load is seen by every request it held up. With `record` for
one request and `window` for the span of time that is measured:

    ttft_s    chunk_s[0] - planned_s                            time to the first token
    tpot_s    (chunk_s[-1] - chunk_s[0]) / (output_tokens - 1)  time per token after the first
    itl_s     the gaps of chunk_s, of all requests together     time between tokens as they came
    e2e_s     end_s - planned_s                                 until the response was complete
    lag_s     sent_s - planned_s                                how late bench itself was

    requests_per_s       successes / duration
    output_tokens_per_s  output tokens of successes / duration
    total_tokens_per_s   input and output tokens of successes / duration
    goodput_per_s        successes that met the SLO / duration
    user_tokens_per_s    output tokens of successes / the sum of their e2e_s: what one user gets
    good_share           requests that met the SLO / requests; a failure has not met it
    failed_share         failures / requests
    max_running, mean_running   requests under way (sent, not ended) at a time
    fairness             Jain's index of user_tokens_per_s over kinds: 1 is equal, 1/kinds is worst

Tokens are those of the server's usage, never chunks: a chunk may hold several. A failure is
counted, and has no latency: as a zero it would make a failing server look fast. A percentile is
None where there are too few samples to say how far off it may be (`interval.samples_needed`: 368
for the 99th); percentiles are linear between samples and deviations divide by n, as in numpy.

Which requests count: for latencies and shares those planned in the window, however late they
ended; leaving out the unfinished would leave out the slow. For what is per second a request counts,
with its tokens, by the share of its time (planned to end) that lies in the window. Counting what
ends in the window, or the chunks that come in it, is off by up to half a request for each user, as
at the beginning of the window all are at the same point of their first request. Without a window
that is every request as a whole, from the first planned time to the last end.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench import interval, spec
from bench.errors import BenchError
from bench.records import Record

Window = tuple[float, float]
_Values = NDArray[np.float64]
_PERCENTS = (50, 90, 95, 99)

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
        for statistic in ("mean", *(f"p{percent}" for percent in _PERCENTS))
    },
}

_LAG_S, _LAG_OF_TTFT = 0.005, 0.05
_CPU, _FAILED_SHARE = 0.9, 0.01
_NOT_STEADY = "no steady state: the run was too short, so its start and its end are measured too"


# --- the latencies of one request -----------------------------------------------------------


def ttft_s(record: Record) -> float | None:
    """None where no token came."""
    return record.chunk_s[0] - record.planned_s if record.chunk_s else None


def tpot_s(record: Record) -> float | None:
    """None where the server's usage is missing, or says less than two tokens."""
    if not record.chunk_s or record.output_tokens is None or record.output_tokens < 2:
        return None
    return (record.chunk_s[-1] - record.chunk_s[0]) / (record.output_tokens - 1)


def itl_s(record: Record) -> list[float]:
    """One less than there were chunks."""
    return [after - before for before, after in pairwise(record.chunk_s)]


def e2e_s(record: Record) -> float | None:
    """None where it never ended."""
    return None if record.end_s is None else record.end_s - record.planned_s


def lag_s(record: Record) -> float | None:
    """None where it was never sent."""
    return None if record.sent_s is None else record.sent_s - record.planned_s


def reason(record: Record) -> str:
    """The class of its failure: the HTTP status, or what its error text begins with."""
    if record.status >= 400:
        return f"http {record.status}"
    return record.error.partition(":")[0]


# --- what is good enough --------------------------------------------------------------------


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """A service level objective: `percentile` % of requests within every limit that is given.

    A request must keep all limits at once, which is a little stricter than each percentile on its
    own. An answer of one token keeps any limit on `tpot_s`.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    percentile: float = 99.0

    def used(self, record: Record) -> float:
        """The greatest share that a request used of a limit: above 1 it missed the objective.

        Infinite for a failure, and where what is limited is not known.
        """
        if not record.ok:
            return math.inf
        tpot = 0.0 if record.output_tokens == 1 else tpot_s(record)
        pairs = ((self.ttft_s, ttft_s(record)), (self.tpot_s, tpot), (self.e2e_s, e2e_s(record)))
        return max(
            (math.inf if took is None else took / limit for limit, took in pairs if limit),
            default=0.0,
        )

    def met_by(self, record: Record) -> bool:
        return self.used(record) <= 1


# Named for the scenarios of MLPerf Inference.
SLOS: Mapping[str, Slo] = {
    "mlperf-server": Slo(ttft_s=2.0, tpot_s=0.1),
    "mlperf-interactive": Slo(ttft_s=0.5, tpot_s=0.03),
}


def parse_slo(text: str) -> Slo:
    """A preset, or limits: "ttft_ms=500,tpot_ms=30,e2e_ms=5000,percentile=95", any of them.

    Raises BenchError, which names the key, its value and the nearest valid choice.
    """
    keys = ("ttft_ms", "tpot_ms", "e2e_ms", "percentile")
    kinds = {**dict.fromkeys(SLOS, ()), "limits": keys}
    options = spec.parse(text, "slo", kinds, BenchError, unnamed="limits")
    if options.name in SLOS:
        return SLOS[options.name]
    limits_ms = [options.number_or_none(key, above=0.0) for key in keys[:3]]
    if not any(limits_ms):
        raise BenchError.of("slo", text, f"limits nothing: give one of {', '.join(keys[:3])}")
    ttft, tpot, e2e = (None if limit is None else limit / 1000 for limit in limits_ms)
    percentile = options.number("percentile", 99.0, least=1.0, most=99.99)
    return Slo(ttft_s=ttft, tpot_s=tpot, e2e_s=e2e, percentile=percentile)


# --- the steady state -----------------------------------------------------------------------


def window(records: Iterable[Record], users: int | None, ramp_s: float = 0.0) -> Window | None:
    """The span in which the load was steady: neither filling up nor running dry.

    Closed loop (`users` of them): from the moment every user has received a first token, until the
    first user finds no more work, which is the earliest last end of a user. In between each user
    has a request under way, or is thinking.

    Open loop (`users` None): from the first end at which at least as many requests have ended as
    are under way, so that those which met an empty server are half gone, but not before `ramp_s`
    (how long the planned rate rises) after the first planned time; until the last planned time.

    Returns:
        (from, to) in seconds of the records' clock. None where there is no such span, or it is too
        short: fewer requests planned in it than there are users, or than are under way at its
        beginning, so that most of what is measured would still be the beginning.
    """
    everything = list(records)
    if users is None:
        from_s, to_s, turn = _open_loop(everything, ramp_s)
    else:
        from_s, to_s, turn = _closed_loop(everything, users)
    planned = sum(from_s <= record.planned_s <= to_s for record in everything)
    return (from_s, to_s) if from_s < to_s and planned >= max(1, turn) else None


def _closed_loop(records: Sequence[Record], users: int) -> tuple[float, float, int]:
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for record in records:
        if record.user is None:
            continue  # Lost with its actor: nobody knows who would have sent it.
        ended_s = _last_known_s(record)
        last[record.user] = max(last.get(record.user, ended_s), ended_s)
        if record.chunk_s:
            begun_s = record.chunk_s[0]
            first[record.user] = min(first.get(record.user, begun_s), begun_s)
    if len(first) < users:
        return math.inf, -math.inf, users
    return max(first.values()), min(last.values()), users


def _open_loop(records: Sequence[Record], ramp_s: float) -> tuple[float, float, int]:
    if not records:
        return math.inf, -math.inf, 1
    planned_s = [record.planned_s for record in records]
    sent_s, end_s = _spans(records)
    ends_s = np.sort(end_s)
    under_way = np.searchsorted(np.sort(sent_s), ends_s, side="right") - np.arange(
        1, len(ends_s) + 1
    )
    turned = np.flatnonzero(under_way <= np.arange(1, len(ends_s) + 1))
    if not len(turned):
        return math.inf, -math.inf, 1
    from_s = max(float(ends_s[turned[0]]), min(planned_s) + ramp_s)
    return from_s, max(planned_s), int(np.sum((sent_s <= from_s) & (end_s > from_s)))


def _last_known_s(record: Record) -> float:
    if record.end_s is not None:
        return record.end_s
    return max(record.planned_s, record.sent_s or 0.0, *record.chunk_s[-1:])


# --- the figures of a run -------------------------------------------------------------------


class Kind(msgspec.Struct, kw_only=True):
    """The figures of one class of requests, beside which others were served."""

    requests: int
    failed: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    e2e_p50_s: float | None
    user_tokens_per_s: float | None


class Measures(msgspec.Struct, kw_only=True):
    """The figures of one repeat. What each means is said at the top of this module.

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
        without_usage: successes for which the server's usage named no output tokens.
        input_tokens, output_tokens, cached_tokens: sums over successes; None where no usage said.
        kinds: empty unless the workload has kinds.
        intervals: 95% intervals for the percentiles of ttft, tpot and e2e by their names, as if
            requests were independent; not for itl, where one request has many.
    """

    steady: bool
    from_s: float
    to_s: float
    duration_s: float
    requests: int
    sent: int
    ok: int
    failed: int
    planned_per_s: float | None
    backlog: int
    failures: dict[str, int]
    failure_texts: dict[str, str]
    statuses: dict[str, int]
    finish_reasons: dict[str, int]
    without_usage: int
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    requests_per_s: float | None
    output_tokens_per_s: float | None
    total_tokens_per_s: float | None
    user_tokens_per_s: float | None
    goodput_per_s: float | None
    good_share: float | None
    failed_share: float | None
    max_running: int
    mean_running: float | None
    kinds: dict[str, Kind]
    fairness: float | None
    ttft_mean_s: float | None
    ttft_std_s: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    tpot_mean_s: float | None
    tpot_std_s: float | None
    tpot_p50_s: float | None
    tpot_p90_s: float | None
    tpot_p95_s: float | None
    tpot_p99_s: float | None
    itl_mean_s: float | None
    itl_std_s: float | None
    itl_p50_s: float | None
    itl_p90_s: float | None
    itl_p95_s: float | None
    itl_p99_s: float | None
    e2e_mean_s: float | None
    e2e_std_s: float | None
    e2e_p50_s: float | None
    e2e_p90_s: float | None
    e2e_p95_s: float | None
    e2e_p99_s: float | None
    lag_p50_s: float | None
    lag_p99_s: float | None
    lag_max_s: float | None
    intervals: dict[str, tuple[float, float]]


def measure(
    records: Iterable[Record], slo: Slo | None = None, window: Window | None = None
) -> Measures:
    """The figures of one repeat, in `window` or, without one, of the whole.

    Rates are None for a duration of 0.
    """
    everything = list(records)
    from_s, to_s = window or _whole(everything)
    counted = [record for record in everything if from_s <= record.planned_s <= to_s]
    ok = [record for record in counted if record.ok]
    shares = [(r, _share_inside(r, from_s, to_s)) for r in everything if r.ok]
    ended = sum(from_s < record.end_s <= to_s for record in everything if record.end_s is not None)
    output, total = _tokens_inside(shares)
    good = {id(record) for record in everything if slo and slo.met_by(record)}
    good_inside = sum(share for record, share in shares if id(record) in good)
    good_share = sum(id(r) in good for r in counted) / len(counted) if counted else None
    latencies = {"ttft": _known(map(ttft_s, ok)), "tpot": _known(map(tpot_s, ok))}
    latencies["e2e"] = _known(map(e2e_s, ok))
    lags = _known(map(lag_s, counted))
    duration_s = to_s - from_s
    per_s = partial(_rate, duration_s=duration_s)
    max_running, mean_running = _running(everything, from_s, to_s)
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
        requests_per_s=per_s(sum(share for _, share in shares)),
        output_tokens_per_s=per_s(output),
        total_tokens_per_s=per_s(total),
        user_tokens_per_s=_user_tokens_per_s(ok),
        goodput_per_s=per_s(good_inside) if slo else None,
        good_share=good_share if slo else None,
        failed_share=(len(counted) - len(ok)) / len(counted) if counted else None,
        max_running=max_running,
        mean_running=mean_running,
        kinds=kinds,
        fairness=_jain([kind.user_tokens_per_s for kind in kinds.values()]),
        lag_p50_s=_percentile(lags, 50),
        lag_p99_s=_percentile(lags, 99),
        lag_max_s=float(lags.max()) if len(lags) else None,
        intervals=_intervals(latencies),
        **_statistics("ttft", latencies["ttft"]),
        **_statistics("tpot", latencies["tpot"]),
        **_statistics("itl", _gaps(ok)),
        **_statistics("e2e", latencies["e2e"]),
    )


def summary(repeats: Sequence[Measures]) -> dict[str, dict[str, float | None]]:
    """For every metric that each repeat has: its mean over repeats, and the t interval for that.

    {metric: {"mean", "low", "high"}}; low and high are None for a single repeat.
    """
    found: dict[str, dict[str, float | None]] = {}
    for metric in METRICS:
        values = [getattr(measures, metric) for measures in repeats]
        if values and None not in values:
            low, high = interval.of_mean(values) or (None, None)
            found[metric] = {"mean": float(np.mean(values)), "low": low, "high": high}
    return found


def _whole(records: Sequence[Record]) -> Window:
    return (
        min((record.planned_s for record in records), default=0.0),
        max((_last_known_s(record) for record in records), default=0.0),
    )


def _rate(amount: float | None, duration_s: float) -> float | None:
    return amount / duration_s if amount is not None and duration_s > 0 else None


def _known(values: Iterable[float | None]) -> _Values:
    return np.array([value for value in values if value is not None], dtype=float)


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _gaps(records: Iterable[Record]) -> _Values:
    lists = [record.chunk_s for record in records if record.chunk_s]
    if not lists:
        return np.empty(0)
    gaps = np.diff(np.concatenate(lists))
    between = np.cumsum([len(chunk_s) for chunk_s in lists])[:-1] - 1
    kept: _Values = np.delete(gaps, between)  # From the end of one request to the next.
    return kept


def _percentile(values: _Values, percent: int) -> float | None:
    if len(values) < interval.samples_needed(percent / 100):
        return None
    return float(np.percentile(values, percent))


def _statistics(latency: str, values: _Values) -> dict[str, float | None]:
    """{"ttft_mean_s": .., "ttft_std_s": .., "ttft_p50_s": .., ..}"""
    found: dict[str, float | None] = {
        f"{latency}_mean_s": float(values.mean()) if len(values) else None,
        f"{latency}_std_s": float(values.std()) if len(values) else None,
    }
    for percent in _PERCENTS:
        found[f"{latency}_p{percent}_s"] = _percentile(values, percent)
    return found


def _intervals(latencies: Mapping[str, _Values]) -> dict[str, interval.Bounds]:
    """{"ttft_p99_s": (low, high), ..} for each percentile that has one."""
    return {
        f"{latency}_p{percent}_s": bounds
        for latency, values in latencies.items()
        for percent in _PERCENTS
        if (bounds := interval.of_percentile(values, percent / 100)) is not None
    }


def _user_tokens_per_s(ok: Sequence[Record]) -> float | None:
    known = [(r.output_tokens, e2e_s(r)) for r in ok if r.output_tokens is not None]
    waited_s = sum(took or 0.0 for _, took in known)
    return sum(tokens for tokens, _ in known) / waited_s if waited_s > 0 else None


def _kinds(counted: Sequence[Record]) -> dict[str, Kind]:
    kinds = sorted({record.kind for record in counted})
    return {kind: _kind([r for r in counted if r.kind == kind]) for kind in kinds if any(kinds)}


def _kind(records: Sequence[Record]) -> Kind:
    ok = [record for record in records if record.ok]
    ttfts = _known(map(ttft_s, ok))
    return Kind(
        requests=len(records),
        failed=len(records) - len(ok),
        ttft_p50_s=_percentile(ttfts, 50),
        ttft_p95_s=_percentile(ttfts, 95),
        e2e_p50_s=_percentile(_known(map(e2e_s, ok)), 50),
        user_tokens_per_s=_user_tokens_per_s(ok),
    )


def _jain(shares: Iterable[float | None]) -> float | None:
    known = _known(shares)
    squares = float((known**2).sum())
    return float(known.sum()) ** 2 / len(known) / squares if len(known) > 1 and squares else None


# --- over time ------------------------------------------------------------------------------


class Timeline(msgspec.Struct, kw_only=True):
    """A run in steps of equal length; the last may be cut by the end.

    Attributes:
        t_s: when each step begins.
        planned_per_s, failed_per_s: requests planned, and failures ended, in the step.
        output_tokens_per_s: of successes, when their chunks came.
        running: mean number of requests under way in the step.
    """

    t_s: list[float]
    planned_per_s: list[float]
    failed_per_s: list[float]
    output_tokens_per_s: list[float]
    running: list[float]


def timeline(records: Iterable[Record], step_s: float = 1.0) -> Timeline:
    """How the load, the answers and the failures of one repeat went over time, from 0."""
    everything = list(records)
    steps = max(1, math.ceil(_whole(everything)[1] / step_s))
    edges = np.arange(steps + 1) * step_s

    def per_s(at_s: Iterable[float], weights: _Values | None = None) -> list[float]:
        counts, _ = np.histogram(list(at_s), edges, weights=weights)
        return [float(count) / step_s for count in counts]

    token_s, tokens = _token_events(everything)
    sent_s, end_s = _spans(everything)
    # Time under way before each edge, summed over requests: its growth over a step is the mean.
    under_way = [float((np.minimum(end_s, e) - np.minimum(sent_s, e)).sum()) for e in edges]
    return Timeline(
        t_s=[float(edge) for edge in edges[:-1]],
        planned_per_s=per_s(record.planned_s for record in everything),
        failed_per_s=per_s(_last_known_s(record) for record in everything if not record.ok),
        output_tokens_per_s=per_s(token_s, tokens),
        running=[float(growth) / step_s for growth in np.diff(under_way)],
    )


def output_tokens_by_slice(records: Iterable[Record], window: Window, slices: int) -> list[float]:
    """Output tokens per second in each of `slices` equal parts of a window, as chunks came."""
    token_s, tokens = _token_events(list(records))
    counts, edges = np.histogram(token_s, slices, range=window, weights=tokens)
    return [float(count) for count in counts / (edges[1] - edges[0])]


def _token_events(records: Iterable[Record]) -> tuple[_Values, _Values]:
    """When output tokens of successes came, and how many: a request's are shared by its chunks."""
    times, amounts = [], []
    for record in records:
        if record.ok and record.output_tokens:
            chunk_s = record.chunk_s or [_last_known_s(record)]
            times.append(np.asarray(chunk_s, dtype=float))
            amounts.append(np.full(len(chunk_s), record.output_tokens / len(chunk_s)))
    if not times:
        return np.empty(0), np.empty(0)
    return np.concatenate(times), np.concatenate(amounts)


def _share_inside(record: Record, from_s: float, to_s: float) -> float:
    """Which share of a request's time lies in a span; 0 where it never ended."""
    if record.end_s is None:
        return 0.0
    took_s = record.end_s - record.planned_s
    if took_s <= 0:
        return float(from_s <= record.planned_s <= to_s)
    return max(0.0, min(record.end_s, to_s) - max(record.planned_s, from_s)) / took_s


def _tokens_inside(shares: Sequence[tuple[Record, float]]) -> tuple[float | None, float | None]:
    """Output tokens, and output and input tokens, of successes that count by these shares.

    None where no usage named output tokens.
    """
    if all(record.output_tokens is None for record, _ in shares):
        return None, None
    output = sum((record.output_tokens or 0) * share for record, share in shares)
    return output, output + sum((record.input_tokens or 0) * share for record, share in shares)


def _spans(records: Iterable[Record]) -> tuple[_Values, _Values]:
    """When requests were sent, and when they ended, of those of which both are known."""
    spans = [(r.sent_s, r.end_s) for r in records if r.sent_s is not None and r.end_s is not None]
    both = np.array(spans, dtype=float).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _running(records: Iterable[Record], from_s: float, to_s: float) -> tuple[int, float | None]:
    """The most, and the mean number of, requests under way in a span."""
    sent_s, end_s = (np.clip(times, from_s, to_s) for times in _spans(records))
    kept = end_s > sent_s
    times = np.concatenate([end_s[kept], sent_s[kept]])
    steps = np.concatenate([-np.ones(kept.sum(), int), np.ones(kept.sum(), int)])
    # Stable, so that at one instant ends go before the requests that follow them.
    levels = np.cumsum(steps[np.argsort(times, kind="stable")])
    mean = float((end_s - sent_s).sum()) / (to_s - from_s) if to_s > from_s else None
    return int(levels.max(initial=0)), mean


# --- whether to trust it --------------------------------------------------------------------


def doubts(
    measures: Measures,
    cpu: Mapping[Any, float] | None = None,
    whole: Measures | None = None,
    batch: bool = False,
) -> list[str]:
    """Why a repeat should not be trusted, one sentence each; empty where nothing is wrong.

    Args:
        measures: of the window, or of the whole where there was no steady state.
        cpu: for each load actor, CPU time over time; 1 is one core.
        whole: of the whole repeat, as failures outside the window count too.
        batch: all was sent at once, and the whole of it is what is measured.
    """
    everything = whole or measures
    found = [] if measures.steady or batch else [_NOT_STEADY]
    if (lag := _doubtful_lag_s(measures)) is not None:
        found.append(
            f"requests were sent late: lag up to {lag * 1e3:.1f} ms, with a median TTFT of "
            f"{(measures.ttft_p50_s or 0) * 1e3:.1f} ms; bench itself held up the load"
        )
    found += [
        f"load actor {actor} used {used:.0%} of a CPU core: bench may be the bottleneck"
        for actor, used in (cpu or {}).items()
        if used > _CPU
    ]
    if not everything.ok:
        found.append(f"nothing succeeded: {_listed(everything.failures) or 'nothing was sent'}")
    elif (everything.failed_share or 0) > _FAILED_SHARE:
        found.append(
            f"{everything.failed} of {everything.requests} requests failed: "
            f"{_listed(everything.failures)}"
        )
    if measures.without_usage:
        found.append(
            f"the server's usage is missing for {measures.without_usage} of {measures.ok} "
            "answers, whose tokens are not counted"
        )
    if falls_behind(measures):
        found.append(
            f"the server fell behind: {measures.requests} requests were planned and "
            f"{measures.requests - measures.backlog} ended, so latencies depend on how long the "
            "run lasted"
        )
    return found


def falls_behind(measures: Measures) -> bool:
    """Whether far more requests were planned in a window than ended in it.

    By more than a tenth, and than three standard deviations of a Poisson count. Users of a closed
    loop wait, so there it never is.
    """
    return measures.steady and measures.backlog > max(
        0.1 * measures.requests, 3 * math.sqrt(measures.requests)
    )


def _doubtful_lag_s(measures: Measures) -> float | None:
    """The 99th percentile of the lag, or where it is unknown the longest, if that is too long."""
    lag = measures.lag_max_s if measures.lag_p99_s is None else measures.lag_p99_s
    limit = max(_LAG_S, _LAG_OF_TTFT * (measures.ttft_p50_s or 0))
    return lag if lag is not None and lag > limit else None


def _listed(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in failures.items())


# --- the names of vllm bench serve ----------------------------------------------------------


def vllm_names(
    records: Iterable[Record],
    *,
    model: str = "",
    endpoint: str = "completions",
    date: str = "",
    slo: Slo | None = None,
    request_rate: float | None = None,
    burstiness: float = 1.0,
    max_concurrency: int | None = None,
    detailed: bool = False,
) -> dict[str, Any]:
    """What `vllm bench serve --save-result` writes, by its names and its definitions.

    These differ from ours, and agree with what it measures on the same requests: latencies count
    from when a request was sent (`sent_s`) and end with its last chunk; nothing is excluded at
    the start and the end; `max_output_tokens_per_s` counts chunks, and `max_concurrent_requests`
    all that were under way at any time in one second. Two things do not agree: a 99th percentile
    of too few samples, like a statistic of nothing, is None here (0 there), and answers without
    usage have no tokens here (there they are counted with a tokenizer).

    Args:
        records: of one repeat or of several; durations of repeats add up.
        date: as %Y%m%d-%H%M%S.
        request_rate, burstiness: of an open loop; None is "inf".
        max_concurrency: users of a closed loop.
        detailed: also what --save-detailed adds, a value for each request. As there, a failed
            request has 0 for what it has not got; `errors` says which failed.
    """
    everything = sorted(records, key=lambda record: (record.repeat, record.index))
    ok = [record for record in everything if record.ok and record.chunk_s]
    repeats = [
        [record for record in everything if record.repeat == repeat]
        for repeat in sorted({record.repeat for record in everything})
    ]
    return {
        "date": date,
        "endpoint_type": "openai-chat" if endpoint == "chat" else "openai",
        "backend": "openai-chat" if endpoint == "chat" else "openai",
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(everything),
        "request_rate": "inf" if request_rate is None else request_rate,
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
        **_vllm_rates(everything, ok, repeats, slo),
        **_vllm_statistics(ok, max_concurrency is not None),
        **_vllm_lists(everything, detailed),
    }


def _vllm_rates(
    everything: Sequence[Record],
    ok: Sequence[Record],
    repeats: Sequence[Sequence[Record]],
    slo: Slo | None,
) -> dict[str, Any]:
    windows = [_whole(repeat) for repeat in repeats]
    duration_s = sum(to_s - from_s for from_s, to_s in windows)
    inputs, outputs = (sum(map(_input_len, ok)), sum(record.output_tokens or 0 for record in ok))
    # vLLM's start of a request is when it was sent.
    good = sum(slo.met_by(_from_sent(record)) for record in ok) if slo else None
    peaks = [_vllm_peaks(repeat) for repeat in repeats]
    per_s = partial(_rate, duration_s=duration_s)
    return {
        "duration": duration_s,
        "completed": len(ok),
        "failed": len(everything) - len(ok),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": per_s(len(ok)),
        "request_goodput": per_s(good),
        "output_throughput": per_s(outputs),
        "total_token_throughput": per_s(inputs + outputs),
        "max_output_tokens_per_s": max((peak[0] for peak in peaks), default=0.0),
        "max_concurrent_requests": max((peak[1] for peak in peaks), default=0),
        "rtfx": 0.0,
    }


def _vllm_statistics(ok: Sequence[Record], queued: bool) -> dict[str, float | None]:
    latencies_s = {
        "ttft": _known(ttft_s(_from_sent(record)) for record in ok),
        "tpot": _known(map(tpot_s, ok)),
        "itl": _gaps(ok),
        "e2el": np.array([_vllm_latency_s(record) for record in ok]),
    }
    if queued:
        latencies_s["client_queue_time"] = _known(map(lag_s, ok))
    found: dict[str, float | None] = {}
    for name, values in latencies_s.items():
        ms = values * 1000
        found[f"mean_{name}_ms"] = float(ms.mean()) if len(ms) else None
        found[f"std_{name}_ms"] = float(ms.std()) if len(ms) else None
        found[f"median_{name}_ms"] = float(np.median(ms)) if len(ms) else None
        for percent in _PERCENTS:
            found[f"p{percent}_{name}_ms"] = _percentile(ms, percent)
    return found


def _vllm_lists(everything: Sequence[Record], detailed: bool) -> dict[str, list[Any]]:
    lists = {
        "latencies": [_vllm_latency_s(record) if record.ok else 0.0 for record in everything],
        "queue_times": [lag_s(record) or 0.0 for record in everything],
    }
    if not detailed:
        return lists
    return lists | {
        "input_lens": [_input_len(record) for record in everything],
        "output_lens": [(record.output_tokens or 0) * record.ok for record in everything],
        "ttfts": [ttft_s(_from_sent(record)) or 0.0 for record in everything],
        "itls": [itl_s(record) for record in everything],
        "start_times": [_from_sent(record).planned_s for record in everything],
        "generated_texts": [record.text for record in everything],
        "errors": [record.error for record in everything],
    }


def _vllm_peaks(records: Sequence[Record]) -> tuple[float, int]:
    """The most chunks, and requests under way, in any one second from the first that was sent."""
    ok = [record for record in records if record.ok and record.chunk_s]
    if not ok:
        return 0.0, 0
    start_s = min(_from_sent(record).planned_s for record in ok)
    chunks = np.concatenate([record.chunk_s for record in ok]) - start_s
    running: Counter[int] = Counter()
    for record in ok:
        first_s = _from_sent(record).planned_s - start_s
        last_s = first_s + _vllm_latency_s(record)
        running.update(range(int(first_s), int(last_s) + 1))
    return float(np.bincount(chunks.astype(int)).max()), max(running.values())


def _vllm_latency_s(record: Record) -> float:
    """From sent to the last chunk; 0 where no chunk came."""
    return record.chunk_s[-1] - _from_sent(record).planned_s if record.chunk_s else 0.0


def _input_len(record: Record) -> int:
    return record.input_tokens or record.asked_input_tokens or 0


def _from_sent(record: Record) -> Record:
    """The record as vLLM sees it: planned when it was sent, and over with its last chunk."""
    last_s = record.chunk_s[-1] if record.chunk_s else record.end_s
    sent_s = record.planned_s if record.sent_s is None else record.sent_s
    return msgspec.structs.replace(record, planned_s=sent_s, end_s=last_s)
