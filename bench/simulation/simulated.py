"""The results of `bench simulate`."""

from dataclasses import dataclass

import msgspec

from bench.interval import Bounds
from bench.measure import Measures
from bench.result import Asked, Result
from bench.simulation.enginefit import Fit, Foretold
from bench.simulation.enginemodel import Engine
from bench.simulation.fleet import Fleet
from bench.simulation.trials import Trial


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """A setting of a policy; the fields are those of `Simulation`."""

    spec: str
    kept: float
    kept_interval: Bounds | None
    gpu_hours: float
    holds: bool | None


@dataclass(kw_only=True)
class Simulation(Trial):
    """The best setting of a policy.

    Attributes:
        policy: the spec with all its alternatives, which are `tried`.
        measures: under the first seed.
        holds: whether it holds the objective; None where the seeds do not decide it.
    """

    policy: str
    measures: Measures
    holds: bool | None
    tried: list[Tried]


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """A simulated fleet minus the measured one; `serving_apart_mean` in replicas, over time."""

    spec: str
    gpu_hours_error: float
    kept_minus_measured: float
    replicas_most_minus_measured: int
    serving_apart_mean: float


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """Simulations beside the run whose requests they repeat."""

    run: str
    start_s: float | None
    policies: list[Error]


class Simulated(Asked, frozen=True, kw_only=True):
    """The result of `bench simulate`.

    Attributes:
        copies, seeds, judged_from_s: see `case.Case`.
        requests: of the first seed; requests_per_s: of it, by minute: (from when, rate).
    """

    benchmark: str = "simulate"
    copies: int
    seeds: int
    requests: int
    judged_from_s: float
    fleet: Fleet
    requests_per_s: list[tuple[float, float]]
    beside: Beside | None = None
    notes: list[str] = []
    policies: list[Simulation]


class Validated(Result, frozen=True, kw_only=True):
    """The result of `bench simulate --validate`: a fitted engine, and how well it foretells loads.

    Attributes:
        loads: each foretold by a fit to the others; errors: of them, by the name of the metric.
    """

    benchmark: str = "simulate"
    engine: Engine
    fit: Fit
    loads: list[Foretold]
    errors: dict[str, dict[str, float]]
