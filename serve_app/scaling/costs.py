"""What a step of an engine costs, estimated from reports. Pure.

A step takes a fixed time and some time for each token that it reads or writes. Replicas report
steps, tokens and the time spent; the three costs are the ones that explain these reports best, by
least squares in which older reports weigh less. Nothing about model or GPU is configured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.scaling.tuning import DEFAULT, Tuning
from serve_app.scaling.types import ReplicaLoad

# A sum below this is what decay left of old reports; dividing by it would give absurd costs.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Costs:
    """Seconds of an engine: a step, a token written, a token of a prompt read."""

    step_s: float = 0.0
    decode_s: float = 0.0
    prefill_s: float = 0.0


def updated_sums(
    sums: tuple[float, ...], loads: Sequence[ReplicaLoad], passed_s: float, tuning: Tuning
) -> tuple[float, ...]:
    """The sums of least squares, older reports with less weight."""
    retained = math.exp(-passed_s / tuning.cost_memory_s)
    decayed = [value * retained for value in sums]
    for load in loads:
        if load.busy < tuning.min_busy_ratio:
            continue
        s, d, p = load.steps_per_s, load.decode_tokens_per_s, load.prefill_tokens_per_s
        b = load.busy
        for place, product in enumerate((s * s, s * d, s * p, d * d, d * p, p * p)):
            decayed[place] += product * passed_s
        for place, product in enumerate((s * b, d * b, p * b), 6):
            decayed[place] += product * passed_s
    return tuple(decayed)


def estimate(sums: Sequence[float], tuning: Tuning = DEFAULT) -> Costs:
    """The non-negative costs that explain best how busy the engines were.

    Coordinate descent over the three costs. It takes a few rounds, unless two quantities are
    correlated. The loop is unrolled, because a decision spends most of its time here.
    """
    ss, sd, sp, dd, dp, pp, sb, db, pb = sums
    # Normalised, so that a token weighs as much as a step.
    of_s, of_d, of_p = (math.sqrt(value) if value > NEGLIGIBLE else 1.0 for value in (ss, dd, pp))
    sd, sp, dp = sd / (of_s * of_d), sp / (of_s * of_p), dp / (of_d * of_p)
    sb, db, pb = sb / of_s, db / of_d, pb / of_p
    ridge = tuning.ridge
    ss, dd, pp = ss / of_s**2 + ridge, dd / of_d**2 + ridge, pp / of_p**2 + ridge
    sd, sp, sb, ds, dp, db, ps, pd, pb = (
        sd / ss, sp / ss, sb / ss, sd / dd, dp / dd, db / dd, sp / pp, dp / pp, pb / pp,
    )  # fmt: skip
    s = d = p = 0.0
    for _ in range(200):
        before_s, before_d, before_p = s, d, p
        # Conditions in place of max() and abs(): calls would be most of a round.
        s = sb - sd * d - sp * p
        s = s if s > 0.0 else 0.0
        d = db - ds * s - dp * p
        d = d if d > 0.0 else 0.0
        p = pb - ps * s - pd * d
        p = p if p > 0.0 else 0.0
        near = 1e-9 * (s if s > d else d)
        near = near if near > 1e-9 * p else 1e-9 * p
        if (
            -near <= s - before_s <= near
            and -near <= d - before_d <= near
            and -near <= p - before_p <= near
        ):
            break
    return Costs(s / of_s, d / of_d, p / of_p)
