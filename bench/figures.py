"""The figures of a run: the means of its repeats, doubts about them, and the cost."""

from collections.abc import Sequence

import msgspec

from bench import measure
from bench.hardware import gpu
from bench.hardware.gpu import GpuSample
from bench.hardware.roofline import Allowed
from bench.measure import Mean, Measures, Sessions, Slo
from bench.result import Asked
from bench.scrape import Sample
from bench.traffic.load import Outcome

# What blocks, and requests that others send meanwhile, explain of a hit rate.
_CACHE_SLACK = 0.05


class Repeat(msgspec.Struct, kw_only=True):
    """One repetition: its outcome, and the server's metrics meanwhile.

    Attributes:
        session_sizes: of a workload of sessions, how many requests each has.
        gpu: what the GPUs of this machine did, on the clock of the records.
    """

    outcome: Outcome
    server: list[Sample] = []
    session_sizes: dict[int, int] = {}
    gpu: list[GpuSample] = []


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to the load, in the words of a plot's label."""

    repeat: int = 0
    at_s: float
    what: str


class Actors(msgspec.Struct, frozen=True, kw_only=True):
    """The load actors of one repeat; the fields are those of `Outcome`."""

    where: dict[int, str]
    cpu: dict[int, float]
    cpu_peak: dict[int, float]
    clock_offset_s: dict[int, float]
    clock_error_s: dict[int, float]


class Load(Asked, frozen=True, kw_only=True):
    """The result of one load.

    Attributes:
        repeats: the steady state of each, where there was one.
        whole: each from its beginning to its end.
        summary: the means of `repeats`, by the name of the metric.
        server: samples of each repeat.
    """

    events: list[Event] = []
    repeats: list[Measures]
    whole: list[Measures]
    summary: dict[str, Mean]
    server: list[list[Sample]] = []


class Run(Load, frozen=True, kw_only=True):
    """The result of `bench run`.

    Attributes:
        workload_notes: what the workload says of itself.
        batch: whether everything was sent at once: then the figures are of the whole.
        interrupted: whether the load was broken off.
        actors: of each repeat.
        sessions: of each repeat that had any.
        gpu: samples of each repeat; baselines wrote those of all repeats in one list.
        gpus, usd_per_gpu_hour: of the server, where they are known.
        efficiency: what the tokens cost, by the name of the metric.
        roofline: what the hardware allows; None where that is not known.
    """

    benchmark: str = "run"
    workload_notes: list[str] = []
    batch: bool = False
    interrupted: bool = False
    actors: list[Actors] = []
    sessions: list[Sessions | None] = []
    gpu: Sequence[list[GpuSample] | GpuSample] = []
    gpus: int | None = None
    usd_per_gpu_hour: float | None = None
    efficiency: dict[str, Mean] = {}
    roofline: Allowed | None = None


def figures(
    repeats: Sequence[Repeat],
    slo: Slo | None,
    users: int | None,
    ramp_s: float = 0.0,
    batch: bool = False,
    gpus: int | None = None,
    usd_per_gpu_hour: float | None = None,
) -> Run:
    """The figures of a repeated run, without the fields that describe the load.

    A run is valid if it was not interrupted, lost no actor and no repeat gives cause for doubt. A
    batch, which is all sent at once, is measured whole: it has no steady state to be away from.
    """
    steady: list[Measures] = []
    whole: list[Measures] = []
    doubts: list[str] = []
    for number, repeat in enumerate(repeats):
        outcome = repeat.outcome
        everything = measure.measure(outcome.records, slo)
        window = None if batch else measure.window(outcome.records, users, ramp_s)
        inside = measure.measure(outcome.records, slo, window) if window else everything
        whole.append(everything)
        steady.append(inside)
        reasons = measure.doubts(inside, outcome.cpu, everything, batch)
        reasons += _cache_doubts(inside, repeat)
        reasons += outcome.lost_actors
        if outcome.interrupted:
            reasons.append("interrupted: the rest of the load was not sent")
        doubts += [f"repeat {number + 1}: {doubt}" for doubt in reasons]
    # Repeats without a window, or that fell behind, are doubtful for that already.
    doubts += measure.unsettled(
        measure.settling_of_all(
            [
                (repeat.outcome.records, (inside.from_s, inside.to_s))
                for repeat, inside in zip(repeats, steady, strict=True)
                if inside.steady and not measure.falls_behind(inside)
            ]
        )
    )
    efficiency = [
        measure.efficiency(inside, gpu.energy(repeat.gpu), gpus, usd_per_gpu_hour)
        for repeat, inside in zip(repeats, steady, strict=True)
    ]
    return Run(
        slo=slo,
        batch=batch,
        valid=bool(repeats) and not doubts,
        interrupted=any(repeat.outcome.interrupted for repeat in repeats),
        doubts=doubts,
        events=[
            Event(repeat=number, at_s=event.at_s, what=event.what)
            for number, repeat in enumerate(repeats)
            for event in repeat.outcome.events
        ],
        repeats=steady,
        whole=whole,
        summary=measure.summary(steady),
        actors=[_actors(repeat.outcome) for repeat in repeats],
        sessions=[
            measure.sessions(repeat.outcome.records, repeat.session_sizes)
            for repeat in repeats
            if repeat.session_sizes
        ],
        server=[repeat.server for repeat in repeats],
        gpu=[repeat.gpu for repeat in repeats],
        gpus=gpus,
        usd_per_gpu_hour=usd_per_gpu_hour,
        efficiency=measure.efficiency_summary(efficiency),
    )


def _actors(outcome: Outcome) -> Actors:
    return Actors(
        where=outcome.actors,
        cpu=outcome.cpu,
        cpu_peak=outcome.cpu_peak,
        clock_offset_s=outcome.clock_offset_s,
        clock_error_s=outcome.clock_error_s,
    )


def _cache_doubts(measures: Measures, repeat: Repeat) -> list[str]:
    """What the server's metrics say of its prefix cache, where its answers say nothing of it."""
    rates = [sample.prefix_hit_rate for sample in repeat.server]
    present = [rate for rate in rates if rate is not None]
    ok = [record for record in repeat.outcome.records if record.ok]
    may_be = measure.may_be_cached_share(ok)
    if measures.answers.cached_share is not None or not present or may_be is None:
        return []
    last = present[-1]
    if last <= may_be + _CACHE_SLACK:
        return []
    return [
        f"by the server's metrics {last:.0%} of the prompt tokens came from its prefix "
        f"cache, and the workload shares only {may_be:.0%}: these prompts were sent before, or "
        "other clients use the server"
    ]
