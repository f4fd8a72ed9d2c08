"""The span of a run in which its load was steady."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from bench.measure.flow import Window, sent_and_ended
from bench.measure.latency import last_known_s
from bench.records import Record


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
        ended_s = last_known_s(record)
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
    sent_s, end_s = sent_and_ended(records)
    ends_s = np.sort(end_s)
    under_way = np.searchsorted(np.sort(sent_s), ends_s, side="right") - np.arange(
        1, len(ends_s) + 1
    )
    turned = np.flatnonzero(under_way <= np.arange(1, len(ends_s) + 1))
    if not len(turned):
        return math.inf, -math.inf, 1
    from_s = max(float(ends_s[turned[0]]), min(planned_s) + ramp_s)
    return from_s, max(planned_s), int(np.sum((sent_s <= from_s) & (end_s > from_s)))
