"""How much each value of a knob changes the score: least squares on the logs of all scores."""

import math
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from bench import interval
from bench.engine.knobs import key
from bench.engine.measured import Measured


class Effect(msgspec.Struct, kw_only=True):
    """What a value of a knob multiplies the score by, beside the default.

    Attributes:
        low, high: its 95% interval; None where there are too few scores to have one.
        trials: settings with this value.
    """

    knob: str
    value: Any
    ratio: float
    low: float | None
    high: float | None
    trials: int


def effects(measured: Iterable[Measured], resolution: float = 1.0) -> list[Effect]:
    """What every value that was tried multiplies the score by, as if knobs did not depend on each
    other; by least squares on the logs of all scores, each rung with a level of its own.

    A score of a rung twice as long has half the variance. All intervals together hold their truths
    with 95% (Bonferroni), as whoever reads twelve of them looks for the one that stands out. A
    value that only came together with another cannot be told from it and is left out.

    Args:
        resolution: how far apart two scores must be to be told apart, as a ratio: scores of a
            ladder are equal where they are not the same, so intervals are that much wider.
    """
    rows = [
        (each.settings, rung, score)
        for each in measured
        for rung, outcome in each.outcomes.items()
        # What a setting was chosen by to go on is the score of a lucky one.
        if rung == each.rung or not each.settings
        for score in outcome.scores
        if score > 0
    ]
    values = {
        (name, key({"v": value})): value
        for settings, _, _ in rows
        for name, value in settings.items()
    }
    rungs = sorted({rung for _, rung, _ in rows})
    columns = list(values)
    if not rows or not columns:
        return []
    matrix = np.zeros((len(rows), len(rungs) + len(columns)))
    for place, (settings, rung, _) in enumerate(rows):
        matrix[place, rungs.index(rung)] = 1.0
        for name, value in settings.items():
            matrix[place, len(rungs) + columns.index((name, key({"v": value})))] = 1.0
    weights = np.array([math.sqrt(2.0**rung) for _, rung, _ in rows])
    logs = np.array([math.log(score) for _, _, score in rows])
    fit = _fit(matrix * weights[:, None], logs * weights, len(columns), math.log(resolution))
    listed = []
    for place, (name, text) in enumerate(columns, len(rungs)):
        if not fit.told_apart[place]:
            continue
        centre, half = float(fit.centres[place]), fit.halves
        width = None if half is None else float(half[place])
        listed.append(
            Effect(
                knob=name,
                value=values[name, text],
                ratio=math.exp(centre),
                low=None if width is None else math.exp(centre - width) / resolution,
                high=None if width is None else math.exp(centre + width) * resolution,
                trials=len({key(s) for s, _, _ in rows if key({"v": s.get(name)}) == text}),
            )
        )
    return sorted(listed, key=lambda each: -abs(math.log(each.ratio)))


class _Fit(msgspec.Struct, frozen=True):
    """Of least squares; `halves` of the intervals are None where there are too few scores."""

    centres: Any
    halves: Any
    told_apart: Any


def _fit(matrix: Any, logs: Any, together: int, step: float) -> _Fit:
    """Least squares, with intervals that hold for `together` columns at once."""
    inverse = np.linalg.pinv(matrix)
    coefficients = inverse @ logs
    told_apart = np.isclose(np.diag(inverse @ matrix), 1.0, atol=1e-6)
    freedom = len(logs) - int(np.linalg.matrix_rank(matrix))
    if freedom <= 0:
        return _Fit(coefficients, None, told_apart)
    rest = logs - matrix @ coefficients
    # Scores of a ladder vary by what lies between two rungs of it, also where they are the same.
    spread = max(float(rest @ rest) / freedom, step**2 / 12)
    error = (1 - interval.CONFIDENCE) / max(1, together)
    quantile = interval.t_quantile(1 - error / 2, freedom)
    return _Fit(coefficients, quantile * np.sqrt(spread * np.diag(inverse @ inverse.T)), told_apart)
