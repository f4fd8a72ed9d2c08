"""Searches: where throughput saturates, and the highest rate under a service level objective.

Pure controllers: `ask` says what to probe next, `tell` takes the records of that, `result` is what
is known. `run` joins one to an `async probe(x, count) -> records`, x being users or requests per
second.
"""

from bench.search.control import Controller, Probe, run, summarise
from bench.search.rate import RateSearch
from bench.search.rateresult import Forecast, RatePoint, RateResult, Share
from bench.search.sweep import Sweep, SweepResult, UsersPoint

__all__ = [
    "Controller",
    "Forecast",
    "Probe",
    "RatePoint",
    "RateResult",
    "RateSearch",
    "Share",
    "Sweep",
    "SweepResult",
    "UsersPoint",
    "run",
    "summarise",
]
