"""At which rate just the allowed share of requests misses an objective, and how sure that is.

Requests per second are to misses what a dose is to its effect: near the limit the log odds of a
miss grow in proportion to the log of the rate. A logistic regression over all probes uses every
request of every rate, where a verdict on each rate alone would need as many for each.

Misses come in runs, as requests wait in one queue. So they are counted in blocks of time, and how
much blocks differ from what the regression expects says how much less they are worth (quasi-
likelihood), by pairs of blocks and by whole probes, as neighbouring blocks resemble each other.
A few probes say little about that and about the slope, so queueing theory is the prior of both:
what M/M/k does at the same share of its capacity. The interval for the rate is Fieller's: all rates
at which the fitted odds may be those allowed.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench import interval

_Values = NDArray[np.float64]
_STEPS, _LONGEST, _ROUNDS = 60, 2.0, 4
_LEAST_PROBES, _LEAST_BLOCKS = 2, 6
_EXPECTED, _CAUTION = 8.0, 1.25
# By how much the slope may differ from what is expected, and its mean over that of a straight line.
_SLOPE_ERROR, _STEEPER = 0.3, 1.2
# Where misses set in within a few percent, the odds need not grow as a regression has them.
_FREE, _STEEP, _MISFIT = 10.0, 2.5, 0.03
_ODDS_ERROR = 3.0  # Hardly anything is expected of the share that misses.
MODE = 3


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """Some time of a probe: how many requests were judged, and how many missed the objective.

    Attributes:
        weight: of one request, beside those of other rates: nearer to the capacity the queue
            forgets more slowly, so a request says less.
    """

    rate: float
    missed: int
    counted: int
    probe: int
    weight: float = 1.0


class Knee(msgspec.Struct, frozen=True, kw_only=True):
    """The rate at which the allowed share misses.

    Attributes:
        rate: the estimate; low and high bound it with the confidence that was asked for, 0 and
            infinite where the probes do not tell.
        slope: of the log odds of a miss over the log of the rate.
        dispersion: how many requests are worth one independent request.
    """

    rate: float
    low: float
    high: float
    slope: float
    dispersion: float

    @property
    def width(self) -> float:
        """By how much the upper bound exceeds the lower one."""
        return self.high / self.low - 1 if self.low > 0 else math.inf


def fit(blocks: Sequence[Block], allowed: float, confidence: float, load: float) -> Knee | None:
    """None where there are too few blocks to say.

    Args:
        allowed: share of requests that may miss.
        load: about which share of the capacity the rate is: what slope and dispersion are taken
            for as long as the blocks do not tell.
    """
    if len({block.probe for block in blocks}) < _LEAST_PROBES or len(blocks) < _LEAST_BLOCKS:
        return None
    counted = np.array([block.counted * block.weight for block in blocks])
    missed = np.array([block.missed * block.weight for block in blocks])
    logs = np.log([block.rate for block in blocks])
    centre = float(np.average(logs, weights=counted))
    design = np.column_stack([np.ones(len(blocks)), logs - centre])
    odds = math.log(allowed / (1 - allowed))
    slope = expected_slope(allowed, load)
    start = np.array([odds, slope])
    spare = _MISFIT
    for slope_error in (_FREE * slope, _SLOPE_ERROR * slope):
        prior = np.array([1 / _ODDS_ERROR**2, 1 / slope_error**2])
        dispersion = forgets(load)
        for _ in range(_ROUNDS):
            estimate = _logistic(design, missed, counted, start, prior * dispersion)
            expected = 1 / (1 + np.exp(-np.clip(design @ estimate, -30, 30)))
            weights = counted * expected * (1 - expected)
            rest = missed - counted * expected
            dispersion = _dispersion(blocks, rest, weights, forgets(load))
        precision = design.T @ (design * weights[:, None]) / dispersion + np.diag(prior)
        # Steeper than any queue, as where every request of a batch misses at once: no prior then.
        if estimate[1] - slope > _STEEP * math.sqrt(np.linalg.inv(precision)[1, 1]):
            break
        spare = 0.0
    if estimate[1] <= 0:
        return None
    t = interval.t_quantile((1 + confidence) / 2, len(blocks) / 2 + _EXPECTED)
    low, high = _fieller(estimate[0] - odds, estimate[1], np.linalg.inv(precision), t)
    return Knee(
        rate=math.exp(centre + (odds - estimate[0]) / estimate[1]),
        low=math.exp(centre + low - spare),
        high=math.exp(min(centre + high + spare, 700.0)),
        slope=float(estimate[1]),
        dispersion=dispersion,
    )


def expected_slope(allowed: float, load: float) -> float:
    """Of log odds over the log of the rate, where `allowed` miss at that share of the capacity.

    At capacity all miss, and the log of the share that misses is about linear below: in M/M/k,
    M/D/k and M/G/k the slope at the limit is 1.1 to 1.4 times that of this line.
    """
    load = min(max(load, 0.2), 0.95)
    return _STEEPER * -math.log(allowed) * load / (1 - load)


def forgets(load: float) -> float:
    """Over about how many requests a queue forgets its past: the relaxation time of M/M/k."""
    load = min(max(load, 0.1), 0.88)
    return max(1.0, load / (1 - math.sqrt(load)) ** 2)


def _logistic(
    design: _Values, missed: _Values, counted: _Values, start: _Values, prior: _Values
) -> _Values:
    """Maximum likelihood with a normal prior, by Newton's steps that are kept short.

    Args:
        start: mean of the prior, and where to begin.
        prior: precision of the prior.
    """
    estimate = start.copy()
    for _ in range(_STEPS):
        expected = 1 / (1 + np.exp(-np.clip(design @ estimate, -30, 30)))
        weights = counted * expected * (1 - expected)
        hessian = design.T @ (design * weights[:, None]) + np.diag(prior)
        gradient = design.T @ (missed - counted * expected) + prior * (start - estimate)
        step = np.linalg.solve(hessian, gradient)
        step *= min(1.0, _LONGEST / max(1e-12, abs(step[0])), start[1] / max(1e-12, abs(step[1])))
        estimate = estimate + step
        if np.abs(step).max() < 1e-8:
            break
    return estimate


def _dispersion(blocks: Sequence[Block], rest: _Values, weights: _Values, expected: float) -> float:
    """Pearson's statistic a degree of freedom, by pairs of blocks and by whole probes together.

    Few probes say little of it, so what is expected counts for `_EXPECTED` degrees.
    """
    probe = np.array([block.probe for block in blocks])
    total, freedom = _EXPECTED * expected, _EXPECTED
    for groups in (_paired(probe), np.unique(probe, return_inverse=True)[1]):
        count = int(groups.max()) + 1
        if count > 2:
            rests, sizes = (np.bincount(groups, each, count) for each in (rest, weights))
            total += float(np.sum(rests**2 / np.maximum(sizes, 1e-12)))
            freedom += count - 2
    return max(1.0, _CAUTION * total / freedom)


def _paired(probe: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each two neighbouring blocks of a probe in one group."""
    groups, last, place = [], -1, 0
    group = -1
    for each in probe:
        place = place + 1 if each == last else 0
        group += place % 2 == 0
        groups.append(group)
        last = each
    return np.array(groups)


def _fieller(apart: float, slope: float, covariance: _Values, t: float) -> tuple[float, float]:
    """Where apart + slope u may be 0: (apart + slope u)² <= t² Var(apart + slope u)."""
    a = slope**2 - t**2 * covariance[1, 1]
    b = apart * slope - t**2 * covariance[0, 1]
    c = apart**2 - t**2 * covariance[0, 0]
    inside = b**2 - a * c
    if a <= 0 or inside < 0:
        return -math.inf, math.inf
    root = math.sqrt(inside)
    return (-b - root) / a, (-b + root) / a
