"""What flowed when: requests and tokens over time, and how many requests were under way."""

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import msgspec
import numpy as np

from bench.measure.latency import Values, last_known_s
from bench.records import Record

Window = tuple[float, float]


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
    steps = max(1, math.ceil(whole_span(everything)[1] / step_s))
    edges = np.arange(steps + 1) * step_s

    def per_s(at_s: Iterable[float], weights: Values | None = None) -> list[float]:
        counts, _ = np.histogram(list(at_s), edges, weights=weights)
        return [float(count) / step_s for count in counts]

    token_s, tokens = token_events(everything)
    sent_s, end_s = sent_and_ended(everything)
    # Time under way before each edge, summed over requests: its growth over a step is the mean.
    under_way = [float((np.minimum(end_s, e) - np.minimum(sent_s, e)).sum()) for e in edges]
    return Timeline(
        t_s=[float(edge) for edge in edges[:-1]],
        planned_per_s=per_s(record.planned_s for record in everything),
        failed_per_s=per_s(last_known_s(record) for record in everything if not record.ok),
        output_tokens_per_s=per_s(token_s, tokens),
        running=[float(growth) / step_s for growth in np.diff(under_way)],
    )


def output_tokens_by_slice(records: Iterable[Record], window: Window, slices: int) -> list[float]:
    """Output tokens per second in each of `slices` equal parts of a window, as chunks came."""
    token_s, tokens = token_events(list(records))
    counts, edges = np.histogram(token_s, slices, range=window, weights=tokens)
    return [float(count) for count in counts / (edges[1] - edges[0])]


def token_events(records: Iterable[Record]) -> tuple[Values, Values]:
    """When output tokens of successes came, and how many: a request's are shared by its chunks."""
    times, amounts = [], []
    for record in records:
        if record.ok and record.output_tokens:
            chunk_s = record.chunk_s or [last_known_s(record)]
            times.append(np.asarray(chunk_s, dtype=float))
            amounts.append(np.full(len(chunk_s), record.output_tokens / len(chunk_s)))
    if not times:
        return np.empty(0), np.empty(0)
    return np.concatenate(times), np.concatenate(amounts)


def share_inside(record: Record, span: Window) -> float:
    """Which share of a request's output came in a span; 0 where it never ended.

    Not of its time: above capacity requests wait ever longer, and a share of their waiting is no
    work of the server.
    """
    if record.end_s is None:
        return 0.0
    arrived_s = record.chunk_s or [record.end_s]
    return (bisect_right(arrived_s, span[1]) - bisect_right(arrived_s, span[0])) / len(arrived_s)


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Per second: successes, their tokens, and those within the objective. None where unknown."""

    requests: float | None
    output_tokens: float | None
    total_tokens: float | None
    good: float | None


def rates(records: Sequence[Record], span: Window, whole: bool, good: set[int] | None) -> Rates:
    """What flowed in a span.

    Args:
        whole: the span is that of the whole load: every request counts as a whole.
        good: of those within the objective, their id(); None without an objective.
    """
    ok = [record for record in records if record.ok]
    per_s: Callable[[list[float]], float | None]
    if not whole and all(record.user is not None for record in ok):
        loop = _Loop.of(records, span)
        per_s = partial(loop.rate, ok)
    else:
        shares = [1.0 if whole else share_inside(record, span) for record in ok]
        duration_s = span[1] - span[0]

        def per_s(amounts: list[float]) -> float | None:
            return per_second(sum(map(operator.mul, amounts, shares)), duration_s)

    output, total = _tokens(ok, inputs=False), _tokens(ok, inputs=True)
    return Rates(
        requests=per_s([1.0] * len(ok)),
        output_tokens=None if output is None else per_s(output),
        total_tokens=None if total is None else per_s(total),
        good=None if good is None else per_s([float(id(record) in good) for record in ok]),
    )


def _tokens(ok: Sequence[Record], inputs: bool) -> list[float] | None:
    """Of each success; None where no usage named output tokens."""
    if all(record.output_tokens is None for record in ok):
        return None
    return [
        float((record.output_tokens or 0) + (record.input_tokens or 0) * inputs) for record in ok
    ]


class _Loop(msgspec.Struct, frozen=True):
    """A closed loop by Little's law: a rate is what is under way over the time that each takes.

    What ends in a window would count too much where lengths vary: at its beginning all users begin
    together, and at its end the long requests are under way. The requests that were planned in it,
    however late they end, are a fair sample of all. The ratio of two means is too great by the
    variance of its denominator, which Beale's estimator takes off.
    """

    running: float
    took_s: dict[int, float]

    @classmethod
    def of(cls, records: Sequence[Record], span: Window) -> "_Loop":
        from_s, to_s = span
        ended = [(r, r.planned_s, r.end_s) for r in records if r.end_s is not None]
        inside_s = sum(
            max(0.0, min(end_s, to_s) - max(planned_s, from_s)) for _, planned_s, end_s in ended
        )
        took_s = {
            id(record): end_s - planned_s
            for record, planned_s, end_s in ended
            if from_s <= planned_s <= to_s
        }
        return cls(inside_s / (to_s - from_s), took_s)

    def rate(self, records: Sequence[Record], amounts: Sequence[float]) -> float | None:
        amount = {id(r): value for r, value in zip(records, amounts, strict=True)}
        x = np.array([amount.get(key, 0.0) for key in self.took_s])
        y = np.array(list(self.took_s.values()))
        if not len(y) or y.sum() <= 0:
            return None
        ratio, count = float(x.sum() / y.sum()), len(y)
        if count > 1 and x.sum() > 0:
            both, own = float(np.cov(x, y)[0, 1]), float(y.var(ddof=1))
            means = float(x.mean() * y.mean()), float(y.mean()) ** 2
            ratio *= (1 + both / count / means[0]) / (1 + own / count / means[1])
        return self.running * ratio


def sent_and_ended(records: Iterable[Record]) -> tuple[Values, Values]:
    """When requests were sent, and when they ended, of those of which both are known."""
    spans = [(r.sent_s, r.end_s) for r in records if r.sent_s is not None and r.end_s is not None]
    both = np.array(spans, dtype=float).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def running_in(records: Iterable[Record], from_s: float, to_s: float) -> tuple[int, float | None]:
    """The most, and the mean number of, requests under way in a span."""
    sent_s, end_s = (np.clip(times, from_s, to_s) for times in sent_and_ended(records))
    valid = end_s > sent_s
    times = np.concatenate([end_s[valid], sent_s[valid]])
    steps = np.concatenate([-np.ones(valid.sum(), int), np.ones(valid.sum(), int)])
    # Stable, so that at one instant ends go before the requests that follow them.
    levels = np.cumsum(steps[np.argsort(times, kind="stable")])
    mean = float((end_s - sent_s).sum()) / (to_s - from_s) if to_s > from_s else None
    return int(levels.max(initial=0)), mean


def whole_span(records: Sequence[Record]) -> Window:
    return (
        min((record.planned_s for record in records), default=0.0),
        max((last_known_s(record) for record in records), default=0.0),
    )


def per_second(amount: float | None, duration_s: float) -> float | None:
    return amount / duration_s if amount is not None and duration_s > 0 else None
