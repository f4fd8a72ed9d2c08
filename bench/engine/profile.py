"""`bench profile`: traces of an engine under load, and their summary.

    python -m bench profile --model FOLDER --out DIR           in process: decode and prefill
    python -m bench profile --url URL --traces DIR --out DIR   a served engine, under load

In process each case runs twice: without the profiler, for its true time, and with it, for the
kernels. The GPU's busy time of a step is from the trace, which hardly changes it; the step's time
is from the run without. Their ratio says how busy the GPU really is, and with the ceilings
(`--roofline`) what bounds the step. The trace files open in Perfetto (ui.perfetto.dev) and Chrome.

Served, the engine must have been started with vLLM's `profiler_config`: here `engine:
{profiler_config: {profiler: torch, torch_profiler_dir: DIR, torch_profiler_with_stack: false}}`.
Traces are written where the engine is; `--traces` is that folder, where it can be read from here.
The front end can be looked at meanwhile (`--front-end PID`) with py-spy, where that is installed.
"""

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bench import result, run
from bench.engine.baseline import Engine
from bench.errors import BenchError, TargetError
from bench.hardware import ceilings, kernels, roofline
from bench.hardware.roofline import Ceilings, Shape
from bench.records import Record
from bench.result import EngineResult, Line
from bench.traffic import workload
from bench.traffic.client import Client
from bench.traffic.request import Request
from bench.traffic.target import Target

TRACES = "traces"
_STEPS = 24  # Of the engine, in a trace of decode: enough for shares, small enough for a browser.
_IDS = (100, 1000)  # Tokens of prompts: in every vocabulary, and not special in any.
_SKIPPED = 12  # Steps before them: prompts are read, graphs and caches are warm.
_STOP_S = 300.0  # Writing a large trace takes long.
_FRONT_END, _FRONT_END_S = ".async_llm.", 10


class InShort(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A case for the last line: times in milliseconds, shares of the time."""

    took_ms: float
    gpu_busy: float | None
    families: dict[str, float]
    launch_bound: bool
    bound: str = ""
    mbu: float | None = None
    mfu: float | None = None


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of one kind, timed without the profiler and traced with it.

    Attributes:
        seqs, context: of decode: sequences at once, and the mean tokens of each.
        prompt: of prefill: tokens of the prompt.
        took_s: of a step; step_busy_s: of it, while the GPU ran a kernel by the trace.
        busy_share: of the step's time without the profiler; None without a GPU.
        trace: path of the trace file.
        verdict: what bounds the step; None where the ceilings are not known.
    """

    name: str
    seqs: int = 0
    context: float = 0.0
    prompt: int = 0
    took_s: float
    trace: str = ""
    step_busy_s: float = 0.0
    busy_share: float | None = None
    kernels_a_step: float = 0.0
    summary: kernels.Summary
    verdict: roofline.Verdict | None = None
    in_short: InShort | None = None


class Hot(msgspec.Struct, frozen=True, kw_only=True):
    """A function, and the share of samples that ended in it."""

    function: str
    share: float


class FrontEnd(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process spends its CPU time, by py-spy; `absent` is the reason if there is no
    profile.
    """

    command: str
    absent: str = ""
    samples: str = ""
    top: list[Hot] = []


class Profile(EngineResult, frozen=True, kw_only=True):
    """The result of `bench profile`.

    Attributes:
        nsys: how to see the same with Nsight Systems.
        load_s: how long the engine in process took to load.
        requests: of the load on a served engine.
        front_end, front_end_traces: of that engine's front end.
    """

    benchmark: str = "profile"
    nsys: str = ""
    load_s: float | None = None
    ceilings: Ceilings | None = None
    cases: list[Case]
    requests: int | None = None
    front_end: FrontEnd | None = None
    front_end_traces: list[str] = []


def command(options: argparse.Namespace) -> Line:
    """What `python -m bench profile` does with its options; returns its last line."""
    # vLLM prints tables of its own when a profile ends.
    with contextlib.redirect_stdout(sys.stderr):
        profiled = asyncio.run(served(options)) if options.url else in_process(options)
    profiled = result.write(options.out, profiled)
    for case in profiled.cases:
        run.say(describe(case))
    cases = {case.name: case.in_short for case in profiled.cases}
    return result.line(profiled, options.out, cases=cases)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench profile`."""
    add = parser.add_argument
    add("--model", help="a local folder: profile in process; with --url, the name in requests")
    add("--url", help="profile the server at this URL, under load")
    add("--out", type=Path, required=True, help="folder of the result and of the traces")
    add("--engine", type=json.loads, default={}, help="vLLM arguments, as JSON (in process)")
    add("--batches", default="1,32", help="sequences of each decode, separated by commas")
    add("--context", type=int, default=200, help="tokens of a sequence before decode")
    add("--prefill", default="2000", help="tokens of each prefill, separated by commas")
    add("--roofline", type=Path, help="a result of `bench roofline`, to compare with")
    add("--users", type=int, default=32, help="streams of the load (served)")
    add(
        "--workload",
        default="synthetic:input=200,output=64",
        help="output tokens of the load (served)",
    )
    add("--seconds", type=float, default=10.0, help="seconds of load before the trace (served)")
    add("--traces", type=Path, help="folder of the served engine's traces")
    add("--front-end", type=int, metavar="PID", help="a process to sample with py-spy (served)")


# --- in process -----------------------------------------------------------------------------


class Profiled(Engine):
    """An engine in this process, with vLLM's profiler at hand."""

    def __init__(self, model: str, arguments: dict[str, Any], traces: Path) -> None:
        traces.mkdir(parents=True, exist_ok=True)
        config = {
            "profiler": "torch",
            "torch_profiler_dir": str(traces.resolve()),
            # Python stacks multiply the size of a trace, and slow the host that is looked at.
            "torch_profiler_with_stack": False,
            "ignore_frontend": True,
            "torch_profiler_dump_cuda_time_total": False,
        }
        super().__init__(model, {**arguments, "profiler_config": config})
        self._traces = traces

    def traced(self, name: str, requests: list[Request], skip: int, steps: int) -> Path:
        """Generate with the profiler on from step `skip`, for `steps`; returns the trace."""
        before = set(self._traces.iterdir())
        self._llm.start_profile(name, delay_iterations=skip, max_iterations=steps)
        try:
            self.generate(requests, 0, time.time())
        finally:
            self._llm.stop_profile()
        # Of the first GPU; the others of a tensor parallel engine do the same.
        new = sorted(set(self._traces.iterdir()) - before)
        traces = [path for path in new if ".pt.trace.json" in path.name]
        if not traces:
            raise BenchError(f"the profiler wrote no trace of {name} to {self._traces}")
        return traces[0]


def in_process(options: argparse.Namespace) -> Profile:
    """Decode at each batch, prefill of each length."""
    if not options.model:
        raise BenchError("say --model FOLDER, or --url URL")
    head = result.header(f"{options.model} in process")
    ceiling = ceilings.shape_and_ceilings(options.roofline, options.model, options.engine)
    began_s = time.time()
    engine = Profiled(options.model, options.engine, options.out / TRACES)
    profiled = Profile(
        **head,
        model=options.model,
        engine=options.engine,
        nsys=nsys(head["command"]),
        load_s=time.time() - began_s,
        ceilings=ceiling[1] if ceiling else None,
        cases=[],
    )
    steps: list[Callable[[], Case]] = [
        *(partial(_decode, engine, n, options.context, ceiling) for n in _numbers(options.batches)),
        *(partial(_prefill, engine, n, ceiling) for n in _numbers(options.prefill)),
    ]
    for step in steps:
        cases = [*profiled.cases, step()]
        doubts = _empty(cases)
        profiled = msgspec.structs.replace(profiled, valid=not doubts, doubts=doubts, cases=cases)
        # Each case is written, should the next one not end.
        profiled = result.write(options.out, profiled)
    return profiled if steps else result.doubted(profiled, "no case was asked for")


def _decode(
    engine: Profiled, seqs: int, context: int, ceiling: tuple[Shape, Ceilings] | None
) -> Case:
    output = _SKIPPED + 2 * _STEPS
    records = _timed(engine, seqs, context, output)
    took_s = _mean_tpot(records)
    name = f"decode-{seqs}"
    trace = engine.traced(name, _batch(3, seqs, context, output), _SKIPPED, _STEPS)
    summary = kernels.summarise(kernels.read(trace))
    length = (records[0].input_tokens or context) + output / 2
    case = Case(name=name, seqs=seqs, context=length, took_s=took_s, summary=summary)
    return _judged(case, trace, ceiling)


def _prefill(engine: Profiled, tokens: int, ceiling: tuple[Shape, Ceilings] | None) -> Case:
    records = _timed(engine, 1, tokens, 1)
    took_s = records[0].chunk_s[0] - records[0].planned_s
    name = f"prefill-{tokens}"
    trace = engine.traced(name, _batch(3, 1, tokens, 1), 0, _STEPS)
    summary = kernels.summarise(kernels.read(trace))
    length = records[0].input_tokens or tokens
    case = Case(name=name, prompt=length, took_s=took_s, summary=summary)
    return _judged(case, trace, ceiling)


def _timed(engine: Profiled, seqs: int, tokens: int, output: int) -> list[Record]:
    """The records of a batch without the profiler, after a warm-up batch."""
    for seed in (1, 2):
        records = engine.generate(_batch(seed, seqs, tokens, output), 0, time.time())
    return records


def _batch(seed: int, seqs: int, tokens: int, output: int) -> list[Request]:
    """Prompts of exactly this many tokens for any vocabulary; none is in a prefix cache."""
    rng = random.Random(f"{seed}/{seqs}/{tokens}")
    made = [[rng.randrange(*_IDS) for _ in range(tokens)] for _ in range(seqs)]
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in made]
    return [Request(prompt=prompt, output_tokens=output) for prompt in prompts]


def _mean_tpot(records: list[Record]) -> float:
    spans = [(r.chunk_s[-1] - r.chunk_s[0], (r.output_tokens or 1) - 1) for r in records]
    return sum(span for span, _ in spans) / max(1, sum(count for _, count in spans))


def _judged(case: Case, trace: Path, ceiling: tuple[Shape, Ceilings] | None) -> Case:
    """The case with its trace, and what bounds it."""
    summary = case.summary
    # A prefill that is cut in chunks is one case of several steps.
    steps = max(1, 1 if case.prompt else summary.steps)
    busy_s, busy = summary.busy_s / steps, case.busy_share
    if busy is None and summary.device == "gpu":
        busy = min(1.0, busy_s / case.took_s)
    verdict = None
    if ceiling is not None:
        shape, roofs = ceiling
        work = (
            roofline.prefill(shape, case.prompt)
            if case.prompt
            else roofline.decode(shape, case.seqs, case.context)
        )
        verdict = roofline.judge(work, case.took_s, roofs, busy)
    in_short = InShort(
        took_ms=case.took_s * 1e3,
        gpu_busy=busy,
        families={family.family: round(family.share, 4) for family in summary.families},
        launch_bound=summary.launch_bound,
        **({n: getattr(verdict, n) for n in ("bound", "mbu", "mfu")} if verdict else {}),
    )
    return msgspec.structs.replace(
        case,
        trace=str(trace),
        step_busy_s=busy_s,
        busy_share=busy,
        kernels_a_step=summary.kernels / steps,
        verdict=verdict,
        in_short=in_short,
    )


def _empty(cases: Sequence[Case]) -> list[str]:
    return [f"{case.name}: its trace is empty" for case in cases if not case.summary.kernels]


def describe(case: Case) -> str:
    """A case in a few lines of text."""
    shares = ", ".join(f"{family.family} {family.share:.0%}" for family in case.summary.families)
    lines = [f"{case.name}: {case.took_s * 1e3:.2f} ms a step; {shares}"]
    if case.busy_share is not None:
        lines.append(f"  the GPU is busy {case.busy_share:.0%} of a step without the profiler")
    lines.append(f"  {case.summary.text}")
    if case.verdict:
        lines.append(f"  {case.verdict.text}")
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise BenchError(f"{text!r}: not numbers separated by commas") from None


def nsys(command: str) -> str:
    """How to trace the same load with Nsight Systems, and whether it is installed."""
    line = (
        "nsys profile --trace=cuda,nvtx --cuda-graph-trace=node --trace-fork-before-exec=true "
        f"--output=profile {command}"
    )
    return line if shutil.which("nsys") else f"not installed here; where it is: {line}"


# --- served ---------------------------------------------------------------------------------


async def served(options: argparse.Namespace) -> Profile:
    """Start and stop the profiler of a served engine while it has load."""
    base = options.url.rstrip("/").removesuffix("/v1")
    target = Target(url=options.url, model=options.model or "", extra={"ignore_eos": True})
    if not target.model:
        served_models = await run.models(target)
        target = msgspec.structs.replace(target, model=served_models[0])
    head = result.header(f"{target.model} at {base}")
    started_s = time.time()
    stop = asyncio.Event()
    load = asyncio.create_task(_load(target, options.workload, options.users, stop))
    front: FrontEnd | None = None
    try:
        await asyncio.sleep(options.seconds)
        # What a step is called with: so many iterations, and no more than a browser opens.
        await _post(f"{base}/start_profile", {"profile_prefix": "served", "max_iterations": _STEPS})
        try:
            if options.front_end:
                front = await asyncio.to_thread(front_end, options.front_end, options.out)
            else:
                await asyncio.sleep(2.0)
        finally:
            await _post(f"{base}/stop_profile", None)
    finally:
        stop.set()
        records = await load
    failed = [record.error for record in records if record.error]
    traces = _new_traces(options.traces, started_s)
    # vLLM's front end writes a trace of its own, of a CPU, beside those of its engines.
    engines = [path for path in traces if _FRONT_END not in path.name]
    cases = [_served_case(path) for path in engines]
    doubts = _empty(cases)
    if not cases:
        where = options.traces or "the folder that torch_profiler_dir names, where the engine is"
        doubts.append(f"no trace was found: look in {where}")
    if failed:
        doubts.append(f"{len(failed)} of {len(records)} requests failed: {failed[0]}")
    return Profile(
        **head,
        target=run.named(target),
        nsys=nsys("SERVER"),
        valid=not doubts,
        doubts=doubts,
        cases=cases,
        requests=len(records),
        front_end=front,
        front_end_traces=[str(path) for path in traces if path not in engines],
    )


async def _load(target: Target, spec: str, users: int, stop: asyncio.Event) -> list[Record]:
    """A closed loop until `stop`."""
    source = workload.parse(spec, 0, salt="")
    done: list[Record] = []
    taken = iter(range(10**9))
    with contextlib.closing(Client(target, time.perf_counter)) as client:

        async def user() -> None:
            while not stop.is_set():
                index = next(taken)
                record = Record(index=index, planned_s=time.perf_counter())
                record = await client.ask(source.request(index), record)
                done.append(record)
                if record.error:
                    await asyncio.sleep(0.2)

        await asyncio.gather(*(user() for _ in range(users)))
    return done


async def _post(url: str, body: dict[str, Any] | None) -> None:
    """POST to one of the profiler's routes.

    Raises:
        TargetError: it is not there, as the engine has no profiler, or it fails.
    """

    def post() -> None:
        data = b"" if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            url, data=data, headers={"content-type": "application/json"}, method="POST"
        )
        urllib.request.urlopen(request, timeout=_STOP_S).close()

    try:
        await asyncio.to_thread(post)
    except urllib.error.HTTPError as error:
        hint = "; start the server with profiler_config" if error.code == 404 else ""
        raise TargetError(f"{url}: {error.code} {error.reason}{hint}") from None
    except OSError as error:
        raise TargetError(f"{url}: {error}") from None


def _new_traces(folder: Path | None, since_s: float) -> list[Path]:
    if folder is None or not folder.is_dir():
        return []
    traces = [path for path in folder.iterdir() if ".pt.trace.json" in path.name]
    return sorted(path for path in traces if path.stat().st_mtime >= since_s)


def _served_case(trace: Path) -> Case:
    summary = kernels.summarise(kernels.read(trace))
    case = Case(
        name=trace.name.split(".")[0],
        took_s=summary.wall_s / max(1, summary.steps),
        busy_share=1 - summary.idle_share if summary.device == "gpu" else None,
        summary=summary,
    )
    return _judged(case, trace, None)


def front_end(pid: int, out: Path) -> FrontEnd:
    """Where a process spends its CPU: samples by py-spy, and the functions they hit most."""
    tool = shutil.which("py-spy")
    path = out / "front-end.txt"
    command = ["py-spy", "record", "--pid", str(pid), "--duration", str(_FRONT_END_S)]
    command += ["--format", "raw", "--nonblocking", "--output", str(path)]
    shown = " ".join(command)
    if tool is None:
        return FrontEnd(command=shown, absent="py-spy is not installed")
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, timeout=120)
    if done.returncode or not path.is_file():
        return FrontEnd(command=shown, absent=done.stderr.strip()[-300:])
    return FrontEnd(command=shown, samples=str(path), top=hottest(path.read_text()))


def hottest(stacks: str, count: int = 10) -> list[Hot]:
    """The functions in which most samples ended, of lines `frame;frame;.. samples`."""
    own: Counter[str] = Counter()
    for line in stacks.splitlines():
        frames, _, samples = line.rpartition(" ")
        if frames and samples.isdigit():
            own[frames.rsplit(";", 1)[-1]] += int(samples)
    total = sum(own.values()) or 1
    return [Hot(function=name, share=hits / total) for name, hits in own.most_common(count)]
