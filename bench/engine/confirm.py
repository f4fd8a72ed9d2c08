"""`bench tune --against`: the best of an earlier search and the defaults, once more."""

import argparse
import time

from bench import result, run
from bench.engine import served
from bench.engine.gain import Gain, gain
from bench.engine.knobs import Settings
from bench.engine.measured import Measured, Outcome
from bench.engine.orders import LoadOutcome
from bench.engine.score import named, rung_of, score
from bench.engine.trial import Engine
from bench.engine.tuned import Tuned
from bench.errors import BenchError
from bench.quality import Agreement
from bench.result import EngineResult, Line


class Confirmed(EngineResult, frozen=True, kw_only=True):
    """The result of `bench tune --against`.

    Attributes:
        system: that ran the engine.
        settings: the best of the search.
        scores: of each repeat of "default" and "best".
        answers: as the search found them.
    """

    benchmark: str = "confirm"
    system: str
    settings: Settings = {}
    scores: dict[str, list[float]]
    answers: Agreement | None = None
    gain: Gain | None = None


def confirm(options: argparse.Namespace) -> Line:
    """The defaults and the best of a search, each on a fresh engine or server, in full."""
    before = result.read(options.against, tune=Tuned)
    goal, pace = before.goal, before.pace  # The same question, asked again.
    if not (goal and pace and before.best and before.default):
        raise BenchError(f"against = {str(options.against)!r}: the search found no best setting")
    settings = before.best.settings
    head = result.header(f"{options.model} as {options.system}, {named(goal)}")
    scores: dict[str, list[float]] = {}
    doubts, late = [], Late()
    began_s, slower = time.monotonic(), 0
    for share, name, scored in ((0.5, "default", before.default), (1.0, "best", before.best)):
        given = {**options.engine, **(settings if name == "best" else {})}
        # From where it was found; a server is slower by what the one before it was slower by.
        start = rung_of(pace, scored.score)
        rung, end_s = start + slower, began_s + share * options.budget_s
        with _fresh(options, given) as system:
            ready_s = time.monotonic()
            for seed in range(options.repeats):
                value, rung = score(
                    lambda what, when, system=system, **more: late.note(
                        system.load(what, when, limit_s=120.0, **more), options.system
                    ),
                    goal,
                    pace,
                    1.0,
                    100 + seed,
                    rung,
                    True,
                )
                slower = rung - start
                scores.setdefault(name, []).append(value)
                run.say(f"{name}, seed {seed}: {value:.4g}")
                took_s = (time.monotonic() - ready_s) / (seed + 1)
                if time.monotonic() + took_s > end_s:
                    break
    fewest = min(map(len, scores.values()))
    if fewest < options.repeats:
        doubts.append(f"{fewest} of {options.repeats} repeats: the time was over")
    best, default = (
        Measured(settings={}, outcomes={0: Outcome(scores=scores[name])})
        for name in ("best", "default")
    )
    output = Confirmed(
        **head,
        valid=fewest > 1 and not late.doubt,
        doubts=[*doubts, *([late.doubt] if late.doubt else [])],
        system=options.system,
        model=options.model,
        engine=options.engine,
        settings=settings,
        slo=goal.slo,
        workload=goal.what,
        scores=scores,
        answers=before.answers,
        gain=gain(best, default, 0, goal.slo is not None),
    )
    output = result.write(options.out, output)
    return result.line(output, options.out, "settings", "scores", "gain")


def _fresh(options: argparse.Namespace, given: Settings) -> Engine | served.Served:
    folder = options.out / "engine"
    if options.system == "engine":
        return Engine(options.model, given, folder)
    return served.Served(options.system, options.model, given, folder, options.port)


class Late:
    """The worst doubt about how late this process sent; empty if it never was late."""

    def __init__(self) -> None:
        self.doubt = ""

    def note(self, answer: LoadOutcome, system: str) -> LoadOutcome:
        # In process a request is sent between two steps, which is when an engine looks for them.
        if system != "engine":
            self.doubt = served.lag(answer.records) or self.doubt
        return answer
