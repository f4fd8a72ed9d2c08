"""How much a series of samples, in order of time, depends on itself.

Requests that wait in one queue see the same queue, so their latencies come in runs and n of them
say less than n independent samples would. `autocorrelation_time` says how many of them are worth
one independent sample. An interval that ignores it covers 1 to 75% where it claims 95%.

The estimate is the larger of two, since either alone is too low in some series: Geyer's initial
monotone sequence (the sum of autocorrelations until they vanish in noise), and the spectrum at
frequency zero of an autoregressive model whose order minimises Akaike's criterion.
"""

import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
_MOST_ORDERS = 10
_ROUNDING = 1e-12


def autocorrelation_time(values: Values) -> float:
    """How many of these samples are worth one independent sample; at least 1.

    1 for fewer than four samples and for samples that do not vary.
    """
    count = len(values)
    if count < 4:
        return 1.0
    correlations = _autocorrelations(values)
    if correlations is None:
        return 1.0
    return max(1.0, _geyer(correlations), _autoregressive(correlations, count))


def ranks(values: Values) -> Values:
    """The place of each sample among all: what a heavy tail cannot distort."""
    order = np.argsort(values, kind="stable")
    rank_of = np.empty(len(values))
    rank_of[order] = np.arange(len(values))
    return rank_of


def _autocorrelations(values: Values) -> Values | None:
    """For each lag from 0; None where the samples do not vary."""
    centred = values - values.mean()
    count = len(centred)
    spread = float(centred @ centred)
    if spread <= _ROUNDING * max(1.0, float(values @ values)):
        return None
    size = 1 << (2 * count - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    sums: Values = np.fft.irfft(spectrum * np.conj(spectrum), size)[:count]
    correlations: Values = sums / sums[0]
    return correlations


def _geyer(correlations: Values) -> float:
    """Sums of neighbouring pairs, up to the first that is negative, and never growing again."""
    pairs = correlations[: len(correlations) // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs <= 0)
    decreasing = np.minimum.accumulate(pairs[: negative[0] if len(negative) else len(pairs)])
    return 2 * float(decreasing.sum()) - 1


def _autoregressive(correlations: Values, count: int) -> float:
    """By the Levinson-Durbin recursion, which fits one order after the other."""
    coefficients, noise = np.empty(0), 1.0
    least, variance = 0.0, 1.0
    for order in range(1, max(1, min(_MOST_ORDERS, count // 10)) + 1):
        foretold = float(coefficients @ correlations[order - 1 : 0 : -1]) if order > 1 else 0.0
        last = (float(correlations[order]) - foretold) / noise
        coefficients = np.append(coefficients - last * coefficients[::-1], last)
        noise *= 1 - last * last
        if noise <= _ROUNDING:
            break
        criterion = count * math.log(noise) + 2 * order
        if criterion < least:
            gain = 1 - float(coefficients.sum())
            least, variance = criterion, noise / gain**2 if gain > 0 else math.inf
    return variance
