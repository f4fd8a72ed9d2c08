"""`bench chaos`: load on an endpoint while parts of it are killed, and what its clients saw.

    python -m bench chaos --url http://127.0.0.1:8000 --requests 2000 --users 16 \\
        --workload synthetic:input=20,output=128 --disturb kill-replica:every=10 \\
        --disturb kill-engine:every=15 --disturb stop-engine:every=60,for=5 --out results/chaos

First each of a few distinct prompts is sent undisturbed: its greedy answer is the right one. Then
users send these prompts repeatedly (a closed loop of streams and some non-streamed answers), while
disturbances (disturb.py) hit processes of the cluster that serves the URL (victims.py), and of no
other. Every answer is compared with the right one (answers.py). A difference is checked afterwards
for being a tie of greedy choices. With `command:` the same run shows whether a change of size,
configuration or version loses a request.

The load lasts until `--requests` are sent and each disturbance with a count has happened that
often. The result is valid, and the exit status 0, if no answer was lost, doubled, incomplete or
different, except for ties, and if every disturbance happened at least once.

Silences are reported twice: as the client saw them, and without the time in which the machine was
stalled (stalls.py), which can be most of it on a small or shared machine.

The load comes from one event loop and not from Ray actors: correctness and long silences do not
depend on milliseconds, and a Ray cluster would take cores from the servers. Each user keeps its
connection between its requests, as the clients of a service do. No request is sent twice, whatever
happens to the connection.
"""

import argparse
import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import progress, records, result, run
from bench.errors import LoadError, TargetError
from bench.faults import answers, chaos_page, damage, disturb, gaps, stalls, victims
from bench.faults.answers import Right
from bench.faults.damage import Chaos, Judged
from bench.faults.disturber import Disturber
from bench.faults.gaps import Span
from bench.faults.victims import Cluster
from bench.options import json_object
from bench.progress import Progress
from bench.result import Line
from bench.traffic import access, users, workload
from bench.traffic.client import Client, check
from bench.traffic.request import Request
from bench.traffic.response import Response
from bench.traffic.target import Target
from bench.traffic.transcript import Transcript
from bench.traffic.users import Users

_COMMANDS_LOG = "commands.log"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A load, what happens meanwhile, and what counts as wrong.

    Attributes:
        target: the server; requests are greedy.
        workload: the prompts, as a spec; the first `distinct` of it are used.
        count, users: requests at least, and how many at once.
        think_s: what each user waits between an answer and its next request.
        most_think_s: if above `think_s`, the wait is drawn from between the two.
        keep_alive: whether each user keeps its connection between its requests.
        whole: share of the requests that are not streamed.
        disturb: specs of disturbances.
        tie_margin: nats by which a greedy token may be less likely than the likeliest.
        gap_s: silences from this on are counted as pauses.
        most_s: the load ends then, whatever is left to be done; None: it does not.
    """

    target: Target
    workload: str
    count: int
    users: int
    distinct: int = 64
    whole: float = 0.0
    think_s: float = 0.0
    most_think_s: float = 0.0
    keep_alive: bool = True
    disturb: tuple[str, ...] = ()
    tie_margin: float = 0.02
    gap_s: float = 0.5
    most_s: float | None = None
    seed: int = 0
    name: str = ""


async def chaos(job: Job, cluster: Cluster | None, folder: Path) -> Chaos:
    """Do the job; the records are in `folder`/records.jsonl as they come, the rest at the end.

    Interrupted, it ends the load and still returns a result, which says so.

    Raises:
        BenchError: the job is impossible, or the target does not answer without disturbances.
    """
    disturbances = [disturb.parse(text) for text in job.disturb]
    requests = workload.parse(job.workload, job.seed, salt="").take(job.distinct)
    await check(job.target)
    head = result.header(job.name or f"{job.workload} users={job.users}")
    path = result.prepare(folder)
    start_s = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - start_s

    disturber = Disturber(disturbances, cluster, job.seed, clock, folder / _COMMANDS_LOG)
    disturber.check()
    rights = await undisturbed(job, requests)
    start_s = time.perf_counter()  # The load's clock begins now.
    with stalls.watching() as watched:
        transcripts, interrupted = await _disturbed(job, requests, disturber, path)
        duration_s = clock()
    stalled = watched.since(start_s)
    judged = await judge(job, transcripts, rights, stalled)
    _rewrite(path, judged)
    figures = damage.figures(judged, rights, disturber.done, job.disturb, job.gap_s)
    if len(judged) < job.count:
        figures.doubts.append(f"only {len(judged)} of {job.count} requests came to an end")
    output = msgspec.structs.replace(
        figures,
        **head,
        **_load_fields(job),
        duration_s=duration_s,
        machine_stalled_s=sum(span.lasted_s for span in stalled),
    )
    if interrupted:
        output = result.doubted(output, "interrupted: the rest of the load was not sent")
    output = result.write(folder, output)
    page = chaos_page.page(output, judged)
    (folder / result.REPORT).write_text(page, encoding="utf-8", errors="replace")
    return output


async def undisturbed(job: Job, requests: Sequence[Request]) -> list[Right]:
    """The right answer to each prompt, from one request at a time without disturbances.

    Raises:
        TargetError: an answer is missing or incomplete.
    """
    rights, line = [], progress.Line(label="undisturbed ")
    start_s = time.perf_counter()
    with contextlib.closing(users.client(job.target, time.perf_counter)) as client:
        for number, request in enumerate(requests):
            record = Transcript(index=number, planned_s=time.perf_counter(), prompt=number)
            await users.ask(client, request, record)
            if record.error:
                problem = f"the undisturbed answer {number} failed: {record.error}"
                raise TargetError(f"url = {job.target.url!r}: {problem}")
            rights.append(Right.of(record))
            done = len(rights)
            at_s = time.perf_counter() - start_s
            line(Progress(at_s=at_s, planned=len(requests), sent=done, done=done))
    line.close()
    return rights


async def _disturbed(
    job: Job, requests: Sequence[Request], disturber: Disturber, path: Path
) -> tuple[list[Transcript], bool]:
    """What the users received, and whether the load was interrupted."""
    loop = Users(
        target=job.target,
        requests=requests,
        users=job.users,
        count=job.count,
        whole=job.whole,
        think_s=job.think_s,
        most_think_s=job.most_think_s,
        keep_alive=job.keep_alive,
        most_s=job.most_s,
        seed=job.seed,
        clock=disturber.clock,
        more=lambda: not disturber.counted,
        path=path,
    )
    striking = asyncio.create_task(disturber.run())
    asking = asyncio.create_task(loop.run())
    interrupted, waiting = False, {asking, striking}
    try:
        # The disturbances may end before the load, but a mistake in them ends it.
        while not asking.done():
            ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if any(task.exception() for task in ended):
                break
    except asyncio.CancelledError:
        interrupted = True
        if task := asyncio.current_task():
            task.uncancel()
    for task in (asking, striking):
        task.cancel()
    for outcome in await asyncio.gather(asking, striking, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    return loop.transcripts, interrupted


# --- what came of it ------------------------------------------------------------------------


async def judge(
    job: Job,
    transcripts: Sequence[Transcript],
    rights: Sequence[Right],
    stalled: Sequence[Span] = (),
) -> list[Judged]:
    """Every record with its verdict, in order; a difference is checked for being a tie."""
    judged, ends = [], answers.ends(rights)
    target = msgspec.structs.replace(job.target, endpoint="completions", extra={})
    with contextlib.closing(Client(target, time.perf_counter)) as client:
        for record in sorted(transcripts, key=lambda record: record.index):
            right = rights[record.prompt]
            verdict = answers.compare(record, right)
            if answers.may_tie(record, verdict, ends):
                verdict.margin = await _margin(client, record, right)
                verdict.tie = verdict.margin is not None and verdict.margin <= job.tie_margin
            silence = gaps.longest(record)
            judged.append(
                Judged(
                    **msgspec.structs.asdict(record),
                    verdict=verdict,
                    silent_s=silence.lasted_s if silence else None,
                    silent_from_s=silence.from_s if silence else None,
                    stalled_s=stalls.overlap_s(silence, stalled) if silence else None,
                )
            )
    return judged


async def _margin(client: Client, record: Transcript, right: Right) -> float | None:
    """By how much the tokens of an answer were less likely than the likeliest; None: unknown."""
    if not record.token_ids or not right.prompt_token_ids:
        return None
    request = Request(
        prompt=[*right.prompt_token_ids, *record.token_ids],
        output_tokens=1,
        extra={"stream": False, "temperature": 0, "prompt_logprobs": 1},
    )
    answer = Response(Transcript(index=0, planned_s=0.0), keep_text=False)
    await client.exchange(request, answer)
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
        body = msgspec.json.decode(b"".join(answer.parts))
        logprobs = body["choices"][0]["prompt_logprobs"]
        return max(answers.margins(logprobs, record.token_ids))
    return None


def _rewrite(path: Path, judged: Sequence[Judged]) -> None:
    """The records once more, now with their verdicts; never half of them."""
    new = path.with_suffix(".new")
    new.write_bytes(b"")
    records.append(new, judged)
    new.replace(path)


def _load_fields(job: Job) -> dict[str, Any]:
    """The fields of a result that describe the load."""
    same = set(Job.__struct_fields__) & set(Chaos.__struct_fields__) - {"target", "name"}
    fields = {name: getattr(job, name) for name in same}
    return {"target": run.named(job.target), "load": f"users={job.users}", **fields}


# --- the command line -----------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", required=True, help="http://host:port, with or without /v1")
    add("--model", help="its name in requests; the only one served, if not given")
    add("--endpoint", choices=["completions", "chat"], default="completions")
    access.arguments(add)
    add("--workload", required=True, help="the requests: see docs/benchmarking.md")
    add("--requests", type=int, required=True, help="minimum number of requests")
    add("--users", type=int, required=True, help="concurrent requests")
    add("--distinct", type=int, default=64, help="distinct prompts, each sent many times")
    add("--whole", type=float, default=0.0, help="share of requests that are not streamed")
    add("--think", type=float, default=0.0, help="seconds of a user between two requests")
    add(
        "--most-think",
        type=float,
        default=0.0,
        help="longest pause of a user in seconds; --think is the shortest",
    )
    about = "keep each user's connection between its requests (the default)"
    add("--keep-alive", action=argparse.BooleanOptionalAction, default=True, help=about)
    add("--disturb", action="append", default=[], help="a disturbance: see bench/faults/disturb.py")
    add(
        "--pid",
        type=int,
        action="append",
        default=[],
        help="disturb only the processes below this one; may be repeated",
    )
    add("--session", default="", help="session of Ray: disturb only children of its raylets")
    add(
        "--tie-margin",
        type=float,
        default=0.02,
        help="difference of log-probabilities (nats) below which tokens count as tied",
    )
    add("--gap", type=float, default=0.5, help="seconds of silence that count as a pause")
    add("--most", type=float, help="seconds after which the load ends")
    add("--timeout", type=float, default=600.0, help="seconds of one request")
    add("--extra", type=json_object, default={}, help="more fields of each request, as JSON")
    add("--seed", type=int, default=0)
    add("--name", default="", help="the name of the run in reports")
    add("--out", type=Path, required=True, help="folder of the result")


def command(options: argparse.Namespace) -> Line:
    """Do what the command line says; the last line is the result without what is long."""
    if options.requests < 1 or options.users < 1 or options.distinct < 1:
        raise LoadError("requests, users, distinct: each must be at least 1")
    if not 0 <= options.whole <= 1:
        raise LoadError.of("whole", options.whole, "must be from 0 to 1")
    job = Job(
        target=run.target_of(options, options.extra),
        workload=options.workload,
        count=options.requests,
        users=options.users,
        distinct=options.distinct,
        whole=options.whole,
        think_s=options.think,
        most_think_s=options.most_think,
        keep_alive=options.keep_alive,
        disturb=tuple(options.disturb),
        tie_margin=options.tie_margin,
        gap_s=options.gap,
        most_s=options.most,
        seed=options.seed,
        name=options.name,
    )
    output = asyncio.run(chaos(job, _cluster(job, options), options.out))
    for doubt in output.doubts:
        run.say(f"doubtful: {doubt}")
    long = {"machine", "events", "done", "faulty", "measures"}  # The folder has all of it.
    names = [name for name in output.__struct_fields__ if name not in long]
    return result.line(output, options.out, *names, report=str(options.out / result.REPORT))


def _cluster(job: Job, options: argparse.Namespace) -> Cluster | None:
    """The processes that may be disturbed; None if no disturbance needs to know."""
    if options.pid or options.session:
        return Cluster(pids=options.pid, session=options.session)
    parsed = [disturb.parse(text) for text in job.disturb]
    if all(disturbance.kind == "command" and not disturbance.min_up for disturbance in parsed):
        return None
    return victims.of_url(job.target.url)
