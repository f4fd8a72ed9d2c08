"""The result of `bench tune`."""

from typing import Any

import msgspec

from bench.engine import knobs
from bench.engine.effects import Effect
from bench.engine.gain import Cost, Gain
from bench.engine.knobs import Settings
from bench.engine.measured import Measured
from bench.engine.score import Goal, Pace
from bench.engine.tuning import Confirmation
from bench.quality import Agreement
from bench.result import EngineResult


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that was measured.

    Attributes:
        described: the setting in words.
        rung: of its longest measurement, from 0; score: of that, in the unit of the search, and
            score_interval: its 95 % interval.
        scores: of each repeat, by rung; held_out: those of the confirmation.
        failure: why there is no score; oom: whether memory ran out.
    """

    settings: Settings = {}
    described: str = ""
    rung: int = 0
    score: float
    score_interval: tuple[float, float] | None = None
    scores: dict[str, list[float]] = {}
    held_out: list[float] = []
    failure: str = ""
    oom: bool = False


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """What was searched: values of each knob, the number of rungs, repeats of a full measurement.

    Attributes:
        grid: whether every combination was measured in full.
    """

    knobs: dict[str, list[Any]]
    rungs: int
    repeats: int
    grid: bool


class Tuned(EngineResult, frozen=True, kw_only=True):
    """The result of `bench tune`; settings are None that were not measured.

    Attributes:
        score: the unit of all scores.
        limits: vLLM's own for the defaults.
        candidate: scored best; best: is recommended, after confirmation and comparison of answers.
        answers: how far those of the best setting agree with those of the defaults.
        pruned: settings that were not measured, each with the reason.
        wall_s: of the search.
        config: path of the configuration that was written.
    """

    benchmark: str = "tune"
    goal: Goal | None = None
    search: Space | None = None
    score: str
    pace: Pace | None = None
    limits: dict[str, int] = {}
    default: Scored | None
    best: Scored | None
    candidate: Scored | None = None
    confirmation: Confirmation | None = None
    gain: Gain | None = None
    cost: Cost | None = None
    answers: Agreement | None = None
    best_lossless: Scored | None = None
    effects: list[Effect] = []
    trials: list[Scored] = []
    pruned: dict[str, str] = {}
    failed: list[Scored] = []
    engine_starts: int = 0
    wall_s: float = 0.0
    config: str | None = None


def scored(each: Measured | None) -> Scored | None:
    if each is None:
        return None
    last = each.outcomes[each.rung]
    return Scored(
        settings=each.settings,
        described=knobs.describe(each.settings),
        rung=each.rung,
        score=each.score(),
        score_interval=last.bounds,
        scores={str(rung): outcome.scores for rung, outcome in each.outcomes.items()},
        held_out=each.held_out,
        failure=last.failure,
        oom=last.oom,
    )
