"""`python -m bench COMMAND`: every command prints one JSON object as its last line.

    run       one load on an endpoint
    matrix    the baseline matrix on an endpoint
    baseline  the same matrix on an engine in this process
    sweep     more and more users, until the endpoint is saturated
    search    the highest rate that keeps an SLO
    simulate  a load against scaling policies, on fleets of engines that are a model
    chaos     a load while replicas are killed, and whether every answer was right
    roofline  what the hardware allows: ceilings, and the least times of a model
    profile   where the time of an engine's steps goes, from traces
    tune      the engine settings that serve most, found on real engines
    kv        what becomes of the KV cache under a load
    scheduler who waits for whom: long prompts among short ones
    scale     tensor parallelism against replicas, on the GPUs there are
    report    one page from results
    compare   two results: which differences are more than noise

Exit status: 0 for a valid result, 1 for one that is not to be trusted, 2 for a mistake in the
command, 130 for Ctrl-C before there was a result.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import measure, run
from bench.engine import kvcache, scale, scheduler, tune
from bench.errors import BenchError
from bench.faults import chaos
from bench.hardware import ceilings, profile, roofline
from bench.run import Job
from bench.simulation import simulate
from bench.traffic import access, workload
from bench.traffic.client import Target

Options = argparse.Namespace


def main() -> int:
    options = _parser().parse_args()
    try:
        found = COMMANDS[options.command](options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted before there was a result", file=sys.stderr)
        return 130
    print(json.dumps(found))
    return 0 if found.get("valid", True) else 1


# --- the commands ---------------------------------------------------------------------------


def _run(options: Options) -> dict[str, Any]:
    found = asyncio.run(run.run(_job(options), options.out))
    _held_against(found, options)
    return _told(found, options, summary=found["summary"])


def _matrix(options: Options) -> dict[str, Any]:
    from bench import matrix

    job, cells = _job(options), workload.matrix()
    found = asyncio.run(matrix.served(job, options.per_user, options.out, cells))
    _held_against(found, options)
    return _told(found, options, cells=_cells(found))


def _baseline(options: Options) -> dict[str, Any]:
    from bench import matrix

    cells = workload.matrix()
    arguments = (options.engine, options.repeats, options.seed, options.out, cells)
    found = matrix.in_process(options.model, *arguments)
    _held_against(found, options)
    return _told(found, options, cells=_cells(found))


def _sweep(options: Options) -> dict[str, Any]:
    from bench import probe

    job = _job(options)
    found = asyncio.run(probe.sweep(job, options.out, options.start, options.most, options.gain))
    return _told(
        found,
        options,
        users=found["users"],
        output_tokens_per_s=found["tokens_per_s"],
        resolved=found["resolved"],
    )


def _search(options: Options) -> dict[str, Any]:
    from bench import probe

    job = _job(options)
    found = asyncio.run(
        probe.highest_rate(job, options.out, options.start, options.most, options.precision)
    )
    keys = ("rate", "fails_at", "goodput_per_s", "resolved")
    return _told(found, options, **{key: found[key] for key in keys})


def _report(options: Options) -> dict[str, Any]:
    from bench.pages import report

    if options.story:
        report.tell_story(options.folders, options.out)
    else:
        report.report(options.folders, options.out, options.against)
    return {"benchmark": "report", "report": str(options.out)}


def _compare(options: Options) -> dict[str, Any]:
    from bench import result
    from bench.pages import compare

    a, b = result.read(options.a), result.read(options.b)
    rows, notes = compare.compare(a, b), compare.notes(a, b)
    print(compare.table(rows, notes), file=sys.stderr)
    return compare.as_json(rows, notes)


COMMANDS: Mapping[str, Callable[[Options], dict[str, Any]]] = {
    "run": _run,
    "matrix": _matrix,
    "baseline": _baseline,
    "sweep": _sweep,
    "search": _search,
    "simulate": simulate.command,
    "chaos": chaos.command,
    "roofline": ceilings.command,
    "profile": profile.command,
    "tune": tune.command,
    "kv": kvcache.command,
    "scheduler": scheduler.command,
    "scale": scale.command,
    "report": _report,
    "compare": _compare,
}


def _held_against(found: dict[str, Any], options: Options) -> None:
    """Add to a result, and to its file, what the hardware would allow, where that is known."""
    from bench import result

    # Only an engine of this process is known to run on this machine's GPU.
    here = found["benchmark"] == "baseline"
    model, engine = (options.model, options.engine) if here else ("", {})
    known = ceilings.known(options.roofline, model, engine)
    if known is not None:
        result.write(options.out, roofline.attach(found, *known))


def _told(found: dict[str, Any], options: Options, **more: Any) -> dict[str, Any]:
    """The last line of a command: the result in short; the whole is in the folder."""
    from bench import result
    from bench.pages import report

    page = options.out / result.REPORT
    report.report([options.out], page, None)
    for doubt in found["doubts"]:
        run.say(f"doubtful: {doubt}")
    return {
        "benchmark": found["benchmark"],
        "name": found["name"],
        "valid": found["valid"],
        "doubts": found["doubts"],
        "out": str(options.out),
        "report": str(page),
        **more,
    }


def _cells(found: dict[str, Any]) -> dict[str, Any]:
    return {cell["name"]: cell["summary"] for cell in found["cells"]}


# --- the command line -----------------------------------------------------------------------


def _job(options: Options) -> Job:
    target = run.with_model(
        Target(
            url=options.url,
            model=options.model or "",
            endpoint=options.endpoint,
            headers=access.headers(options.api_key_env, options.key_header, options.header),
            ca_file=options.ca,
            timeout_s=options.timeout,
            keep_text=options.keep_text,
            extra={"temperature": options.temperature, **options.extra},
        )
    )
    base = options.url.rstrip("/").removesuffix("/v1")
    return Job(
        target=target,
        workload=getattr(options, "workload", ""),
        load=getattr(options, "load", ""),
        count=getattr(options, "requests", None),
        duration_s=getattr(options, "duration", None),
        repeats=options.repeats,
        seed=options.seed,
        **({"salt": options.salt} if options.salt is not None else {}),
        actors=options.actors,
        warm_up=options.warm_up,
        slo=measure.parse_slo(options.slo) if options.slo else None,
        metrics=tuple(options.metrics or ([f"{base}/metrics"] if not options.no_metrics else [])),
        dashboard=options.dashboard,
        deployment=options.deployment,
        linger_s=options.linger,
        name=options.name,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("run", help="one load on an endpoint")
    _add_target(one)
    one.add_argument(
        "--workload", required=True, help="what to send: see bench/traffic/workload.py"
    )
    one.add_argument("--load", required=True, help="when to send: see bench/traffic/schedule.py")
    one.add_argument("--requests", type=int, help="requests of each repeat")
    one.add_argument("--duration", type=float, help="seconds of each repeat")
    _add_roofline(one)

    matrix = commands.add_parser("matrix", help="the baseline matrix on an endpoint")
    _add_target(matrix)
    about = "requests of each user and repeat; 1: a batch, as the baseline has it"
    matrix.add_argument("--per-user", type=int, default=4, help=about)
    _add_roofline(matrix)

    baseline = commands.add_parser("baseline", help="the baseline matrix on an engine alone")
    baseline.add_argument("--model", required=True, help="a local folder or a hub id")
    baseline.add_argument("--engine", type=json.loads, default={}, help="vLLM arguments, as JSON")
    baseline.add_argument("--repeats", type=int, default=3)
    baseline.add_argument("--seed", type=int, default=0)
    baseline.add_argument("--out", type=Path, required=True)
    _add_roofline(baseline)

    sweep = commands.add_parser("sweep", help="more and more users, until saturation")
    _add_target(sweep)
    sweep.add_argument("--workload", required=True)
    sweep.add_argument("--start", type=int, default=1, help="users of the first point")
    sweep.add_argument("--most", type=int, default=1024, help="users of the last point")
    sweep.add_argument("--gain", type=float, default=0.05, help="what counts as growth")

    search = commands.add_parser("search", help="the highest rate that keeps an SLO (--slo)")
    _add_target(search, slo=True)
    search.add_argument("--workload", required=True)
    search.add_argument("--start", type=float, default=1.0, help="requests/s of the first point")
    search.add_argument("--most", type=float, default=10_000.0, help="requests/s at most")
    search.add_argument("--precision", type=float, default=0.05)

    simulate.arguments(commands.add_parser("simulate", help="scaling policies on a model"))
    chaos.arguments(commands.add_parser("chaos", help="a load while replicas are killed"))

    ceilings.arguments(commands.add_parser("roofline", help="what the hardware allows"))
    profile.arguments(commands.add_parser("profile", help="traces of an engine, and what they say"))

    tune.arguments(commands.add_parser("tune", help="the best engine settings for a goal"))
    kvcache.arguments(commands.add_parser("kv", help="the KV cache under a load"))
    scheduler.arguments(commands.add_parser("scheduler", help="who waits for whom"))
    scale.arguments(commands.add_parser("scale", help="tensor parallelism against replicas"))

    report = commands.add_parser("report", help="one page from results")
    report.add_argument("folders", type=Path, nargs="+")
    report.add_argument("--out", type=Path, required=True, help="the HTML file")
    report.add_argument("--against", type=Path, help="a result that is the baseline")
    about = "a page of chapters instead: hardware, baseline, profile, tuned, more GPUs"
    report.add_argument("--story", action="store_true", help=about)

    compare = commands.add_parser("compare", help="which differences are more than noise")
    compare.add_argument("a", type=Path)
    compare.add_argument("b", type=Path)
    return parser


def _add_roofline(parser: argparse.ArgumentParser) -> None:
    about = "a result of `bench roofline`: say what share of the hardware was used"
    parser.add_argument("--roofline", type=Path, help=about)


def _add_target(parser: argparse.ArgumentParser, slo: bool = False) -> None:
    add = parser.add_argument
    add("--url", required=True, help="http://host:port, with or without /v1")
    add("--model", help="its name in requests; the only one served, if not given")
    add("--out", type=Path, required=True, help="folder of the result")
    add("--name", default="", help="of the run, in reports")
    add("--endpoint", choices=["completions", "chat"], default="completions")
    access.arguments(add)
    add("--actors", type=int, default=1, help="load actors, spread over the nodes")
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0, help="of lengths and arrival times")
    add("--salt", help="of an earlier result, to send its prompts again; by default a new one")
    add("--warm-up", type=int, default=4, help="requests before the first repeat")
    add("--timeout", type=float, default=600.0, help="seconds of one request")
    add("--temperature", type=float, default=0.0)
    add("--extra", type=json.loads, default={}, help="more fields of each request, as JSON")
    add("--keep-text", action="store_true", help="keep what was generated")
    limits = f"{', '.join(measure.SLOS)} or ttft_ms=..,tpot_ms=..,e2e_ms=..,percentile=.."
    add("--slo", required=slo, help=limits)
    add("--metrics", action="append", help="URL of the server's metrics; URL/metrics by default")
    add("--no-metrics", action="store_true", help="do not ask for metrics")
    add("--dashboard", default="", help="http://host:port of Ray's, to count replicas")
    add("--deployment", default="engine", help="whose replicas: %(default)s")
    add("--linger", type=float, default=0.0, help="seconds to watch replicas after the last answer")


if __name__ == "__main__":
    sys.exit(main())
