"""The latencies of one request, each derived from the raw times of its record."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bench import interval
from bench.records import Record
from bench.traffic.verdict import ONE_PIECE

Values = NDArray[np.float64]
PERCENTS = (50, 90, 95, 99)


def ttft_s(record: Record) -> float | None:
    """None where no token came."""
    return record.chunk_s[0] - record.planned_s if record.chunk_s else None


def tpot_s(record: Record) -> float | None:
    """None where the server's usage is missing or says less than two tokens, and where the answer
    came in one piece: then nobody knows. Of several answers in one response, as if one by one."""
    if len(record.chunk_s) < 2 or record.odd or record.output_tokens is None:
        return None
    tokens, took_s = record.output_tokens / record.choices, record.chunk_s[-1] - record.chunk_s[0]
    return took_s / (tokens - 1) if tokens >= 2 and took_s > 0 else None


def itl_s(record: Record) -> list[float]:
    """One less than there were chunks; none of an answer that came in one piece."""
    if _came_at_once(record):
        return []
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


def last_known_s(record: Record) -> float:
    if record.end_s is not None:
        return record.end_s
    return max(record.planned_s, record.sent_s or 0.0, *record.chunk_s[-1:])


def _came_at_once(record: Record) -> bool:
    return record.odd.startswith(ONE_PIECE)


def present(values: Iterable[float | None]) -> Values:
    return np.array([value for value in values if value is not None], dtype=float)


def gaps(records: Iterable[Record]) -> Values:
    lists = [r.chunk_s for r in records if r.chunk_s and not _came_at_once(r)]
    if not lists:
        return np.empty(0)
    gaps = np.diff(np.concatenate(lists))
    between = np.cumsum([len(chunk_s) for chunk_s in lists])[:-1] - 1
    within: Values = np.delete(gaps, between)  # From the end of one request to the next.
    return within


def percentile(values: Values, percent: int) -> float | None:
    if len(values) < interval.samples_needed(percent / 100):
        return None
    return float(np.percentile(values, percent))
