"""The command-line options of an endpoint and a run, and the target and job that they describe."""

import argparse
from pathlib import Path

from bench import measure, run
from bench.options import folder, json_object, number, whole
from bench.run import Job
from bench.traffic import access
from bench.traffic.target import PAGES, Target


def add_endpoint(parser: argparse.ArgumentParser, endpoint: str = "completions") -> None:
    """The options of an endpoint."""
    add = parser.add_argument
    add("--url", required=True, help="http://host:port, with or without /v1")
    add("--model", help="its name; by default the only model that is served")
    add("--endpoint", choices=list(PAGES), default=endpoint, help="the API: %(default)s")
    access.arguments(add)
    add("--timeout", type=number(above=0.0), default=600.0, help="seconds of one request")
    add("--temperature", type=number(), default=0.0)
    add("--extra", type=json_object, default={}, help="more fields of each request, as JSON")
    add("--keep-text", action="store_true", help="save the generated text")


def add_target(parser: argparse.ArgumentParser, slo: bool = False) -> None:
    add_endpoint(parser)
    add = parser.add_argument
    add("--out", type=folder, required=True, help="folder of the result")
    add("--name", default="", help="the name of the run in reports")
    add(
        "--actors",
        type=whole(1, 1000),
        default=1,
        help="load actors, spread over the nodes",
    )
    add("--repeats", type=whole(1, 1000), default=3)
    add("--seed", type=int, default=0, help="seed of lengths and arrival times")
    add(
        "--salt",
        help="the salt of an earlier result, to send the same prompts; by default a new one",
    )
    add("--warm-up", type=whole(0), default=4, help="requests before the first repeat")
    limits = f"{', '.join(measure.SLOS)} or ttft_ms=..,tpot_ms=..,e2e_ms=..,percentile=.."
    add("--slo", required=slo, help=limits)
    add("--metrics", action="append", help="URL of the server's metrics; URL/metrics by default")
    add("--gpus", type=whole(1), help="GPUs of the server, for figures per GPU")
    about = "price of one GPU in dollars per hour, for the cost of tokens"
    add("--gpu-hour", type=number(above=0.0), metavar="USD", help=about)
    add("--no-metrics", action="store_true", help="do not scrape metrics")
    add("--dashboard", default="", help="http://host:port of Ray's, to count replicas")
    add("--deployment", default="engine", help="whose replicas: %(default)s")
    add(
        "--linger",
        type=number(),
        default=0.0,
        help="seconds to watch replicas after the last answer",
    )


def add_roofline(parser: argparse.ArgumentParser) -> None:
    about = "a result of `bench roofline`, to report the share of the hardware that was used"
    parser.add_argument("--roofline", type=Path, help=about)


def target(options: argparse.Namespace) -> Target:
    extra = {"temperature": options.temperature, **options.extra}
    return run.target_of(options, extra, options.keep_text)


def job(options: argparse.Namespace) -> Job:
    base = options.url.rstrip("/").removesuffix("/v1")
    return Job(
        target=target(options),
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
        gpus=options.gpus,
        usd_per_gpu_hour=options.gpu_hour,
        name=options.name,
    )
