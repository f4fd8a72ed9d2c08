"""`bench tune --against`: the best of an earlier search and the defaults, once more."""

import argparse
import time
from typing import Any

import msgspec

from bench import result, run
from bench.engine import served
from bench.engine.gain import gain
from bench.engine.score import Goal, Pace, named, rung_of, score
from bench.engine.trial import Answer, Engine
from bench.engine.tuning import Measured, Outcome
from bench.errors import BenchError


def confirm(options: argparse.Namespace) -> dict[str, Any]:
    """The defaults and the best of a search, each on a fresh engine or server, in full."""
    before = result.read(options.against)
    if before.get("benchmark") != "tune" or not before.get("best"):
        raise BenchError(f"against = {str(options.against)!r}: not a result of `bench tune`")
    goal = msgspec.convert(before["goal"], Goal)  # The same question, asked again.
    pace = msgspec.convert(before["pace"], Pace)
    settings = before["best"]["settings"]
    head = result.header("confirm", f"{options.model} as {options.system}, {named(goal)}")
    scores: dict[str, list[float]] = {}
    doubts, late = [], Late()
    began_s, slower = time.monotonic(), 0
    for share, name, given in ((0.5, "default", {}), (1.0, "best", settings)):
        given = {**options.engine, **given}
        # From where it was found; a server is slower by what the one before it was slower by.
        start = rung_of(pace, before[name]["score"])
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
    output = head | {
        "valid": fewest > 1 and not late.doubt,
        "doubts": [*doubts, *([late.doubt] if late.doubt else [])],
        "system": options.system,
        "engine": options.engine,
        "settings": settings,
        "slo": msgspec.to_builtins(goal.slo),
        "workload": goal.what,
        "scores": scores,
        "answers": before.get("answers"),
        "gain": gain(best, default, 0, goal.slo is not None),
    }
    result.write(options.out, output)
    keys = ("name", "valid", "doubts", "settings", "scores", "gain")
    return {"benchmark": "confirm", "out": str(options.out), **{key: output[key] for key in keys}}


def _fresh(options: argparse.Namespace, given: dict[str, Any]) -> Any:
    folder = options.out / "engine"
    if options.system == "engine":
        return Engine(options.model, given, folder)
    return served.Served(options.system, options.model, given, folder, options.port)


class Late:
    """The worst that is to be said of how late this process sent; empty where it never was late."""

    def __init__(self) -> None:
        self.doubt = ""

    def note(self, answer: Answer, system: str) -> Answer:
        # In process a request is sent between two steps, which is when an engine looks for them.
        if system != "engine":
            self.doubt = served.lag(answer.records) or self.doubt
        return answer
