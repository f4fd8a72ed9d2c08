"""`bench tune`: engine settings with the highest throughput, measured on real engines.

    python -m bench tune --model FOLDER --slo mlperf-interactive --out DIR --budget-s 1800
    python -m bench tune --model FOLDER --goal cost --knob max_num_seqs=16,64 --out DIR
    python -m bench tune --model FOLDER --against DIR --system bare --out DIR2     # confirm it

The score is goodput, the highest Poisson rate within the SLO (`--goal goodput`), or output tokens/s
with all requests at once (`--goal cost`: the cost per million tokens is the hourly price divided by
it). `tuning.py` decides what to try next. Here trials run on engines (`trial.py`), which restart if
a knob needs it, and each finished trial is written to DIR/journal.jsonl. After an interruption the
same command continues from that journal. An engine that does not start or runs out of memory is a
failed trial.

Answers of the best setting are compared with those of the defaults (`answers` in the result). A
setting that may change answers is not recommended without that comparison.

The results are DIR/result.json and DIR/serve_config.yaml, with which the application can start. A
trial on a running engine uses limits below those of its start. `--against` measures the defaults
and the best setting again, each on a new engine with exactly its arguments, or behind a server.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import measure, result, run
from bench.engine import confirm, deployment, knobs, tuning
from bench.engine.effects import effects
from bench.engine.floor import Floor, Lengths
from bench.engine.gain import Gain, cost, gain
from bench.engine.journal import Journal
from bench.engine.knobs import Knob
from bench.engine.measured import Measured, Outcome, Trial
from bench.engine.score import LONGEST, STEP, Goal, Pace, Probes, named, pace, score
from bench.engine.stand import Stand
from bench.engine.trial import EngineError
from bench.engine.tuned import Space, Tuned, scored
from bench.engine.tuning import Search
from bench.errors import BenchError
from bench.hardware import ceilings, gpu
from bench.quality import PROMPTS, Agreement, agreement
from bench.result import Line

CONFIG = "serve_config.yaml"
_OVER_S = 2.0
_PROBES = 3  # Of a climb, on average.
_COMPARED = 48  # Tokens of each answer that is compared with one of the defaults.


# --- the command ----------------------------------------------------------------------------


def command(options: argparse.Namespace) -> Line:
    """What `python -m bench tune` does with its options; returns its last line."""
    slo = measure.parse_slo(options.slo) if options.goal == "goodput" else None
    goal = Goal(slo=slo, what=options.workload, seconds=options.seconds, by_cpu=options.by_cpu)
    if options.against:
        return confirm.confirm(options)
    return Tuning(options, goal).run()


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench tune`."""
    add = parser.add_argument
    add("--model", required=True, help="a local folder or a hub id")
    add("--out", type=Path, required=True, help="folder of the result and of the journal")
    add("--engine", type=json.loads, default={}, help="vLLM arguments of every trial, as JSON")
    add("--goal", choices=["goodput", "cost"], default="goodput")
    add("--slo", default="mlperf-interactive", help="objective of goodput: a preset, or limits")
    add("--workload", default="synthetic:input=lognormal(800;0.4),output=100,max=3000")
    about = "NAME=VALUE,VALUE; may be repeated; by default every knob of this machine"
    add("--knob", action="append", default=[], help=about)
    add("--lossy", action="store_true", help="also knobs that change the answers (fp8)")
    add("--budget-s", type=float, default=3600.0, help="time limit in seconds")
    add(
        "--seconds",
        type=float,
        default=10.0,
        help="seconds of a full probe; up to 4 times as many if requests take long",
    )
    add("--rungs", type=int, default=3, help="measurements, each twice as long as the last")
    add(
        "--repeats",
        type=int,
        default=3,
        help="repeats of a full measurement, each with its own seed",
    )
    add("--most", type=int, help="settings to measure at most")
    add(
        "--grid", action="store_true", help="measure every combination in full, to check the search"
    )
    about = "throughput by the CPU time of an engine on a CPU that others use too"
    add("--by-cpu", action="store_true", help=about)
    add("--roofline", type=Path, help="a result of `bench roofline`: prunes more")
    add("--price", type=float, help="price of this machine per hour, for the cost of tokens")
    add("--against", type=Path, help="a result of tune: measure its best and the defaults again")
    add(
        "--system",
        choices=["engine", "bare", "ours"],
        default="engine",
        help="what to start for --against: the engine, bare vLLM or this application",
    )
    add("--port", type=int, default=8890, help="port of the server, with --system bare or ours")


# --- the search -----------------------------------------------------------------------------


class Tuning:
    """A search, its journal and its engines."""

    def __init__(self, options: argparse.Namespace, goal: Goal) -> None:
        self._options, self._goal = options, goal
        self._end_s: float = time.monotonic() + options.budget_s
        self._space = knobs.space(
            options.knob,
            on_gpu=gpu.present(),
            lossy=options.lossy,
            dummy=options.engine.get("load_format") == "dummy",
            fixed=options.engine,
        )
        if not self._space:
            raise BenchError("there is no knob to turn: name one with --knob")
        self._head = result.header(f"{options.model}, {named(goal)}")
        self._journal = Journal(options.out, self._about())
        self._stand = Stand(options.model, options.engine, self._space, options.out)
        self._roof = ceilings.shape_and_ceilings(options.roofline, options.model, options.engine)
        self._took_s: dict[int, list[float]] = {}
        self._rung = 0
        self._agreement: Agreement | None = None
        self._pace: Pace | None = self._journal.pace
        self._limits: dict[str, int] = self._journal.limits

    def run(self) -> Line:
        """Search until it is over or the time is; returns the last line."""
        doubts: list[str] = []
        search: Search | None = None
        try:
            self._prepare()
            search = self._search()
            self._go(search)
            self._compare_answers(search)
        except KeyboardInterrupt:
            doubts.append("interrupted: the same command continues from the journal")
        finally:
            self._stand.close()
        return self._write(search, doubts)

    def _prepare(self) -> None:
        """Learn how fast the defaults are, before anything is measured."""
        if self._pace is not None:
            return
        with self._stand.engine({}, self._left_s()) as (engine, limits):
            self._limits = dict(limits)
            self._pace = pace(engine, self._goal, limits, self._limit_s())
        self._journal.begin(self._pace, self._limits)

    def _search(self) -> Search:
        assert self._pace is not None
        floor = Floor(
            shape=self._roof[0] if self._roof else None,
            ceilings=self._roof[1] if self._roof else None,
            step_s=self._pace.step_s,
            seqs=self._limits["max_num_seqs"],
            tokens=self._limits["max_num_batched_tokens"],
        )
        lengths = Lengths(read=self._pace.read, written=self._pace.written)
        # The score of throughput is in tokens, that of goodput in requests.
        unit = 1.0 if self._goal.slo else lengths.written
        return Search(
            self._space,
            rungs=self._options.rungs,
            repeats=self._options.repeats,
            max_trials=self._options.most,
            worth=lambda settings: floor.worth(lengths, settings),
            ceiling=lambda settings: unit * floor.requests_per_s(lengths, settings),
            refused=self._refused,
        )

    def _refused(self, settings: Mapping[str, Any]) -> str:
        """What vLLM would not start with."""
        tokens, seqs = settings.get("max_num_batched_tokens"), settings.get("max_num_seqs")
        if tokens and seqs and tokens < seqs:
            return "vLLM refuses max_num_batched_tokens below max_num_seqs"
        if settings.get("enable_chunked_prefill") is False:
            room = tokens or self._limits["max_num_batched_tokens"]
            if room < self._options.engine.get("max_model_len", math.inf):
                return "without chunks the longest prompt must fit in max_num_batched_tokens"
        return ""

    def _go(self, search: Search) -> None:
        planned: Iterator[Trial] | None = None
        if self._options.grid:
            planned = iter(_full_grid(self._space, self._options))
        while True:
            trial = next(planned, None) if planned else search.ask()
            if trial is None and planned:  # The grid is measured: who won is to be confirmed.
                planned = None
                search.conclude()
                continue
            if trial is None:
                return
            outcome = self._journal.outcome(trial)
            if outcome is None:
                if not self._affordable(trial, search):
                    if search.hurried:
                        return
                    planned = None
                    search.hurry()
                    continue
                outcome = self._measure(trial)
                if outcome.failure and self._left_s() <= _OVER_S:
                    search.hurried = True  # It was the time that ended it: not to be remembered.
                    return
                self._journal.add(trial, outcome, self._stand)
            if planned:
                name = knobs.key(trial.settings)
                measured = search.measured.setdefault(
                    name, Measured(settings=trial.settings, outcomes={})
                )
                measured.outcomes[trial.rung] = outcome
            else:
                search.tell(outcome)

    def _compare_answers(self, search: Search) -> None:
        """How far the answers of the best setting agree with those of the defaults."""
        best = search.best
        if best is None or not best.settings or self._left_s() <= _OVER_S:
            return
        completions = []
        try:
            for settings in (best.settings, {}):
                with self._stand.engine(settings, self._left_s()) as (engine, _):
                    completions.append(engine.complete(PROMPTS, _COMPARED, self._left_s()))
        except EngineError as error:
            run.say(f"answers were not compared: {error}")
            return
        texts = [
            [" ".join(map(str, tokens)) for tokens in completion] for completion in completions
        ]
        self._agreement = agreement(texts[1], texts[0])
        run.say(f"{self._agreement.equal} of {len(PROMPTS)} answers equal those of the defaults")

    def _affordable(self, trial: Trial, search: Search) -> bool:
        """Whether there is time for it, and then for a first look at the confirmation."""
        need_s = self._estimate_s(trial)
        candidate = search.candidate
        if not search.hurried and not trial.held_out and candidate is not None:
            last = msgspec.structs.replace(
                trial, rung=self._options.rungs - 1, share=1.0, repeats=self._options.repeats
            )
            need_s += sum(
                self._estimate_s(msgspec.structs.replace(last, settings=settings))
                for settings in (candidate.settings, {})
            )
        return need_s <= self._left_s()

    def _estimate_s(self, trial: Trial) -> float:
        seen_s = self._took_s.get(trial.rung)
        if seen_s:
            took_s = max(seen_s[-3:])
        else:
            probes = _PROBES if self._goal.slo else 1.2
            took_s = self._goal.seconds * trial.share * trial.repeats * probes
        return took_s + (self._stand.start_s if self._stand.would_start(trial.settings) else 0.0)

    def _measure(self, trial: Trial) -> Outcome:
        """One trial, whatever comes of it."""
        assert self._pace is not None
        label = f"rung {trial.rung}: {knobs.describe(trial.settings)} ({trial.why})"
        run.say(f"{label}; {self._left_s():.0f} s left")
        outcome, probes = Outcome(), Probes()
        try:
            with self._stand.engine(trial.settings, self._left_s()) as (engine, limits):
                began_s = time.monotonic()
                for seed in trial.seeds:
                    value, self._rung = score(
                        lambda what, when, **more: engine.load(
                            what, when, live=limits, limit_s=self._limit_s(), **more
                        ),
                        self._goal,
                        self._pace,
                        trial.share,
                        seed,
                        self._rung,
                        trial.rung == self._options.rungs - 1,
                        probes,
                    )
                    outcome.scores.append(value)
                self._took_s.setdefault(trial.rung, []).append(time.monotonic() - began_s)
        except EngineError as error:
            outcome = Outcome(failure=str(error), oom=error.oom)
        if self._goal.slo is not None and outcome.score > 0:
            outcome.bounds = probes.bounds(outcome.score, self._goal.slo)
        scores = ", ".join(f"{value:.4g}" for value in outcome.scores)
        if outcome.bounds is not None:
            scores += " ({:.4g} to {:.4g})".format(*outcome.bounds)
        run.say(f"  {scores or outcome.failure}")
        return outcome

    def _left_s(self) -> float:
        return max(1.0, self._end_s - time.monotonic())

    def _limit_s(self) -> float:
        """Of one load: far longer than it should take, and not beyond the whole."""
        return min(max(20.0, 2 * LONGEST * self._goal.seconds), self._left_s() + 5)

    # --- what is written ---

    def _searched(self) -> Space:
        return Space(
            knobs={knob.name: list(knob.values) for knob in self._space},
            rungs=self._options.rungs,
            repeats=self._options.repeats,
            grid=self._options.grid,
        )

    def _about(self) -> Mapping[str, object]:
        """What a journal must be of, to be gone on from."""
        options, space = self._options, msgspec.structs.asdict(self._searched())
        return {"model": options.model, "engine": options.engine, "goal": self._goal, **space}

    def _write(self, search: Search | None, doubts: list[str]) -> Line:
        measured = list(search.measured.values()) if search else []
        winner, default = (search.best, search.default) if search else (None, None)
        lossy = {knob.name for knob in self._space if knob.lossy}
        best = tuning.recommended(winner, default, lossy, self._agreement)
        last = self._options.rungs - 1
        found_best = search.candidate if search else None
        confirmation = search.confirmation if search else None
        if best is None:
            doubts.append("no setting was measured")
        elif last not in best.outcomes:
            doubts.append("the best was not measured in full: the time was over")
        if (
            found_best is not None
            and found_best.settings
            and not (confirmation and confirmation.parts)
        ):
            doubts.append(
                f"{knobs.describe(found_best.settings)} scored best and was not confirmed, so the "
                "defaults stay: the time was over"
            )
        if winner is not None and best is not winner:
            doubts.append(
                f"{knobs.describe(winner.settings)} may change answers, which were not "
                "compared with those of the defaults in time, so the defaults stay"
            )
        elif best is not None and best.settings and self._agreement is None:
            doubts.append("the answers were not compared with those of the defaults")
        if search and search.hurried:
            doubts.append(f"the time of {self._options.budget_s:g} s ended the search early")
        throughput = self._goal.slo is None
        gained = gain(best, default, last, ladder=not throughput)
        trials = [each for each in map(scored, measured) if each is not None]
        output = Tuned(
            **self._head,
            valid=best is not None and last in best.outcomes,
            doubts=doubts,
            model=self._options.model,
            engine=self._options.engine,
            goal=self._goal,
            search=self._searched(),
            score="output tokens/s" if throughput else "requests/s within the SLO",
            slo=self._goal.slo,
            workload=self._goal.what,
            pace=self._pace,
            limits=self._limits,
            default=scored(default),
            best=scored(best),
            candidate=scored(found_best),
            confirmation=confirmation,
            gain=gained,
            cost=cost(best.score(), self._options.price) if best and throughput else None,
            answers=self._agreement,
            best_lossless=scored(_lossless(measured, self._space, last)),
            effects=effects(measured, 1.0 if throughput else STEP),
            trials=trials,
            pruned=search.pruned if search else {},
            failed=[trial for trial in trials if trial.failure],
            engine_starts=self._journal.starts,
            wall_s=self._options.budget_s - (self._end_s - time.monotonic()),
            config=str(self._configuration(best, gained)) if best else None,
        )
        output = result.write(self._options.out, output)
        names = ("best", "default", "gain", "answers", "effects", "config", "engine_starts")
        return result.line(output, self._options.out, *names, "wall_s", trials=len(output.trials))

    def _configuration(self, best: Measured, gained: Gain | None) -> Path:
        times = f", {gained['ratio']:.2f} times the defaults" if gained else ""
        if (same := self._agreement) is not None and best.settings:
            times += (
                f"; {same.equal} of {same.asked} answers equal those of the defaults "
                f"({same.equal_low:.0%} to {same.equal_high:.0%})"
            )
        return deployment.write(
            self._options.out / CONFIG,
            model=self._options.model,
            engine=self._options.engine,
            tuned=best.settings,
            why=f"Found by `bench tune` for {named(self._goal)}{times}:",
        )


def _full_grid(space: Sequence[Knob], options: argparse.Namespace) -> Iterator[Trial]:
    """Every combination, in full; those that share an engine one after the other."""
    last = options.rungs - 1
    points = sorted(
        knobs.points(space), key=lambda point: knobs.key(knobs.started_with(point, space))
    )
    for point in points:
        yield Trial(settings=point, rung=last, share=1.0, repeats=options.repeats, why="the grid")


def _lossless(measured: Sequence[Measured], space: Sequence[Knob], last: int) -> Measured | None:
    """The best that does not change the answers, of the longest measurement there is."""
    lossy = {knob.name for knob in space if knob.lossy}
    lossless = [each for each in measured if not lossy & set(each.settings) and each.score() > 0]
    rung = 0 if not any(last in each.outcomes and each.settings for each in lossless) else last
    same = [each for each in lossless if rung in each.outcomes]
    return max(same, key=lambda each: each.score(rung), default=None)
