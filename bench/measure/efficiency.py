"""What a token costs: in joules of the GPUs, and in dollars of their rent.

Energy is of the GPUs alone, as their driver counts it; fans, processors and the losses of power
supplies come on top. Dollars are those of GPUs that are rented by the hour and do nothing else, so
that they depend on the load: an idle GPU costs as much as a busy one.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from bench import interval
from bench.measure.figures import Mean, Measures

Energy = Sequence[tuple[float, float]]  # Times, and joules used until then by all GPUs together.


class Efficiency(msgspec.Struct, frozen=True, kw_only=True):
    """Of one repeat, in its window.

    Attributes:
        gpus: how many the server has; None where that is not known.
        joules, watts: of all GPUs together.
        user_tokens_per_s: what one user gets: 1 / the 90th percentile of the time per output token
            (`tps_per_user` of MLPerf Endpoints), or 1 / its mean where that is not known.
        gpu_tokens_per_s: output tokens/s of each GPU.
        usd_per_million_output_tokens: with all of the rent borne by output tokens;
            usd_per_million_tokens: borne by input and output alike.
    """

    gpus: int | None = None
    joules: float | None = None
    watts: float | None = None
    joules_per_output_token: float | None = None
    user_tokens_per_s: float | None = None
    gpu_tokens_per_s: float | None = None
    usd_per_million_output_tokens: float | None = None
    usd_per_million_tokens: float | None = None


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """A load of a curve of users against GPUs: a run of one number of users.

    Attributes:
        efficiency: what the tokens cost; summary: the usual figures. By the name of the metric.
        front: whether no other point beats it on both axes; None where it lacks one of them.
    """

    users: int
    efficiency: dict[str, Mean]
    summary: dict[str, Mean] = {}
    doubts: list[str] = []
    front: bool | None = None


def efficiency(
    measures: Measures,
    energy: Energy = (),
    gpus: int | None = None,
    usd_per_gpu_hour: float | None = None,
) -> Efficiency:
    """What one repeat cost.

    Args:
        energy: over the repeat, on the clock of its records.
    """
    joules = _joules(energy, measures.from_s, measures.to_s)
    tokens, duration_s = measures.output_tokens_per_s, measures.duration_s
    tpot_s = measures.tpot_p90_s or measures.tpot_mean_s
    usd_per_s = None if not usd_per_gpu_hour or not gpus else usd_per_gpu_hour * gpus / 3600
    return Efficiency(
        gpus=gpus,
        joules=joules,
        watts=joules / duration_s if joules is not None and duration_s else None,
        joules_per_output_token=(
            joules / (tokens * duration_s) if joules is not None and tokens and duration_s else None
        ),
        user_tokens_per_s=1 / tpot_s if tpot_s else None,
        gpu_tokens_per_s=tokens / gpus if tokens is not None and gpus else None,
        usd_per_million_output_tokens=_per_million(usd_per_s, tokens),
        usd_per_million_tokens=_per_million(usd_per_s, measures.total_tokens_per_s),
    )


def efficiency_summary(
    repeats: Sequence[Efficiency],
) -> dict[str, Mean]:
    """The mean over repeats of each figure that all have, and its interval."""
    summaries: dict[str, Mean] = {}
    for name in Efficiency.__struct_fields__:
        values = [getattr(repeat, name) for repeat in repeats]
        if values and None not in values:
            low, high = interval.of_repeats(values) or (None, None)
            summaries[name] = {"mean": float(np.mean(values)), "low": low, "high": high}
    return summaries


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats in both of two figures, of which more is better."""
    return [
        not any(
            other[0] >= point[0] and other[1] >= point[1] and other != point for other in points
        )
        for point in points
    ]


def _joules(energy: Energy, from_s: float, to_s: float) -> float | None:
    """What was used in a span; None where it was not measured from its beginning to its end."""
    if len(energy) < 2:
        return None
    times, joules = np.array(energy, dtype=float).T
    # A sample every half second or so: the span may begin and end between two of them.
    gap_s = float(np.diff(times).max())
    if times[0] > from_s + gap_s or times[-1] < to_s - gap_s:
        return None
    begun, ended = np.interp([from_s, to_s], times, joules)
    return float(ended - begun)


def _per_million(usd_per_s: float | None, tokens_per_s: float | None) -> float | None:
    return 1e6 * usd_per_s / tokens_per_s if usd_per_s is not None and tokens_per_s else None
