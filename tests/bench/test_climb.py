"""What `bench tune` says of a highest rate: an interval, which holds the truth of a known queue."""

import heapq

import numpy as np

from bench.engine import score
from bench.engine.orders import LoadOutcome
from bench.itself.power import LIMIT
from bench.measure import Slo
from bench.records import Record

# M/D/8, as in bench.itself.power: at LIMIT requests/s 5 % wait longer than this.
SLOTS, SERVICE_S = 8, 0.38
SLO = Slo(ttft_s=0.56 * SERVICE_S + 0.01, percentile=95.0)
PACE = score.Pace(requests_per_s=20.0, step_s=0.01, read=20.0, written=8.0)


def load(_: str, when: str, *, count: int, seed: int, slo: Slo) -> LoadOutcome:
    rate, rng = float(when.partition("=")[2]), np.random.default_rng((seed, count))
    free_s, records = [0.0] * SLOTS, []
    for index, at_s in enumerate(np.cumsum(rng.exponential(1 / rate, count)).tolist()):
        start_s = max(at_s, heapq.heappop(free_s))
        heapq.heappush(free_s, start_s + SERVICE_S)
        records.append(
            Record(
                index=index,
                planned_s=at_s,
                sent_s=at_s,
                end_s=start_s + SERVICE_S,
                chunk_s=[start_s + 0.01, start_s + SERVICE_S],
                status=200,
                output_tokens=2,
                asked_output_tokens=2,
            )
        )
    return LoadOutcome(records=records)


def climbed(number: int, seconds: float, repeats: int = 3) -> tuple[float, score.Probes]:
    """The mean of the climbs of one setting, and their probes."""
    goal = score.Goal(slo=SLO, what="w", seconds=seconds)
    probes, rung, values = score.Probes(), 0, []
    for seed in range(repeats):
        value, rung = score.score(
            load, goal, PACE, 1.0, 100 * number + seed, rung, True, probes=probes
        )
        values.append(value)
    return sum(values) / len(values), probes


def test_the_interval_of_a_climb_holds_the_truth() -> None:
    bounds = []
    for number in range(16):
        value, probes = climbed(number, 20.0)
        bounds.append(probes.bounds(value, SLO))
    stated = [each for each in bounds if each is not None]
    assert len(stated) >= 13
    assert sum(low <= LIMIT <= high for low, high in stated) / len(stated) >= 0.85
    assert np.median([high / low for low, high in stated]) < 1.4


def test_probes_that_are_too_short_have_no_interval() -> None:
    value, probes = climbed(0, 3.0, repeats=1)
    assert probes.bounds(value, SLO) is None
