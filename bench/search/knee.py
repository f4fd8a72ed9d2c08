"""At which rate just the allowed share of requests misses an objective, and how sure that is.

Requests per second are to misses what a dose is to its effect: near the limit the log odds of a
miss grow in proportion to the log of the rate. A logistic regression over all probes uses every
request of every rate, where a verdict on each rate alone would need as many for each.

Misses come in runs, as requests wait in one queue. So they are counted in blocks of time, and how
much blocks differ from what the regression expects says how much less they are worth (quasi-
likelihood), by pairs of blocks and by whole probes, as neighbouring blocks resemble each other.
A few probes say little about that and about the slope, so queueing theory is the prior of both:
what M/M/k does at the same share of its capacity. The odds grow a little faster than a straight
line, so the regression has a curvature as well, with that of queues as its prior: a straight line
between probes below and above the limit gives rates that are too low. The interval for the rate
holds all rates at which the fitted odds may be those allowed.
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
# By how much the slope may differ from what is expected of a queue. The probes alone decide where
# they differ from that by so many standard errors, or vary so many times as much about it.
_SLOPE_ERROR, _FREE_SLOPE_ERROR, _SURE, _WORSE = 0.2, 10.0, 2.5, 1.5
# Where misses set in within a few percent, the odds need not grow as a regression has them.
_STEEP, _MISFIT = 2.5, 0.03
_IDLE = 0.4
_ODDS_ERROR = 3.0  # Hardly anything is expected of the share that misses.
# The second derivative of the log odds by the log of the rate, over the slope's square, less the
# share that may miss. In M/G/k with 1 to 16 servers, cv 0 to 2 and 1 to 10 % of misses it is from
# -0.1 to 0.3.
_BENT, _BENT_ERROR = 0.05, 0.12
# How far from the estimate its interval may reach on the log scale, and in how many steps.
_FARTHEST, _GRID = 1.5, 1500


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
    free, expected = (
        _regress(blocks, allowed, load, times) for times in (_FREE_SLOPE_ERROR, _SLOPE_ERROR)
    )
    slope = expected_slope(allowed, load)
    # Unlike any queue, as where every request of a batch misses at once: no prior then.
    fits = expected.dispersion <= _WORSE * free.dispersion and (
        abs(free.coefficients[1] - slope) <= _SURE * math.sqrt(free.covariance[1, 1])
    )
    best = expected if fits else free
    spare = _MISFIT if best.coefficients[1] > _STEEP * slope else 0.0
    odds = math.log(allowed / (1 - allowed))
    apart, steep, bent = (float(value) for value in best.coefficients - [odds, 0, 0])
    if steep <= 0:
        return None
    inside = steep**2 - 2 * bent * apart
    if inside < 0:  # Too far off for the curvature: only a direction.
        at, low, high = -apart / steep, -math.inf, math.inf
    else:
        t = interval.t_quantile((1 + confidence) / 2, len(blocks) / 2 + _EXPECTED)
        at = -2 * apart / (steep + math.sqrt(inside))
        low, high = _within(at, best, odds, t)
    return Knee(
        rate=math.exp(best.centre + at),
        low=math.exp(best.centre + low - spare),
        high=math.exp(min(best.centre + high + spare, 700.0)),
        slope=steep,
        dispersion=best.dispersion,
    )


class _Regression(msgspec.Struct, frozen=True):
    """The log odds of a miss, over the log of the rate less `centre`.

    Attributes:
        coefficients: constant, slope and curvature.
    """

    centre: float
    coefficients: _Values
    covariance: _Values
    dispersion: float


def _regress(
    blocks: Sequence[Block], allowed: float, load: float, slope_error: float
) -> _Regression:
    """Args:
    slope_error: of the prior, over the slope that is expected of a queue.
    """
    counted = np.array([block.counted * block.weight for block in blocks])
    missed = np.array([block.missed * block.weight for block in blocks])
    logs = np.log([block.rate for block in blocks])
    centre = float(np.average(logs, weights=counted))
    design = _powers(logs - centre)
    odds, slope = math.log(allowed / (1 - allowed)), expected_slope(allowed, load)
    dispersion, steep = forgets(load), slope
    for _ in range(_ROUNDS):
        mean = np.array([odds, slope, (allowed + _BENT) * steep**2])
        errors = np.array([_ODDS_ERROR, slope_error * slope, _BENT_ERROR * steep**2])
        estimate = _logistic(design, missed, counted, mean, dispersion / errors**2)
        expected = 1 / (1 + np.exp(-np.clip(design @ estimate, -30, 30)))
        weights = counted * expected * (1 - expected)
        dispersion = _dispersion(blocks, missed - counted * expected, weights, forgets(load))
        steep = max(float(estimate[1]), slope / _STEEP)
    precision = design.T @ (design * weights[:, None]) / dispersion + np.diag(1 / errors**2)
    covariance = np.asarray(np.linalg.inv(precision), dtype=np.float64)
    return _Regression(centre, estimate, covariance, dispersion)


def _powers(logs: _Values) -> _Values:
    """The columns of the regression: constant, slope and curvature."""
    return np.column_stack([np.ones(len(logs)), logs, logs**2 / 2])


def expected_slope(allowed: float, load: float) -> float:
    """Of log odds over the log of the rate, where `allowed` miss at that share of the capacity.

    Within 30 % of what M/M/k, M/D/k and M/G/k with 1 to 16 servers have.
    """
    load = min(max(load, 0.05), 0.95)
    return -math.log(allowed) / (1 - allowed) * (_IDLE + load / (1 - load))


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


def _within(at: float, fitted: _Regression, odds: float, t: float) -> tuple[float, float]:
    """How far from `at`, where they are equal, the fitted odds may still be those allowed."""
    bounds, step = [], _FARTHEST / (_GRID - 1)
    for direction in (-1.0, 1.0):
        reach = np.asarray(at + direction * step * np.arange(_GRID), dtype=np.float64)
        powers = _powers(reach)
        apart = np.abs(powers @ fitted.coefficients - odds)
        errors = np.sqrt(np.einsum("ij,jk,ik->i", powers, fitted.covariance, powers))
        spare = t * errors - apart
        beyond = np.flatnonzero(spare < 0)
        if len(beyond):
            last = beyond[0] - 1
            steps = last + spare[last] / (spare[last] - spare[last + 1])
            bounds.append(at + direction * step * float(steps))
        else:
            bounds.append(direction * math.inf)
    return bounds[0], bounds[1]
