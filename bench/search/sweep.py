"""Where more users bring no more throughput.

Throughput is the mean over slices of the steady state, whose spread says how sure it is. What is
found is the mean of all points that are saturated: the greatest of several noisy points would be
too great. Bench's own lateness is a doubt of a point, and every doubt reaches the result.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import msgspec

from bench import interval, measure
from bench.errors import BenchError
from bench.measure import Mean, Measures, validity
from bench.records import Record
from bench.result import Asked

_LOOKS = 4
_SLICES = 10
# Requests of a probe for each user, whose first and last one are not steady.
_USER_TURNS = 12


class UsersPoint(msgspec.Struct, kw_only=True):
    """One number of users, and its throughput.

    Attributes:
        tokens_per_s: mean of slices of time; low and high are its interval, where it has one.
        gain: throughput over that of the point before; gain_low and gain_high are its interval,
            at the confidence of one look.
        resolved: whether that interval tells growth from none.
        summary: of `measures`, once the sweep is over.
    """

    users: int
    looks: int = 0
    tokens_per_s: float = 0.0
    low: float | None = None
    high: float | None = None
    resolved: bool = False
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    measures: list[Measures] = []
    summary: dict[str, Mean] = {}
    doubts: list[str] = []


class SweepResult(Asked, frozen=True, kw_only=True):
    """Where more users bring no more throughput.

    Attributes:
        users: the fewest whose throughput is within the gain of the greatest; None before any.
        tokens_per_s: mean throughput of the points with so many users or more.
        resolved: whether saturation was reached, and at every step growth was told from none.
        reason: why not; empty where it is.
        doubts: of every point.
    """

    benchmark: str = "sweep"
    users: int | None
    tokens_per_s: float | None
    resolved: bool
    reason: str
    points: list[UsersPoint]


# --- where throughput saturates -------------------------------------------------------------


class Sweep:
    """Doubles the users until throughput grows by less than `gain` twice in a row.

    Throughput is the mean over slices of the steady state, ten a probe, whose spread says how
    sure it is. Where the interval of the growth from one point to the next includes `gain`, the
    less sure of the two is probed again.

    Args:
        start, most: limits of the number of users.
        gain: what counts as growth, 0.05: 5% from one point to the next.
        looks: how often a point is probed at most, each time with twice the requests.
        least_count: requests of the smallest probe.
    """

    def __init__(
        self,
        start: int = 1,
        *,
        most: int = 1024,
        gain: float = 0.05,
        looks: int = _LOOKS,
        least_count: int = 48,
    ) -> None:
        if not 1 <= start <= most:
            raise BenchError.of("start", start, f"must be from 1 to {most}")
        self._max_users, self._grown, self._looks, self._least = (
            most,
            1 + gain,
            looks,
            least_count,
        )
        self._slices: dict[int, list[float]] = {}
        self._points: list[UsersPoint] = []
        self._point: UsersPoint | None = UsersPoint(users=start)

    def ask(self) -> tuple[float, int] | None:
        if self._point is None:
            return None
        users = self._point.users
        return users, max(self._least, _USER_TURNS * users) * 2**self._point.looks

    def tell(self, records: Sequence[Record], doubts: Sequence[str] = ()) -> None:
        if self._point is None:
            raise ValueError("the search is over: nothing was asked for")
        if not self._point.looks:
            self._points.append(self._point)
        self._look(self._point, records, doubts)
        for before, point in pairwise(self._points):
            self._compare(before, point)
        self._point = self._following()

    @property
    def result(self) -> SweepResult:
        best = max((point.tokens_per_s for point in self._points), default=0.0)
        enough = [p.users for p in self._points if p.tokens_per_s * self._grown >= best]
        users = min(enough) if best else None
        reason = self._reason()
        return SweepResult(
            users=users,
            tokens_per_s=self._saturated(users) if users else None,
            resolved=not reason,
            reason=reason,
            doubts=[f"{p.users} users: {doubt}" for p in self._points for doubt in p.doubts],
            points=list(self._points),
        )

    def _saturated(self, users: int) -> float:
        """Mean of all that was seen with so many users or more."""
        slices = [
            each
            for point in self._points
            if point.users >= users
            for each in self._slices[point.users]
        ]
        return fmean(slices) if slices else max(point.tokens_per_s for point in self._points)

    def _look(self, point: UsersPoint, records: Sequence[Record], doubts: Sequence[str]) -> None:
        window = measure.window(records, point.users)
        measures = measure.measure(records, window=window)
        point.looks += 1
        point.measures.append(measures)
        of_bench = [d.text for d in validity.find(measures) if d.kind in validity.NOT_OF_RATE]
        point.doubts += [text for text in (*of_bench, *doubts) if text not in point.doubts]
        slices = self._slices.setdefault(point.users, [])
        if window:  # Else the probe was too short, and shows no throughput but its start and end.
            slices += _slices(records, window, measures.output_tokens_per_s or 0.0)
        point.tokens_per_s = fmean(slices) if slices else measures.output_tokens_per_s or 0.0
        point.low, point.high = interval.of_repeats(slices) or (None, None)

    def _compare(self, before: UsersPoint, point: UsersPoint) -> None:
        if before.tokens_per_s > 0:
            point.gain = point.tokens_per_s / before.tokens_per_s
        slices = self._slices[point.users], self._slices[before.users]
        bounds = interval.of_ratio(*slices, 1 - (1 - interval.CONFIDENCE) / self._looks)
        point.gain_low, point.gain_high = bounds or (None, None)
        point.resolved = bounds is not None and not bounds[0] <= self._grown <= bounds[1]

    def _following(self) -> UsersPoint | None:
        """The point to probe next, which may be one of before; None where the search is over."""
        last = self._points[-1]
        if not last.tokens_per_s:
            return None
        unsure = [point for point in self._points[-2:] if point.looks < self._looks]
        if not last.resolved and unsure and len(self._points) > 1:
            return max(unsure, key=_spread)
        if self._flat() or last.users >= self._max_users:
            return None
        return UsersPoint(users=min(self._max_users, last.users * 2))

    def _flat(self) -> bool:
        """Whether the last two steps brought less than the gain."""
        last = self._points[-2:]
        return len(self._points) > 2 and all((p.gain or 0) < self._grown for p in last)

    def _reason(self) -> str:
        if not self._points:
            return "nothing was probed"
        if self._point is not None:
            return "the search is not over"
        if not self._points[-1].tokens_per_s:
            return f"nothing was answered with {self._points[-1].users} users"
        if not self._flat():
            return f"throughput was not seen to stop growing up to {self._max_users} users"
        unsure = [str(point.users) for point in self._points[1:] if not point.resolved]
        if unsure:
            return (
                f"throughput varies too much to tell growth from none at {', '.join(unsure)} users"
            )
        return ""


def _slices(records: Sequence[Record], window: measure.Window, tokens_per_s: float) -> list[float]:
    """Throughput in equal parts of a window: the mean as `measure` defines it, varied as seen."""
    seen = measure.output_tokens_by_slice(records, window, _SLICES)
    scale = tokens_per_s / fmean(seen) if any(seen) else 0.0
    return [value * scale for value in seen]


def _spread(point: UsersPoint) -> float:
    """Width of the interval over the mean; infinite where there is no interval."""
    if point.low is None or point.high is None:
        return math.inf
    return (point.high - point.low) / point.tokens_per_s
