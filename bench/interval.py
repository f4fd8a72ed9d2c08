"""How sure a figure is: intervals for means, ratios, percentiles and shares.

Every `of_...` returns (low, high), or None where the data cannot bear an interval at that
confidence. Nothing is assumed that a benchmark cannot promise:

- Latencies are not normal, so percentiles get order statistics.
- Requests that queue together are not independent. `of_percentile` and `of_series` take samples in
  the order of time, count them for as many as they are worth (`bench.correlation`), and return None
  below `ENOUGH` independent ones: there the correlation itself cannot be measured.
- A mean of a few skewed values lies far from the true mean more often than Student's t allows, so
  positive values get an interval for the mean of a lognormal distribution, which is that of t where
  the values differ by little.
- Shares near 1 are where approximations fail, so there is an exact interval beside Wilson's.

What these intervals cover is tested in `tests/bench/test_interval.py`, and printed by
`python -m bench.itself`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, variance

import numpy as np
from numpy.typing import NDArray

from bench import correlation

Bounds = tuple[float, float]
Samples = Sequence[float] | NDArray[np.float64]
CONFIDENCE = 0.95
# Below this many values of unknown shape a mean has no interval.
_FEWEST_VALUES = 5
# Independent samples that a series must be worth: below, its correlation is underestimated too
# often, and the series that pass are those where it was. That is why each half of a series must be
# as good: where only the calm of one half lets it pass, it has no interval. A series that shows no
# correlation needs fewer.
ENOUGH, _ENOUGH_UNCORRELATED = 600, 60
_UNCORRELATED, _CORRELATED = 1.5, 3.0
# A correlation is estimated from the same samples, and series whose estimate is too low pass more
# often: it is taken as greater by so many times sqrt(autocorrelation time / samples). With 6, the
# intervals of M/G/1 and M/D/1 queues held the mean in 85 to 91 % of cases.
_CAUTION = 20.0
# Of a weakly correlated process, the short series that have an interval are those that happen to
# show little correlation: of AR(1) 0.3 with 100 samples one in six, and their intervals held the
# mean in 89 %. So the excess of an autocorrelation time over 1 is taken as greater by the cube of
# this over the number of samples: nearly three times as great at 100 samples, and 3 % greater at
# 400. Tails need no such care, as their exceedances are farther apart.
_SHORT = 125.0
# From this percentile on, and below 1 less it, exceedances are rare: they must be worth this many
# times `samples_needed` where they come in runs.
_TAIL, _SPARE = 0.75, 1.5
_MOST_LOG, _ROUNDING = 700.0, 1e-12
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(80)


def of_mean(values: Sequence[float], confidence: float = CONFIDENCE) -> Bounds | None:
    """Interval for the mean of independent values of which nothing else is known.

    None below five values: with fewer a skewed distribution cannot be told from a narrow one. Where
    each value is itself the figure of many requests, use `of_repeats`.
    """
    return of_repeats(values, confidence) if len(values) >= _FEWEST_VALUES else None


def of_repeats(values: Sequence[float], confidence: float = CONFIDENCE) -> Bounds | None:
    """Interval for the mean of `values`, each the figure of one repeat; None below two.

    Student's t, for positive values on the log scale with Cox's correction, so that the interval is
    for the mean and not for the median: it is that of t where values differ by a few percent, and
    reaches farther up where they differ by more. That each value is right by itself is the caller's
    to know: a p99 of too few requests is too low in every repeat.
    """
    if len(values) < 2:
        return None
    if min(values) <= 0:
        return _of_normal(values, confidence)
    logs = [math.log(value) for value in values]
    count, spread = len(logs), variance(logs)
    if spread == 0:
        return values[0], values[0]
    centre = fmean(logs) + spread / 2
    error = math.sqrt(spread / count + spread**2 / (2 * (count - 1)))
    half = t_quantile((1 + confidence) / 2, count - 1) * error
    return math.exp(centre - half), math.exp(min(centre + half, _MOST_LOG))


def _of_normal(values: Sequence[float], confidence: float) -> Bounds | None:
    if len(values) < 2:
        return None
    mean, freedom = fmean(values), len(values) - 1
    half = t_quantile((1 + confidence) / 2, freedom) * math.sqrt(variance(values) / len(values))
    return mean - half, mean + half


def of_series(values: Samples, confidence: float = CONFIDENCE) -> Bounds | None:
    """Interval for the mean of samples in the order of time, which may depend on each other.

    None where they are worth too few independent samples.
    """
    series = np.asarray(values, dtype=float)
    time = _bearable_time(series)
    if time is None:
        return None
    worth = _worth(time, len(series))
    error = float(series.std()) / math.sqrt(worth)
    half, mean = t_quantile((1 + confidence) / 2, worth - 1) * error, float(series.mean())
    if float(series.min()) <= 0:
        return mean - half, mean + half
    # Latencies are skewed: a mean of them is nearer to normal on the log scale.
    return mean * math.exp(-half / mean), mean * math.exp(half / mean)


@dataclass(frozen=True)
class Ratio:
    """A ratio on the log scale, where that of the inverse differs in sign only."""

    log: float
    error: float
    freedom: float

    def bounds(self, confidence: float = CONFIDENCE) -> Bounds:
        half = t_quantile((1 + confidence) / 2, self.freedom) * self.error if self.error else 0.0
        return math.exp(self.log - half), math.exp(self.log + half)

    def p(self) -> float:
        """How likely a ratio as far from 1 is where the true one is 1."""
        if self.error == 0:
            return 1.0 if abs(self.log) < _ROUNDING else 0.0
        return 1 - t_within(abs(self.log) / self.error, self.freedom)


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio | None:
    """mean(over) / mean(under) of independent repeats: Welch's, on the log scale.

    The log of a mean has the variance (s / mean)² / n (delta method). None where a mean is not
    positive or a side has less than two repeats.
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
    squares = sum(parts)
    weights = parts[0] ** 2 / (len(over) - 1) + parts[1] ** 2 / (len(under) - 1)
    freedom = squares**2 / weights if weights else 1.0
    return Ratio(math.log(means[0] / means[1]), math.sqrt(squares), freedom)


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> Ratio | None:
    """The ratio of repeats that belong together pair by pair, as interleaved ones do.

    The mean log ratio: what both of a pair share (drift of the machine, a colder first repeat)
    cancels. None where a value is not positive or there are less than two pairs.
    """
    if len(over) != len(under):
        raise ValueError(f"pairs need as many on both sides, not {len(over)} and {len(under)}")
    if len(over) < 2 or min((*over, *under)) <= 0:
        return None
    logs = [math.log(a / b) for a, b in zip(over, under, strict=True)]
    return Ratio(fmean(logs), math.sqrt(variance(logs) / len(logs)), len(logs) - 1)


def of_ratio(
    over: Sequence[float], under: Sequence[float], confidence: float = CONFIDENCE
) -> Bounds | None:
    """Interval for `ratio`; swapping the runs inverts it."""
    bounds = ratio(over, under)
    return None if bounds is None else bounds.bounds(confidence)


def of_paired_ratio(
    over: Sequence[float], under: Sequence[float], confidence: float = CONFIDENCE
) -> Bounds | None:
    """Interval for `paired_ratio`."""
    bounds = paired_ratio(over, under)
    return None if bounds is None else bounds.bounds(confidence)


def of_percentile(values: Samples, share: float, confidence: float = CONFIDENCE) -> Bounds | None:
    """Interval for the percentile below which `share` (0 to 1) of samples lie.

    Order statistics, free of any distribution: how many of n independent samples lie below the true
    percentile is binomial, so two of the sorted samples bracket it. Ranks between two samples are
    interpolated. Samples that depend on each other count for as many independent ones as the
    sequence of "below" and "above" is worth.

    Args:
        values: in the order of time.

    Returns:
        None where there are no such two samples, which is below `samples_needed` of `share` or of
        1 - `share`, or where the samples are worth too few independent ones.
    """
    series = np.asarray(values, dtype=float)
    count = len(series)
    overall = _bearable_time(series)
    if overall is None:
        return None
    above = (series > np.quantile(series, share)).astype(float)
    mine = correlation.autocorrelation_time(above)
    in_tail = max(share, 1 - share) > _TAIL
    longest = max(mine, overall) if in_tail else mine
    if longest > _UNCORRELATED and count / longest < _SPARE * samples_needed(share, confidence):
        return None
    # The few exceedances of a tail understate how long runs are, all samples overstate it.
    time = math.sqrt(mine * overall)
    worth = int(count / cautious(time, count) if in_tail else _worth(time, count))
    levels = _levels(worth, share, confidence)
    if levels is None:
        return None
    # Rank r of the `worth` independent samples is at r / (worth + 1) of all.
    places = np.clip(np.array(levels) / (worth + 1) * (count + 1) - 1, 0, count - 1)
    low, high = np.interp(places, np.arange(count), np.sort(series))
    return float(low), float(high)


def _levels(count: int, share: float, confidence: float) -> Bounds | None:
    """The two ranks, from 1 and not whole, that bracket a percentile of `count` samples."""
    tail = (1 - confidence) / 2
    below = _binomial_cdf(count, share)  # below[k]: at most k samples lie below
    if below[0] > tail or below[-2] < 1 - tail:
        return None
    # As the probability that fewer than rank samples lie below is below[rank - 1].
    ranks = np.arange(1, count + 1)
    low, high = np.interp([tail, 1 - tail], below[:-1], ranks)
    return float(low), float(high)


def _bearable_time(series: NDArray[np.float64]) -> float | None:
    """The autocorrelation time; None where the samples are worth too few independent ones.

    Of correlated samples it is the longest of the whole series and its halves.
    """
    if len(series) < _ENOUGH_UNCORRELATED:
        return None
    time = _time(series)
    enough = np.interp(time, (_UNCORRELATED, _CORRELATED), (_ENOUGH_UNCORRELATED, ENOUGH))
    if len(series) / time < enough:
        return None
    if time > _CORRELATED:
        time = max(time, *map(_time, np.array_split(series, 2)))
    return time if len(series) / time >= enough else None


def _time(series: NDArray[np.float64]) -> float:
    return max(
        correlation.autocorrelation_time(series),
        correlation.autocorrelation_time(correlation.ranks(series)),
    )


def cautious(time: float, count: int) -> float:
    """An autocorrelation time with what it may be underestimated by."""
    if time < _UNCORRELATED:
        return time
    return 1 + (time - 1) * (1 + _CAUTION * math.sqrt(time / count))


def _worth(time: float, count: int) -> float:
    """How many independent samples a series is worth that was not too short for an interval."""
    excess = cautious(time, count) - 1
    if time < _UNCORRELATED:
        excess *= 1 + (_SHORT / count) ** 3
    return count / (1 + excess)


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
    first, other = of_share(hits, count, confidence), of_share(other_hits, other_count, confidence)
    if first is None or other is None:
        return None
    share, other_share = hits / count, other_hits / other_count
    difference = share - other_share
    return (
        difference - math.hypot(share - first[0], other[1] - other_share),
        difference + math.hypot(first[1] - share, other_share - other[0]),
    )


@lru_cache(maxsize=256)
def t_quantile(probability: float, freedom: float) -> float:
    """Student's t below which `probability` (0.5 to 1) lies; any `freedom` of at least 1.

    The angle of `t_within` is found by bisection.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile of {probability} with {freedom} degrees of freedom")
    sought = 2 * probability - 1
    # Beyond 40 standard deviations, or a right angle, there is nothing to find.
    highest = min(math.pi / 2, math.atan(40 / math.sqrt(freedom)) if freedom > 30 else math.pi / 2)
    angle = _bisect(lambda angle: _within(angle, freedom) < sought, 0.0, highest)
    return math.sqrt(freedom) * math.tan(angle)


def t_within(t: float, freedom: float) -> float:
    """How likely Student's t lies within `t` of 0."""
    if freedom > 30 and t > 40:
        return 1.0
    return min(1.0, _within(math.atan(t / math.sqrt(freedom)), freedom))


def _within(angle: float, freedom: float) -> float:
    """With t = sqrt(freedom) tan(angle), the probability of |T| < t is the integral of
    cos(angle)^(freedom - 1) from 0, times a constant. That integrand is smooth, so Gauss-Legendre
    is exact to about 1e-12."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = 2 * math.exp(log_scale) / math.sqrt(math.pi)
    angles = angle / 2 * (_NODES + 1)
    return scale * angle / 2 * float(_WEIGHTS @ np.cos(angles) ** (freedom - 1))


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
