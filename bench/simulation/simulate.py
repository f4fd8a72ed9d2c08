"""`bench simulate`: a load against several policies, on fleets of engines that are a model.

    python -m bench simulate --workload azure:PATH --policy ours --policy 'serve:target=8|16|32' ..

Every policy meets the same requests at the same times, with the same fleet at the start. What comes
out are records, as of a run, so that `bench.measure` says what they mean. The engine is one of a
data sheet (--gpu, --model) or one fitted to measured runs (--engine), and --validate says how far
such a fit can be trusted. With --beside the requests are those of a measured run, and what its
replicas did is shown beside what they do here (reality.py). See policies.py, demand.py, fleet.py
and enginemodel.py for what is modelled.

A policy with alternatives stands for the best of them: the fewest GPU-hours among those that hold
the objective or, where none does, the one that comes nearest. So do `static` and `foresight`
without a value; for them the search ends with the first that holds it, from cheap to dear.

Loads of several seeds are drawn, and all policies meet the same ones: shares and hours are means
with 95 % intervals, and a policy holds the objective where its whole interval does (trials.py).
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from bench import measure, records, result
from bench.errors import BenchError
from bench.measure import Measures, Slo
from bench.options import whole
from bench.records import Record
from bench.result import Line
from bench.simulation import (
    enginefit,
    enginemodel,
    fleet,
    policies,
    reality,
)
from bench.simulation.case import Case, Draw
from bench.simulation.enginemodel import Engine
from bench.simulation.fleet import Fleet, Outcome
from bench.simulation.job import Job
from bench.simulation.reality import Measured
from bench.simulation.simulated import Beside, Error, Simulated, Simulation, Tried, Validated
from bench.simulation.trials import Strain, Trial, over_seeds

MEASURED = "measured"
# From cheap to dear.
_SHARES = (1.3, 1.15, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_INITIAL_SHARE = 0.6  # How busy the replicas of the start are in the load's first minute.
_FIRST_S = 60.0
_MINUTE_S = 60.0


def simulate(
    case: Case, texts: Sequence[str], folder: Path | None = None, keep: bool = False
) -> Simulated:
    """Every policy's best trial; written to `folder`, with a page, if given.

    With `keep` also the records of it, each policy a repeat: a gigabyte for an hour of traffic.

    Raises BenchError for a policy, workload or load that cannot be understood, before any run.
    """
    draws = case.drawn()
    jobs = draws[0].jobs
    searches = [list(_alternatives(text, case)) for text in texts]
    for choices in searches:
        for text in choices:
            policies.parse(text, case.goal, case.fleet, jobs[:1])
    simulated = []
    path = result.prepare(folder) if folder is not None and keep else None
    for number, (text, choices) in enumerate(zip(texts, searches, strict=True)):
        trials, heard = _search(draws, choices, stops=text in _SEARCHED)
        best = _best(trials, case.slo)
        _say(f"{best.spec}: {best.kept:.2%} met the objective, {best.gpu_hours:.2f} GPU-hours")
        measures = measure.measure(_judged_of(case, heard), case.slo)
        simulated.append((text, best, measures, trials))
        if path is not None:
            records.append(path, (msgspec.structs.replace(r, repeat=number) for r in heard))
    if case.beside is not None:
        simulated.insert(0, _measured(case, case.beside))
    from bench.simulation import simulation_page  # Loads matplotlib, which takes a second.

    data = _result(case, jobs, simulated)
    if folder is not None:
        data = result.write(folder, data)
        page = simulation_page.page(data)
        (folder / result.REPORT).write_text(page, encoding="utf-8")
    _say(simulation_page.table(data))
    return data


_SEARCHED = ("static", "foresight")


def _alternatives(text: str, case: Case) -> Iterator[str]:
    if text == "static":
        for count in range(max(1, case.fleet.min_replicas), case.fleet.max_replicas + 1):
            yield f"static:n={count}"
    elif text == "foresight":
        for share in _SHARES:
            yield f"foresight:share={share}"
    else:
        yield from policies.alternatives(text)


def _search(
    draws: Sequence[Draw], choices: Sequence[str], stops: bool
) -> tuple[list[Trial], list[Record]]:
    """A trial of each choice, and the records of the best under the first seed."""
    trials: list[Trial] = []
    first: list[Outcome] = []
    case, slo = draws[0].case, draws[0].case.slo
    for text in choices:
        runs = [trial_of(draw.case, draw.jobs, text) for draw in draws]
        strains = [
            _strain(slo, _judged_of(case, outcome.records(whole=False))) for _, outcome in runs
        ]
        trials.append(over_seeds([trial for trial, _ in runs], strains))
        if _best(trials, slo) is trials[-1]:
            first = [runs[0][1]]
        if stops and trials[-1].verdict(slo):
            break
    return trials, first[0].records()


def _best(trials: Sequence[Trial], slo: Slo) -> Trial:
    holding = [trial for trial in trials if trial.verdict(slo)]
    if holding:
        return min(holding, key=lambda trial: trial.gpu_hours)
    return max(trials, key=lambda trial: trial.kept)


def _strain(slo: Slo, heard: Sequence[Record]) -> Strain:
    in_order = sorted(heard, key=lambda record: record.planned_s)
    return Strain(
        np.array([record.planned_s for record in in_order]),
        np.array([slo.used(record) for record in in_order]),
    )


def trial_of(case: Case, jobs: Sequence[Job], text: str) -> tuple[Trial, Outcome]:
    """One policy against the load."""
    began_s = time.perf_counter()
    size = case.fleet
    if text.startswith("static:"):  # Its fleet is there from the start.
        count = int(text.partition("=")[2])
        size = replace(size, initial=min(max(count, size.min_replicas), size.max_replicas))
    outcome = fleet.run(size, jobs, policies.parse(text, case.goal, size, jobs))
    return _judged(text, outcome, case, time.perf_counter() - began_s), outcome


def _judged(text: str, outcome: Outcome, case: Case, took_s: float) -> Trial:
    slo, heard = case.slo, _judged_of(case, outcome.records(whole=False))
    paid_s = outcome.replica_s(case.judged_from_s)
    met = [slo.met_by(record) for record in heard]
    line = outcome.timeline
    paid = reality.paid(line)
    steps = np.diff([wanted for _, wanted, _ in _from_start(outcome, case)])
    return Trial(
        spec=text,
        kept=sum(met) / len(met) if met else 1.0,
        kept_ttft=_share(heard, Slo(ttft_s=slo.ttft_s)),
        kept_tpot=_share(heard, Slo(tpot_s=slo.tpot_s)),
        gpu_hours=paid_s * case.fleet.engine.gpus / 3600,
        unfinished=sum(not record.ok for record in heard),
        changes=len(outcome.decisions),
        reversals=int(np.sum(np.sign(steps[1:]) != np.sign(steps[:-1]))),
        preempted=outcome.preempted,
        replicas_mean=paid_s / max(outcome.end_s - case.judged_from_s, 1e-9),
        replicas_most=int(paid.max(initial=0)),
        timeline=line,
        decisions=outcome.decisions,
        kept_by_minute=_by_minute([record.planned_s for record in heard], met),
        took_s=took_s,
        judged=len(heard),
    )


def _measured(case: Case, beside: Measured) -> tuple[str, Trial, Measures, list[Trial]]:
    """The run that is simulated once more, as if it were a trial."""
    heard = _judged_of(case, beside.records)
    met = [case.slo.met_by(record) for record in heard]
    wanted = [beside.timeline.wanted[0], *(count for _, count, _ in beside.decisions)]
    signs = np.sign(np.diff(wanted))
    paid_s = beside.replica_s(case.judged_from_s)
    trial = Trial(
        spec=MEASURED,
        kept=sum(met) / len(met) if met else 1.0,
        kept_ttft=_share(heard, Slo(ttft_s=case.slo.ttft_s)),
        kept_tpot=_share(heard, Slo(tpot_s=case.slo.tpot_s)),
        gpu_hours=paid_s * case.fleet.engine.gpus / 3600,
        unfinished=sum(not record.ok for record in heard),
        changes=len(beside.decisions),
        reversals=int(np.sum(signs[1:] != signs[:-1])),
        preempted=0,
        replicas_mean=paid_s / max(beside.end_s - case.judged_from_s, 1e-9),
        replicas_most=int(reality.paid(beside.timeline).max()),
        timeline=beside.timeline,
        decisions=beside.decisions,
        kept_by_minute=_by_minute([record.planned_s for record in heard], met),
        judged=len(heard),
    )
    return MEASURED, trial, measure.measure(heard, case.slo), [trial]


def _judged_of(case: Case, heard: Sequence[Record]) -> list[Record]:
    return [record for record in heard if record.planned_s >= case.judged_from_s]


def _from_start(outcome: Outcome, case: Case) -> list[tuple[float, int, str]]:
    return [(0.0, case.fleet.initial, "the start"), *outcome.decisions]


def _share(heard: Sequence[Record], slo: Slo) -> float:
    return sum(map(slo.met_by, heard)) / len(heard) if heard else 1.0


def _by_minute(at_s: Sequence[float], met: Sequence[bool]) -> list[tuple[float, float]]:
    minutes: dict[int, list[bool]] = {}
    for planned_s, good in zip(at_s, met, strict=True):
        minutes.setdefault(int(planned_s / _MINUTE_S), []).append(good)
    return [(minute * _MINUTE_S, sum(mine) / len(mine)) for minute, mine in sorted(minutes.items())]


# --- the result -----------------------------------------------------------------------------


def _result(
    case: Case, jobs: Sequence[Job], simulated: Sequence[tuple[str, Trial, Measures, list[Trial]]]
) -> Simulated:
    return Simulated(
        **result.header(f"{case.workload} {case.load}"),
        workload=case.workload,
        load=case.load,
        copies=case.copies,
        seed=case.seed,
        seeds=case.seeds,
        requests=len(jobs),
        duration_s=jobs[-1].at_s if jobs else 0.0,
        judged_from_s=case.judged_from_s,
        slo=case.slo,
        fleet=case.fleet,
        requests_per_s=_per_minute(jobs),
        beside=_beside(case.beside, [best for _, best, _, _ in simulated]) if case.beside else None,
        notes=_notes(case),
        policies=[
            Simulation(
                **vars(best),
                policy=text,
                measures=measures,
                holds=best.verdict(case.slo),
                tried=[
                    Tried(
                        spec=trial.spec,
                        kept=trial.kept,
                        kept_interval=trial.kept_interval,
                        gpu_hours=trial.gpu_hours,
                        holds=trial.verdict(case.slo),
                    )
                    for trial in trials
                ],
            )
            for text, best, measures, trials in simulated
        ],
    )


def _notes(case: Case) -> list[str]:
    if case.beside is not None:
        return ["the requests are those of one measured run: shares and hours have no interval"]
    if case.seeds == 1:
        return ["one seed: another one may turn each verdict; --seeds 5 gives intervals"]
    return []


def _beside(beside: Measured, trials: Sequence[Trial]) -> Beside:
    """How far the simulated fleets are from the measured one, the first of the trials."""
    measured, *simulated = trials
    return Beside(
        run=beside.name,
        start_s=beside.start_s,
        policies=[
            Error(
                spec=trial.spec,
                gpu_hours_error=trial.gpu_hours / measured.gpu_hours - 1,
                kept_minus_measured=trial.kept - measured.kept,
                replicas_most_minus_measured=trial.replicas_most - measured.replicas_most,
                serving_apart_mean=reality.apart(trial.timeline, beside),
            )
            for trial in simulated
        ],
    )


def _per_minute(jobs: Sequence[Job]) -> list[tuple[float, float]]:
    counts = Counter(int(job.at_s / _MINUTE_S) for job in jobs)
    minutes = range(max(counts, default=-1) + 1)
    return [(minute * _MINUTE_S, counts[minute] / _MINUTE_S) for minute in minutes]


# --- the command ----------------------------------------------------------------------------


DEFAULT_POLICIES = (
    "ours",
    "serve:target=8|16|32|64,up=0|30,down=120|600",
    "spare:kv=0.6|0.8,queue=5,kv_spare=0.1|0.3",
    "waiting:per=1|5",
    "static",
    "foresight",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the result")
    add("--workload", help="the requests: see bench/traffic/workload.py")
    add(
        "--load",
        default="trace",
        help="their arrival times: see bench/traffic/schedule.py and bench/simulation/demand.py",
    )
    add("--requests", type=int, help="simulate only the first N requests")
    add("--duration", type=float, help="simulate only the first seconds of the load")
    add("--copies", type=int, default=1, help="copies of each request")
    add("--policy", action="append", help="see bench/simulation/policies.py; may be repeated")
    add(
        "--slo",
        default="ttft_ms=2000,tpot_ms=100,percentile=99",
        help="objective: a preset, or limits, as in `bench search`",
    )
    add("--judge-from", type=float, default=0.0, help="seconds that are simulated but not judged")
    add("--seed", type=int, default=0, help="first seed")
    about = "loads to draw, for intervals and verdicts; 1 with --beside; default: %(default)s"
    add("--seeds", type=whole(1, 1000), default=5, help=about)
    add("--gpu", default="H100", help=f"GPU of the modelled engines: {', '.join(enginemodel.GPUS)}")
    add("--gpus", type=int, default=1, help="GPUs of one replica")
    add("--model", default="Qwen2.5-7B", help=", ".join(enginemodel.MODELS))
    add("--beside", type=Path, help="folder of a `bench run --dashboard ..`, instead of --workload")
    add(
        "--engine",
        type=Path,
        help="engine to use instead of --gpu and --model: a result of --validate, or a file",
    )
    add("--start", type=float, help="seconds until a replica serves; 120, or as it was --beside")
    add("--start-spread", type=float, default=0.0, help="share of --start by which starts vary")
    add("--period", type=float, default=5.0, help="seconds between decisions")
    add("--min", type=int, default=1, help="minimum number of replicas")
    add("--max", type=int, default=16, help="maximum number of replicas")
    add(
        "--initial",
        type=int,
        help="replicas at the start; by default as many as the first minute needs",
    )
    add("--records", action="store_true", help="write the records, with the time of every token")
    add("--validate", type=Path, action="append", help="folder of a measured run; may be repeated")
    for name in ("max_num_seqs", "token_budget", "kv_blocks", "block_tokens"):
        add(f"--{name.replace('_', '-')}", type=int, help=f"{name} of the engine")


def command(options: argparse.Namespace) -> Line:
    """What `python -m bench simulate` does; the last line of its output."""
    engine = _engine(options)
    if options.validate:
        return _validated(options, engine)
    beside = Measured.read(options.beside) if options.beside else None
    if (beside is None) == (not options.workload):
        raise BenchError.of("workload", options.workload or "", "give one of it and --beside")
    start_s: float | None = options.start
    if start_s is None and beside is not None:
        start_s = beside.start_s
    fleet_of = Fleet(
        engine,
        start_s=120.0 if start_s is None else start_s,
        start_spread=options.start_spread,
        period_s=options.period,
        percentile=99.0,
        min_replicas=options.min,
        max_replicas=options.max,
        initial=max(options.min, 1),
        seed=options.seed,
    )
    slo = measure.parse_slo(options.slo)
    case = Case(
        beside.name if beside else options.workload,
        "as it was measured" if beside else options.load,
        replace(fleet_of, percentile=slo.percentile, ttft_s=slo.ttft_s, tpot_s=slo.tpot_s),
        slo,
        count=options.requests,
        duration_s=options.duration,
        copies=options.copies,
        seed=options.seed,
        seeds=1 if beside else options.seeds,
        judged_from_s=options.judge_from,
        beside=beside,
    )
    initial = options.initial if options.initial is not None else first(case)
    case = replace(case, fleet=replace(case.fleet, initial=initial))
    data = simulate(case, options.policy or DEFAULT_POLICIES, options.out, options.records)
    keys = ["spec", "kept", "kept_interval", "holds", "gpu_hours", "gpu_hours_interval"]
    keys += ["changes", "replicas_mean"]
    rows = [{key: getattr(row, key) for key in keys} for row in data.policies]
    page, names = str(options.out / result.REPORT), ["beside"] if beside else []
    return result.line(data, options.out, *names, report=page, policies=rows)


def first(case: Case) -> int:
    """Replicas that the first minute of a load needs: every policy begins with a fleet that fits,
    as if it had been there before, and none is judged by how it gets there."""
    size = case.fleet
    busy = policies.busy(case.jobs(), size.engine, case.slo.ttft_s or 2.0)[: int(_FIRST_S)]
    needed = int(np.ceil(busy.max(initial=0.0) / _INITIAL_SHARE))
    return min(max(needed, size.min_replicas, 1), size.max_replicas)


def _engine(options: argparse.Namespace) -> Engine:
    if options.engine:
        engine = enginefit.from_json(options.engine)
    else:
        engine = enginemodel.roofline(options.gpu, options.model, options.gpus)
    names = ("max_num_seqs", "token_budget", "kv_blocks", "block_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(engine, **given) if given else engine


def _validated(options: argparse.Namespace, engine: Engine) -> Line:
    """The engine fitted to measured runs, and how well such a fit foretells one it has not seen."""
    measured = enginefit.loads(options.validate)
    whole = enginefit.fit(measured, engine)
    foretold = enginefit.validate(measured, engine)
    errors = enginefit.summary(foretold)
    fitted = replace(engine, costs=whole.costs, name=f"fitted to {len(measured)} measured loads")
    validated = Validated(
        **result.header("validation"),
        engine=fitted,
        fit=whole,
        loads=foretold,
        errors=errors,
    )
    validated = result.write(options.out, validated)
    _say(enginefit.table(whole, foretold))
    return result.line(validated, options.out, "errors", costs=whole.costs)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
