"""The fleet: who gets a request, when a replica serves, what it costs, and that nothing is lost."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from bench import measure
from bench.errors import BenchError
from bench.simulation import fleet
from bench.simulation.enginemodel import Costs, Engine
from bench.simulation.fleet import Fleet, View
from bench.simulation.job import Job
from serve_app.scaling.types import Decision

# A request of 10 tokens in and 1 out takes a second, alone or not.
ENGINE = Engine(Costs(1.0, 0, 0, 0), max_num_seqs=1, token_budget=16, kv_blocks=100)
FLEET = Fleet(ENGINE, start_s=10.0, period_s=1.0, max_replicas=8)


def always(count: int) -> Callable[[View], Decision]:
    return lambda view: Decision(count, "always")


def at(*steps: tuple[float, int]) -> Callable[[View], Decision]:
    """From each time on so many."""

    def decide(view: View) -> Decision:
        wanted = [count for from_s, count in steps if view.snapshot.now_s >= from_s]
        return Decision(wanted[-1], "by plan")

    return decide


def every(gap_s: float, count: int, write: int = 1) -> list[Job]:
    return [Job(index, index * gap_s, 10, write) for index in range(count)]


# --- requests -------------------------------------------------------------------------------


def test_the_replica_with_the_fewest_open_requests_is_next_in_turn() -> None:
    outcome = fleet.run(replace(FLEET, initial=3), every(0.1, 7), always(3))
    # Three at once, then three that wait one each, then one more; each takes a second.
    ends_s = [record.end_s for record in outcome.records()]
    assert ends_s == pytest.approx([1.0, 1.1, 1.2, 2.0, 2.1, 2.2, 3.0])


def test_requests_wait_where_no_replica_is_and_keep_their_order() -> None:
    nothing = replace(FLEET, min_replicas=0, initial=0)
    outcome = fleet.run(nothing, every(0.5, 6), at((0, 0), (3, 1)))
    ends_s = [record.end_s for record in outcome.records()]
    assert ends_s == pytest.approx([14.0 + place for place in range(6)])
    assert outcome.spans == [(3.0, 13.0, outcome.end_s)]
    assert max(outcome.timeline.waiting) == 6


def test_a_policy_that_never_starts_one_fails_what_waits() -> None:
    nothing = replace(FLEET, min_replicas=0, initial=0, patience_s=60.0)
    outcome = fleet.run(nothing, every(0.5, 6), always(0))
    assert all(record.error.startswith("unfinished") for record in outcome.records())
    assert outcome.replica_s() == 0
    assert measure.measure(outcome.records()).failed == 6


# --- replicas -------------------------------------------------------------------------------


def test_a_replica_serves_when_it_has_started_and_costs_from_when_it_was_asked_for() -> None:
    outcome = fleet.run(FLEET, every(0.5, 60), at((0, 1), (5, 2)))
    assert outcome.spans == [(0.0, 0.0, outcome.end_s), (5.0, 15.0, outcome.end_s)]
    assert outcome.replica_s() == pytest.approx(2 * outcome.end_s - 5)
    assert outcome.replica_s(from_s=10.0) == pytest.approx(2 * (outcome.end_s - 10))
    line = outcome.timeline
    states = dict(zip(line.t_s, zip(line.serving, line.starting, strict=True), strict=True))
    assert [states[t_s] for t_s in (4.0, 5.0, 14.0, 15.0)] == [(1, 0), (1, 1), (1, 1), (2, 0)]


def test_one_that_is_let_go_ends_its_requests_and_gets_no_more() -> None:
    long = [Job(0, 0.0, 10, 20), Job(1, 0.1, 10, 20)]
    late = [Job(2 + index, 6.0 + index, 10, 1) for index in range(5)]
    engine = replace(ENGINE, max_num_seqs=8)
    outcome = fleet.run(replace(FLEET, engine=engine, initial=2), long + late, at((0, 2), (5, 1)))
    assert all(record.ok for record in outcome.records())
    gone_s = min(gone_s for _, _, gone_s in outcome.spans)
    assert gone_s == pytest.approx(21.0)  # The second request ends at 20.1: the next look.
    assert outcome.timeline.draining[10] == 1


def test_those_that_still_start_are_let_go_first() -> None:
    outcome = fleet.run(FLEET, every(1.5, 20), at((0, 1), (3, 3), (6, 2), (8, 1)))
    assert outcome.spans[1:] == [(3.0, None, 8.0), (3.0, None, 6.0)]


def test_bounds_hold_whatever_the_policy_says() -> None:
    bounded = replace(FLEET, min_replicas=2, max_replicas=3, initial=2)
    for wanted, each in ((0, 2), (99, 3)):
        outcome = fleet.run(bounded, every(1.0, 10), always(wanted))
        assert set(outcome.timeline.wanted) == {each}


def test_start_times_vary_with_the_seed_and_only_with_it() -> None:
    spread = replace(FLEET, start_spread=0.5)
    runs = [
        fleet.run(replace(spread, seed=seed), every(0.5, 60), at((0, 1), (5, 4)))
        for seed in (1, 1, 2)
    ]
    assert runs[0].spans == runs[1].spans
    assert runs[0].records() == runs[1].records()
    assert runs[0].spans != runs[2].spans
    served_s = [served_s for _, served_s, _ in runs[0].spans[1:]]
    assert all(10.0 <= at_s <= 20.0 for at_s in served_s if at_s is not None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_replicas": 9},
        {"initial": 9},
        {"initial": 0},
        {"period_s": 0.0},
        {"start_s": -1.0},
        {"start_spread": 1.0},
    ],
)
def test_a_fleet_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(BenchError):
        replace(FLEET, **wrong)  # type: ignore[arg-type]


# --- what a policy sees ---------------------------------------------------------------------


def test_what_replicas_report() -> None:
    engine = Engine(
        Costs(0.1, 1e-3, 0, 0), max_num_seqs=2, token_budget=200, kv_blocks=100, block_tokens=10
    )
    seen: list[View] = []

    def look(view: View) -> Decision:
        seen.append(view)
        return Decision(1, "a look")

    mine = [Job(index, 0.0, 100, 40) for index in range(3)]
    fleet.run(Fleet(engine, period_s=1.0, window_s=2.0, percentile=50.0), mine, look)
    assert seen[0].snapshot.replicas[0].running == 0
    load = seen[1].snapshot.replicas[0]
    assert (load.running, load.waiting, load.queued_tokens) == (2, 1, 100)
    # Both prompts are read in 0.3 s; then a step takes 0.1 s.
    assert load.ttft_s == pytest.approx(0.3)
    assert load.itl_s == pytest.approx(0.1)
    assert load.prefill_tokens_per_s == pytest.approx(200)
    assert load.decode_tokens_per_s == pytest.approx(2 * 8, abs=2)
    assert load.arrivals_per_s == pytest.approx(3)
    assert load.steps_per_s == pytest.approx(8, abs=1)
    assert load.busy == 1.0
    assert load.kv_usage == pytest.approx(2 * 11 / 100)
    assert load.max_running == 2
    assert load.finished_per_s == 0
    later = seen[4].snapshot.replicas[0]  # The window is over for what came at the start.
    assert later.arrivals_per_s == later.prefill_tokens_per_s == 0
    assert later.ttft_s is None
    assert seen[1].ongoing == 3
    assert seen[1].target == 1
    # Two end after 4.2 s, the third had to wait for them.
    limits = {"ttft_s": 1.0, "tpot_s": 0.15}
    for strict, missed in (({}, 0), (limits, 1), (limits | {"tpot_s": 0.05}, 3)):
        seen.clear()
        engine_s = Fleet(engine, period_s=20.0, window_s=30.0, **strict)  # type: ignore[arg-type]
        fleet.run(engine_s, mine, look)
        load = seen[1].snapshot.replicas[0]
        assert load.finished_per_s * 20 == pytest.approx(3)
        assert load.missed_per_s * 20 == pytest.approx(missed)


def test_an_engine_is_busy_while_it_is_in_a_step() -> None:
    seen: list[View] = []

    def look(view: View) -> Decision:
        seen.append(view)
        return Decision(1, "a look")

    fleet.run(replace(FLEET, window_s=10.0), every(4.0, 6), look)  # A second of work every four.
    load = seen[20].snapshot.replicas[0]
    assert load.busy == pytest.approx(0.25, abs=0.06)
    assert load.steps_per_s == pytest.approx(0.25, abs=0.06)


def test_a_step_of_many_sequences_weighs_more() -> None:
    """The percentile is over gaps between tokens, not over steps."""
    engine = Engine(Costs(0.1, 0, 0.1, 0), max_num_seqs=20, token_budget=200, kv_blocks=1000)
    seen: list[View] = []

    def look(view: View) -> Decision:
        seen.append(view)
        return Decision(1, "a look")

    # One alone for 10 steps of 0.2 s, then 10 together for 10 steps of 1.1 s.
    mine = [Job(0, 0.0, 1, 21), *(Job(1 + index, 2.0, 1, 11) for index in range(9))]
    fleet.run(Fleet(engine, period_s=1.0, window_s=100.0, percentile=50.0), mine, look)
    assert seen[-1].snapshot.replicas[0].itl_s == pytest.approx(1.1, rel=0.01)


# --- what must hold -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_whatever_the_policy_does(seed: int) -> None:
    """A policy that changes its mind at random; every request still gets every token, once."""
    rng = random.Random(seed)
    engine = Engine(
        Costs(0.02, 1e-4, 1e-3, 1e-6), max_num_seqs=4, token_budget=64, kv_blocks=60, block_tokens=4
    )
    at_s, mine = 0.0, []
    for index in range(400):
        at_s += rng.expovariate(6.0)
        mine.append(Job(index, at_s, rng.randint(1, 100), rng.randint(1, 40)))
    changes = random.Random(seed + 100)
    outcome = fleet.run(
        Fleet(engine, start_s=3.0, start_spread=0.5, period_s=1.0, min_replicas=0, initial=1),
        mine,
        lambda view: Decision(changes.randint(0, 6), "a whim"),
    )
    assert [record.index for record in outcome.records()] == list(range(400))
    for job, record in zip(mine, outcome.records(), strict=True):
        assert record.ok
        assert len(record.chunk_s) == job.output_tokens
        assert record.chunk_s == sorted(record.chunk_s)
        assert job.at_s < record.chunk_s[0]
        assert job.end_s is None  # The caller's jobs are not touched.
    assert outcome.preempted > 0
    served_s = sum(gone_s - (from_s or gone_s) for _, from_s, gone_s in outcome.spans)
    assert served_s <= outcome.replica_s()
    line = outcome.timeline
    assert all(after - before == pytest.approx(1.0) for before, after in pairwise(line.t_s))
    assert max(line.serving) + max(line.starting) > 3


def test_more_replicas_are_never_slower() -> None:
    rng, at_s, mine = random.Random(0), 0.0, []
    for index in range(500):
        at_s += rng.expovariate(1.2)
        mine.append(Job(index, at_s, 10, 1))
    waits_s = []
    for count in (2, 3, 4):
        outcome = fleet.run(replace(FLEET, initial=count), mine, always(count))
        waits_s.append(measure.measure(outcome.records()).ttft_mean_s or 0)
    assert waits_s[0] > waits_s[1] > waits_s[2] > 1.0
