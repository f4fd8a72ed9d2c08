"""`python -m bench COMMAND`: measures servers of language models, and says how sure it is.

Every command ends with a table for people (standard error) and one JSON object (the last line of
standard output). Exit status: 0 for figures that can be trusted; 1 for figures that are not valid,
and the doubts say why; 2 for a mistake in the command; 3 where nothing could be measured: the
endpoint cannot be reached or fails, or the disk is full; 130 for Ctrl-C or SIGTERM before there
was a result.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from bench import job_options, matrix, pareto, probe, quality, result, run, signals
from bench.engine import kvcache, profile, scale, scheduler, starts, tune
from bench.errors import BenchError
from bench.faults import chaos
from bench.figures import Run
from bench.hardware import ceilings, roofline
from bench.hardware.roofline import Ceilings, Shape
from bench.itself import agreement
from bench.matrix import Matrix
from bench.options import folder, json_object, number, whole
from bench.pages import console
from bench.result import Line, Result
from bench.simulation import simulate
from bench.traffic import workload

Options = argparse.Namespace


def main() -> int:
    options = _parser().parse_args()
    signals.end_in_order()
    try:
        output = COMMANDS[options.command].run(options)
    except BenchError as error:
        return _failed(str(error), error.status)
    except OSError as error:
        return _failed(f"{error.filename or 'input or output'}: {error.strerror or error}", 3)
    except KeyboardInterrupt:
        return _failed("interrupted before there was a result", 130)
    if not COMMANDS[options.command].has_table:
        console.show(output)
    print(json.dumps(output))
    return 0 if output.get("valid", True) else 1


def _failed(why: str, status: int) -> int:
    print(f"bench: {why}", file=sys.stderr)
    return status


# --- the commands ---------------------------------------------------------------------------


def _run(options: Options) -> Line:
    hardware = _hardware(options)  # Before the run: what cannot be read would be known too late.
    output = asyncio.run(run.run(job_options.job(options), options.out))
    if hardware:
        allowed = roofline.of_run(*hardware, output.repeats)
        output = result.write(options.out, msgspec.structs.replace(output, roofline=allowed))
    return _headline_of(output, options, "summary", **_request_figures(output))


def _request_figures(output: Run) -> Line:
    """The context of the figures: the lengths of the requests, and the cached share."""
    answers = [repeat.answers for repeat in output.repeats]
    headline: Line = {"salt": output.salt}
    headline |= {f"note_{n}": note for n, note in enumerate(output.workload_notes, 1)}
    headline["prompt_tokens"] = _mean(answer.input_tokens for answer in answers)
    headline["answer_tokens"] = _mean(answer.output_tokens for answer in answers)
    headline["prefix_cache_share"] = _mean(answer.cached_share for answer in answers)
    acceptance = _mean(samples[-1].acceptance_rate for samples in output.server if samples)
    if acceptance is not None:
        headline["speculative_acceptance"] = acceptance
    headline |= {name: each["mean"] for name, each in output.efficiency.items()}
    if output.sessions and output.sessions[0]:
        first = msgspec.structs.asdict(output.sessions[0])
        turns = [msgspec.structs.asdict(turn) for turn in first.pop("turns")]
        headline["turns"] = {turn.pop("name"): turn for turn in turns}
        del first["each"]  # Hundreds of sessions are for result.json.
        headline |= {f"sessions_{key}": value for key, value in first.items()}
    return headline


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def _matrix(options: Options) -> Line:
    job, cells = job_options.job(options), workload.matrix()
    output = asyncio.run(matrix.served(job, options.per_user, options.out, cells))
    return _matrix_line(output, options)


def _baseline(options: Options) -> Line:
    cells = workload.matrix()
    arguments = (options.engine, options.repeats, options.seed, options.out, cells)
    return _matrix_line(matrix.in_process(options.model, *arguments), options)


def _matrix_line(output: Matrix, options: Options) -> Line:
    # Only an engine of this process is known to run on this machine's GPU.
    here = output.benchmark == "baseline"
    if hardware := _hardware(options, *((options.model, options.engine) if here else ())):
        output = result.write(options.out, matrix.with_roofline(output, *hardware))
    return _headline_of(output, options, cells={cell.name: cell.summary for cell in output.cells})


def _hardware(
    options: Options, model: str = "", engine: Mapping[str, Any] | None = None
) -> tuple[Shape, Ceilings] | None:
    return ceilings.shape_and_ceilings(options.roofline, model, engine or {})


def _sweep(options: Options) -> Line:
    job = job_options.job(options)
    output = asyncio.run(probe.sweep(job, options.out, options.start, options.most, options.gain))
    tokens_per_s = output.tokens_per_s
    return _headline_of(output, options, "users", "resolved", output_tokens_per_s=tokens_per_s)


def _search(options: Options) -> Line:
    job = job_options.job(options)
    output = asyncio.run(
        probe.highest_rate(
            job, options.out, options.start, options.most, options.precision, options.budget_s
        )
    )
    keys = ("rate", "fails_at", "estimate", "goodput_per_s", "resolved", "elapsed_s")
    return _headline_of(output, options, *keys)


def _pareto(options: Options) -> Line:
    users = pareto.users_of(options.users)
    output = asyncio.run(
        pareto.curve(job_options.job(options), users, options.per_user, options.out)
    )
    curve = {f"{each.users} users": pareto.row(each) for each in output.curve}
    return _headline_of(output, options, curve=curve)


def _quality(options: Options) -> Line:
    if options.write:
        return _reference(options)
    if options.out is None or (options.reference is None) == (options.answers is None):
        raise BenchError("say --write FILE, or --out DIR with one of --reference and --answers")
    scored = options.reference is None
    references = quality.read(options.answers if scored else options.reference)
    output = asyncio.run(
        quality.judge(job_options.target(options), references, options.tokens, scored, options.out)
    )
    names = [name for name in _QUALITY if getattr(output, name) is not None]
    return result.line(output, options.out, *names)


def _reference(options: Options) -> Line:
    """Keep the answers of an engine that is as it should be."""
    own = [each.prompt for each in quality.read(options.prompts)] if options.prompts else []
    prompts = own or list(quality.PROMPTS)
    answers = asyncio.run(quality.ask(job_options.target(options), prompts, options.tokens))
    quality.write(options.write, prompts, answers)
    name = f"{len(answers)} references"
    return {"benchmark": "quality", "name": name, "file": str(options.write)}


def _report(options: Options) -> Line:
    from bench.pages import report

    if options.story:
        report.tell_story(options.folders, options.out)
    else:
        report.report(options.folders, options.out, options.against)
    return {"benchmark": "report", "report": str(options.out)}


def _compare(options: Options) -> Line:
    from bench.pages import compare, loaded

    a, b = (result.read(path, **loaded.KINDS) for path in (options.a, options.b))
    rows = compare.compare(a, b, anyway=options.anyway)
    notes = compare.notes(a, b)
    print(compare.table(rows, notes), file=sys.stderr)
    return {"benchmark": "compare", "rows": msgspec.to_builtins(rows), "notes": notes}


def _headline_of(output: Result, options: Options, *names: str, **more: object) -> Line:
    """The last line of a command that has a report in its folder."""
    from bench.pages import report

    page = options.out / result.REPORT
    try:
        report.report([options.out], page, None)
    except OSError as error:
        run.say(f"bench: {page}: {error.strerror}")
    return result.line(output, options.out, *names, report=str(page), **more)


# --- the command line -----------------------------------------------------------------------


_QUALITY = ["tokens", "asked", "equal", "equal_share", "equal_low", "equal_high", "common_share"]
_QUALITY += ["first_words", "correct", "correct_share", "correct_low", "correct_high"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.about, description=command.about))
    return parser


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    job_options.add_target(parser)
    add = parser.add_argument
    add("--workload", required=True, help="the requests: see docs/benchmarking.md")
    add("--load", required=True, help="their arrival times: see docs/benchmarking.md")
    add("--requests", type=int, help="requests (or sessions) of each repeat")
    add("--duration", type=float, help="seconds of each repeat")
    job_options.add_roofline(parser)


def _matrix_arguments(parser: argparse.ArgumentParser) -> None:
    job_options.add_target(parser)
    about = "requests of each user and repeat; 1: one batch, as in the baseline"
    parser.add_argument("--per-user", type=whole(1), default=4, help=about)
    job_options.add_roofline(parser)


def _baseline_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="a local folder or a hub id")
    add("--engine", type=json_object, default={}, help="vLLM arguments, as JSON")
    add("--repeats", type=whole(1), default=3)
    add("--seed", type=int, default=0)
    add("--out", type=folder, required=True)
    job_options.add_roofline(parser)


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    job_options.add_target(parser)
    add = parser.add_argument
    add("--workload", required=True)
    add("--start", type=whole(1), default=1, help="users of the first point")
    add("--most", type=whole(1), default=1024, help="users of the last point")
    add(
        "--gain",
        type=float,
        default=0.05,
        help="least growth of throughput to continue: %(default)s",
    )


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    job_options.add_target(parser, slo=True)
    add = parser.add_argument
    add("--workload", required=True)
    positive = number(above=0.0)
    add("--start", type=positive, default=1.0, help="requests/s of the first point")
    add("--most", type=positive, default=10_000.0, help="requests/s at most")
    add("--precision", type=positive, default=0.15, help="width of the interval: %(default)s")
    about = "seconds for all probes; a shorter budget gives a wider interval"
    add("--budget-s", type=positive, default=600.0, help=about)


def _pareto_arguments(parser: argparse.ArgumentParser) -> None:
    job_options.add_target(parser)
    add = parser.add_argument
    add("--workload", required=True, help="the requests: see docs/benchmarking.md")
    add("--users", default="1,2,4,8,16,32,64", help="numbers of users to measure: %(default)s")
    add("--per-user", type=whole(1), default=8, help="requests of each user and repeat")


def _quality_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    job_options.add_endpoint(parser, endpoint="chat")
    add("--tokens", type=whole(1), default=64, help="maximum tokens of an answer: %(default)s")
    add("--prompts", type=Path, help="prompts for --write; by default the built-in ones")
    add("--write", type=Path, metavar="FILE", help="save the answers as the reference")
    add(
        "--reference",
        type=Path,
        metavar="FILE",
        help="a file of --write to compare the answers with",
    )
    add("--answers", type=Path, metavar="FILE", help="correct answers to score against")
    add("--out", type=folder, help="folder of the result")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", type=Path, nargs="+")
    add("--out", type=Path, required=True, help="the HTML file")
    add("--against", type=Path, help="the result to compare with")
    about = "a page with chapters: hardware, baseline, profile, tuning, more GPUs"
    add("--story", action="store_true", help=about)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    about = "compare even if workload or load differ"
    parser.add_argument("--anyway", action="store_true", help=about)


@dataclass(frozen=True)
class Command:
    """One command: its purpose, its options and its function.

    `run` returns what is printed; where that has a `valid` of False the figures are not. It prints
    a table of its own where it `has_table`.
    """

    about: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Options], Line]
    has_table: bool = False


COMMANDS: Mapping[str, Command] = {
    "run": Command("one load on an endpoint", _run_arguments, _run),
    "matrix": Command("the baseline matrix on an endpoint", _matrix_arguments, _matrix),
    "baseline": Command(
        "the baseline matrix on an engine in this process", _baseline_arguments, _baseline
    ),
    "sweep": Command(
        "a rising number of users, until the endpoint is saturated", _sweep_arguments, _sweep
    ),
    "search": Command("the highest rate that meets an SLO", _search_arguments, _search),
    "pareto": Command(
        "tokens/s of a user against tokens/s of a GPU, with joules and dollars",
        _pareto_arguments,
        _pareto,
    ),
    "quality": Command(
        "answers compared with a reference engine, or with correct answers",
        _quality_arguments,
        _quality,
    ),
    "simulate": Command(
        "scaling policies under a load, on simulated fleets",
        simulate.arguments,
        simulate.command,
    ),
    "chaos": Command(
        "a load while replicas are killed; every answer is checked",
        chaos.arguments,
        chaos.command,
    ),
    "roofline": Command(
        "the limits of the hardware: ceilings, and the shortest times of a model",
        ceilings.arguments,
        ceilings.command,
    ),
    "profile": Command(
        "the time of an engine's steps by kind of work, from traces",
        profile.arguments,
        profile.command,
    ),
    "tune": Command(
        "engine settings with the highest throughput, measured on real engines",
        tune.arguments,
        tune.command,
    ),
    "kv": Command("the use of the KV cache under a load", kvcache.arguments, kvcache.command),
    "scheduler": Command(
        "latencies of short prompts among long ones", scheduler.arguments, scheduler.command
    ),
    "scale": Command(
        "tensor parallelism compared with replicas, on the GPUs of this machine",
        scale.arguments,
        scale.command,
    ),
    "starts": Command(
        "the duration of starts by phase, compared with a bare vLLM",
        starts.arguments,
        starts.command,
    ),
    "agreement": Command(
        "bench compared with `vllm bench serve` on one server",
        agreement.arguments,
        agreement.command,
    ),
    "report": Command("one page from results", _report_arguments, _report, True),
    "compare": Command(
        "the significant differences between two results", _compare_arguments, _compare, True
    ),
}


if __name__ == "__main__":
    sys.exit(main())
