"""Which setting to try next, and what the trials have shown: the policy of `bench tune`.

Pure. `Search.ask` returns what to measure, `tell` takes the scores, and `_plan` has the steps in
order: the defaults; each knob by itself, around the best setting so far; the combinations that are
the most promising by the effects of their parts; then successive halving, in which the better half
is measured again with twice the requests; and in the last rung, the best settings with repeats
beside the defaults.

The best of many scores is partly luck, so it is only a candidate. It wins if it beats the defaults
in separate measurements, in pairs with one seed (`Confirmation`); otherwise the defaults stay. The
reported gain is that of these pairs.

A setting that cannot win is not measured: it is pruned if its upper bound (`ceiling`: from the
hardware, and from the shortest measured step) is below the score of another one. Pruned settings
are listed with the reason. The effect of a knob comes from all scores together, by least squares on
their logs: the factor of each value on the score, with its interval (effects.py).
"""

import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from statistics import fmean
from typing import Any

import msgspec

from bench import interval
from bench.engine.effects import effects
from bench.engine.knobs import Knob, Settings, key, started_with
from bench.engine.measured import Measured, Outcome, Trial
from bench.quality import Agreement

# A difference below this is noise at the first rung: the simpler setting stays.
_TIE = 0.02
# Of a confirmation: how likely each look at it is to err, 5% together.
_LOOK_ERRORS = (0.01, 0.04)
_COMBINED = 6
_PROMISING = 1.15
_HOPEFUL = 0.85  # Of the best at a rung: what is below that is not the best by bad luck.


def recommended(
    best: Measured | None,
    default: Measured | None,
    lossy: Collection[str],
    agreement: Agreement | None,
) -> Measured | None:
    """The best setting, or the defaults if it may change answers and that was not measured.

    Args:
        lossy: names of the knobs that change answers.
        agreement: of the best setting's answers with those of the defaults.
    """
    if best is None or agreement is not None or not set(best.settings) & set(lossy):
        return best
    return default


class Confirmation(msgspec.Struct, kw_only=True):
    """A candidate beside the defaults, in pairs that were measured for this alone.

    Attributes:
        ratios: candidate over defaults, a pair each.
        parts: how many parts of pairs have been measured; each is a look at the whole.
    """

    settings: Settings
    ratios: list[float] = []
    parts: int = 0

    @property
    def wins(self) -> bool:
        """Whether it is better than the defaults, by the error of this look alone."""
        pairs = interval.paired_ratio(self.ratios, [1.0] * len(self.ratios))
        if pairs is None or not self.parts:
            return False
        return pairs.bounds(1 - _LOOK_ERRORS[self.parts - 1])[0] > 1

    @property
    def over(self) -> bool:
        """Whether further pairs cannot change the verdict, or there are none."""
        behind = self.parts > 0 and fmean(map(math.log, self.ratios)) <= 0
        return self.wins or behind or self.parts >= len(_LOOK_ERRORS)


Plan = Generator[Trial, Outcome, None]


class Search:
    """Successive halving, around a search that turns one knob at a time.

    Args:
        knobs: what may be turned.
        rungs: measurements of different length; each is twice the one before.
        repeats: of the last one.
        most: settings to measure; None for as many as it takes.
        worth: about how much better a setting should be than the defaults, on paper; decides the
            order.
        ceiling: the score that a setting cannot exceed.
        refused: why a setting is impossible, empty if it is not.
    """

    def __init__(
        self,
        knobs: Sequence[Knob],
        *,
        rungs: int = 3,
        repeats: int = 3,
        max_trials: int | None = None,
        worth: Callable[[Settings], float] = lambda _: 1.0,
        ceiling: Callable[[Settings], float] = lambda _: math.inf,
        refused: Callable[[Settings], str] = lambda _: "",
    ) -> None:
        self._knobs, self._rungs, self._repeats = list(knobs), rungs, repeats
        self._max_trials = max_trials if max_trials is not None else 10**9
        self._worth, self._ceiling, self._refused = worth, ceiling, refused
        self.measured: dict[str, Measured] = {}
        self.pruned: dict[str, str] = {}
        self.hurried = False
        self.confirmation: Confirmation | None = None
        self._running: Settings = {}
        self._generator = self._plan()
        self._trial: Trial | None = next(self._generator)

    def ask(self) -> Trial | None:
        """The next trial, the same until `tell`; None when the search is over."""
        return self._trial

    def tell(self, outcome: Outcome) -> None:
        """Record the outcome of the trial that `ask` returned."""
        trial = self._trial
        if trial is None:
            raise ValueError("the search is over: nothing was asked for")
        if not trial.held_out:
            name = key(trial.settings)
            measured = self.measured.setdefault(
                name, Measured(settings=dict(trial.settings), outcomes={})
            )
            measured.outcomes[trial.rung] = outcome
        self._running = started_with(trial.settings, self._knobs)
        try:
            self._trial = self._generator.send(outcome)
        except StopIteration:
            self._trial = None

    def hurry(self) -> None:
        """Time runs out: no new setting, only the confirmation of the best one."""
        if not self.hurried:
            self.hurried = True
            self.conclude()

    def conclude(self) -> None:
        """Try no other setting: confirm the best."""
        if self._trial is None or not self._trial.held_out:
            self._generator = self._confirm()
            self._trial = next(self._generator, None)

    @property
    def default(self) -> Measured | None:
        return self.measured.get(key({}))

    @property
    def candidate(self) -> Measured | None:
        """The best of those that got farthest; the default, where no other is better."""
        good = [each for each in self.measured.values() if each.score() > 0]
        # The longest measurement that more than the defaults have: scores of one rung compare.
        others = [each.rung for each in good if each.settings]
        rung = max(others, default=max((each.rung for each in good), default=0))
        same = [each for each in good if rung in each.outcomes]
        return max(same, key=lambda each: each.score(rung), default=None)

    @property
    def best(self) -> Measured | None:
        """The candidate where it was confirmed, else the defaults."""
        if self.confirmation is not None and self.confirmation.wins:
            return self.measured[key(self.confirmation.settings)]
        # Where the defaults serve nothing at all, there is nothing to be held against.
        default = self.default
        return self.candidate if default is None or not default.score() else default

    # --- the plan ---------------------------------------------------------------------------

    def _plan(self) -> Plan:
        # What everything else is held against, at the first and at the last rung.
        yield from self._measure({}, 0, "vLLM's defaults")
        yield from self._measure({}, self._rungs - 1, "vLLM's defaults, in full")
        best = yield from self._screen()
        for point in self._promising(best):
            yield from self._measure(point, 0, "its parts were worth it")
        for rung in range(1, self._rungs):
            for point in self._better_half(rung):
                yield from self._measure(point, rung, f"among the best of rung {rung - 1}")
        yield from self._confirm()

    def _confirm(self) -> Plan:
        """The candidate beside the defaults, with seeds that no trial had."""
        candidate, default, last = self.candidate, self.default, self._rungs - 1
        if candidate is None or default is None or not candidate.settings or not default.score():
            if default is not None and last not in default.outcomes:
                yield self._trial_of({}, last, "vLLM's defaults, in full")
            return
        self.confirmation = Confirmation(settings=dict(candidate.settings))
        while not self.confirmation.over:
            part = self.confirmation.parts + 1
            scores = []
            for settings in (candidate.settings, {}) if part % 2 else ({}, candidate.settings):
                outcome = yield self._trial_of(settings, last, "confirmation", part)
                scores.append(outcome.scores)
            mine, theirs = scores if part % 2 else scores[::-1]
            pairs = [(a, b) for a, b in zip(mine, theirs, strict=False) if b > 0]
            if not pairs or min(a for a, _ in pairs) <= 0:
                return  # It failed where the defaults did not.
            candidate.held_out += [a for a, _ in pairs]
            default.held_out += [b for _, b in pairs]
            self.confirmation.ratios += [a / b for a, b in pairs]
            self.confirmation.parts = part
        for each in (candidate, default):  # Held-out scores are full measurements too.
            each.outcomes.setdefault(last, Outcome(scores=each.held_out))

    def _screen(self) -> Generator[Trial, Outcome, Settings]:
        """One knob at a time around the best so far, the most promising first."""
        best: Settings = {}
        knobs = list(self._knobs)
        while knobs:
            knob = max(knobs, key=lambda each: self._promise(each, best))
            knobs.remove(knob)
            if best and not knob.live:
                # While its engine stands; and whatever is cut short, the best so far was measured.
                yield from self._measure(best, self._rungs - 1, "the best so far, in full")
            for value in knob.values[1:]:
                point = {**best, knob.name: value}
                why = f"{knob.name} {value} beside the best so far"
                yield from self._measure(point, 0, why)
            # Only when all its values are known: they are compared with one another too.
            tried = [best, *({**best, knob.name: value} for value in knob.values[1:])]
            scores = [self._score(point, 0) for point in tried]
            place = scores.index(max(scores))
            if scores[place] > scores[0] * (1 + _TIE):
                best = tried[place]
        return best

    def _promise(self, knob: Knob, best: Settings) -> tuple[float, bool]:
        """What its best value should bring on paper; where little, what needs no start is first."""
        values = knob.values[1:]
        highest = max((self._worth({**best, knob.name: value}) for value in values), default=0.0)
        promise = highest / self._worth(best)
        return (round(promise, 1) if promise >= _PROMISING else 1.0), knob.live

    def _promising(self, best: Settings) -> list[Settings]:
        """Combinations not yet measured, the best by the product of their effects first."""
        logs = self._logs()
        points: list[Settings] = [{}]
        for knob in self._knobs:
            tried = [value for value in knob.values if value is None or _name(knob, value) in logs]
            by_worth = sorted(tried, key=lambda value: -_log_of(logs, knob.name, value))
            points = [
                point if value is None else {**point, knob.name: value}
                for point in points
                for value in by_worth[:2]
            ]

        def foretold(point: Settings) -> float:
            return sum(_log_of(logs, name, value) for name, value in point.items())

        least = foretold(best) + math.log(1 - 2 * _TIE)
        good = [point for point in points if foretold(point) >= least]
        good.sort(key=lambda point: (-foretold(point), key(point)))
        fresh = [point for point in good if key(point) not in self.measured]
        return self._standing_first(fresh[:_COMBINED])

    def _better_half(self, rung: int) -> list[Settings]:
        """The better half of those that reached the rung before, engines that stand first."""
        candidates = [
            each
            for each in self.measured.values()
            if rung - 1 in each.outcomes and each.score(rung - 1) > 0
        ]
        candidates.sort(key=lambda each: -each.score(rung - 1))
        best = candidates[0].score(rung - 1) if candidates else 0.0
        candidates = [each for each in candidates if each.score(rung - 1) >= _HOPEFUL * best]
        # The first rung has many that only differ in what does not matter: few go on.
        better = candidates[: max(2, math.ceil(len(candidates) / 2**rung))]
        if rung == self._rungs - 1:
            better = better[:2]
        return self._standing_first([each.settings for each in better if rung not in each.outcomes])

    def _standing_first(self, points: Sequence[Settings]) -> list[Settings]:
        """In the same order, but for those that the engine which stands can measure."""
        same = key(self._running)
        return sorted(points, key=lambda point: key(started_with(point, self._knobs)) != same)

    def _measure(self, settings: Settings, rung: int, why: str) -> Plan:
        """Ask for a trial, unless it was made, is impossible, or cannot win."""
        name = key(settings)
        measured = self.measured.get(name)
        if name in self.pruned or (measured is not None and rung in measured.outcomes):
            return
        if settings and measured is None and (reason := self._out_of_the_question(settings)):
            self.pruned[name] = reason
            return
        yield self._trial_of(settings, rung, why)

    def _trial_of(self, settings: Settings, rung: int, why: str, held_out: int = 0) -> Trial:
        last = rung == self._rungs - 1
        return Trial(
            settings=dict(settings),
            rung=rung,
            share=0.5 ** (self._rungs - 1 - rung),
            repeats=self._repeats if last else 1,
            why=why,
            held_out=held_out,
        )

    def _out_of_the_question(self, settings: Settings) -> str:
        if reason := self._refused(settings):
            return reason
        for each in self.measured.values():
            failed = each.outcomes[each.rung]
            start = started_with(each.settings, self._knobs)
            if failed.failure and start and start.items() <= settings.items():
                return f"as {start} failed: {failed.failure}"
        best = max((each.score(0) for each in self.measured.values()), default=0.0)
        ceiling = self._ceiling(settings)
        if ceiling < best:
            return f"cannot exceed {ceiling:.4g}, and {best:.4g} was reached"
        if len(self.measured) >= self._max_trials:
            return f"{self._max_trials} settings were measured, which is all that were allowed"
        return ""

    def _score(self, settings: Settings, rung: int) -> float:
        measured = self.measured.get(key(settings))
        return measured.score(rung) if measured else 0.0

    def _logs(self) -> dict[tuple[str, str], float]:
        return {
            (effect.knob, key({"v": effect.value})): math.log(effect.ratio)
            for effect in effects(self.measured.values())
        }


def _name(knob: Knob, value: Any) -> tuple[str, str]:
    return knob.name, key({"v": value})


def _log_of(logs: Mapping[tuple[str, str], float], name: str, value: Any) -> float:
    return 0.0 if value is None else logs.get((name, key({"v": value})), 0.0)
