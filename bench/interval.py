"""How sure a figure is: intervals for means, ratios, percentiles and shares.

Every `of_...` returns (low, high), or None where the data cannot bear an interval at that
confidence: one repeat says nothing about the next. Nothing is assumed that a benchmark cannot
promise: latencies are not normal, so percentiles get order statistics; shares near 1 are where
approximations fail, so there is an exact interval beside Wilson's. Means of repeats are taken as
normal (t), since a mean over many requests nearly is.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist, fmean, variance

import numpy as np
from numpy.typing import NDArray

Bounds = tuple[float, float]
Samples = Sequence[float] | NDArray[np.float64]
CONFIDENCE = 0.95
_BLOCKS = 10
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(80)


def of_mean(values: Sequence[float], confidence: float = CONFIDENCE) -> Bounds | None:
    """t interval for the mean that `values`, one a repeat, are samples of. None below two."""
    if len(values) < 2:
        return None
    mean, freedom = fmean(values), len(values) - 1
    half = t_quantile((1 + confidence) / 2, freedom) * math.sqrt(variance(values) / len(values))
    return mean - half, mean + half


def of_ratio(
    over: Sequence[float], under: Sequence[float], confidence: float = CONFIDENCE
) -> Bounds | None:
    """Interval for mean(over) / mean(under) of independent repeats: Welch's, on the log scale.

    The log of a mean has the variance (s / mean)² / n (delta method), and the logs of a ratio and
    of its inverse differ in sign only, so swapping the runs inverts the interval. None where a
    mean is not positive or a side has less than two repeats.
    """
    if min(len(over), len(under)) < 2:
        return None
    means = fmean(over), fmean(under)
    if min(means) <= 0:
        return None
    parts = [
        variance(values) / mean**2 / len(values)
        for values, mean in zip((over, under), means, strict=True)
    ]
    centre, squares = math.log(means[0] / means[1]), sum(parts)
    if squares == 0:
        return means[0] / means[1], means[0] / means[1]
    freedom = squares**2 / (parts[0] ** 2 / (len(over) - 1) + parts[1] ** 2 / (len(under) - 1))
    half = t_quantile((1 + confidence) / 2, freedom) * math.sqrt(squares)
    return math.exp(centre - half), math.exp(centre + half)


def of_paired_ratio(
    over: Sequence[float], under: Sequence[float], confidence: float = CONFIDENCE
) -> Bounds | None:
    """Interval for the ratio of repeats that belong together pair by pair, as interleaved ones do.

    A t interval for the mean log ratio: what both of a pair share (drift of the machine, a colder
    first repeat) cancels. None where a value is not positive or there are less than two pairs.
    """
    if len(over) != len(under):
        raise ValueError(f"pairs need as many on both sides, not {len(over)} and {len(under)}")
    if min((*over, *under), default=0) <= 0:
        return None
    logs = [math.log(a / b) for a, b in zip(over, under, strict=True)]
    bounds = of_mean(logs, confidence)
    return bounds and (math.exp(bounds[0]), math.exp(bounds[1]))


def of_percentile(values: Samples, share: float, confidence: float = CONFIDENCE) -> Bounds | None:
    """Order-statistic interval for the percentile below which `share` (0 to 1) of values lie.

    Free of any distribution: how many of n samples lie below the true percentile is binomial, so
    two of the sorted samples bracket it with at least `confidence`, at most half of the rest on
    either side. None where there are no such two, which is below `samples_needed` of `share` or of
    1 - `share`.
    """
    count, tail = len(values), (1 - confidence) / 2
    below = _binomial_cdf(count, share)  # below[k]: at most k samples lie below
    # The low end is the greatest sample with P(fewer lie below than its rank) within the tail.
    low = int(np.searchsorted(below, tail, side="right"))
    high = int(np.searchsorted(below, 1 - tail, side="left")) + 1
    if low < 1 or high > count:
        return None
    ordered = np.sort(np.asarray(values, dtype=float))
    return float(ordered[low - 1]), float(ordered[high - 1])


def samples_needed(share: float, confidence: float = CONFIDENCE) -> int:
    """The least n at which a percentile has an interval: that where 1 - share^n covers one tail.

    368 for the 99th, 72 for the 95th, 36 for the 90th, 6 for the median.
    """
    farther = max(share, 1 - share)
    return math.ceil(math.log((1 - confidence) / 2) / math.log(farther))


def of_share(hits: float, count: float, confidence: float = CONFIDENCE) -> Bounds | None:
    """Wilson's interval for a share. None for a count of 0."""
    if count <= 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = hits / count, z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def of_share_exact(hits: int, count: int, confidence: float = CONFIDENCE) -> Bounds:
    """Clopper and Pearson's interval for a share: wrong at most in `1 - confidence` of cases.

    For verdicts about shares near 1. There Wilson's is too sure: one miss in ten already puts its
    upper end below 0.99, though a server that is right 99% of the time does that one time in ten.
    (0, 1) for a count of 0: nothing is known.
    """
    if not 0 <= hits <= count:
        raise ValueError(f"{hits} of {count} is no share")
    tail = (1 - confidence) / 2
    low, high = 0.0, 1.0
    if hits > 0:  # The share at which as many hits or more are just too rare.
        low = _bisect(lambda share: 1 - _binomial_cdf(count, share)[hits - 1] < tail, 0.0, 1.0)
    if hits < count:  # The share at which as few hits or fewer are just too rare.
        high = _bisect(lambda share: _binomial_cdf(count, share)[hits] > tail, 0.0, 1.0)
    return low, high


def of_share_difference(
    hits: int, count: int, other_hits: int, other_count: int, confidence: float = CONFIDENCE
) -> Bounds | None:
    """Newcombe's interval for hits/count - other_hits/other_count, from Wilson's for each."""
    one, other = of_share(hits, count, confidence), of_share(other_hits, other_count, confidence)
    if one is None or other is None:
        return None
    share, other_share = hits / count, other_hits / other_count
    difference = share - other_share
    return (
        difference - math.hypot(share - one[0], other[1] - other_share),
        difference + math.hypot(one[1] - share, other_share - other[0]),
    )


def inflation(values: Samples) -> float:
    """How many of these samples, in order of time, are worth one independent; >= 1.

    Requests that are under way together wait in the same queue, so latencies come in runs, and an
    interval that takes them for independent is too narrow. The variance of the means of ten blocks
    is compared with what independent samples would give. Never more than a block is long, so it is
    too low where runs are longer than that, and 1 where there are too few samples to say.
    """
    length = len(values) // _BLOCKS
    kept = np.asarray(values[: _BLOCKS * length], dtype=float)
    spread = float(kept.var()) if length > 1 else 0.0
    if spread == 0:
        return 1.0
    means = kept.reshape(_BLOCKS, length).mean(axis=1)
    return max(1.0, length * float(means.var(ddof=1)) / spread)


@lru_cache(maxsize=256)
def t_quantile(probability: float, freedom: float) -> float:
    """Student's t below which `probability` (0.5 to 1) lies; any `freedom` of at least 1.

    With t = sqrt(freedom) tan(angle), the probability of |T| < t is the integral of
    cos(angle)^(freedom - 1) from 0, times a constant. That integrand is smooth, so Gauss-Legendre
    is exact to about 1e-12, and the angle is found by bisection.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile of {probability} with {freedom} degrees of freedom")
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = 2 * math.exp(log_scale) / math.sqrt(math.pi)

    def within(angle: float) -> float:
        angles = angle / 2 * (_NODES + 1)
        return scale * angle / 2 * float(_WEIGHTS @ np.cos(angles) ** (freedom - 1))

    sought = 2 * probability - 1
    # Beyond 40 standard deviations, or a right angle, there is nothing to find.
    most = min(math.pi / 2, math.atan(40 / math.sqrt(freedom)) if freedom > 30 else math.pi / 2)
    angle = _bisect(lambda angle: within(angle) < sought, 0.0, most)
    return math.sqrt(freedom) * math.tan(angle)


def _binomial_cdf(count: int, share: float) -> NDArray[np.float64]:
    """P(at most k of `count`) for k = 0 .. count."""
    if share <= 0 or share >= 1:
        return np.append(np.full(count, 1.0 if share <= 0 else 0.0), 1.0)
    k = np.arange(count + 1)
    logs = _log_choices(count) + k * math.log(share) + (count - k) * math.log1p(-share)
    cdf: NDArray[np.float64] = np.minimum(np.cumsum(np.exp(logs)), 1.0)
    return cdf


@lru_cache(maxsize=8)
def _log_choices(count: int) -> NDArray[np.float64]:
    """Logs of the binomial coefficients of `count` over 0 .. count."""
    k = np.arange(1, count + 1)
    return np.concatenate([[0.0], np.cumsum(np.log((count - k + 1) / k))])


def _bisect(below: Callable[[float], bool], low: float, high: float) -> float:
    """Where `below` turns from true to false."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2
