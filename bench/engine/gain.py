"""What a setting gains over the defaults, and what a million tokens cost with it."""

import math
from statistics import fmean
from typing import NotRequired, TypedDict

import msgspec

from bench import interval
from bench.engine.measured import Measured
from bench.engine.score import STEP


class Gain(TypedDict):
    """The score of a setting over that of the defaults.

    Attributes:
        low, high: its 95 % interval; None where there is none.
        in_full: whether both were measured in full.
    """

    ratio: float
    low: float | None
    high: float | None
    in_full: NotRequired[bool]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """The machine time of a million output tokens, and its price if that is known."""

    machine_seconds_a_million_tokens: float
    cost_a_million_tokens: float | None = None


def gain(best: Measured | None, default: Measured | None, last: int, ladder: bool) -> Gain | None:
    """What the best gains over the defaults, with its interval; 1 where the defaults are best.

    Of a search it is what the confirmation says: the scores that the best was chosen by are those
    of the luckiest. Rates lie on a ladder, so that equal ones may differ by a step of it: the
    interval is that much wider on both sides.
    """
    if best is None or default is None or not default.score():
        return None
    if best is default:
        return Gain(ratio=1.0, low=None, high=None, in_full=last in default.outcomes)
    rungs = sorted(set(best.outcomes) & set(default.outcomes))
    if not rungs:
        return None
    over, under = best.held_out, default.held_out
    if not over:  # `--against` measures nothing else, and has nothing to choose.
        over, under = best.outcomes[rungs[-1]].scores, default.outcomes[rungs[-1]].scores
    pairs = [(a, b) for a, b in zip(over, under, strict=False) if min(a, b) > 0]
    if not pairs:
        return None
    bounds = interval.of_paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    wide = STEP if ladder else 1.0
    return Gain(
        ratio=math.exp(fmean(math.log(a / b) for a, b in pairs)),
        low=bounds[0] / wide if bounds else None,
        high=bounds[1] * wide if bounds else None,
        in_full=bool(best.held_out) or rungs[-1] == last,
    )


def cost(tokens_per_s: float, price_per_hour: float | None) -> Cost:
    hours = 1e6 / tokens_per_s / 3600 if tokens_per_s else math.inf
    return Cost(
        machine_seconds_a_million_tokens=hours * 3600,
        cost_a_million_tokens=None if price_per_hour is None else hours * price_per_hour,
    )
