"""`bench tune`: the engine settings that serve most, found on real engines within a time.

    python -m bench tune --model FOLDER --slo mlperf-interactive --out DIR --budget-s 1800
    python -m bench tune --model FOLDER --goal cost --knob max_num_seqs=16,64 --out DIR
    python -m bench tune --model FOLDER --against DIR --system bare --out DIR2     # confirm it

The score is goodput, the highest Poisson rate that keeps the SLO (`--goal goodput`), or output
tokens/s with all requests at once (`--goal cost`: the cost per million tokens is the price of an
hour over that). What is tried next is `tuning.py`'s; here trials are run on engines (`trial.py`),
restarted where a knob needs it, each noted in DIR/journal.jsonl when it is done. The same command
goes on from that journal after an interruption. An engine that does not start, or runs out of
memory, is a trial that failed.

The end is DIR/result.json and DIR/serve_config.yaml, which the application starts with. A trial on
a running engine uses limits below those it was started with; `--against` measures defaults and best
once more, each on a fresh engine with exactly its arguments, behind a server where asked to.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from bench import interval, measure, result, run
from bench.engine import deployment, knobs, served, trial, tuning
from bench.engine.knobs import Knob
from bench.engine.trial import Answer, Engine, EngineError
from bench.engine.tuning import Climb, Floor, Lengths, Measured, Outcome, Search, Trial
from bench.errors import BenchError, ResultError
from bench.hardware import ceilings, gpu
from bench.measure import Slo

JOURNAL, CONFIG = "journal.jsonl", "serve_config.yaml"
_STEP = 1.04  # Of the ladder of rates: what two settings must differ by to be told apart.
_FEWEST = 64  # Requests of a probe.
_TURNS = 2.0  # Mean times of a request that a probe lasts at least,
_LONGEST = 4.0  # but no longer than so many times --seconds.
_START_GUESS_S = 90.0
_OVER_S = 2.0
_PROBES = 3  # Of a climb, on average.
_ALL_AT_ONCE = "users=1"
_ALONE, _SURELY = 5, 0.8


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted of a setting.

    Attributes:
        slo: the highest rate within it; None for throughput.
        what: the workload.
        seconds: of a full probe.
        by_cpu: throughput is by the engine's CPU time, not by the clock.
    """

    slo: Slo | None
    what: str
    seconds: float
    by_cpu: bool = False


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What the defaults do with all requests at once, measured first: how long loads must be.

    Attributes:
        requests_per_s: answered; `step_s`: the shortest step, of one sequence.
        read, written: tokens of an average request.
    """

    requests_per_s: float
    step_s: float
    read: float
    written: float


# --- the command ----------------------------------------------------------------------------


def command(options: argparse.Namespace) -> dict[str, Any]:
    """What `python -m bench tune` does with its options; returns its last line."""
    slo = measure.parse_slo(options.slo) if options.goal == "goodput" else None
    goal = Goal(slo=slo, what=options.workload, seconds=options.seconds, by_cpu=options.by_cpu)
    if options.against:
        return _confirm(options)
    return Tuning(options, goal).run()


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench tune`."""
    add = parser.add_argument
    add("--model", required=True, help="a local folder or a hub id")
    add("--out", type=Path, required=True, help="folder of the result and of the journal")
    add("--engine", type=json.loads, default={}, help="vLLM arguments of every trial, as JSON")
    add("--goal", choices=["goodput", "cost"], default="goodput")
    add("--slo", default="mlperf-interactive", help="of goodput: a preset, or limits")
    add("--workload", default="synthetic:input=lognormal(800;0.4),output=100,max=3000")
    about = "NAME=VALUE,VALUE; may be given again. Without: every knob of this machine"
    add("--knob", action="append", default=[], help=about)
    add("--lossy", action="store_true", help="also knobs that change the answers (fp8)")
    add("--budget-s", type=float, default=3600.0, help="seconds of the whole")
    add(
        "--seconds",
        type=float,
        default=10.0,
        help="of a full probe, up to 4 times as long where requests are",
    )
    add("--rungs", type=int, default=3, help="measurements, each twice as long as the last")
    add("--repeats", type=int, default=3, help="of a full measurement, each with its own seed")
    add("--most", type=int, help="settings to measure at most")
    add("--grid", action="store_true", help="measure every combination in full instead: the proof")
    about = "throughput by the CPU time of an engine on a CPU that others use too"
    add("--by-cpu", action="store_true", help=about)
    add("--roofline", type=Path, help="a result of `bench roofline`: prunes more")
    add("--price", type=float, help="of an hour of this machine, for the cost per million tokens")
    add("--against", type=Path, help="a result of tune: measure its best and the defaults again")
    add("--system", choices=["engine", "bare", "ours"], default="engine", help="of --against")
    add("--port", type=int, default=8890, help="of --system bare or ours")


# --- trials on engines ----------------------------------------------------------------------


class Stand:
    """The engine that stands, replaced where a setting needs another one.

    Attributes:
        starts: engines that were started; `start_s`: how long the last one took.
    """

    def __init__(self, model: str, fixed: Mapping[str, Any], space: Sequence[Knob], folder: Path):
        self._model, self._fixed, self._space, self._folder = model, dict(fixed), space, folder
        self._engine: Engine | None = None
        self._base: dict[str, Any] = {}
        self._raised: dict[str, int] = {}
        self._defaults: dict[str, dict[str, int]] = {}
        self.starts, self.start_s = 0, _START_GUESS_S

    def would_start(self, settings: Mapping[str, Any]) -> bool:
        """Whether a setting needs an engine other than the one that stands."""
        if self._engine is None or self._engine.ready is None:
            return True
        if knobs.started_with(settings, self._space) != self._base:
            return True
        limits = self._engine.ready.limits
        if any(value > limits.get(name, 0) for name, value in self._live(settings).items()):
            return True
        # A limit that was raised for another must be known to be lowered again.
        return any(name not in settings for name in self._raised) and not self._known()

    @contextlib.contextmanager
    def engine(
        self, settings: Mapping[str, Any], start_s: float
    ) -> Iterator[tuple[Engine, dict[str, int]]]:
        """An engine for a setting, and the limits to give it.

        Raises:
            EngineError: it does not start, or ended in the block; the next one is a new one.
        """
        if self.would_start(settings):
            self.close()
            self._start(settings, start_s)
        assert self._engine is not None
        assert self._engine.ready is not None
        limits = dict(self._known() or self._engine.ready.limits) | self._live(settings)
        limits["max_num_seqs"] = min(limits["max_num_seqs"], limits["max_num_batched_tokens"])
        try:
            yield self._engine, limits
        except EngineError:
            self.close()
            raise

    @property
    def limits(self) -> dict[str, int]:
        """vLLM's own limits, for the engine arguments that are fixed."""
        return self._defaults.get(knobs.key({}), {})

    @property
    def kv_tokens(self) -> int:
        ready = self._engine.ready if self._engine else None
        return ready.kv_blocks * ready.block_tokens if ready else 0

    def close(self) -> None:
        if self._engine is not None:
            self._engine.__exit__(None, None, None)
            self._engine = None

    def _live(self, settings: Mapping[str, Any]) -> dict[str, int]:
        live = {knob.name for knob in self._space if knob.live}
        return {name: int(value) for name, value in settings.items() if name in live}

    def _known(self) -> dict[str, int] | None:
        return self._defaults.get(knobs.key(self._base))

    def _start(self, settings: Mapping[str, Any], start_s: float) -> None:
        self._base = knobs.started_with(settings, self._space)
        known = self._known()
        # Only what is above the defaults; less can be told to the engine later.
        self._raised = {
            name: value
            for name, value in self._live(settings).items()
            if known is None or value > known[name]
        }
        given = {**self._fixed, **self._base, **self._raised}
        run.say(f"starting an engine: {knobs.describe({**self._base, **self._raised})}")
        engine = Engine(self._model, given, self._folder, start_s)
        began_s = time.monotonic()
        self.starts += 1
        try:
            engine.__enter__()
        finally:
            self.start_s = time.monotonic() - began_s
        self._engine = engine
        if not self._raised and engine.ready is not None:
            self._defaults[knobs.key(self._base)] = engine.ready.limits


def pace(engine: Engine, goal: Goal, limits: Mapping[str, int], limit_s: float) -> Pace:
    """Measure how fast the defaults are, so that loads have a length that says something."""
    alone = [
        _step_s(engine.load(goal.what, _ALL_AT_ONCE, count=1, seed=-2 - n), goal)
        for n in range(_ALONE)
    ]
    count, requests_per_s = _FEWEST, 0.0
    # Longer until it takes a while: the start and the end of a batch are slow.
    while True:
        answer = engine.load(
            goal.what, _ALL_AT_ONCE, count=count, seed=-3, live=limits, limit_s=limit_s
        )
        requests_per_s = count / (answer.cpu_s if goal.by_cpu else answer.elapsed_s)
        if answer.elapsed_s >= goal.seconds / 4 or count >= 4096:
            break
        count *= 2
    return Pace(
        requests_per_s=requests_per_s,
        # It prunes, so it must be below what any step takes, also where the machine is disturbed.
        step_s=_SURELY * min(alone),
        read=fmean(record.input_tokens or 1 for record in answer.records),
        written=fmean(record.output_tokens or 1 for record in answer.records),
    )


def _step_s(answer: Answer, goal: Goal) -> float:
    """The step of a load of one request, on the clock that scores go by."""
    if goal.by_cpu:
        return answer.cpu_s / answer.steps
    return trial.tpot_s(answer.records) or 0.0


def score(
    load: Any, goal: Goal, known: Pace, share: float, seed: int, start: int, precise: bool
) -> tuple[float, int]:
    """One score, and the rung of the ladder where it lies.

    Args:
        load: `Engine.load` or `Served.load`, limits of the scheduler given.
        share: of the requests of a full measurement.
        start: the rung to begin at.
    """
    if goal.slo is None:
        count = max(_FEWEST // 2, round(known.requests_per_s * goal.seconds * share))
        answer: Answer = load(goal.what, _ALL_AT_ONCE, count=count, seed=seed)
        return trial.output_tokens_per_s(answer, goal.by_cpu), 0
    climb = Climb(start, gap=1 if precise else 2, most=12 if precise else 8)
    length_s = goal.seconds * share
    while (rung := climb.ask()) is not None:
        rate, kept = rate_of(known, rung), True
        while kept:
            count = max(_FEWEST, round(rate * length_s))
            answer = load(goal.what, f"poisson:rate={rate!r}", count=count, seed=seed, slo=goal.slo)
            good = trial.good_share(answer.records, goal.slo)
            kept = not answer.lost and good >= goal.slo.percentile / 100
            # Until the first requests end there are more and more at once: a load that was over by
            # then has seen nothing of the crowd. One that failed would fail in a longer one too.
            needed_s = min(_TURNS * _mean_s(answer), _LONGEST * goal.seconds)
            if count >= 0.9 * rate * needed_s:
                break
            length_s = needed_s
        climb.tell(kept)
    found = climb.result
    return (0.0, start) if found is None else (rate_of(known, found), found)


def _mean_s(answer: Answer) -> float:
    """How long a request took from when it was planned."""
    took_s = [r.end_s - r.planned_s for r in answer.records if r.ok and r.end_s is not None]
    return fmean(took_s) if took_s else 0.0


def rate_of(known: Pace, rung: int) -> float:
    """Requests/s of a rung of the ladder; rung 0 is below what the defaults answer at once."""
    return 0.7 * known.requests_per_s * math.pow(_STEP, rung)


def rung_of(known: Pace, value: float) -> int:
    """The rung of a rate."""
    base = rate_of(known, 0)
    return round(math.log(value / base) / math.log(_STEP)) if min(value, base) > 0 else 0


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
        self._head = result.header("tune", f"{options.model}, {_named(goal)}")
        self._journal = Journal(options.out, self._about())
        self._stand = Stand(options.model, options.engine, self._space, options.out)
        self._roof = ceilings.known(options.roofline, options.model, options.engine)
        self._took_s: dict[int, list[float]] = {}
        self._rung = 0
        self._pace: Pace | None = self._journal.pace
        self._limits: dict[str, int] = self._journal.limits

    def run(self) -> dict[str, Any]:
        """Search until it is over or the time is; returns the last line."""
        doubts: list[str] = []
        search: Search | None = None
        try:
            self._prepare()
            search = self._search()
            self._go(search)
        except KeyboardInterrupt:
            doubts.append("interrupted: the same command goes on from the journal")
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
            most=self._options.most,
            worth=lambda settings: tuning.worth(floor, lengths, settings),
            ceiling=lambda settings: unit * tuning.requests_per_s(floor, lengths, settings),
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
        planned = iter(_full_grid(self._space, self._options)) if self._options.grid else None
        while True:
            asked = next(planned, None) if planned else search.ask()
            if asked is None:
                return
            outcome = self._journal.outcome(asked)
            if outcome is None:
                if not self._affordable(asked, search):
                    if search.hurried or planned:
                        return
                    search.hurry()
                    continue
                outcome = self._measure(asked)
                if outcome.failure and self._left_s() <= _OVER_S:
                    search.hurried = True  # It was the time that ended it: not to be remembered.
                    return
                self._journal.add(asked, outcome, self._stand)
            if planned:
                name = knobs.key(asked.settings)
                known = search.measured.setdefault(
                    name, Measured(settings=asked.settings, outcomes={})
                )
                known.outcomes[asked.rung] = outcome
            else:
                search.tell(outcome)

    def _affordable(self, asked: Trial, search: Search) -> bool:
        """Whether there is time for it, and then for the best one's full measurement."""
        need_s = self._estimate_s(asked)
        last = self._options.rungs - 1
        if not search.hurried and asked.rung < last and search.default is not None:
            best = search.best
            if best is not None and last not in best.outcomes:
                need_s += self._estimate_s(
                    msgspec.structs.replace(
                        asked,
                        settings=best.settings,
                        rung=last,
                        share=1.0,
                        repeats=self._options.repeats,
                    )
                )
        return need_s <= self._left_s()

    def _estimate_s(self, asked: Trial) -> float:
        seen_s = self._took_s.get(asked.rung)
        if seen_s:
            took_s = max(seen_s[-3:])
        else:
            probes = _PROBES if self._goal.slo else 1.2
            took_s = self._goal.seconds * asked.share * asked.repeats * probes
        return took_s + (self._stand.start_s if self._stand.would_start(asked.settings) else 0.0)

    def _measure(self, asked: Trial) -> Outcome:
        """One trial, whatever comes of it."""
        assert self._pace is not None
        label = f"rung {asked.rung}: {knobs.describe(asked.settings)} ({asked.why})"
        run.say(f"{label}; {self._left_s():.0f} s left")
        outcome = Outcome()
        try:
            with self._stand.engine(asked.settings, self._left_s()) as (engine, limits):
                began_s = time.monotonic()
                for seed in range(asked.repeats):
                    value, self._rung = score(
                        lambda what, when, **more: engine.load(
                            what, when, live=limits, limit_s=self._limit_s(), **more
                        ),
                        self._goal,
                        self._pace,
                        asked.share,
                        seed,
                        self._rung,
                        asked.rung == self._options.rungs - 1,
                    )
                    outcome.scores.append(value)
                self._took_s.setdefault(asked.rung, []).append(time.monotonic() - began_s)
        except EngineError as error:
            outcome = Outcome(failure=str(error), oom=error.oom)
        said = [f"{value:.4g}" for value in outcome.scores]
        run.say(f"  {', '.join(said) or outcome.failure}")
        return outcome

    def _left_s(self) -> float:
        return max(1.0, self._end_s - time.monotonic())

    def _limit_s(self) -> float:
        """Of one load: far longer than it should take, and not beyond the whole."""
        return min(max(20.0, 2 * _LONGEST * self._goal.seconds), self._left_s() + 5)

    # --- what is written ---

    def _about(self) -> dict[str, Any]:
        """What a journal must be of, to be gone on from."""
        return {
            "model": self._options.model,
            "engine": self._options.engine,
            "goal": msgspec.to_builtins(self._goal),
            "knobs": {knob.name: list(knob.values) for knob in self._space},
            "rungs": self._options.rungs,
            "repeats": self._options.repeats,
            "grid": self._options.grid,
        }

    def _write(self, search: Search | None, doubts: list[str]) -> dict[str, Any]:
        measured = list(search.measured.values()) if search else []
        best, default = (search.best, search.default) if search else (None, None)
        last = self._options.rungs - 1
        if best is None:
            doubts.append("no setting was measured")
        elif last not in best.outcomes:
            doubts.append("the best was not measured in full: the time was over")
        if search and search.hurried:
            doubts.append(f"the time of {self._options.budget_s:g} s ended the search early")
        about = self._about()
        found: dict[str, Any] = self._head | {
            **{name: about.pop(name) for name in ("model", "engine", "goal")},
            "search": about,
            "valid": best is not None and last in best.outcomes,
            "doubts": doubts,
            "score": "requests/s within the SLO" if self._goal.slo else "output tokens/s",
            "slo": msgspec.to_builtins(self._goal.slo),
            "workload": self._goal.what,
            "pace": msgspec.to_builtins(self._pace),
            "limits": self._limits,
            "default": _row(default),
            "best": _row(best),
            "gain": gain(best, default, last, self._goal.slo is not None),
            "best_lossless": _row(_lossless(measured, self._space, last)),
            "effects": msgspec.to_builtins(
                tuning.effects(measured, _STEP if self._goal.slo else 1.0)
            ),
            "trials": [_row(each) for each in measured],
            "pruned": search.pruned if search else {},
            "failed": [_row(each) for each in measured if each.outcomes[each.rung].failure],
            "engine_starts": self._journal.starts,
            "wall_s": self._options.budget_s - (self._end_s - time.monotonic()),
            "config": None,
        }
        if best is not None:
            found["config"] = str(self._configuration(best, found["gain"]))
            if self._goal.slo is None:
                found["cost"] = cost(best.score(), self._options.price)
        result.write(self._options.out, found)
        keys = ("best", "default", "gain", "effects", "config", "engine_starts", "wall_s")
        return {
            "benchmark": "tune",
            "name": found["name"],
            "valid": found["valid"],
            "doubts": doubts,
            "out": str(self._options.out),
            "trials": len(measured),
            **{key: found[key] for key in keys},
        }

    def _configuration(self, best: Measured, gained: dict[str, Any] | None) -> Path:
        times = f", {gained['ratio']:.2f} times the defaults" if gained else ""
        return deployment.write(
            self._options.out / CONFIG,
            model=self._options.model,
            engine=self._options.engine,
            tuned=best.settings,
            why=f"Found by `bench tune` for {_named(self._goal)}{times}:",
        )


def _full_grid(space: Sequence[Knob], options: argparse.Namespace) -> Iterator[Trial]:
    """Every combination, in full; those that share an engine one after the other."""
    last = options.rungs - 1
    points = sorted(
        knobs.points(space), key=lambda point: knobs.key(knobs.started_with(point, space))
    )
    for point in points:
        yield Trial(settings=point, rung=last, share=1.0, repeats=options.repeats, why="the grid")


def _named(goal: Goal) -> str:
    if goal.slo is None:
        return "throughput"
    limits = {k: v for k, v in msgspec.to_builtins(goal.slo).items() if v is not None}
    return "goodput within " + ", ".join(f"{name} {value:g}" for name, value in limits.items())


def _row(each: Measured | None) -> dict[str, Any] | None:
    if each is None:
        return None
    return {
        "settings": each.settings,
        "described": knobs.describe(each.settings),
        "rung": each.rung,
        "score": each.score(),
        "scores": {str(rung): outcome.scores for rung, outcome in each.outcomes.items()},
        "failure": each.outcomes[each.rung].failure,
        "oom": each.outcomes[each.rung].oom,
    }


def _lossless(measured: Sequence[Measured], space: Sequence[Knob], last: int) -> Measured | None:
    """The best that does not change the answers, of the longest measurement there is."""
    lossy = {knob.name for knob in space if knob.lossy}
    kept = [each for each in measured if not lossy & set(each.settings) and each.score() > 0]
    rung = 0 if not any(last in each.outcomes and each.settings for each in kept) else last
    same = [each for each in kept if rung in each.outcomes]
    return max(same, key=lambda each: each.score(rung), default=None)


def gain(
    best: Measured | None, default: Measured | None, last: int, ladder: bool
) -> dict[str, Any] | None:
    """Best over default at the longest measurement both have, with its interval.

    Rates lie on a ladder, so that equal ones may differ by a step of it: the interval is that much
    wider on both sides.
    """
    if best is None or default is None or not default.score():
        return None
    rungs = sorted(set(best.outcomes) & set(default.outcomes))
    if not rungs:
        return None
    over, under = best.outcomes[rungs[-1]].scores, default.outcomes[rungs[-1]].scores
    if not over or not under:
        return None
    pairs = list(zip(over, under, strict=False))
    bounds = interval.of_paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    wide = _STEP if ladder else 1.0
    return {
        "ratio": math.exp(fmean(math.log(a / b) for a, b in pairs)) if min(under) > 0 else None,
        "low": bounds[0] / wide if bounds else None,
        "high": bounds[1] * wide if bounds else None,
        "in_full": rungs[-1] == last,
    }


def cost(tokens_per_s: float, price: float | None) -> dict[str, Any]:
    """What a million output tokens take of the machine, and cost where its price is known."""
    hours = 1e6 / tokens_per_s / 3600 if tokens_per_s else math.inf
    found: dict[str, Any] = {"machine_seconds_a_million_tokens": hours * 3600}
    if price is not None:
        found["cost_a_million_tokens"] = hours * price
    return found


# --- the journal ----------------------------------------------------------------------------


class Journal:
    """What was measured, a line each, so that a search goes on where it was cut.

    Raises:
        ResultError: the folder has the journal of another search.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / JOURNAL
        self._about = json.loads(json.dumps(about))
        self.pace: Pace | None = None
        self.limits: dict[str, int] = {}
        self.starts = 0
        self._known: dict[tuple[str, int], Outcome] = {}
        if self._path.is_file():
            self._read()

    def begin(self, known: Pace, limits: Mapping[str, int]) -> None:
        head = {"about": self._about, "pace": msgspec.to_builtins(known), "limits": dict(limits)}
        self._append(head)

    def outcome(self, asked: Trial) -> Outcome | None:
        """What the journal has of a trial."""
        return self._known.get((knobs.key(asked.settings), asked.rung))

    def add(self, asked: Trial, outcome: Outcome, stand: Stand) -> None:
        self.starts += stand.starts
        stand.starts = 0
        self._known[knobs.key(asked.settings), asked.rung] = outcome
        row = {"trial": msgspec.to_builtins(asked), "outcome": msgspec.to_builtins(outcome)}
        self._append(row | {"starts": self.starts, "at": time.time()})

    def _append(self, row: dict[str, Any]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def _read(self) -> None:
        whole, newline, cut = self._path.read_text().rpartition("\n")
        if cut:  # Off, as it was written: what comes next must begin a line.
            self._path.write_text(whole + newline)
        for line in whole.splitlines():
            row = json.loads(line)
            if "about" in row:
                if row["about"] != self._about:
                    raise ResultError(f"{self._path}: is the journal of another search")
                self.pace = msgspec.convert(row["pace"], Pace)
                self.limits = row["limits"]
                continue
            asked = msgspec.convert(row["trial"], Trial)
            outcome = msgspec.convert(row["outcome"], Outcome)
            self._known[knobs.key(asked.settings), asked.rung] = outcome
            self.starts = row["starts"]


# --- confirming -----------------------------------------------------------------------------


def _confirm(options: argparse.Namespace) -> dict[str, Any]:
    """The defaults and the best of a search, each on a fresh engine or server, in full."""
    before = result.read(options.against)
    if before.get("benchmark") != "tune" or not before.get("best"):
        raise BenchError(f"against = {str(options.against)!r}: not a result of `bench tune`")
    goal = msgspec.convert(before["goal"], Goal)  # The same question, asked again.
    known = msgspec.convert(before["pace"], Pace)
    settings = before["best"]["settings"]
    head = result.header("confirm", f"{options.model} as {options.system}, {_named(goal)}")
    scores: dict[str, list[float]] = {}
    doubts: list[str] = []
    began_s, slower = time.monotonic(), 0
    for share, name, given in ((0.5, "default", {}), (1.0, "best", settings)):
        given = {**options.engine, **given}
        # From where it was found; a server is slower by what the one before it was slower by.
        start = rung_of(known, before[name]["score"])
        rung, end_s = start + slower, began_s + share * options.budget_s
        with _fresh(options, given) as system:
            ready_s = time.monotonic()
            for seed in range(options.repeats):
                value, rung = score(
                    lambda what, when, system=system, **more: _noted(
                        system.load(what, when, limit_s=120.0, **more), doubts, options.system
                    ),
                    goal,
                    known,
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
    found = head | {
        "valid": fewest > 1 and not any(doubt.startswith("late") for doubt in doubts),
        "doubts": sorted(set(doubts)),
        "system": options.system,
        "engine": options.engine,
        "settings": settings,
        "slo": msgspec.to_builtins(goal.slo),
        "workload": goal.what,
        "scores": scores,
        "gain": gain(best, default, 0, goal.slo is not None),
    }
    result.write(options.out, found)
    keys = ("name", "valid", "doubts", "settings", "scores", "gain")
    return {"benchmark": "confirm", "out": str(options.out), **{key: found[key] for key in keys}}


def _fresh(options: argparse.Namespace, given: dict[str, Any]) -> Any:
    folder = options.out / "engine"
    if options.system == "engine":
        return Engine(options.model, given, folder)
    return served.Served(options.system, options.model, given, folder, options.port)


def _noted(answer: Answer, doubts: list[str], system: str) -> Answer:
    # In process a request is sent between two steps, which is when an engine looks for them.
    if system != "engine" and (late := served.lag(answer.records)):
        # The worst of them is enough to be told.
        doubts[:] = [*(doubt for doubt in doubts if not doubt.startswith("late")), late]
    return answer
