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

import numpy as np

from bench import correlation, interval, measure
from bench.errors import BenchError
from bench.measure import Slo, validity
from bench.records import Record
from bench.search.knee import Block, Knee, expected_slope, fit, forgets
from bench.search.rateresult import Forecast, RatePoint, RateResult
from bench.search.seen import BELOW, TELLS, Seen, blocks, judge, reach

# The first probes say in which direction to go, and no more.
_CLIMB_S, _CLIMB_LEAST, _CLIMB_MOST = 8.0, 16, 400
_CLIMB_MISSES, _CLIMB_ODDS = 3, 2.0
# Of a probe near the limit: the misses that it should see, its share of all requests, and its
# length as a multiple of the requests over which the queue forgets its past.
_MISSES, _PARTS, _LONG = 40, 7, 14.0
_FEWEST = 400
# A probe lasts at least so many times as a request takes.
_TURNS = 4.0
# Log odds to either side of those allowed at which is probed, by what the slope is taken for.
_ODDS_APART, _APART = 0.5, (0.03, 0.15)
_BUSY = 0.8  # The first probes near the limit are below this share of the capacity.
_LEAST_ROUNDS, _MOST_ROUNDS, _EARLIER = 5, 40, 0.5
_MOST_FORECAST = 100.0  # An interval that is wider than this has no forecast.
# With fewer requests under way than this on average, they hardly ever meet.
_IDLE = 0.5
_LOOKS = 4


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
            raise BenchError.of("start", start, f"must be from {lowest:g} to {most:g}")
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
        full = max(self._overloads(), default=max(self._points) / BELOW**2)
        return max(full, (passed or 0.0) / BELOW**2)

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
            near = reach(self._middle, self._capacity(), self._allowed)
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
            if self._knee is not None and self._knee.width <= TELLS:
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
        return float(min(max(turned, self._lowest), self._highest, BELOW * self._capacity()))

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
        if knee is not None and knee.width <= TELLS:
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
