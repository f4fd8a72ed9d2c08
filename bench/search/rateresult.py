"""The result of `bench search`: each rate that was probed, and the interval of the highest one."""

from typing import Literal

import msgspec

from bench.measure import Mean, Measures
from bench.result import Asked

Verdict = Literal["pass", "fail", "unresolved"]


class Share(msgspec.Struct, kw_only=True):
    """How many of the requests of a point were within the objective.

    Attributes:
        good, counted: requests; failures are counted and not good.
        unknown: requests that only bench made miss; not counted.
        independent: how many independent requests the counted ones are worth.
        low, high: exact interval for the share of that many.
    """

    good: int = 0
    counted: int = 0
    unknown: int = 0
    independent: int = 0
    low: float = 0.0
    high: float = 1.0


class RatePoint(msgspec.Struct, kw_only=True):
    """One rate, and what its probes showed.

    Attributes:
        verdict: by the interval of the whole search, where there is one.
        summary: of `measures`, once the search is over.
    """

    rate: float
    verdict: Verdict = "unresolved"
    looks: int = 0
    share: Share = msgspec.field(default_factory=Share)
    measures: list[Measures] = []
    summary: dict[str, Mean] = {}
    doubts: list[str] = []


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What remains until the precision is reached: requests, and their time."""

    requests: int
    seconds: float


class RateResult(Asked, frozen=True, kw_only=True):
    """The highest rate under the objective lies from `rate` to `fails_at`.

    Attributes:
        estimate: the most likely rate; None where it was not bracketed.
        rate: a rate that keeps the objective, requests per second; None where none did.
        fails_at: a rate that does not; None where all did.
        confidence: that the true rate lies between them.
        resolved: both are known and differ by no more than the precision.
        reason: why it is not resolved; empty where it is.
        goodput_per_s: measured at the highest rate that passed.
        elapsed_s: of all probes.
        forecast: what more would resolve it; None where it is resolved, or nothing is known.
        doubts: of every probe, each once.
        points: in the order of their rates.
    """

    benchmark: str = "search"
    estimate: float | None = None
    rate: float | None
    fails_at: float | None
    confidence: float = 0.0
    resolved: bool
    reason: str
    goodput_per_s: float | None = None
    elapsed_s: float = 0.0
    forecast: Forecast | None = None
    points: list[RatePoint]
