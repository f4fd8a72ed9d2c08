"""The highest rate under a service level objective.

`RateSearch` doubles the rate in short probes until most requests miss the objective, which no
chance explains and which shows the server's capacity. Then it probes around the rate where just the
allowed share would miss, by the regression of `bench.search.knee` over all that was seen near it.
It ends when the interval for that rate is as narrow as was asked for, or when the time is over;
either way the interval holds the true rate with the stated confidence. Where every rate keeps the
objective, or none does, the highest or lowest is probed until an exact interval for its share says
so.

Bench's own lateness fails no rate. A request that was sent late, and was answered within the
objective from when it was sent, is neither good nor a miss: it is left out, and the result is
doubted.
"""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench import correlation, interval, measure
from bench.errors import BenchError
from bench.measure import Mean, Measures, Slo, validity
from bench.records import Record
from bench.result import Asked
from bench.search.knee import Block, Knee, expected_slope, fit, forgets

Verdict = Literal["pass", "fail", "unresolved"]

# The first probes say in which direction to go, and no more.
_CLIMB_S, _CLIMB_LEAST, _CLIMB_MOST = 8.0, 16, 400
_CLIMB_MISSES, _CLIMB_ODDS = 3, 2.0
# Of a probe near the limit: the misses that it should see, and how much of all requests it is.
_MISSES, _PARTS = 40, 7
_FEWEST = 400
# A queue forgets that it began empty over about as many requests as one independent one is worth:
# a probe is so many times as long, and so many times that are left out at its beginning.
_LONG, _START, _START_MOST = 14.0, 3.0, 0.3
# A probe lasts at least so many times as a request takes.
_TURNS = 4.0
# Blocks of a probe, each with some misses expected.
_BLOCKS, _MISSES_OF_BLOCK = 8, 3
# Probes count for the regression while the log odds that it expects are no farther than this from
# those allowed, and within these ratios of its estimate: farther off they do not grow evenly.
_NEAR_ODDS, _NEAR = 2.5, (1.15, 1.35)
# Log odds to either side of those allowed at which is probed, by what the slope is taken for.
_ODDS_APART, _APART = 0.5, (0.03, 0.15)
# The capacity is seen where so many miss; a rate above this share of it is no use.
_OVERLOADED, _BELOW, _BUSY = 0.5, 0.97, 0.8
_MIDDLE = (0.2, 0.8)
_LEAST_ROUNDS, _MOST_ROUNDS, _EARLIER = 5, 40, 0.5
_TELLS = 1.0  # An interval that is wider than this says nothing; beyond, not even a forecast.
_MOST_FORECAST = 100.0
# With fewer requests under way than this on average, they hardly ever meet.
_IDLE = 0.5
_LOOKS = 4


class Share(msgspec.Struct, kw_only=True):
    """How many of the requests of a point were within the objective.

    Attributes:
        good, counted: requests; failures are counted and not good.
        unknown: requests that only bench made miss; not counted.
        independent: how many independent requests the counted ones are worth.
        low, high: exact interval for the share of that many.
    """

    good: int = 0
    counted: int = 0
    unknown: int = 0
    independent: int = 0
    low: float = 0.0
    high: float = 1.0


class RatePoint(msgspec.Struct, kw_only=True):
    """One rate, and what its probes showed.

    Attributes:
        verdict: by the interval of the whole search, where there is one.
        summary: of `measures`, once the search is over.
    """

    rate: float
    verdict: Verdict = "unresolved"
    looks: int = 0
    share: Share = msgspec.field(default_factory=Share)
    measures: list[Measures] = []
    summary: dict[str, Mean] = {}
    doubts: list[str] = []


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What remains until the precision is reached: requests, and their time."""

    requests: int
    seconds: float


class RateResult(Asked, frozen=True, kw_only=True):
    """The highest rate under the objective lies from `rate` to `fails_at`.

    Attributes:
        estimate: the most likely rate; None where it was not bracketed.
        rate: a rate that keeps the objective, requests per second; None where none did.
        fails_at: a rate that does not; None where all did.
        confidence: that the true rate lies between them.
        resolved: both are known and differ by no more than the precision.
        reason: why it is not resolved; empty where it is.
        goodput_per_s: measured at the highest rate that passed.
        elapsed_s: of all probes.
        forecast: what more would resolve it; None where it is resolved, or nothing is known.
        doubts: of every probe, each once.
        points: in the order of their rates.
    """

    benchmark: str = "search"
    estimate: float | None = None
    rate: float | None
    fails_at: float | None
    confidence: float = 0.0
    resolved: bool
    reason: str
    goodput_per_s: float | None = None
    elapsed_s: float = 0.0
    forecast: Forecast | None = None
    points: list[RatePoint]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe showed of a rate.

    Attributes:
        missed: for each request that was judged, in the order of planned times, whether it missed.
        unknown: how many could not be judged.
        failed: how many were answered with an error, or never.
        running: requests under way on average.
        served_per_s: answers a second in the middle of the probe.
        took_s: until the last answer.
    """

    missed: NDArray[np.bool_]
    unknown: int
    failed: int
    running: float
    served_per_s: float
    took_s: float

    def overloaded(self, allowed: float) -> bool:
        """Whether far more requests missed than the allowed share."""
        if not len(self.missed):
            return False
        return float(self.missed.mean()) > max(_OVERLOADED, (1 + allowed) / 2)


def judge(records: Sequence[Record], slo: Slo) -> Seen:
    """What records say of the server, whose start is left out where a steady state begins later."""
    span = measure.window(records, None)
    ordered = sorted(records, key=lambda record: record.planned_s)
    counted = [r for r in ordered if span is None or r.planned_s >= span[0]]
    judged = [(slo.used(record) <= 1, record) for record in counted]
    late = [not good and _only_late(record, slo) for good, record in judged]
    end_s = max((r.end_s for r in records if r.end_s is not None), default=0.0)
    took_s = sum(r.end_s - r.planned_s for r in records if r.end_s is not None)
    return Seen(
        missed=np.array(
            [not good for (good, _), is_late in zip(judged, late, strict=True) if not is_late],
            dtype=bool,
        ),
        unknown=sum(late),
        failed=sum(not record.ok for record in records),
        running=took_s / end_s if end_s > 0 else 0.0,
        served_per_s=_served_per_s([r.end_s for r in records if r.end_s is not None and r.ok]),
        took_s=end_s,
    )


def _served_per_s(end_s: Sequence[float]) -> float:
    """Answers a second of the middle of a probe, neither filling up nor running dry."""
    if len(end_s) < 2:
        return 0.0
    first_s, last_s = np.quantile(end_s, _MIDDLE)
    apart = (_MIDDLE[1] - _MIDDLE[0]) * len(end_s)
    return float(apart / (last_s - first_s)) if last_s > first_s else math.inf


def _only_late(record: Record, slo: Slo) -> bool:
    """Whether it would have been good, had it been planned for when it was sent."""
    sent_s = record.sent_s
    if sent_s is None or not record.ok:
        return False
    return slo.met_by(msgspec.structs.replace(record, planned_s=sent_s))


def blocks(
    seen: Sequence[tuple[float, Seen]],
    rate: float,
    capacity: float,
    allowed: float,
    memory: float = 1.0,
) -> list[Block]:
    """Blocks of the probes near a rate, without the time in which the queue still filled.

    Args:
        memory: over how many requests the queue was seen to forget its past, where that is longer
            than it is for one of its load in theory.
    """
    fewest = max(1, math.ceil(_MISSES_OF_BLOCK / allowed))
    near, forgotten = _reach(rate, capacity, allowed), forgets(rate / capacity)
    made = []
    for probe, (at, each) in enumerate(seen):
        # Above capacity the share of misses is that of the probe's length.
        if not 1 / near <= at / rate <= near or at > _BELOW * capacity:
            continue
        start = min(_START * max(memory, forgets(at / capacity)), _START_MOST * len(each.missed))
        recent = each.missed[int(start) :]
        for part in np.array_split(recent, min(_BLOCKS, len(recent) // fewest) or 1):
            if len(part):
                made.append(
                    Block(
                        rate=at,
                        missed=int(part.sum()),
                        counted=len(part),
                        probe=probe,
                        weight=forgotten / forgets(at / capacity),
                    )
                )
    return made


def _reach(rate: float, capacity: float, allowed: float) -> float:
    """The ratio up to which probes count for the regression around a rate."""
    slope = expected_slope(allowed, rate / capacity)
    return min(max(math.exp(min(1.0, _NEAR_ODDS / slope)), _NEAR[0]), _NEAR[1])


def estimate(
    seen: Sequence[tuple[float, Seen]],
    rate: float,
    allowed: float,
    confidence: float = interval.CONFIDENCE,
) -> Knee | None:
    """The highest rate within the objective, by probes that another search made around `rate`.

    None where they are too short, or too few, to bound it: an interval wider than a factor of two.
    """
    full = [each.served_per_s for _, each in seen if each.overloaded(allowed)]
    highest = max((at for at, _ in seen), default=0.0)
    capacity = max(max(full, default=highest / _BELOW**2), rate)
    knee = fit(blocks(seen, rate, capacity, allowed), allowed, confidence, rate / capacity)
    return knee if knee is not None and knee.width <= _TELLS else None


class RateSearch:
    """The highest rate at which no more than the allowed share of requests misses an objective.

    Args:
        slo: the objective.
        start: the first rate, requests per second.
        lowest, most: limits of the rate.
        precision: how far apart the ends of the interval may be, 0.15: 15%.
        confidence: that the interval holds the true rate.
        budget_s: time for all probes; None for as long as the precision takes.
    """

    def __init__(
        self,
        slo: Slo,
        start: float = 1.0,
        *,
        lowest: float = 0.01,
        most: float = 10_000.0,
        precision: float = 0.15,
        confidence: float = interval.CONFIDENCE,
        budget_s: float | None = None,
    ) -> None:
        if not 0 < lowest <= start <= most:
            raise BenchError.of("start", start, f"must be from {lowest:g} to most, {most:g}")
        self._slo, self._allowed = slo, 1 - slo.percentile / 100
        self._lowest, self._highest, self._precision = lowest, most, precision
        self._confidence, self._budget_s = confidence, budget_s
        self._points: dict[float, RatePoint] = {}
        self._seen: list[tuple[float, Seen]] = []
        self._rounds = 0
        self._elapsed_s, self._latency_s = 0.0, 0.0
        self._knee: Knee | None = None
        self._widths: list[tuple[int, float]] = []  # Requests near the limit, and the width then.
        self._middle = 0.0  # Around which is probed, once a rate was too high.
        self._rate: float | None = start
        self._reason = ""

    # --- between two probes ---

    def ask(self) -> tuple[float, int] | None:
        """(rate, requests) to probe next, the same until `tell`; None when the search is over."""
        return None if self._rate is None else (self._rate, self._count(self._rate))

    def tell(self, records: Sequence[Record], doubts: Sequence[str] = ()) -> None:
        """What came back of what was asked for last, and what else is doubtful about it."""
        if self._rate is None:
            raise ValueError("the search is over: nothing was asked for")
        rate = self._rate
        point = self._points.setdefault(rate, RatePoint(rate=rate))
        measures = measure.measure(records, self._slo, measure.window(records, None))
        point.measures.append(measures)
        of_bench = [d.text for d in validity.find(measures) if d.kind in validity.NOT_OF_RATE]
        point.doubts += [text for text in (*of_bench, *doubts) if text not in point.doubts]
        self.take(judge(records, self._slo))

    def take(self, seen: Seen) -> None:
        """`tell`, where the requests have been judged."""
        if self._rate is None:
            raise ValueError("the search is over: nothing was asked for")
        rate = self._rate
        self._elapsed_s += seen.took_s
        self._latency_s = seen.running / rate
        self._seen.append((rate, seen))
        self._count_in(rate, seen)
        self._knee = self._fitted()
        self._judge_points()
        self._rate = self._following(rate, seen)

    @property
    def result(self) -> RateResult:
        passed, failed = self._ends()
        narrow = passed and failed and failed / passed <= 1 + self._precision + 1e-9
        knee = self._knee
        return RateResult(
            estimate=knee.rate if knee and passed and failed else None,
            rate=passed,
            fails_at=failed,
            confidence=self._confidence,
            resolved=bool(narrow),
            reason="" if narrow else self._why_not(),
            goodput_per_s=self._goodput_per_s(passed),
            elapsed_s=self._elapsed_s,
            forecast=None if narrow else self.forecast,
            doubts=list(dict.fromkeys(self._doubts())),
            points=sorted(self._points.values(), key=lambda point: point.rate),
        )

    @property
    def forecast(self) -> Forecast | None:
        """By the width of the interval so far, which falls with the root of the requests."""
        if self._knee is None or self._knee.width > _MOST_FORECAST:
            return None
        used = sum(block.counted for block in self._near(self._knee.rate))
        more = used * ((self._knee.width / self._precision) ** 2 - 1)
        return Forecast(requests=max(0, round(more)), seconds=max(0.0, more / self._knee.rate))

    # --- what was seen ---

    def _count_in(self, rate: float, seen: Seen) -> None:
        point = self._points.setdefault(rate, RatePoint(rate=rate))
        point.looks += 1
        missed, count = int(seen.missed.sum()), len(seen.missed)
        share = point.share
        share.unknown += seen.unknown
        share.good += count - missed
        share.counted += count
        everything = np.concatenate([each.missed for at, each in self._seen if at == rate])
        time = correlation.autocorrelation_time(everything.astype(float))
        share.independent = int(share.counted / time)
        lost = (share.counted - share.good) * share.independent / max(1, share.counted)
        error = (1 - self._confidence) / _LOOKS
        share.low, _ = interval.of_share_exact(
            max(0, share.independent - math.ceil(lost)), share.independent, 1 - error
        )
        _, share.high = interval.of_share_exact(
            share.independent - math.floor(lost), share.independent, 1 - error
        )

    def _near(self, rate: float) -> list[Block]:
        return blocks(self._seen, rate, self._capacity(), self._allowed, self._memory())

    def _overloads(self) -> list[float]:
        """Answers a second of each probe that was far above the capacity."""
        return [seen.served_per_s for _, seen in self._seen if seen.overloaded(self._allowed)]

    def _capacity(self) -> float:
        """Answers a second of a server that is full; above the highest rate where none was.

        Not below a rate that keeps the objective: a server may get slower in overload.
        """
        passed, _ = self._bracket()
        full = max(self._overloads(), default=max(self._points) / _BELOW**2)
        return max(full, (passed or 0.0) / _BELOW**2)

    def _memory(self) -> float:
        """How many requests are worth one independent request, by the regression so far."""
        return self._knee.dispersion if self._knee else 1.0

    def _load(self, rate: float) -> float:
        """Which share of the capacity a rate is."""
        return rate / self._capacity()

    def _fitted(self) -> Knee | None:
        """The regression over the probes near its own estimate."""
        passed, failed = self._bracket()
        if not passed or not failed or self._climbing():
            return None
        if not self._middle:
            self._middle = min(math.sqrt(passed * failed), _BUSY * self._capacity())
            return None
        blocks = self._near(self._middle)
        knee = fit(blocks, self._allowed, self._confidence, self._load(self._middle))
        if knee is not None:  # Not farther at a time than the probes so far reach.
            near = _reach(self._middle, self._capacity(), self._allowed)
            self._middle = min(max(knee.rate, self._middle / near), self._middle * near)
            self._widths.append((sum(block.counted for block in blocks), knee.width))
        return knee

    def _climbing(self) -> bool:
        """Whether a higher rate must be seen before any can be said to be too high."""
        return not self._overloads() and max(self._points) < self._highest

    def _bracket(self) -> tuple[float | None, float | None]:
        """The highest rate that seems to keep the objective, and the lowest that seems not to.

        More requests miss at a higher rate. Where fewer do, the rates are judged by all their
        requests together (isotonic regression), so that a short probe in a bad moment does not
        outweigh longer ones above it.
        """
        groups: list[tuple[int, int, list[float]]] = []
        for rate, point in sorted(self._points.items()):
            group = (point.share.counted - point.share.good, point.share.counted, [rate])
            while groups and groups[-1][0] * group[1] >= group[0] * groups[-1][1]:
                missed, counted, rates = groups.pop()
                group = (missed + group[0], counted + group[1], rates + group[2])
            groups.append(group)
        passed = [rate for *share, rates in groups if self._seems_good(*share) for rate in rates]
        failed = [rate for rate in self._points if rate not in passed]
        lowest = min(failed, default=None)
        return max((r for r in passed if lowest is None or r < lowest), default=None), lowest

    def _seems_good(self, missed: int, counted: int) -> bool:
        if counted < _FEWEST:  # A miss or two of a short probe say nothing.
            return missed < max(_CLIMB_MISSES, _CLIMB_ODDS * self._allowed * counted)
        return missed <= self._allowed * counted

    def _judge_points(self) -> None:
        for point in self._points.values():
            if self._knee is not None and self._knee.width <= _TELLS:
                above, below = point.rate > self._knee.high, point.rate < self._knee.low
                point.verdict = "fail" if above else "pass" if below else "unresolved"
            elif point.share.low > 1 - self._allowed:
                point.verdict = "pass"
            elif point.share.high < 1 - self._allowed:
                point.verdict = "fail"

    # --- where to go ---

    def _following(self, rate: float, seen: Seen) -> float | None:
        """The next rate; None where nothing is left to find, or there is no time."""
        passed, failed = self._bracket()
        point = self._points[rate]
        if passed is not None and self._climbing():
            return self._afford(min(self._highest, 2 * max(self._points)))
        if failed is None:
            sure = point.verdict == "pass" or point.looks >= _LOOKS
            return None if sure else self._afford(rate)
        if passed is None:
            idle = seen.running < _IDLE or seen.failed == len(seen.missed)
            sure = point.verdict == "fail" or point.looks >= _LOOKS
            if idle or rate <= self._lowest:
                return None if sure else self._afford(rate)
            return self._afford(max(self._lowest, rate / 2))
        if self._rounds >= _LEAST_ROUNDS and self._narrow():
            return None
        self._rounds += 1
        if self._rounds > _MOST_ROUNDS:
            self._reason = f"{_MOST_ROUNDS} probes near the limit did not tell"
            return None
        return self._afford(self._around())

    def _narrow(self) -> bool:
        """Whether the interval is as narrow as was asked for, and would be by earlier probes.

        An interval is too narrow where by chance few requests missed below the estimate, which is
        then too high. A search that ends at the first narrow interval ends in such moments: its
        intervals held the truth in 88 % of simulated searches. So the width that was to be expected
        by half of the requests, and by all since, must have been narrow as well.
        """
        if self._knee is None:
            return False
        now, _ = self._widths[-1]
        expected = [w * math.sqrt(n / now) for n, w in self._widths if n >= _EARLIER * now]
        return max(expected) <= self._precision

    def _around(self) -> float:
        """Below and above the estimate by turns; never so high that no queue would settle."""
        slope = expected_slope(self._allowed, self._load(self._middle))
        if self._knee is not None:  # As where all requests of a batch miss at once.
            slope = max(slope, self._knee.slope)
        apart = min(max(_ODDS_APART / slope, _APART[0]), _APART[1])
        turned = self._middle * math.exp(apart if self._rounds % 2 else -apart)
        return float(min(max(turned, self._lowest), self._highest, _BELOW * self._capacity()))

    def _count(self, rate: float) -> int:
        passed, failed = self._bracket()
        if not (passed and failed and self._rounds):
            climb = max(
                _CLIMB_LEAST,
                min(round(rate * _CLIMB_S), _CLIMB_MOST),
                round(_TURNS * rate * self._latency_s),
            )
            point = self._points.get(rate)
            if point is not None:  # The end of what may be probed: to be told for sure.
                return max(climb, math.ceil(4 / self._allowed), point.share.counted)
            return climb
        count = max(
            _FEWEST,
            round(_MISSES / self._allowed),
            round(_LONG * max(self._memory(), forgets(self._load(rate)))),
            round(2 * _TURNS * rate * self._latency_s),
            sum(len(seen.missed) for _, seen in self._seen) // _PARTS,
        )
        if self._budget_s is not None:
            parts = max(1, _LEAST_ROUNDS + 1 - self._rounds)
            left = rate * (self._budget_s - self._elapsed_s) / parts
            count = min(count, max(_CLIMB_LEAST, round(left)))
        return count

    def _afford(self, rate: float) -> float | None:
        """The rate, where there is time for a probe of it."""
        if self._budget_s is None:
            return rate
        needed_s = max(_CLIMB_LEAST, 0.5 * _CLIMB_S * rate) / rate
        if self._elapsed_s + needed_s <= self._budget_s:
            return rate
        self._reason = f"the time of {self._budget_s:g} s was over"
        return None

    # --- what is known ---

    def _ends(self) -> tuple[float | None, float | None]:
        knee = self._knee
        if knee is not None and knee.width <= _TELLS:
            return knee.low, knee.high
        if None not in self._bracket():
            return None, None
        sure = {p.rate for p in self._points.values() if p.verdict == "pass"}
        bad = {p.rate for p in self._points.values() if p.verdict == "fail"}
        return max(sure, default=None), min(bad, default=None)

    def _why_not(self) -> str:
        if not self._points:
            return "nothing was probed"
        if self._rate is not None:
            return "the search is not over"
        passed, failed = self._bracket()
        lowest = self._points[min(self._points)]
        if failed is None and max(self._points) >= self._highest:
            return f"the highest rate that may be probed passed: {self._highest:g} requests/s"
        if passed is None and not any(m.ok for m in lowest.measures):
            return f"nothing succeeded at {lowest.rate:g} requests/s"
        if passed is None and lowest.rate <= self._lowest:
            return f"the lowest rate that may be probed failed: {lowest.rate:g} requests/s"
        if passed is None and not self._reason:
            return f"the objective is missed by a server that is idle: {lowest.rate:g} requests/s"
        return self._reason or "the probes do not show how misses grow with the rate"

    def _doubts(self) -> list[str]:
        return [
            f"{point.rate:g} requests/s: {doubt}"
            for _, point in sorted(self._points.items())
            for doubt in point.doubts
        ]

    def _goodput_per_s(self, passed: float | None) -> float | None:
        """Of the probes at the highest rate that keeps the objective."""
        below = [rate for rate in self._points if passed is not None and rate <= passed]
        if not below:
            return None
        steady = [m for m in self._points[max(below)].measures if m.goodput_per_s is not None]
        duration_s = sum(m.duration_s for m in steady)
        good = sum((m.goodput_per_s or 0.0) * m.duration_s for m in steady)
        return good / duration_s if duration_s else None
