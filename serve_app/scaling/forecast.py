"""The load that will not be exceeded at the time at which a new replica serves. Pure."""

import math
from collections.abc import Sequence
from operator import sub

from serve_app.scaling.tuning import Tuning


def forecast(means: Sequence[float], parts: int, cover: float, tuning: Tuning) -> float:
    """The load that will not be exceeded, `parts` means from now, with probability `cover`.

    Each candidate is a running mean plus a margin: the quantile of how far the load `parts` means
    later exceeded it in the past. Errors are weighted by load, because requests count, and older
    errors weigh less.
    """
    count = len(means)
    if count <= parts:
        return max(means) * (1 + tuning.first_headroom_ratio)
    ages = [math.exp(-(count - 1 - i) / (parts * tuning.forget_starts)) for i in range(count)]
    weights = [(means[i] + 1e-9) * ages[i] for i in range(parts, count)]
    total = sum(weights)
    # Excesses in a row are one excess, so their number is that of the starts.
    unseen = max(0.0, -math.log((1 - cover) * ((count - parts) / parts + 1)))
    best: tuple[float, float] | None = None
    for share in tuning.smoothings:
        guess, guesses = means[0], []
        for mean in means:
            guess += share * (mean - guess)
            guesses.append(guess)
        above = list(map(sub, means[parts:], guesses))
        mean_above = sum(a * w for a, w in zip(above, weights, strict=True) if a > 0.0) / total
        mean_guess = sum(guesses) / count
        # Excesses as large as the load come in bursts, and a larger one may follow. Excesses of a
        # tenth of the load are noise, which is bounded.
        burst = min(1.0, mean_above / max(mean_guess, 1e-9)) ** 2
        margin = max(0.0, _quantile(above, weights, cover * total))
        margin += tuning.tail_ratio * burst * mean_above * unseen
        price = mean_guess + margin
        if best is None or price < best[0]:
            best = price, guess + margin
    assert best is not None
    return best[1]


def _quantile(values: Sequence[float], weights: Sequence[float], wanted: float) -> float:
    reached = 0.0
    for place in sorted(range(len(values)), key=values.__getitem__):
        reached += weights[place]
        if reached >= wanted:
            return values[place]
    return max(values)
