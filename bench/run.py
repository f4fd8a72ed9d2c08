"""`bench run`: one load, sent several times, measured and written down.

Reads top to bottom in `run`: check the target, warm it up; for each repeat, plan what to send and
when, send it from Ray actors while the server is scraped, and put the records on disk as they come;
then work out the figures.
"""

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import urlsplit

import msgspec

from bench import measure, result
from bench.errors import TargetError, TargetFailed
from bench.figures import Repeat, Run, figures
from bench.hardware import gpu
from bench.measure import Slo
from bench.progress import Line, Progress
from bench.records import Journal, Record
from bench.result import TargetName
from bench.scrape import Scraper, samples
from bench.traffic import access, load, schedule
from bench.traffic.client import Client, check
from bench.traffic.conversation import Script
from bench.traffic.request import Workload
from bench.traffic.target import Target
from bench.traffic.words import fresh_salt
from bench.traffic.workload import parse

_HERE = ("127.0.0.1", "localhost", "::1")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A load on a target.

    Attributes:
        target: the server.
        workload, load: what to send and when, as specs.
        count, duration_s: what ends a repeat; None for the workload's or the load's own end.
        repeats: how often the load is sent; each time with other prompts and arrival times.
        seed: of the first repeat.
        salt: of all texts; another one unless given, so that no earlier run has sent them.
        actors: load actors.
        warm_up: requests sent before the first repeat, and not recorded.
        slo: what counts as good.
        metrics: where the server's metrics are.
        dashboard, deployment: where Ray's dashboard is, and whose replicas are counted there.
        gpus: how many the server has; None where that is not known.
        usd_per_gpu_hour: what one of them costs; None where that is not known.
        linger_s: for which the server is watched after the last answer, as replicas leave.
        name: of the run, in reports.
    """

    target: Target
    workload: str
    load: str
    count: int | None = None
    duration_s: float | None = None
    repeats: int = 3
    seed: int = 0
    salt: str = msgspec.field(default_factory=fresh_salt)
    actors: int = 1
    warm_up: int = 4
    slo: Slo | None = None
    metrics: tuple[str, ...] = ()
    dashboard: str = ""
    deployment: str = "engine"
    gpus: int | None = None
    usd_per_gpu_hour: float | None = None
    linger_s: float = 0.0
    name: str = ""


async def run(job: Job, folder: Path) -> Run:
    """Do the job. Records go to `folder`/records.jsonl as they arrive, the rest at the end.

    Interrupted, it breaks off and still returns a result, which says so.

    Raises:
        BenchError: the job is impossible, or the target does not answer.
    """
    when = schedule.parse(job.load)
    seeds = range(job.seed, job.seed + job.repeats)
    workloads = {seed: workload_of(job, seed) for seed in seeds}
    plans = [
        schedule.plan(workload, when, job.count, job.duration_s, seed)
        for seed, workload in workloads.items()
    ]
    await check(job.target)
    await _scraper(job).check()
    head = result.header(job.name or f"{job.workload} {job.load}")
    journal = Journal(result.prepare(folder))
    load.connect()
    await warm_up(job)
    repeats: list[Repeat] = []
    for number, plan in enumerate(plans):
        repeats.append(await _repeat(job, plan, number, journal))
        if repeats[-1].outcome.interrupted:
            break
    users = when.users if isinstance(when, schedule.Closed) else None
    ramp_s = when.duration_s if isinstance(when, schedule.Ramp) else 0.0
    batch = users is not None and job.count == users
    doubts = [journal.problem] if journal.problem else []
    if len(repeats) < job.repeats:
        doubts.append(f"{len(repeats)} of {job.repeats} repeats were run")
    output = msgspec.structs.replace(
        figures(repeats, job.slo, users, ramp_s, batch, job.gpus, job.usd_per_gpu_hour),
        **head,
        **load_fields(job),
        workload_notes=list(workloads[job.seed].notes),
    )
    records = [record for repeat in repeats for record in repeat.outcome.records]
    vllm_names = measure.vllm_names(
        records,
        model=job.target.model,
        endpoint=job.target.endpoint,
        date=time.strftime("%Y%m%d-%H%M%S"),
        slo=job.slo,
        request_rate=getattr(when, "rate", None),
        burstiness=getattr(when, "cv", 1.0) ** -2,
        max_concurrency=users,
    )
    return result.write(folder, result.doubted(output, *doubts), records, vllm_names)


async def _repeat(job: Job, plan: schedule.Plan, number: int, journal: Journal) -> Repeat:
    """Send one plan, while the server is scraped."""
    line = Line(label=f"{number + 1}/{job.repeats} ")

    def take(records: list[Record], progress: Progress) -> None:
        journal.add(records)
        line(progress)

    async with _scraper(job).running() as scraper, _gpus_of(job) as gpus:
        outcome = await load.run(plan, job.target, job.actors, take, repeat=number)
        if not outcome.interrupted:
            await asyncio.sleep(job.linger_s)
    line.close()
    # The scraper's clock is the machine's, the load's starts with the load.
    start_s = time.time() - (time.perf_counter() - outcome.start_s)
    return Repeat(
        outcome=outcome,
        server=samples(scraper.scrapes, start_s),
        session_sizes=plan.session_sizes,
        gpu=[msgspec.structs.replace(each, t_s=each.t_s - start_s) for each in gpus],
    )


@contextlib.asynccontextmanager
async def _gpus_of(job: Job) -> AsyncIterator[list[gpu.GpuSample]]:
    """What the GPUs of this machine do meanwhile, on `time.time()`; none of a server elsewhere."""
    if urlsplit(job.target.url).hostname not in _HERE:
        yield []
        return
    with gpu.sampling(0.0) as samples:
        yield samples


def _scraper(job: Job) -> Scraper:
    return Scraper(
        job.metrics, dashboard=job.dashboard, deployment=job.deployment, target=job.target
    )


def workload_of(job: Job, seed: int) -> Workload:
    """The requests of a job with a seed. Their texts are new: no other run has sent them.

    Raises:
        WorkloadError: the job's workload cannot be understood or read.
    """
    return parse(job.workload, seed, job.salt)


async def models(target: Target) -> list[str]:
    """The models that the target serves.

    Raises:
        TargetError: it does not answer.
    """
    with contextlib.closing(Client(target, time.perf_counter)) as client:
        return await client.models()


async def warm_up(job: Job) -> None:
    """Send the first requests of the workload one by one, so that no repeat includes a first use.

    Raises:
        TargetError: one of them fails; so would the run.
    """
    # Of a seed that no repeat has: a repeat must not find its prompts in the prefix cache.
    workload = workload_of(job, job.seed - 1)
    count = min(job.warm_up, workload.count or job.warm_up)
    firsts = [schedule.session(workload, unit, 0, None)[0] for unit in range(count)]
    script = Script([], chat=job.target.endpoint != "completions")
    requests = [script.request(first) for first in firsts]
    with contextlib.closing(Client(job.target, time.perf_counter)) as client:
        for index, request in enumerate(requests):
            record = Record(index=index, planned_s=time.perf_counter())
            record = await client.ask(request, record)
            if record.error:
                raise TargetFailed(f"url = {job.target.url!r}: the warm-up failed: {record.error}")


class LoadFields(TypedDict):
    """The fields of a result that describe the load (`result.Asked`)."""

    target: TargetName
    workload: str
    load: str
    count: int | None
    duration_s: float | None
    seed: int
    salt: str
    slo: Slo | None


def load_fields(job: Job) -> LoadFields:
    return LoadFields(
        target=named(job.target),
        workload=job.workload,
        load=job.load,
        count=job.count,
        duration_s=job.duration_s,
        seed=job.seed,
        salt=job.salt,
        slo=job.slo,
    )


def named(target: Target) -> TargetName:
    return TargetName(url=target.url, model=target.model, endpoint=target.endpoint)


def target_of(
    options: argparse.Namespace, extra: dict[str, Any], keep_text: bool = False
) -> Target:
    """The target that the options of a command name (`access.arguments` and the API's own).

    Raises:
        TargetError: it names no model and does not answer, or serves several.
    """
    return with_model(
        Target(
            url=options.url,
            model=options.model or "",
            endpoint=options.endpoint,
            headers=access.headers(options.api_key_env, options.key_header, options.header),
            ca_file=options.ca,
            timeout_s=options.timeout,
            keep_text=keep_text,
            extra=extra,
        )
    )


def with_model(target: Target) -> Target:
    """The target, with the model that it serves where none was named.

    Raises:
        TargetError: it does not answer, or serves several.
    """
    if target.model:
        return target
    served = asyncio.run(models(target))
    if len(served) != 1:
        raise TargetError(f"url = {target.url!r}: say with --model which of: {', '.join(served)}")
    return msgspec.structs.replace(target, model=served[0])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
