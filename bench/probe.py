"""`bench sweep` and `bench search`: the controllers of search.py, joined to a real load.

Each probe is one plan of its own seed, sent from Ray actors; its records stay on disk, numbered by
probe (`repeat`), so that a search that was interrupted can be read.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bench import measure, result, run, search
from bench.progress import Line, Progress
from bench.records import Journal, Record
from bench.run import Job
from bench.traffic import load, schedule
from bench.traffic.client import check


async def sweep(
    job: Job, folder: Path, start: int, max_users: int, gain: float
) -> search.SweepResult:
    """Double the users until throughput no longer grows by `gain`."""
    controller = search.Sweep(start, most=max_users, gain=gain)
    output: search.SweepResult = await _search(
        job, folder, controller, lambda users: f"users={users:g}"
    )
    return output


async def highest_rate(
    job: Job,
    folder: Path,
    start: float,
    max_rate: float,
    precision: float,
    budget_s: float | None = None,
) -> search.RateResult:
    """Find the highest Poisson rate that keeps the job's SLO, to within `precision` or a time."""
    assert job.slo is not None
    controller = search.RateSearch(
        job.slo, start, most=max_rate, precision=precision, budget_s=budget_s
    )
    output: search.RateResult = await _search(
        job, folder, controller, lambda rate: f"poisson:rate={rate!r}"
    )
    return output


async def _search(
    job: Job,
    folder: Path,
    controller: search.Controller[Any],
    load_of: Callable[[float], str],
) -> Any:
    """Probe until the controller knows enough, or until it is interrupted."""
    await check(job.target)
    benchmark = controller.result.benchmark
    head = result.header(job.name or f"{benchmark} {job.workload}")
    journal = Journal(result.prepare(folder))
    load.connect()
    await run.warm_up(job)
    doubts: list[str] = []
    of_probe: list[str] = []
    probes = 0

    async def probe(x: float, count: int) -> list[Record]:
        nonlocal probes
        when, seed = load_of(x), job.seed + probes
        plan = schedule.plan(run.workload_of(job, seed), schedule.parse(when), count, None, seed)
        line = Line(label=f"{when} ")

        def take(records: list[Record], progress: Progress) -> None:
            journal.add(records)
            line(progress)

        outcome = await load.run(plan, job.target, job.actors, take, repeat=probes)
        line.close()
        probes += 1
        if outcome.interrupted:
            raise asyncio.CancelledError
        of_probe[:] = [*outcome.lost_actors, *measure.busy(outcome.cpu)]
        return outcome.records

    try:
        end = await search.run(controller, probe, _show, lambda: of_probe)
    except asyncio.CancelledError:
        doubts.append("interrupted: the search was not over")
        end = controller.result
    if journal.problem:
        doubts.append(journal.problem)
    if not end.resolved:
        doubts.append(f"not resolved: {end.reason}")
    search.summarise(end)
    doubts = [*end.doubts, *doubts]
    end = msgspec.structs.replace(
        end, **head, **run.load_fields(job), valid=not doubts, doubts=doubts
    )
    return result.write(folder, end)


def _show(end: search.RateResult | search.SweepResult) -> None:
    """Show the state of the search after a probe, and the expected time of the rest."""
    if isinstance(end, search.SweepResult) or end.rate is None or end.fails_at is None:
        return
    text = f"the highest good rate lies from {end.rate:.3g} to {end.fails_at:.3g} requests/s"
    if end.forecast is not None:
        text += f"; about {end.forecast.seconds:.0f} s more for the precision asked for"
    run.say(text)
