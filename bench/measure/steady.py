"""The span of a run in which its load was steady, and whether its latencies had settled there.

A server that begins empty answers its first requests faster than it will answer later ones. What is
left of that start is found in two steps. MSER-5 cuts off the beginning whose removal makes the mean
of the rest most certain: the means of five requests each, from the cut on, have the least standard
error. It cuts only what differs from the rest by more than correlation explains. And what remains
must be worth enough independent requests, as a queue that was seen for only a few of its ups and
downs may have been seen in a good hour (`Settling`).
"""

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from bench import correlation, interval
from bench.measure.flow import Window, sent_and_ended
from bench.measure.latency import Values, e2e_s, last_known_s, present, ttft_s
from bench.records import Record

_BATCH = 5  # Of MSER-5.
_FEWEST_BATCHES = 8
_ROUNDING = 1e-12
_Z = 1.96
# Below this many independent requests a queue may not have been seen as it is on average. It does
# not matter where the mean is known to a twentieth, or to the few milliseconds of a clock.
_ENOUGH, _UNCORRELATED = 100.0, 3.0
_FEWEST = 20
_FILLED = 0.9
_TURNS = 1.5  # Of each user in a window: fewer are no sample.
# What is counted may have been answered faster by that share because users had run out of work.
_EMPTYING = 0.02
_FEWEST_TURNS = 3
_SMALL_SHARE, _SMALL_S = 0.05, 0.005


def window(records: Iterable[Record], users: int | None, ramp_s: float = 0.0) -> Window | None:
    """The span in which the load was steady: neither filling up nor running dry.

    Closed loop (`users` of them): from the moment every user has received a first token and as many
    requests have ended as there are users. All users begin together, so until then no new prompt
    holds up the answers. Until the first user finds no more work, which is the earliest last end of
    a user; or earlier, if requests would be counted that ended on an emptying server, which is
    faster than the full one (`_until_emptying_s`).

    Open loop (`users` None): from the first end at which at least as many requests have ended as
    are under way, so that those which met an empty server are half gone; but not before nine in ten
    requests take from the first planned time, which is how long as many requests as will be under
    way take to gather, nor before `ramp_s` (how long the planned rate rises), nor before MSER-5
    cuts the TTFT and the end-to-end time; until the last planned time.

    Returns:
        (from, to) in seconds of the records' clock. None where there is no such span, or it is too
        short: fewer requests planned in it than two for each user, or than are under way at its
        beginning, so that most of what is measured would still be the beginning.
    """
    everything = list(records)
    if users is None:
        from_s, to_s, turn = _open_loop(everything, ramp_s)
        from_s = max(from_s, _settled_from_s(everything, from_s, to_s))
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
    ends_s = sorted(record.end_s for record in records if record.end_s is not None)
    if len(first) < users or len(ends_s) < users:
        return math.inf, -math.inf, users
    from_s, idle_s = max(*first.values(), ends_s[users - 1]), min(last.values())
    return from_s, _until_emptying_s(records, from_s, idle_s), math.ceil(_TURNS * users)


def _until_emptying_s(records: Sequence[Record], from_s: float, idle_s: float) -> float:
    """The latest end of a window whose requests gain little from running on beside idle users.

    Requests of one length end together, and none is cut. Where lengths vary, the last requests of a
    loop are answered by a server with ever fewer of them, which may be faster. How long one runs on
    is what is expected of any request that was sent when it was: with its own time the window would
    end before a long one, and hold too many short ones.
    """
    counted = sorted(
        (r for r in records if r.end_s is not None and from_s <= r.planned_s <= idle_s),
        key=lambda r: r.planned_s,
    )
    if not counted:
        return idle_s
    planned_s = np.array([r.planned_s for r in counted])
    ended_s = np.array([r.end_s or 0.0 for r in counted])
    took_s = np.sort(ended_s - planned_s)
    left_s = idle_s - planned_s
    # The mean of what requests take beyond the time that was left to each.
    longer = np.searchsorted(took_s, left_s, side="right")
    beyond_s = np.append(np.cumsum(took_s[::-1])[::-1], 0.0)[longer]
    gained_s = _gain(counted, idle_s) * np.cumsum(beyond_s - left_s * (len(took_s) - longer))
    full = np.flatnonzero(gained_s <= _EMPTYING * took_s.mean() * np.arange(1, len(took_s) + 1))
    if len(full) == len(counted):
        return idle_s
    return float(planned_s[full[-1]]) if len(full) else -math.inf


def _gain(records: Sequence[Record], idle_s: float) -> float:
    """By which share requests need less time for a token once users are idle; 1 if not known."""
    late = [r for r in records if r.end_s is not None and r.end_s > idle_s]
    late_s = sum((r.end_s or 0.0) - idle_s for r in late)
    paces_s = _pace_s(late), _pace_s([r for r in records if r.end_s and r.end_s <= idle_s])
    if not late_s or None in paces_s:
        return 1.0
    share = late_s / sum((r.end_s or 0.0) - r.planned_s for r in late)
    ratio = (paces_s[0] or 0.0) / (paces_s[1] or 1.0)
    return min(1.0, max(0.0, (1 - ratio) / share))


def _pace_s(records: Sequence[Record]) -> float | None:
    """Seconds a token after the first, over all requests; None where no tokens are known."""
    several = [r for r in records if (r.output_tokens or 0) > 1 and len(r.chunk_s) > 1]
    tokens = sum((r.output_tokens or 0) - 1 for r in several)
    return sum(r.chunk_s[-1] - r.chunk_s[0] for r in several) / tokens if tokens else None


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
    # Of the first half: above capacity the later ones take ever longer.
    middle_s = float(np.median(planned_s))
    took_s = present(e2e_s(record) for record in records if record.planned_s <= middle_s)
    from_s = max(
        float(ends_s[turned[0]]),
        min(planned_s) + ramp_s,
        min(planned_s) + (float(np.quantile(took_s, _FILLED)) if len(took_s) else 0.0),
    )
    return from_s, max(planned_s), int(np.sum((sent_s <= from_s) & (end_s > from_s)))


# --- the start, as the latencies show it ----------------------------------------------------


def _settled_from_s(records: Sequence[Record], from_s: float, to_s: float) -> float:
    """When the first request was planned whose latencies MSER-5 keeps."""
    counted = sorted(
        (r for r in records if r.ok and from_s <= r.planned_s <= to_s), key=lambda r: r.planned_s
    )
    if not len(counted):
        return from_s
    series = [present(map(of, counted)) for of in (ttft_s, e2e_s)]
    cut = max(mser(values) for values in series if len(values) == len(counted) or not len(values))
    return counted[cut].planned_s if cut else from_s


def mser(values: Values) -> int:
    """How many of the first samples MSER-5 cuts off; at most half, and 0 where there are too few.

    The cut has the least sum of squares of what remains over the square of its size, and what it
    cuts off differs from what remains.
    """
    batches = len(values) // _BATCH
    if batches < _FEWEST_BATCHES:
        return 0
    means = values[: batches * _BATCH].reshape(batches, _BATCH).mean(axis=1)
    left = np.arange(batches, 0, -1)
    sums, squares = (np.cumsum(x[::-1])[::-1] for x in (means, means**2))
    errors = np.maximum(squares - sums**2 / left, 0.0) / left.astype(float) ** 2
    # Differences of rounding are none: the earliest cut stays.
    errors[errors <= _ROUNDING * float(squares[0])] = 0.0
    cut = int(np.argmin(errors[: batches // 2 + 1]))
    return cut * _BATCH if cut and _differ(means, cut) else 0


def _differ(means: Values, cut: int) -> bool:
    """Whether the part before a cut differs from the rest by more than correlation explains.

    Without this check MSER prefers the quiet hours of a queue that is in its steady state.
    """
    time = correlation.autocorrelation_time(means)
    error = float(means.std()) * math.sqrt(time / cut + time / (len(means) - cut))
    return abs(float(means[:cut].mean() - means[cut:].mean())) > _Z * error


class Settling(msgspec.Struct, frozen=True, kw_only=True):
    """How well a steady mean is known from correlated latencies.

    Attributes:
        requests: whose latencies are known, in each repeat.
        independent: how many independent requests they are worth.
        error_s: half of a 95% interval for the mean, at that worth; as `error_share` of the mean.
    """

    requests: int
    independent: float
    error_s: float
    error_share: float

    @property
    def settled(self) -> bool:
        """Whether the mean can be trusted: it was seen often enough, or hardly varies."""
        return (
            self.independent >= _ENOUGH
            or self.independent >= self.requests / _UNCORRELATED
            or self.error_share <= _SMALL_SHARE
            or self.error_s <= _SMALL_S
        )


def settling(values: Values, users: int | None = None) -> Settling | None:
    """Of latencies in the order of their planned times; None where there are too few to say.

    Args:
        users: of a closed loop. Requests of equal length stay in step there: all users wait for
            the same prefill, turn after turn, and such waves say more about the mean than their
            correlation admits. So the error is also that of the means of turns, if it is smaller.
    """
    count = len(values)
    if count < _FEWEST:
        return None
    ranked = correlation.autocorrelation_time(correlation.ranks(values))
    independent = count / max(ranked, correlation.autocorrelation_time(values))
    mean = float(values.mean())
    error_s = _Z * float(values.std()) / math.sqrt(independent)
    if users is not None:
        error_s = min(error_s, _error_of_turns_s(values, users))
    return Settling(
        requests=count,
        independent=independent,
        error_s=error_s,
        error_share=error_s / mean if mean > 0 else 0.0,
    )


def averaged(repeats: Sequence[Values]) -> Values:
    """Repeats of a run as one series: at each place in the order of time, their mean.

    What differs between repeats by chance averages out. What all of them have at the same place, as
    a queue that grows does, stays.
    """
    shortest = min(map(len, repeats))
    places = [np.linspace(0, len(values) - 1, shortest).round().astype(int) for values in repeats]
    means: Values = np.mean([v[at] for v, at in zip(repeats, places, strict=True)], axis=0)
    return means


def _error_of_turns_s(values: Values, users: int) -> float:
    """Half of a 95% interval for the mean, from the means of as many requests as there are users.

    Infinite where there are too few turns.
    """
    turns = len(values) // users
    if turns < _FEWEST_TURNS:
        return math.inf
    means = values[-turns * users :].reshape(turns, users).mean(axis=1)
    independent = max(2.0, turns / correlation.autocorrelation_time(means))
    spread_s = float(means.std(ddof=1))
    return interval.t_quantile(0.975, independent - 1) * spread_s / math.sqrt(independent)
