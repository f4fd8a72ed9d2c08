"""What one policy did in one run, and over several seeds: means with intervals, and a verdict.

Arrivals are random, so one run says little about a fleet that is near its limit: another seed may
turn the verdict. Each seed is an independent draw of the load, and the interval is that of the mean
over seeds. A policy holds the objective where the whole interval is above it, and fails it where
the whole interval is below; between them the verdict is open, and more seeds decide it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from bench import correlation, interval
from bench.interval import Bounds
from bench.measure import Slo
from bench.simulation import fleet

# With fewer independent misses than this, the spread between seeds may be too small by chance.
_FEW_MISSES = 30
_PARTS = 50  # Of a run, in which the mean over all seeds is the load's own course.


@dataclass(frozen=True)
class Strain:
    """How near the requests of one seed came to the objective, in the order of their arrival.

    Attributes:
        used: the greatest share of a limit that each took: see `Slo.used`.
    """

    planned_s: NDArray[np.float64]
    used: NDArray[np.float64]


@dataclass
class Trial:
    """One policy, one run; or the means of several seeds (`over_seeds`).

    Attributes:
        spec: of the policy, without alternatives.
        kept: share of requests that met the whole objective; of its TTFT; of its TPOT.
        judged: how many requests `kept` is of, in all seeds.
        gpu_hours: paid for, from when each replica is asked for until it is gone.
        unfinished, preempted: in all seeds.
        changes, reversals: how often what is wanted changed, and how often from up to down or back;
            in the first seed, like `timeline` and `decisions`.
        timeline: see fleet.Timeline; `kept_by_minute` holds (from when, share).
        seeds: how many runs this is the mean of.
        kept_interval, gpu_hours_interval: for the means over seeds; None for one seed.
    """

    spec: str
    kept: float
    kept_ttft: float
    kept_tpot: float
    gpu_hours: float
    unfinished: int
    changes: int
    reversals: int
    preempted: int
    replicas_mean: float
    replicas_most: int
    timeline: fleet.Timeline
    decisions: list[tuple[float, int, str]]
    kept_by_minute: list[tuple[float, float]] = field(default_factory=list)
    took_s: float = 0.0
    judged: int = 0
    seeds: int = 1
    kept_interval: Bounds | None = None
    gpu_hours_interval: Bounds | None = None

    def verdict(self, slo: Slo) -> bool | None:
        """Whether the objective is held; None where the seeds do not decide it."""
        target = slo.percentile / 100
        if self.kept_interval is None:
            return self.kept >= target
        low, high = self.kept_interval
        return True if low >= target else False if high < target else None


def over_seeds(trials: Sequence[Trial], strains: Sequence[Strain]) -> Trial:
    """The mean of one policy's trials under loads of different seeds."""
    first = trials[0]
    if len(trials) == 1:
        return first
    hours = [trial.gpu_hours for trial in trials]
    return replace(
        first,
        kept=fmean(trial.kept for trial in trials),
        kept_ttft=fmean(trial.kept_ttft for trial in trials),
        kept_tpot=fmean(trial.kept_tpot for trial in trials),
        gpu_hours=fmean(hours),
        unfinished=sum(trial.unfinished for trial in trials),
        preempted=sum(trial.preempted for trial in trials),
        replicas_mean=fmean(trial.replicas_mean for trial in trials),
        replicas_most=max(trial.replicas_most for trial in trials),
        took_s=sum(trial.took_s for trial in trials),
        judged=sum(trial.judged for trial in trials),
        seeds=len(trials),
        kept_interval=kept_interval([trial.kept for trial in trials], strains),
        gpu_hours_interval=interval.of_repeats(hours),
    )


def kept_interval(shares: Sequence[float], strains: Sequence[Strain]) -> Bounds:
    """Interval for the mean share over seeds.

    The spread between seeds decides, by Student's t. Few misses make that spread too small by
    chance, as misses come in runs: a limit that is missed for one bad minute an hour is missed in
    no seed of ten minutes. So the interval is also at least that of as many independent requests as
    the seeds are worth.
    """
    missed = [1 - share for share in shares]
    low, high = interval.of_repeats(missed) or (0.0, 1.0)
    count = sum(len(strain.used) for strain in strains)
    time = interval.cautious(_autocorrelation_time(strains), count)
    worth = int(count / time)
    misses = worth * fmean(missed)
    if misses < _FEW_MISSES and worth:
        exact = interval.of_share_exact(round(misses), worth)
        low, high = min(low, exact[0]), max(high, exact[1])
    return 1 - min(high, 1.0), 1 - max(low, 0.0)


def _autocorrelation_time(strains: Sequence[Strain]) -> float:
    """How many requests are worth one independent request.

    What all seeds have in common, the load's own course, is no chance and is removed first: from
    each request the mean of its part of the run over all seeds.
    """
    ends_s = [strain.planned_s[-1] for strain in strains if len(strain.planned_s)]
    if not ends_s:
        return 1.0
    edges = np.linspace(0.0, max(ends_s), _PARTS + 1)[1:-1]
    parts = [np.searchsorted(edges, strain.planned_s) for strain in strains]
    ranked = np.split(
        correlation.ranks(np.concatenate([strain.used for strain in strains])),
        np.cumsum([len(strain.used) for strain in strains])[:-1],
    )
    together = np.concatenate(parts)
    counts = np.bincount(together, minlength=_PARTS)
    sums = np.bincount(together, np.concatenate(ranked), _PARTS)
    means = sums / np.maximum(counts, 1)
    return fmean(
        correlation.autocorrelation_time(values - means[part])
        for values, part in zip(ranked, parts, strict=True)
    )
