"""Intervals cover what they claim to cover, in simulations whose truth is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from bench import interval


def covered(bounds: Callable[[np.random.Generator], interval.Bounds | None], truth: float) -> float:
    """In which share of 600 simulations an interval holds the truth; None never does."""
    hits = 0
    for seed in range(600):
        found = bounds(np.random.default_rng(seed))
        hits += found is not None and found[0] <= truth <= found[1]
    return hits / 600


def misses(hits: int, count: int, share: float) -> float:
    """P(exactly so many hits)."""
    return math.comb(count, hits) * share**hits * (1 - share) ** (count - hits)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.30265), (4, 2.77645), (10, 2.22814), (30, 2.04227), (1e6, 1.95997)],
)
def test_t_quantiles_are_those_of_the_printed_tables(freedom: float, expected: float) -> None:
    assert interval.t_quantile(0.975, freedom) == pytest.approx(expected, rel=3e-6)


def test_t_quantiles_between_whole_degrees_of_freedom() -> None:
    assert interval.t_quantile(0.975, 2) > interval.t_quantile(0.975, 2.5)
    assert interval.t_quantile(0.975, 2.5) > interval.t_quantile(0.975, 3)
    assert interval.t_quantile(0.995, 3) == pytest.approx(5.84091, rel=3e-6)
    with pytest.raises(ValueError, match="degrees of freedom"):
        interval.t_quantile(0.975, 0.5)


def test_a_mean_of_three_repeats() -> None:
    low, high = interval.of_mean([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == (pytest.approx(2 - 2.48414, abs=1e-5), pytest.approx(2 + 2.48414))


def test_one_repeat_has_no_interval() -> None:
    assert interval.of_mean([1.0]) is None
    assert interval.of_ratio([1.0], [1.0, 2.0]) is None
    assert interval.of_paired_ratio([1.0], [1.0]) is None
    assert interval.of_share(0, 0) is None


@pytest.mark.parametrize("repeats", [2, 3, 10])
def test_the_interval_of_a_mean_covers_it(repeats: int) -> None:
    share = covered(lambda rng: interval.of_mean(list(rng.normal(5, 2, repeats))), 5.0)
    assert 0.93 < share < 0.97


@pytest.mark.parametrize(("over", "under"), [(3, 3), (3, 6)])
def test_the_interval_of_a_ratio_covers_it(over: int, under: int) -> None:
    def bounds(rng: np.random.Generator) -> interval.Bounds | None:
        return interval.of_ratio(list(rng.normal(12, 0.3, over)), list(rng.normal(10, 1, under)))

    assert 0.93 < covered(bounds, 1.2) < 0.99


def test_the_ratio_the_other_way_round_is_the_inverse() -> None:
    a, b = [9.0, 10.0, 11.5], [14.0, 15.0, 15.5]
    low, high = interval.of_ratio(a, b) or (0, 0)
    assert interval.of_ratio(b, a) == (pytest.approx(1 / high), pytest.approx(1 / low))
    assert low < 10.1666 / 14.8333 < high < 1


def test_a_ratio_needs_positive_means() -> None:
    assert interval.of_ratio([0.0, 0.0], [1.0, 2.0]) is None
    assert interval.of_paired_ratio([0.0, 1.0], [1.0, 2.0]) is None
    with pytest.raises(ValueError, match="3 and 2"):
        interval.of_paired_ratio([1.0, 2.0, 3.0], [1.0, 2.0])


def test_equal_repeats_have_a_ratio_without_width() -> None:
    assert interval.of_ratio([2.0, 2.0], [1.0, 1.0]) == (2.0, 2.0)


def drifting(rng: np.random.Generator) -> tuple[list[float], list[float]]:
    """Interleaved repeats of a ratio of 1.05 on a machine that drifts by far more."""
    drift = rng.normal(1, 0.2, 4)
    return (
        list(10.5 * drift * rng.normal(1, 0.01, 4)),
        list(10.0 * drift * rng.normal(1, 0.01, 4)),
    )


def test_pairs_cancel_the_drift_that_both_share() -> None:
    paired = covered(lambda rng: interval.of_paired_ratio(*drifting(rng)), 1.05)
    assert 0.92 < paired < 0.97
    over, under = drifting(np.random.default_rng(0))
    narrow = interval.of_paired_ratio(over, under) or (0, 0)
    wide = interval.of_ratio(over, under) or (0, 0)
    assert narrow[0] > 1 > wide[0]


@pytest.mark.parametrize(("share", "count"), [(0.5, 25), (0.9, 100), (0.95, 72), (0.99, 400)])
def test_the_interval_of_a_percentile_covers_it_whatever_the_distribution(
    share: float, count: int
) -> None:
    truth = float(np.exp(np.sqrt(2) * 1.5 * _erfinv(2 * share - 1)))

    def bounds(rng: np.random.Generator) -> interval.Bounds | None:
        return interval.of_percentile(rng.lognormal(0, 1.5, count), share)

    assert 0.93 < covered(bounds, truth) <= 0.995


def _erfinv(value: float) -> float:
    low, high = -6.0, 6.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle) < value else (low, middle)
    return low


def test_the_known_ranks_of_the_median_of_a_hundred() -> None:
    assert interval.of_percentile([float(rank) for rank in range(1, 101)], 0.5) == (40.0, 61.0)


@pytest.mark.parametrize(("share", "needed"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368)])
def test_a_percentile_has_an_interval_from_just_so_many_samples(share: float, needed: int) -> None:
    assert interval.samples_needed(share) == needed
    assert interval.of_percentile([float(n) for n in range(needed)], share) is not None
    assert interval.of_percentile([float(n) for n in range(needed - 1)], share) is None


def test_wilson_as_published_and_at_the_ends() -> None:
    assert interval.of_share(9, 10) == (
        pytest.approx(0.59585, abs=1e-5),
        pytest.approx(0.98212, abs=1e-5),
    )
    assert interval.of_share(0, 10) == (pytest.approx(0.0), pytest.approx(0.27754, abs=1e-5))
    assert interval.of_share(10, 10) == (pytest.approx(0.72246, abs=1e-5), pytest.approx(1.0))


def test_wilson_covers_on_average() -> None:
    found = [interval.of_share(hits, 50) or (0, 0) for hits in range(51)]
    coverage = [
        sum(misses(hits, 50, p) for hits, (low, high) in enumerate(found) if low <= p <= high)
        for p in np.linspace(0.02, 0.98, 97)
    ]
    assert 0.945 < np.mean(coverage) < 0.96
    assert min(coverage) < 0.95


@pytest.mark.parametrize("count", [10, 50])
def test_the_exact_interval_never_covers_less_than_it_claims(count: int) -> None:
    found = [interval.of_share_exact(hits, count) for hits in range(count + 1)]
    for p in np.linspace(0.001, 0.999, 999):
        inside = [low <= p <= high for low, high in found]
        assert sum(misses(hits, count, p) for hits in range(count + 1) if inside[hits]) >= 0.95


def test_the_exact_interval_as_published() -> None:
    assert interval.of_share_exact(9, 10) == (
        pytest.approx(0.55498, abs=1e-5),
        pytest.approx(0.99747, abs=1e-5),
    )
    assert interval.of_share_exact(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="11 of 10"):
        interval.of_share_exact(11, 10)


def test_368_of_368_are_just_enough_for_99_percent() -> None:
    assert interval.of_share_exact(368, 368)[0] > 0.99
    assert interval.of_share_exact(367, 367)[0] < 0.99


def test_why_verdicts_near_1_are_not_wilsons() -> None:
    """With a true share of 0.99, "certainly below" should be said at most one time in 40."""

    def wrong(of: Callable[[int, int], interval.Bounds | None]) -> float:
        highs = [(of(hits, 10) or (0, 0))[1] for hits in range(11)]
        return sum(misses(hits, 10, 0.99) for hits in range(11) if highs[hits] < 0.99)

    assert wrong(interval.of_share) > 0.09
    assert wrong(interval.of_share_exact) < 0.025


def test_the_difference_of_shares_as_newcombe_published_it() -> None:
    assert interval.of_share_difference(56, 70, 48, 80) == (
        pytest.approx(0.0524, abs=1e-4),
        pytest.approx(0.3339, abs=1e-4),
    )
    assert interval.of_share_difference(1, 10, 0, 0) is None


def test_independent_samples_count_as_what_they_are() -> None:
    found = [interval.inflation(np.random.default_rng(s).exponential(1, 500)) for s in range(100)]
    assert np.mean(found) < 1.4
    assert min(found) == 1.0


def test_samples_that_hang_together_count_for_less() -> None:
    """In an AR(1) series of coefficient r it is (1 + r) / (1 - r) that are worth one: here 9."""
    found = []
    for seed in range(50):
        noise, series = np.random.default_rng(seed).normal(0, 1, 2000), [0.0]
        for one in noise:
            series.append(0.8 * series[-1] + one)
        found.append(interval.inflation(series))
    assert 7 < np.mean(found) < 11


@pytest.mark.parametrize("values", [[], [1.0] * 3, [2.5] * 1000])
def test_where_nothing_varies_nothing_is_said(values: list[float]) -> None:
    assert interval.inflation(values) == 1.0
