"""Which setting to try next, and what the tries have shown: the policy of `bench tune`.

Pure. `Search.ask` says what to measure, `tell` takes the scores, and the plan reads top to bottom
in `_plan`: the defaults; each knob by itself, around the best so far; the combinations that the
worth of their parts promises most of; then successive halving, the better half again with twice
the requests, until the last rung, where the best stand with repeats beside the defaults.

The best of many scores is partly the luckiest, so it is only a candidate. It wins where it beats
the defaults in measurements that were made for that alone, in pairs of one seed (`Confirmation`);
else the defaults stay. What it gains is what those pairs say.

Nothing is measured that cannot win. A setting is pruned where its upper bound (`ceiling`: from the
hardware, and from the shortest step that was seen) is below what another has reached. Whatever is
left out is kept with its reason. The knobs' worth comes from all scores together, by least squares
on their logs: what a value multiplies the score by, with its interval.

`Climb` finds the highest rate that keeps an objective on a ladder of rates, from where it is
thought to be, in few probes.
"""

import math
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import msgspec
import numpy as np

from bench import interval
from bench.engine.knobs import Knob, Settings, key, started_with
from bench.hardware import roofline
from bench.hardware.roofline import Ceilings, Shape
from bench.quality import Agreement

# A difference below this is noise at the first rung: the simpler setting stays.
_TIE = 0.02
# Of a confirmation: how likely each look at it is to err, 5% together.
_LOOK_ERRORS = (0.01, 0.04)
_SEEDS = 1000  # Between those of one part of a confirmation and of the next.
_COMBINED = 6
_PROMISING = 1.15
_HOPEFUL = 0.85  # Of the best at a rung: what is below that is not the best by bad luck.


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


def recommended(
    best: Measured | None,
    default: Measured | None,
    lossy: Collection[str],
    agreement: Agreement | None,
) -> Measured | None:
    """The best setting, or the defaults where it may change answers and nobody knows by how much.

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
        """Whether more pairs could not change the verdict, or none are left."""
        behind = self.parts > 0 and fmean(map(math.log, self.ratios)) <= 0
        return self.wins or behind or self.parts >= len(_LOOK_ERRORS)


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
        """What to measure next, the same until told; None: the search is over."""
        return self._trial

    def tell(self, outcome: Outcome) -> None:
        """What came of the trial that was asked for last."""
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
        best: dict[str, Any] = {}
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
            place = int(np.argmax(scores))
            if scores[place] > scores[0] * (1 + _TIE):
                best = dict(tried[place])
        return best

    def _promise(self, knob: Knob, best: Settings) -> tuple[float, bool]:
        """What its best value should bring on paper; where little, what needs no start is first."""
        values = knob.values[1:]
        highest = max((self._worth({**best, knob.name: value}) for value in values), default=0.0)
        promise = highest / self._worth(best)
        return (round(promise, 1) if promise >= _PROMISING else 1.0), knob.live

    def _promising(self, best: Settings) -> list[Settings]:
        """Combinations not yet measured, by what the knobs' worth says of them; the best first."""
        logs = self._logs()
        points: list[dict[str, Any]] = [{}]
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
        there = [
            each
            for each in self.measured.values()
            if rung - 1 in each.outcomes and each.score(rung - 1) > 0
        ]
        there.sort(key=lambda each: -each.score(rung - 1))
        best = there[0].score(rung - 1) if there else 0.0
        there = [each for each in there if each.score(rung - 1) >= _HOPEFUL * best]
        # The first rung has many that only differ in what does not matter: few go on.
        better = there[: max(2, math.ceil(len(there) / 2**rung))]
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


# --- what each knob is worth ----------------------------------------------------------------


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


# --- the hardware ---------------------------------------------------------------------------


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Of an average request of the load, in tokens; `cached` of the prompt need not be read."""

    read: float
    written: float


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an engine before a trial of it.

    Attributes:
        shape, ceilings: None where nobody measured the machine.
        step_s: the shortest step that was seen, a batch of one: none is shorter.
        seqs, tokens: vLLM's own limits of a batch.
    """

    shape: Shape | None = None
    ceilings: Ceilings | None = None
    step_s: float = 0.0
    seqs: int = 256
    tokens: int = 2048


def requests_per_s(floor: Floor, lengths: Lengths, settings: Settings) -> float:
    """The rate that a setting cannot exceed, whatever the load."""
    tokens = int(settings.get("max_num_batched_tokens") or floor.tokens)
    seqs = min(int(settings.get("max_num_seqs") or floor.seqs), tokens)
    least_s = max(floor.step_s, _read_s(floor, lengths, settings, seqs))
    bounds = [math.inf]
    if least_s > 0:
        # A sequence gets a token a step; and a step has room for so many tokens.
        bounds.append(seqs / (lengths.written * least_s))
        bounds.append(tokens / ((lengths.read + lengths.written) * least_s))
    if hardware_s := _hardware_s(floor, lengths, settings, seqs):
        bounds.append(1 / max(hardware_s))
    return min(bounds)


def worth(floor: Floor, lengths: Lengths, settings: Settings) -> float:
    """About how many times faster than the defaults the hardware lets a setting be."""
    seqs = min(floor.seqs, 128)  # A batch that is neither small nor beyond what fits.
    mine = _hardware_s(floor, lengths, settings, seqs)
    default = _hardware_s(floor, lengths, {}, seqs)
    return sum(default) / sum(mine) if mine and default else 1.0


def _shape_and_ceilings(floor: Floor, settings: Settings) -> tuple[Shape, Ceilings] | None:
    if floor.shape is None or floor.ceilings is None:
        return None
    shape, ceilings = floor.shape, floor.ceilings
    if settings.get("quantization") == "fp8":
        shape = msgspec.structs.replace(shape, weight_bytes=1.0)
        ceilings = msgspec.structs.replace(ceilings, flops_per_s=2 * ceilings.flops_per_s)
    if str(settings.get("kv_cache_dtype", "")).startswith("fp8"):
        shape = msgspec.structs.replace(shape, kv_bytes=1.0)
    return shape, ceilings


def _read_s(floor: Floor, lengths: Lengths, settings: Settings, seqs: int) -> float:
    """The least time of a step that writes a token to so many sequences."""
    hardware = _shape_and_ceilings(floor, settings)
    if hardware is None:
        return 0.0
    shape, ceilings = hardware
    return roofline.decode(shape, seqs, lengths.read).least_s(ceilings)


def _hardware_s(
    floor: Floor, lengths: Lengths, settings: Settings, seqs: int
) -> tuple[float, float] | None:
    """Of one request in a batch of `seqs`: the least time to compute, and to read memory."""
    hardware = _shape_and_ceilings(floor, settings)
    if hardware is None:
        return None
    shape, ceilings = hardware
    prompt = roofline.prefill(shape, lengths.read)
    step = roofline.decode(shape, seqs, lengths.read)
    flops = prompt.flops + lengths.written * step.flops / seqs
    memory = lengths.written * step.bytes / seqs
    return flops / ceilings.flops_per_s, memory / ceilings.bytes_per_s


# --- the highest rate -----------------------------------------------------------------------


class Climb:
    """The highest rung of a ladder that passes, from a start, in strides that halve.

    Args:
        start, stride: rungs, any whole number.
        gap: how far apart the highest that passed and the lowest that failed may be.
        lowest: nothing below is tried.
        probes: how many rungs are tried at most.
    """

    def __init__(
        self, start: int, *, stride: int = 4, gap: int = 1, lowest: int = -60, probes: int = 12
    ) -> None:
        self._at, self._stride, self._gap = start, max(stride, gap), gap
        self._least, self._left = lowest, probes
        self.passed: int | None = None
        self.failed: int | None = None

    @property
    def result(self) -> int | None:
        """The highest that passed; where the probes did not narrow it down, the middle of what is
        left; a stride below what failed, where nothing passed. None where that is off the ladder.
        """
        if self.passed is None:
            below = None if self.failed is None else self.failed - self._gap
            return below if below is not None and below >= self._least else None
        wide = self.failed is not None and self.failed - self.passed > self._gap
        return (self.passed + (self.failed or 0)) // 2 if wide else self.passed

    def ask(self) -> int | None:
        """The rung to probe next; None: it is known."""
        if self._left <= 0 or self._at < self._least:
            return None
        if self.passed is not None and self.failed is not None:
            return None if self.failed - self.passed <= self._gap else self._at
        return self._at

    def tell(self, passed: bool) -> None:
        self._left -= 1
        at = self._at
        if passed:
            self.passed = at if self.passed is None else max(self.passed, at)
        else:
            self.failed = at if self.failed is None else min(self.failed, at)
        if self.passed is not None and self.failed is not None:
            self._at = (self.passed + self.failed) // 2
            return
        # Further each time: what is thought may be far off.
        self._at = at + self._stride if passed else at - self._stride
        self._stride = min(2 * self._stride, 8)
