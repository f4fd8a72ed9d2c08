"""What probes of a rate showed: which requests missed the objective, and how that grows.

`judge` reads the records of one probe, `blocks` prepares several probes for the regression of
`bench.search.knee`, and `estimate` applies it to the probes of another search.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench import interval, measure
from bench.measure import Slo
from bench.records import Record
from bench.search.knee import Block, Knee, expected_slope, fit, forgets

# The capacity is seen where so many miss; a rate above this share of it is no use.
_OVERLOADED, BELOW = 0.5, 0.97
_MIDDLE = (0.2, 0.8)
TELLS = 1.0  # An interval that is wider than this says nothing.
# A queue forgets that it began empty over about as many requests as one independent one is worth:
# so many times that are left out at the beginning of a probe, but no more than this share of it.
_START, _START_MOST = 3.0, 0.3
# Blocks of a probe, each with some misses expected.
_BLOCKS, _MISSES_OF_BLOCK = 8, 3
# Probes count for the regression while the log odds that it expects are no farther than this from
# those allowed, and within these ratios of its estimate: farther off they do not grow evenly.
_NEAR_ODDS, _NEAR = 2.5, (1.15, 1.35)


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
    near, forgotten = reach(rate, capacity, allowed), forgets(rate / capacity)
    made = []
    for probe, (at, each) in enumerate(seen):
        # Above capacity the share of misses is that of the probe's length.
        if not 1 / near <= at / rate <= near or at > BELOW * capacity:
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


def reach(rate: float, capacity: float, allowed: float) -> float:
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
    capacity = max(max(full, default=highest / BELOW**2), rate)
    knee = fit(blocks(seen, rate, capacity, allowed), allowed, confidence, rate / capacity)
    return knee if knee is not None and knee.width <= TELLS else None
