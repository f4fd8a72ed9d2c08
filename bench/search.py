"""Searches: where throughput saturates, and the highest rate under a service level objective.

Pure controllers: `ask` says what to probe next, `tell` takes the records of that, `result` is what
is known. `run` joins one to an `async probe(x, count) -> records`, x being users or requests per
second. Every search ends: each point gets a bounded number of probes, and the points close in on
each other or on a limit.

Nothing is called resolved that is not. A point passes or fails only where the exact interval for
the share of requests within the objective clears the target, at a confidence that is shared out
over all looks at the point, since whoever looks again until an interval clears will see it clear.
Requests that wait in one queue are not independent samples, so they count for as many as
`interval.inflation` says. What is still open after the last look is "unresolved", and the search
then closes in on it from both sides.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from bench import interval, measure
from bench.measure import Measures, Slo
from bench.records import Record

Verdict = Literal["pass", "fail", "unresolved"]
Probe = Callable[[float, int], Awaitable[list[Record]]]

_LOOKS = 4
# How many more requests than the fewest that could pass, as some count for less than one.
_SPARE = 2.0
_FEWEST = 64
# With fewer requests under way than this on average, they hardly ever meet.
_IDLE = 0.5
_SLICES = 10
# Requests of a probe for each that is under way at a time. A queue forgets that it began empty
# only over many of them; a user of a closed loop has a first and a last one that are not steady.
_RATE_TURNS, _USER_TURNS = 24, 12
# Below this share of a limit a latency is far from it, and above that one far over it: there it
# does not matter how they vary.
_FAR, _FAR_OVER = 0.2, 2.0
_ROUNDING = 1e-9


class Share(msgspec.Struct, kw_only=True):
    """How many of the requests of a point were within the objective.

    Attributes:
        good, counted: requests; failures are counted and not good.
        inflation: how many of them are worth one independent; the most that a probe showed, as a
            probe that is lucky with its queue also shows less of how its requests hang together.
        independent: counted / inflation.
        low, high: interval for the share, at the confidence of one look.
    """

    good: int = 0
    counted: int = 0
    inflation: float = 1.0
    independent: int = 0
    low: float = 0.0
    high: float = 1.0


class RatePoint(msgspec.Struct, kw_only=True):
    """One rate, and what its probes showed."""

    rate: float
    verdict: Verdict = "unresolved"
    looks: int = 0
    share: Share = msgspec.field(default_factory=Share)
    measures: list[Measures] = msgspec.field(default_factory=list)
    doubts: list[str] = msgspec.field(default_factory=list)


class RateResult(msgspec.Struct, kw_only=True):
    """The highest rate under the objective lies from `rate` to `fails_at`.

    Attributes:
        rate: highest that passed, requests per second; None where none did.
        fails_at: lowest that failed; None where none did.
        resolved: both are known and differ by no more than the precision.
        reason: why it is not resolved; empty where it is.
        goodput_per_s: measured at `rate`.
        points: in the order of their rates.
    """

    rate: float | None
    fails_at: float | None
    resolved: bool
    reason: str
    goodput_per_s: float | None
    points: list[RatePoint]


class UsersPoint(msgspec.Struct, kw_only=True):
    """One number of users, and its throughput.

    Attributes:
        tokens_per_s: mean of slices of time; low and high are its interval, where it has one.
        gain: throughput over that of the point before; gain_low and gain_high are its interval,
            at the confidence of one look.
        resolved: whether that interval tells growth from none.
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
    measures: list[Measures] = msgspec.field(default_factory=list)
    doubts: list[str] = msgspec.field(default_factory=list)


class SweepResult(msgspec.Struct, kw_only=True):
    """Where more users bring no more throughput.

    Attributes:
        users: the fewest whose throughput is within the gain of the greatest; None before any.
        tokens_per_s: the greatest throughput of a point.
        resolved: whether saturation was reached, and at every step growth was told from none.
        reason: why not; empty where it is.
    """

    users: int | None
    tokens_per_s: float | None
    resolved: bool
    reason: str
    points: list[UsersPoint]


Result = TypeVar("Result", RateResult, SweepResult, covariant=True)


class Controller(Protocol[Result]):
    """What a search does between two probes."""

    def ask(self) -> tuple[float, int] | None:
        """(x, count of requests) to probe next, the same until told; None: the search is over."""

    def tell(self, records: Sequence[Record]) -> None:
        """What came back of what was asked for last."""

    @property
    def result(self) -> Result: ...


async def run(
    controller: Controller[Result],
    probe: Probe,
    on_look: Callable[[Result], None] | None = None,
) -> Result:
    """Probe until the search is over. `on_look` is called with what is known after each probe."""
    while (asked := controller.ask()) is not None:
        controller.tell(await probe(*asked))
        if on_look:
            on_look(controller.result)
    return controller.result


# --- the highest rate under an objective ----------------------------------------------------


class RateSearch:
    """Doubles or halves the rate until one passes and one fails, then bisects between them.

    A rate passes where the share of requests within the objective is above its percentile, in
    probes long enough for the server to fill up. With independent latencies a verdict on a rate is
    wrong as seldom as `error` says. In a queue they are not, and how little they are worth is
    itself an estimate: of simulated queues (M/M/8, M/M/32) up to one in seven passed just at its
    true limit, one in 25 at 7% above it, one in 100 at 15% above. Near its limit such a server
    needs many thousand requests a rate, and more often stays unresolved.

    Args:
        slo: the objective.
        start: the first rate, requests per second.
        least, most: limits of the rate.
        precision: how far apart the highest passing and the lowest failing rate may be, 0.05: 5%.
        looks: how often a point is probed at most; each time its requests double.
        error: how likely a verdict on one point may be wrong, on either side.
    """

    def __init__(
        self,
        slo: Slo,
        start: float = 1.0,
        *,
        least: float = 0.01,
        most: float = 10_000.0,
        precision: float = 0.05,
        looks: int = _LOOKS,
        error: float = 0.025,
    ) -> None:
        if not 0 < least <= start <= most:
            raise ValueError(f"rates must be 0 < {least} <= {start} <= {most}")
        self._slo, self._target = slo, slo.percentile / 100
        self._least, self._most, self._precision = least, most, precision
        self._looks, self._confidence = looks, 1 - 2 * error / looks
        # So many must all be good for the interval to clear the target.
        fewest = math.log(error / looks) / math.log(self._target)
        self._first = max(_FEWEST, math.ceil(fewest * _SPARE / 4))
        self._asked = 0
        self._latency_s = 0.0
        self._points: dict[float, RatePoint] = {}
        self._point: RatePoint | None = RatePoint(rate=start)

    def ask(self) -> tuple[float, int] | None:
        if self._point is None:
            return None
        # A quarter of what could pass, which is enough to fail by; then the rest; then as many
        # again as there were.
        looks = self._point.looks
        count = self._first * (2**looks if looks > 1 else 1 + 2 * looks)
        # And as many as it takes for the queue to forget that it began empty.
        turned = math.ceil(2 * _RATE_TURNS * self._point.rate * self._latency_s)
        count = max(count, min(turned, 4 * self._asked) if looks else turned // 4)
        return self._point.rate, count

    def tell(self, records: Sequence[Record]) -> None:
        point = self._point
        if point is None:
            raise ValueError("the search is over: nothing was asked for")
        self._points[point.rate] = point
        self._judge(point, records)
        if point.verdict != "unresolved" or point.looks >= self._looks:
            following = self._following()
            self._point = None if following is None else RatePoint(rate=following)

    @property
    def result(self) -> RateResult:
        passed, failed = self._bracket()
        narrow = passed and failed and failed / passed <= 1 + self._precision + _ROUNDING
        return RateResult(
            rate=passed,
            fails_at=failed,
            resolved=bool(narrow),
            reason="" if narrow else self._reason(passed, failed),
            goodput_per_s=self._goodput_per_s(passed),
            points=sorted(self._points.values(), key=lambda point: point.rate),
        )

    def _judge(self, point: RatePoint, records: Sequence[Record]) -> None:
        window = measure.window(records, None)
        measures = measure.measure(records, self._slo, window)
        point.looks += 1
        point.measures.append(measures)
        point.doubts = measure.doubts(measures)
        from_s, to_s = window or (-math.inf, math.inf)
        counted = sorted(
            (record for record in records if from_s <= record.planned_s <= to_s),
            key=lambda record: record.planned_s,
        )
        used = [self._slo.used(record) for record in counted]
        running = measures.mean_running or 0.0
        self._asked, self._latency_s = len(records), running / point.rate
        # The server begins empty: what was too short for it to fill up flatters it. That can fail
        # a rate, but is no part of what passes one.
        if window and len(used) >= _RATE_TURNS * running:
            point.share = self._with(point.share, used)
            if point.share.low > self._target:
                point.verdict = "pass"
        elif (alone := self._with(Share(), used)).high < self._target:
            point.share = alone
        if point.share.high < self._target:
            point.verdict = "fail"

    def _with(self, share: Share, used: Sequence[float]) -> Share:
        """The requests of one more probe added; `used` is how much of a limit each used."""
        good = share.good + sum(one <= 1 for one in used)
        counted = share.counted + len(used)
        if not counted:
            return share
        near = [min(max(one, _FAR), _FAR_OVER) for one in used]
        inflation = max(share.inflation, interval.inflation(near))
        independent = int(counted / inflation)
        # Rounded against either verdict: a part of a miss is one for a pass, and none for a fail.
        missed = (counted - good) * independent / counted
        most, least = math.ceil(missed - _ROUNDING), math.floor(missed + _ROUNDING)
        low, _ = interval.of_share_exact(max(0, independent - most), independent, self._confidence)
        _, high = interval.of_share_exact(independent - least, independent, self._confidence)
        return Share(
            good=good,
            counted=counted,
            inflation=inflation,
            independent=independent,
            low=low,
            high=high,
        )

    def _hopeless(self) -> str:
        """Why no lower rate need be tried; empty where one may pass."""
        lowest = self._points[min(self._points)]
        if lowest.verdict != "fail":
            return ""
        if not any(measures.ok for measures in lowest.measures):
            return f"nothing succeeded at {lowest.rate:g} requests/s"
        if (lowest.measures[-1].mean_running or 0) < _IDLE:
            return f"the objective is missed by a server that is idle: {lowest.rate:g} requests/s"
        if lowest.rate <= self._least:
            return f"the lowest rate that may be probed failed: {lowest.rate:g} requests/s"
        return ""

    def _bracket(self) -> tuple[float | None, float | None]:
        passed = [p.rate for p in self._points.values() if p.verdict == "pass"]
        failed = [p.rate for p in self._points.values() if p.verdict == "fail"]
        return max(passed, default=None), min(failed, default=None)

    def _following(self) -> float | None:
        """The next rate; None where nothing is left to find."""
        passed, failed = self._bracket()
        rates = sorted(self._points)
        if failed is None and rates[-1] < self._most:
            return min(self._most, rates[-1] * 2)
        if passed is None and rates[0] > self._least and not self._hopeless():
            return max(self._least, rates[0] / 2)
        # Between the two lie only unresolved points; the gap to close first is the lowest one.
        inner = [rate for rate in rates if (passed or 0) <= rate <= (failed or math.inf)]
        gaps = [(inner[0], inner[1]), (inner[-2], inner[-1])] if len(inner) > 1 else []
        ends = [gap for gap in gaps if passed in gap or failed in gap]
        # Around an unresolved point two gaps add up.
        near = (1 + self._precision) ** (1 if len(inner) == 2 else 0.5)
        wide = [(low, high) for low, high in ends if high / low > near + _ROUNDING]
        return math.sqrt(wide[0][0] * wide[0][1]) if wide else None

    def _reason(self, passed: float | None, failed: float | None) -> str:
        if not self._points:
            return "nothing was probed"
        if self._point is not None:
            return "the search is not over"
        if failed is None and self._points[max(self._points)].verdict == "pass":
            return f"the highest rate that may be probed passed: {self._most:g} requests/s"
        return self._hopeless() or (
            "the rates in between are too near the objective to tell with "
            f"{self._looks} probes each"
        )

    def _goodput_per_s(self, rate: float | None) -> float | None:
        if rate is None:
            return None
        steady = [measures for measures in self._points[rate].measures if measures.steady]
        good = sum((m.goodput_per_s or 0.0) * m.duration_s for m in steady)
        return good / sum(measures.duration_s for measures in steady)


# --- where throughput saturates -------------------------------------------------------------


class Sweep:
    """Doubles the users until throughput grows by less than `gain` twice in a row.

    Throughput is the mean over slices of the steady state, ten a probe, whose spread says how
    sure it is. Where the interval of the growth from one point to the next includes `gain`, the
    less sure of the two is probed again.

    Args:
        start, most: users.
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
            raise ValueError(f"users must be 1 <= {start} <= {most}")
        self._most, self._grown, self._looks, self._least = most, 1 + gain, looks, least_count
        self._slices: dict[int, list[float]] = {}
        self._points: list[UsersPoint] = []
        self._point: UsersPoint | None = UsersPoint(users=start)

    def ask(self) -> tuple[float, int] | None:
        if self._point is None:
            return None
        users = self._point.users
        return users, max(self._least, _USER_TURNS * users) * 2**self._point.looks

    def tell(self, records: Sequence[Record]) -> None:
        if self._point is None:
            raise ValueError("the search is over: nothing was asked for")
        if not self._point.looks:
            self._points.append(self._point)
        self._look(self._point, records)
        for before, point in pairwise(self._points):
            self._compare(before, point)
        self._point = self._following()

    @property
    def result(self) -> SweepResult:
        best = max((point.tokens_per_s for point in self._points), default=0.0)
        enough = [p.users for p in self._points if p.tokens_per_s * self._grown >= best]
        reason = self._reason()
        return SweepResult(
            users=min(enough) if best else None,
            tokens_per_s=best or None,
            resolved=not reason,
            reason=reason,
            points=list(self._points),
        )

    def _look(self, point: UsersPoint, records: Sequence[Record]) -> None:
        window = measure.window(records, point.users)
        measures = measure.measure(records, window=window)
        point.looks += 1
        point.measures.append(measures)
        point.doubts = measure.doubts(measures)
        slices = self._slices.setdefault(point.users, [])
        if window:  # Else the probe was too short, and shows no throughput but its start and end.
            slices += _slices(records, window, measures.output_tokens_per_s or 0.0)
        point.tokens_per_s = fmean(slices) if slices else measures.output_tokens_per_s or 0.0
        point.low, point.high = interval.of_mean(slices) or (None, None)

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
        if self._flat() or last.users >= self._most:
            return None
        return UsersPoint(users=min(self._most, last.users * 2))

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
            return f"throughput was not seen to stop growing up to {self._most} users"
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
    return [one * scale for one in seen]


def _spread(point: UsersPoint) -> float:
    """Width of the interval over the mean; infinite where there is no interval."""
    if point.low is None or point.high is None:
        return math.inf
    return (point.high - point.low) / point.tokens_per_s


# --- the result -----------------------------------------------------------------------------


def as_json(result: RateResult | SweepResult) -> dict[str, Any]:
    """A search for result.json: what was found and, of each point, the summary of its probes."""
    found: dict[str, Any] = msgspec.to_builtins(result)
    points: Sequence[RatePoint | UsersPoint] = result.points
    for point, raw in zip(points, found["points"], strict=True):
        raw["summary"] = measure.summary(point.measures)
        if isinstance(point, RatePoint):
            raw["resolved"] = point.verdict != "unresolved"
    return found
