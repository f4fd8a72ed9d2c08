"""Whether comparisons, tuning and searches find what there is, and nothing where there is nothing.

Servers, settings and queues that are simulated, so that the truth is known.
"""

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

import msgspec
import numpy as np

from bench.engine import gain
from bench.engine.effects import effects
from bench.engine.knobs import Knob
from bench.engine.measured import Outcome
from bench.engine.tuning import Search
from bench.figures import Run
from bench.measure import METRICS, Measures, Slo
from bench.pages import compare
from bench.search.rate import RateSearch
from bench.search.rateresult import RateResult
from bench.search.seen import Seen

# --- comparisons ----------------------------------------------------------------------------


def served(draw: random.Random, slower: float = 1.0, own: float = 0.03) -> Run:
    """Three repeats with every metric: all share the noise of their repeat, and have their own."""
    repeats = []
    for _ in range(3):
        shared = draw.gauss(1, 0.02)
        figures = {
            metric: 100
            * shared
            * draw.gauss(1, own)
            * (slower if better == "lower" else 1 / slower)
            for metric, better in METRICS.items()
        }
        repeats.append(msgspec.convert(figures, Measures))
    return Run(workload="w", load="users=4", repeats=repeats, whole=repeats, summary={})


def comparisons(pairs: int) -> str:
    lines = [f"{'B is slower by':18}{'any row differs':>18}{'rows said worse':>18}"]
    for slower in (1.0, 1.05, 1.1, 1.2, 1.5):
        draw = random.Random(slower)
        compared = [compare.compare(served(draw), served(draw, slower)) for _ in range(pairs)]
        differ = fmean(any(row.verdict != "noise" for row in rows) for rows in compared)
        worse = fmean(row.verdict == "worse" for rows in compared for row in rows)
        lines.append(f"{slower - 1:<18.0%}{differ:>18.1%}{worse:>18.1%}")
    return "\n".join(lines)


# --- tuning ---------------------------------------------------------------------------------

KNOBS = (
    Knob(name="a", values=(None, 1, 2, 3, 4), live=True, meaning=""),
    Knob(name="b", values=(None, 1, 2, 3, 4), live=True, meaning=""),
    Knob(name="c", values=(None, 1, 2), meaning=""),
)


def tuned(
    seed: int,
    spread: float,
    worth: Callable[[Mapping[str, Any]], float] = lambda _: 1.0,
    ladder: bool = False,
) -> Search:
    """A search with scores that vary as those of short measurements do."""
    rng, search = random.Random(seed), Search(KNOBS)
    while (trial := search.ask()) is not None:
        scores = []
        for _ in range(trial.repeats):
            score = worth(trial.settings) * math.exp(rng.gauss(0, spread * trial.share**-0.5))
            scores.append(1.04 ** math.floor(math.log(score) / math.log(1.04)) if ladder else score)
        search.tell(Outcome(scores=scores))
    return search


def _one_is_better(ratio: float, settings: Mapping[str, Any]) -> float:
    return ratio if settings.get("a") == 3 else 1.0


def tunings(count: int) -> str:
    lines = [f"{'truth':22}{'noise':>7}{'changed':>9}{'mean gain':>11}{'false knobs':>13}"]
    for better in (1.0, 1.1, 1.2):
        for spread in (0.02, 0.05):
            changed, ratios, false = 0, [], 0
            for seed in range(count):
                search = tuned(seed, spread, partial(_one_is_better, better))
                assert search.best is not None
                changed += bool(search.best.settings)
                gained = gain.gain(search.best, search.default, 2, False)
                ratios.append(gained["ratio"] if gained else 1.0)
                false += any(
                    effect.low is not None and not effect.low <= 1 <= (effect.high or 0)
                    for effect in effects(search.measured.values())
                    if effect.knob != "a" or effect.value != 3
                )
            truth = "nothing is better" if better == 1 else f"a = 3 gains {better - 1:.0%}"
            lines.append(
                f"{truth:22}{spread:>7.0%}{changed / count:>9.0%}{fmean(ratios):>11.3f}"
                f"{false / count:>13.0%}"
            )
    return "\n".join(lines)


# --- searches -------------------------------------------------------------------------------

# M/D/8 whose requests take 0.38 s: at most 5% wait longer than 0.56 of that up to 0.765 of its
# capacity, found by simulating eighteen million requests.
_SLOTS, _SERVICE_S, _WAIT = 8, 0.38, 0.56
LIMIT = 0.765 * _SLOTS / _SERVICE_S


def searched(
    seed: int, budget_s: float | None, precision: float = 0.15
) -> tuple[RateResult, float]:
    """A search, and the seconds that its probes took."""
    rng, took_s = np.random.default_rng(seed), 0.0
    controller = RateSearch(
        Slo(ttft_s=1.0, percentile=95.0), precision=precision, budget_s=budget_s
    )
    while (probe := controller.ask()) is not None:
        seen = _probe(rng, *probe)
        took_s += seen.took_s
        controller.take(seen)
    return controller.result, took_s


def _probe(rng: np.random.Generator, rate: float, count: int) -> Seen:
    at_s = np.cumsum(rng.exponential(1 / rate, count))
    # As all requests take the same time, each slot gets every eighth one: a request starts when it
    # arrives, or a service after the one before it in its slot.
    starts_s = np.empty(count)
    for slot in range(_SLOTS):
        busy_s = _SERVICE_S * np.arange(len(at_s[slot::_SLOTS]))
        starts_s[slot::_SLOTS] = busy_s + np.maximum.accumulate(at_s[slot::_SLOTS] - busy_s)
    ends_s = starts_s + _SERVICE_S
    first_s, last_s = np.quantile(ends_s, [0.2, 0.8])
    return Seen(
        missed=starts_s - at_s > _WAIT * _SERVICE_S,
        unknown=0,
        failed=0,
        running=rate * float((ends_s - at_s).mean()),
        served_per_s=0.6 * count / float(last_s - first_s),
        took_s=float(ends_s.max()),
    )


def searches(count: int) -> str:
    results = [searched(seed, 600.0) for seed in range(count)]
    covering = sum((r.rate or 0) <= LIMIT <= (r.fails_at or 0) for r, _ in results)
    widths = [(r.fails_at or math.inf) / (r.rate or 1) - 1 for r, _ in results]
    took_s = [seconds for _, seconds in results]
    return (
        f"truth {LIMIT:.2f} requests/s: held by {covering} of {count} intervals; width "
        f"{np.median(widths):.3f} (median), {max(widths):.3f} (most); at most 15% in "
        f"{sum(r.resolved for r, _ in results)}; {np.median(took_s):.0f} s (median)"
    )
