"""The trials of a search of `bench tune`, and their outcomes."""

from statistics import fmean

import msgspec

from bench.engine.knobs import Settings

_SEEDS = 1000  # Between those of one part of a confirmation and of the next.


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure.

    Attributes:
        rung: from 0; the last is the full measurement.
        share: of the full measurement's requests.
        repeats: with as many seeds.
        why: for the one who watches.
        held_out: 0 for a trial of the search; else which part of the confirmation this is, whose
            seeds no other trial has.
    """

    settings: Settings
    rung: int
    share: float
    repeats: int
    why: str
    held_out: int = 0

    @property
    def seeds(self) -> range:
        first = self.held_out * _SEEDS
        return range(first, first + self.repeats)


class Outcome(msgspec.Struct, kw_only=True):
    """What a trial showed: a score for each repeat, the higher the better; 0 where nothing passed.

    Attributes:
        bounds: 95 % interval for the highest rate within the SLO, by all probes of all repeats;
            None for another goal, and where the probes do not bear one.
        failure: why there is none: the engine did not start, or ended.
    """

    scores: list[float] = []
    bounds: tuple[float, float] | None = None
    failure: str = ""
    oom: bool = False

    @property
    def score(self) -> float:
        return fmean(self.scores) if self.scores else 0.0


class Measured(msgspec.Struct, kw_only=True):
    """A setting and its outcomes, by rung.

    Attributes:
        held_out: scores of the confirmation, which took no part in choosing it; those of the
            candidate and of the defaults belong together pair by pair.
    """

    settings: Settings
    outcomes: dict[int, Outcome]
    held_out: list[float] = []

    @property
    def rung(self) -> int:
        return max(self.outcomes)

    def score(self, rung: int | None = None) -> float:
        outcome = self.outcomes.get(self.rung if rung is None else rung)
        return outcome.score if outcome else 0.0
