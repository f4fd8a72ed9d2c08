"""Verdicts of `bench simulate` over seeds: intervals cover, and no seed turns a verdict."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bench.measure import Slo
from bench.simulation import simulate, simulation_page
from bench.simulation.case import Case
from bench.simulation.enginemodel import Costs, Engine
from bench.simulation.fleet import Fleet
from bench.simulation.trials import Strain, kept_interval

ENGINE = Engine(
    Costs(0.02, 1e-4, 1e-3, 1e-7), max_num_seqs=8, token_budget=512, kv_blocks=2000, name="small"
)
CASE = Case(
    workload="synthetic:input=200,output=20",
    load="poisson:rate=9.5",
    fleet=Fleet(ENGINE, start_s=10.0, max_replicas=4),
    slo=Slo(ttft_s=0.5, percentile=95.0),
    duration_s=30.0,
    seeds=4,
)


def queues(busy: float, requests: int, runs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """When requests come to M/M/1 queues that begin empty, and how long each is there."""
    rng = np.random.default_rng(seed)
    gaps, service = (
        rng.exponential(1 / busy, (runs, requests)),
        rng.exponential(1, (runs, requests)),
    )
    waits = np.zeros((runs, requests))
    for place in range(1, requests):
        left = waits[:, place - 1] + service[:, place - 1] - gaps[:, place]
        waits[:, place] = np.maximum(0.0, left)
    return np.cumsum(gaps, axis=1), waits + service


@pytest.mark.parametrize(
    ("busy", "requests", "share"),
    [(0.3, 1000, 0.99), (0.5, 500, 0.95), (0.8, 1000, 0.95), (0.8, 1000, 0.99), (0.9, 2000, 0.95)],
)
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_covers(busy: float, requests: int, share: float, seeds: int) -> None:
    """A few runs with few misses that come together are the hard case: 0.54 to 0.70 without."""
    limit_s = -math.log(1 - share) / (1 - busy)
    truth = float((queues(busy, requests, 4000, 0)[1] <= limit_s).mean())
    planned_s, took_s = queues(busy, requests, seeds * 120, 1)
    covered = 0
    for first in range(0, len(took_s), seeds):
        mine = slice(first, first + seeds)
        strains = [
            Strain(at_s, took / limit_s)
            for at_s, took in zip(planned_s[mine], took_s[mine], strict=True)
        ]
        low, high = kept_interval([float((each.used <= 1).mean()) for each in strains], strains)
        covered += low <= truth <= high
    assert covered / 120 >= 0.89  # 95 %, less what 120 draws may differ by.


def test_other_seeds_never_turn_a_verdict() -> None:
    """At the limit of one replica single runs say yes and no; verdicts may only be open."""
    runs = [replace(CASE, seeds=1, seed=seed) for seed in range(12)]
    single = {
        simulate.trial_of(case, case.jobs(), "static:n=1")[0].verdict(CASE.slo) for case in runs
    }
    assert single == {True, False}
    verdicts = {
        simulate.simulate(replace(CASE, seed=seed), ["static:n=1"]).policies[0].holds
        for seed in (0, 4, 8)
    }
    assert verdicts in ({None}, {None, True}, {None, False}, {True}, {False})


def test_a_clear_case_has_a_verdict_and_an_interval() -> None:
    data = simulate.simulate(replace(CASE, load="poisson:rate=6"), ["static:n=1|3"])
    few, many = data.policies[0].tried
    assert few.holds is many.holds is True
    assert few.kept <= many.kept
    low, high = data.policies[0].kept_interval
    assert 0.95 <= low <= few.kept <= high <= 1.0
    assert f"({100 * low:.2f} to {100 * high:.2f})" in simulation_page.table(data)
    assert data.seeds == 4
    assert not data.notes


def test_all_policies_meet_the_same_loads() -> None:
    data = simulate.simulate(CASE, ["static:n=2", "static:n=2"])
    first, second = (replace(row, took_s=0) for row in data.policies)
    assert first == second


def test_one_seed_has_no_interval_and_says_so() -> None:
    data = simulate.simulate(replace(CASE, seeds=1), ["static:n=2"])
    assert data.policies[0].kept_interval is None
    assert "--seeds" in data.notes[0]
    assert data.notes[0] in simulation_page.table(data)
