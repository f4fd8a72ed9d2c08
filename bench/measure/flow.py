"""What flowed when: requests and tokens over time, and how many requests were under way."""

import math
from collections.abc import Iterable, Sequence

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


def share_inside(record: Record, from_s: float, to_s: float) -> float:
    """Which share of a request's time lies in a span; 0 where it never ended."""
    if record.end_s is None:
        return 0.0
    took_s = record.end_s - record.planned_s
    if took_s <= 0:
        return float(from_s <= record.planned_s <= to_s)
    return max(0.0, min(record.end_s, to_s) - max(record.planned_s, from_s)) / took_s


def tokens_inside(shares: Sequence[tuple[Record, float]]) -> tuple[float | None, float | None]:
    """Output tokens, and output and input tokens, of successes that count by these shares.

    None where no usage named output tokens.
    """
    if all(record.output_tokens is None for record, _ in shares):
        return None, None
    output = sum((record.output_tokens or 0) * share for record, share in shares)
    return output, output + sum((record.input_tokens or 0) * share for record, share in shares)


def sent_and_ended(records: Iterable[Record]) -> tuple[Values, Values]:
    """When requests were sent, and when they ended, of those of which both are known."""
    spans = [(r.sent_s, r.end_s) for r in records if r.sent_s is not None and r.end_s is not None]
    both = np.array(spans, dtype=float).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def running_in(records: Iterable[Record], from_s: float, to_s: float) -> tuple[int, float | None]:
    """The most, and the mean number of, requests under way in a span."""
    sent_s, end_s = (np.clip(times, from_s, to_s) for times in sent_and_ended(records))
    kept = end_s > sent_s
    times = np.concatenate([end_s[kept], sent_s[kept]])
    steps = np.concatenate([-np.ones(kept.sum(), int), np.ones(kept.sum(), int)])
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
