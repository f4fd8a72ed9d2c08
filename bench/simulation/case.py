"""What is simulated, apart from the policies."""

from dataclasses import dataclass, replace

from bench.measure import Slo
from bench.simulation import demand
from bench.simulation.fleet import Fleet
from bench.simulation.job import Job
from bench.simulation.reality import Measured
from serve_app.scaling.types import Goal


@dataclass(frozen=True)
class Case:
    """What is simulated, apart from the policies.

    Attributes:
        workload, load, copies, seed: specs of what comes; see demand.py.
        seeds: how many loads are drawn, with the seeds `seed`, `seed` + 1, ..; all policies meet
            the same ones.
        count, duration_s: where it ends.
        slo: what every policy is judged by, and what ours aims for.
        judged_from_s: what came and was paid before is left out: a policy that learns is seen after
            it has, as on any day but its first.
        fleet: the engines, and their bounds.
        beside: a measured run, whose requests come instead of those of `workload` and `load`.
    """

    workload: str
    load: str
    fleet: Fleet
    slo: Slo
    count: int | None = None
    duration_s: float | None = None
    copies: int = 1
    seed: int = 0
    judged_from_s: float = 0.0
    seeds: int = 1
    beside: Measured | None = None

    @property
    def goal(self) -> Goal:
        return Goal(
            ttft_s=self.slo.ttft_s,
            itl_s=self.slo.tpot_s,
            percentile=self.slo.percentile,
            min_replicas=self.fleet.min_replicas,
            max_replicas=self.fleet.max_replicas,
        )

    def drawn(self) -> "list[Draw]":
        """The requests of each seed."""
        cases = [
            replace(
                self,
                seed=self.seed + number,
                seeds=1,
                fleet=replace(self.fleet, seed=self.fleet.seed + number),
            )
            for number in range(self.seeds)
        ]
        return [Draw(case, case.jobs()) for case in cases]

    def jobs(self) -> list[Job]:
        if self.beside is not None:
            return self.beside.jobs()
        return demand.jobs(
            self.workload,
            self.load,
            self.fleet.engine,
            count=self.count,
            duration_s=self.duration_s,
            copies=self.copies,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Draw:
    """The requests of one seed."""

    case: Case
    jobs: list[Job]
