"""Random processes with known means and percentiles, on which bench's statistics are tested.

Latencies of requests that do not meet (iid), that depend on the one before (AR(1)), and that wait
in one queue (the sojourn times of M/M/1, which are exponential whatever the load, and depend on
each other for as many requests as the queue takes to forget).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
_NORMAL = NormalDist()
_FILLING = 4000  # Requests of a queue that begins empty, before it is in its steady state.


@dataclass(frozen=True)
class Process:
    """A stationary process.

    Attributes:
        sample: (rng, series, samples of each) to an array with a row for each series.
        mean: of its marginal distribution.
        quantile: of its marginal distribution, by the share below.
    """

    name: str
    sample: Callable[[np.random.Generator, int, int], Values]
    mean: float
    quantile: Callable[[float], float]

    def truth(self, share: float | None) -> float:
        """The percentile below which `share` lies; without one the mean."""
        return self.mean if share is None else self.quantile(share)


def exponential() -> Process:
    return Process(
        "iid exponential",
        lambda rng, series, count: rng.exponential(1.0, (series, count)),
        1.0,
        lambda share: -math.log1p(-share),
    )


def lognormal(sigma: float) -> Process:
    return Process(
        f"iid lognormal {sigma:g}",
        lambda rng, series, count: rng.lognormal(0.0, sigma, (series, count)),
        math.exp(sigma**2 / 2),
        lambda share: math.exp(sigma * _NORMAL.inv_cdf(share)),
    )


def autoregressive(coefficient: float, mean: float = 10.0) -> Process:
    """AR(1) with normal noise of variance 1."""
    deviation = 1 / math.sqrt(1 - coefficient**2)

    def sample(rng: np.random.Generator, series: int, count: int) -> Values:
        values = rng.normal(0.0, 1.0, (count, series))
        values[0] *= deviation
        for at in range(1, count):
            values[at] += coefficient * values[at - 1]
        return values.T + mean

    return Process(
        f"AR(1) {coefficient:g}",
        sample,
        mean,
        lambda share: mean + deviation * _NORMAL.inv_cdf(share),
    )


def queue(load: float) -> Process:
    """Sojourn times of M/M/1 with one request a second served, from a stationary start."""

    def sample(rng: np.random.Generator, series: int, count: int) -> Values:
        service = rng.exponential(1.0, (series, count))
        between = rng.exponential(1 / load, (series, count))
        waits = rng.random(series) < load
        steps = np.empty((series, count))
        steps[:, 0] = np.where(waits, rng.exponential(1 / (1 - load), series), 0.0)
        steps[:, 1:] = service[:, :-1] - between[:, 1:]
        # Lindley's recursion, W(n+1) = max(0, W(n) + step), as a walk above its own minimum.
        walk = np.cumsum(steps, axis=1)
        floor = np.minimum(np.minimum.accumulate(walk, axis=1), 0.0)
        sojourns_s: Values = walk - floor + service
        return sojourns_s

    return Process(
        f"M/M/1 {load:g}",
        sample,
        1 / (1 - load),
        lambda share: -math.log1p(-share) / (1 - load),
    )


def deterministic_queue(load: float) -> Process:
    """Sojourn times of M/D/1 with a service of one second; of its distribution only the mean."""

    def sample(rng: np.random.Generator, series: int, count: int) -> Values:
        steps = 1 - rng.exponential(1 / load, (series, _FILLING + count))
        walk = np.cumsum(steps, axis=1)
        waits_s: Values = walk - np.minimum(np.minimum.accumulate(walk, axis=1), 0.0)
        return waits_s[:, _FILLING:] + 1

    def unknown(share: float) -> float:
        raise NotImplementedError(f"the {share:.0%} quantile of M/D/1")

    return Process(f"M/D/1 {load:g}", sample, 1 + load / (2 * (1 - load)), unknown)


KNOWN = (
    exponential(),
    lognormal(1.0),
    autoregressive(0.3),
    autoregressive(0.9),
    queue(0.5),
    queue(0.8),
    queue(0.9),
)
