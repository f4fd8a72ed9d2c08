"""What a setting of an engine is worth: its score, and the loads that it is measured with."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import msgspec

from bench.engine import trial
from bench.engine.climb import Climb
from bench.engine.orders import LoadOutcome
from bench.engine.trial import Engine
from bench.interval import Bounds
from bench.measure import Slo
from bench.search import seen

STEP = 1.04  # Of the ladder of rates: what two settings must differ by to be told apart.
_FEWEST = 64  # Requests of a probe.
_TURNS = 2.0  # Mean times of a request that a probe lasts at least,
LONGEST = 4.0  # but no longer than so many times --seconds.
_ALL_AT_ONCE = "users=1"
_ALONE, _SURELY = 5, 0.8


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted of a setting.

    Attributes:
        slo: the highest rate within it; None for throughput.
        what: the workload.
        seconds: of a full probe.
        by_cpu: throughput is by the engine's CPU time, not by the clock.
    """

    slo: Slo | None
    what: str
    seconds: float
    by_cpu: bool = False


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What the defaults do with all requests at once, measured first: how long loads must be.

    Attributes:
        requests_per_s: answered; `step_s`: the shortest step, of one sequence.
        read, written: tokens of an average request.
    """

    requests_per_s: float
    step_s: float
    read: float
    written: float


def named(goal: Goal) -> str:
    if goal.slo is None:
        return "throughput"
    limits = {k: v for k, v in msgspec.to_builtins(goal.slo).items() if v is not None}
    return "goodput within " + ", ".join(f"{name} {value:g}" for name, value in limits.items())


def pace(engine: Engine, goal: Goal, limits: Mapping[str, int], limit_s: float) -> Pace:
    """Measure the speed of the defaults, from which the length of the loads follows."""
    alone = [
        _step_s(engine.load(goal.what, _ALL_AT_ONCE, count=1, seed=-2 - n), goal)
        for n in range(_ALONE)
    ]
    count, requests_per_s = _FEWEST, 0.0
    # Longer until it takes a while: the start and the end of a batch are slow.
    while True:
        answer = engine.load(
            goal.what, _ALL_AT_ONCE, count=count, seed=-3, live=limits, limit_s=limit_s
        )
        requests_per_s = count / (answer.cpu_s if goal.by_cpu else answer.elapsed_s)
        if answer.elapsed_s >= goal.seconds / 4 or count >= 4096:
            break
        count *= 2
    return Pace(
        requests_per_s=requests_per_s,
        # It prunes, so it must be below what any step takes, also where the machine is disturbed.
        step_s=_SURELY * min(alone),
        read=fmean(record.input_tokens or 1 for record in answer.records),
        written=fmean(record.output_tokens or 1 for record in answer.records),
    )


def _step_s(answer: LoadOutcome, goal: Goal) -> float:
    """The step of a load of one request, on the clock that scores go by."""
    if goal.by_cpu:
        return answer.cpu_s / answer.steps
    return trial.tpot_s(answer.records) or 0.0


class Probes:
    """What the climbs of one setting showed, and how sure the highest rate is by all of them."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, seen.Seen]] = []

    def add(self, rate: float, answer: LoadOutcome, slo: Slo) -> None:
        self._seen.append((rate, seen.judge(answer.records, slo)))

    def bounds(self, rate: float, slo: Slo) -> Bounds | None:
        """95 % interval for the highest rate within the SLO, near the mean of the climbs.

        None where the probes are too short, or too few, for one.
        """
        knee = seen.estimate(self._seen, rate, 1 - slo.percentile / 100)
        return None if knee is None else (knee.low, knee.high)


def score(
    load: Any,
    goal: Goal,
    pace: Pace,
    share: float,
    seed: int,
    start: int,
    precise: bool,
    probes: Probes | None = None,
) -> tuple[float, int]:
    """One score, and the rung of the ladder where it lies.

    Args:
        load: `Engine.load` or `Served.load`, limits of the scheduler given.
        share: of the requests of a full measurement.
        start: the rung to begin at.
        probes: what each load showed is added to it.
    """
    if goal.slo is None:
        count = max(_FEWEST // 2, round(pace.requests_per_s * goal.seconds * share))
        answer: LoadOutcome = load(goal.what, _ALL_AT_ONCE, count=count, seed=seed)
        return trial.output_tokens_per_s(answer, goal.by_cpu), 0
    climb = Climb(start, gap=1 if precise else 2, probes=12 if precise else 8)
    length_s = goal.seconds * share
    while (rung := climb.ask()) is not None:
        rate, met = rate_of(pace, rung), True
        while met:
            count = max(_FEWEST, round(rate * length_s))
            answer = load(goal.what, f"poisson:rate={rate!r}", count=count, seed=seed, slo=goal.slo)
            good = trial.good_share(answer.records, goal.slo)
            if probes is not None:
                probes.add(rate, answer, goal.slo)
            met = not answer.lost and good >= goal.slo.percentile / 100
            # Until the first requests end there are more and more at once: a load that was over by
            # then has seen nothing of the crowd. One that failed would fail in a longer one too.
            needed_s = min(_TURNS * _mean_s(answer), LONGEST * goal.seconds)
            if count >= 0.9 * rate * needed_s:
                break
            length_s = needed_s
        climb.tell(met)
    result = climb.result
    return (0.0, start) if result is None else (rate_of(pace, result), result)


def _mean_s(answer: LoadOutcome) -> float:
    """How long a request took from when it was planned."""
    took_s = [r.end_s - r.planned_s for r in answer.records if r.ok and r.end_s is not None]
    return fmean(took_s) if took_s else 0.0


def rate_of(pace: Pace, rung: int) -> float:
    """Requests/s of a rung of the ladder; rung 0 is below what the defaults answer at once."""
    return 0.7 * pace.requests_per_s * math.pow(STEP, rung)


def rung_of(pace: Pace, value: float) -> int:
    """The rung of a rate."""
    base = rate_of(pace, 0)
    return round(math.log(value / base) / math.log(STEP)) if min(value, base) > 0 else 0
