"""What comes in a simulation: the requests of a workload at the times of a load, without a server.

Any workload and any open load of a run will do, and two loads more, which are Poisson at any moment
and change as days and crowds do:

    wave:low=2,high=20,period=1800            from low to high and back, as a sine
    surge:base=2,peak=20,every=600,lasting=60     base, and after each `every` s peak for a while

`copies` sends every request so many times, within `SPREAD_S` and with the lengths of others: more
traffic of the same shape, where a trace's speed-up would make the shape itself faster than replicas
can start.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from bench import spec
from bench.errors import LoadError
from bench.simulation.enginemodel import Engine
from bench.simulation.job import Job
from bench.traffic import schedule, workload
from bench.traffic.request import Request

SPREAD_S = 1.0
_STRIDE = 997  # A prime: copies of one request have lengths from far apart.
KINDS = {
    **schedule.KINDS,
    "wave": ("low", "high", "period"),
    "surge": ("base", "peak", "every", "lasting"),
}


@dataclass(frozen=True)
class Wave(schedule.Open):
    """Poisson arrivals whose rate swings between `low` and `high`, low first."""

    low: float
    high: float
    period_s: float

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        at_s = 0.0
        while True:
            at_s += rng.expovariate(self.high)
            swing = (1 - math.cos(2 * math.pi * at_s / self.period_s)) / 2
            if rng.random() * self.high < self.low + (self.high - self.low) * swing:
                yield at_s

    def __str__(self) -> str:
        return f"wave:low={self.low:g},high={self.high:g},period={self.period_s:g}"


@dataclass(frozen=True)
class Surge(schedule.Open):
    """Poisson arrivals at `base`, and at `peak` for `lasting_s` from each `every_s` on."""

    base: float
    peak: float
    every_s: float
    lasting_s: float

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        at_s, peak_rate = 0.0, max(self.base, self.peak)
        while True:
            at_s += rng.expovariate(peak_rate)
            inside = at_s >= self.every_s and at_s % self.every_s < self.lasting_s
            if rng.random() * peak_rate < (self.peak if inside else self.base):
                yield at_s

    def __str__(self) -> str:
        times = f"every={self.every_s:g},lasting={self.lasting_s:g}"
        return f"surge:base={self.base:g},peak={self.peak:g},{times}"


def parse(text: str) -> schedule.Open | schedule.TraceTimes:
    """The load of a spec.

    Raises LoadError, which names the key, its value and the nearest valid choice; also for a closed
    loop, whose users would ask less of a fleet that is too small.
    """
    options = spec.parse(text, "load", KINDS, LoadError, unnamed="closed")
    if options.name == "wave":
        low = options.number("low", above=0.0)
        high, period_s = options.number("high", minimum=low), options.number("period", above=0.0)
        return Wave(low, high, period_s)
    if options.name == "surge":
        base, peak = options.number("base", above=0.0), options.number("peak", above=0.0)
        every_s = options.number("every", above=0.0)
        return Surge(base, peak, every_s, options.number("lasting", above=0.0, maximum=every_s))
    parsed = schedule.parse(text)
    if isinstance(parsed, schedule.Closed):
        raise LoadError.of("load", text, "is a closed loop; a simulation needs an open one")
    return parsed


def jobs(
    what: str,
    when: str,
    engine: Engine,
    *,
    count: int | None = None,
    duration_s: float | None = None,
    copies: int = 1,
    seed: int = 0,
) -> list[Job]:
    """The requests of a workload's and a load's spec, in the order of their times.

    Raises WorkloadError and LoadError, as a run does.
    """
    if copies < 1:
        raise LoadError.of("copies", copies, "must be at least 1")
    made = workload.parse(what, seed, salt="")
    plan = schedule.plan(made, parse(when), count, duration_s, seed)
    planned = [(each.at_s or 0.0, each.request) for each in plan.planned]
    rng = random.Random(f"{seed}/copies")
    for copy in range(1, copies):
        moved = (copy * _STRIDE) % len(plan.planned)
        for place, each in enumerate(plan.planned):
            other = plan.planned[(place + moved) % len(plan.planned)].request
            planned.append(((each.at_s or 0.0) + rng.uniform(0, SPREAD_S), other))
    planned.sort(key=lambda job: job[0])
    return [_job(index, at_s, request, engine) for index, (at_s, request) in enumerate(planned)]


def _job(index: int, at_s: float, request: Request, engine: Engine) -> Job:
    hashes = tuple(_hashes(request, engine.block_tokens)) if engine.prefix_caching else ()
    return Job(
        index,
        at_s,
        _input_tokens(request),
        request.output_tokens,
        hashes=hashes,
        kind=request.kind,
    )


def _input_tokens(request: Request) -> int:
    if request.input_tokens is not None:
        return max(1, request.input_tokens)
    if isinstance(request.prompt, str):
        return max(1, len(request.prompt.split()))
    return max(1, len(request.prompt))


def _hashes(request: Request, block: int) -> Iterator[int]:
    """One a whole block, of it and all before it: vLLM's prefix cache knows blocks by the same."""
    if not isinstance(request.prompt, str):
        return
    digest, words = 0, iter(request.prompt.split())
    while len(part := tuple(islice(words, block))) == block:
        digest = hash((digest, part))
        yield digest
