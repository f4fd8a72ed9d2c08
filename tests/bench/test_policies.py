"""The policies: what each answers to what it sees, as the system it stands for would."""

from collections.abc import Sequence

import pytest

from bench.errors import BenchError
from bench.simulation import fleet, policies
from bench.simulation.enginemodel import Costs, Engine, roofline
from bench.simulation.fleet import Fleet, Policy, View
from bench.simulation.job import Job
from serve_app.scaling import policy as scaling
from serve_app.scaling.types import Goal, ReplicaLoad, Snapshot

ENGINE = roofline("A100", "Qwen2.5-7B")
FLEET = Fleet(ENGINE, max_replicas=20)
GOAL = Goal(max_replicas=20)


def policy(text: str) -> Policy:
    return policies.parse(text, GOAL, FLEET, [])


def view(
    now_s: float,
    loads: Sequence[ReplicaLoad],
    *,
    starting: int = 0,
    ongoing: int | None = None,
    pending: int = 0,
) -> View:
    ongoing = sum(load.running + load.waiting for load in loads) if ongoing is None else ongoing
    snapshot = Snapshot(now_s, tuple(loads), starting=starting, pending=pending)
    return View(snapshot, tuple(range(len(loads))), len(loads) + starting, ongoing)


def busy(count: int, running: int = 0, waiting: int = 0, kv: float = 0.0) -> list[ReplicaLoad]:
    return [ReplicaLoad(running=running, waiting=waiting, kv_usage=kv) for _ in range(count)]


def answers(
    decide: Policy, count: int, loads: Sequence[ReplicaLoad], until_s: float, step_s: float = 5.0
) -> list[tuple[float, int]]:
    """When the answer first differs from `count`, with the same load all along."""
    result, now_s = [], 0.0
    while now_s <= until_s:
        answer = decide(view(now_s, loads, starting=count - len(loads))).replicas
        if answer != count:
            result.append((now_s, answer))
            break
        now_s += step_s
    return result


# --- ours -----------------------------------------------------------------------------------


def test_ours_is_the_policy_of_the_application_and_remembers() -> None:
    decide, state = policy("ours"), scaling.State()
    for second in range(0, 200, 5):
        load = ReplicaLoad(running=second, max_running=100, busy=0.5, steps_per_s=50.0)
        seen = view(float(second), [load, load], starting=second // 100)
        expected, state = scaling.decide(seen.snapshot, GOAL, state)
        assert decide(seen) == expected
    assert expected.replicas > 3


# --- Ray Serve ------------------------------------------------------------------------------


def test_serve_goes_up_after_its_delay() -> None:
    decide = policy("serve:target=10,up=30,down=600")
    assert answers(decide, 2, busy(2, running=30), 300) == [(30.0, 6)]


def test_serve_goes_down_after_its_longer_delay() -> None:
    decide = policy("serve:target=10,up=30,down=600")
    assert answers(decide, 4, busy(4, running=5), 900) == [(600.0, 2)]


def test_serve_averages_over_its_look_back() -> None:
    decide = policy("serve:target=10,up=0,down=600,look_back=30")
    for now_s in range(0, 30, 5):
        assert decide(view(now_s, busy(1, running=10))).replicas == 1
    # Seven readings, the last of which is 80.
    assert decide(view(30, busy(1, running=80))).replicas == 2


def test_serve_counts_a_change_of_mind_from_its_beginning() -> None:
    decide = policy("serve:target=10,up=30,down=600,look_back=1")
    for now_s in range(0, 25, 5):
        assert decide(view(now_s, busy(2, running=30))).replicas == 2
    assert decide(view(25, busy(2, running=10))).replicas == 2
    for now_s in range(30, 60, 5):
        assert decide(view(now_s, busy(2, running=30))).replicas == 2
    assert decide(view(60, busy(2, running=30))).replicas == 6


def test_serve_takes_part_of_a_step_with_a_factor() -> None:
    decide = policy("serve:target=10,up=0,up_factor=0.5")
    assert decide(view(0, busy(2, running=30))).replicas == 4


def test_serve_starts_from_nothing_at_once() -> None:
    decide = policy("serve:target=10,up=30")
    assert decide(view(0, [], ongoing=3, pending=3)).replicas == 1


# --- waiting requests -----------------------------------------------------------------------


def test_waiting_has_one_replica_for_so_many() -> None:
    assert policy("waiting:per=5")(view(0, busy(3, waiting=7))).replicas == 5


def test_waiting_does_not_change_within_a_tenth() -> None:
    assert policy("waiting:per=5")(view(0, busy(10, waiting=5) + busy(1, waiting=1))).replicas == 11


def test_waiting_at_most_doubles_or_adds_four() -> None:
    assert policy("waiting:per=1")(view(0, busy(2, waiting=50))).replicas == 6
    assert policy("waiting:per=1")(view(0, busy(6, waiting=50))).replicas == 12


def test_waiting_looks_only_so_often() -> None:
    decide = policy("waiting:per=5,every=15")
    assert decide(view(0, busy(1))).replicas == 1
    assert decide(view(10, busy(1, waiting=20))).replicas == 1
    assert decide(view(15, busy(1, waiting=20))).replicas == 4


def test_waiting_lets_a_busy_fleet_go_after_its_window() -> None:
    """What runs is not in its metric: a fleet that keeps up looks idle."""
    decide = policy("waiting:per=5,down=300")
    decide(view(0, busy(4, running=50, waiting=5)))
    result = answers(decide, 4, busy(4, running=50), 600)
    assert result == [(315.0, 0)]


# --- spare capacity -------------------------------------------------------------------------


def test_spare_adds_one_when_the_cache_is_nearly_full() -> None:
    assert policy("spare")(view(0, busy(3, kv=0.71))).replicas == 4
    assert policy("spare")(view(0, busy(3, kv=0.69))).replicas == 3


def test_spare_adds_one_when_the_queue_is_nearly_full() -> None:
    assert policy("spare")(view(0, busy(3, waiting=3))).replicas == 4


def test_spare_leaves_saturated_ones_out_of_the_mean() -> None:
    mixed = busy(2, kv=0.95) + busy(2, kv=0.6)
    assert policy("spare")(view(0, mixed)).replicas == 4
    assert policy("spare")(view(0, busy(4, kv=0.95))).replicas == 5


def test_spare_waits_for_one_that_starts() -> None:
    assert policy("spare")(view(0, busy(3, kv=0.79), starting=1)).replicas == 4


def test_spare_goes_down_when_the_rest_would_have_enough() -> None:
    # 0.4 on four is 0.53 on three, which leaves 0.27; 0.6 would be 0.8.
    assert answers(policy("spare:down=300"), 4, busy(4, kv=0.4), 600) == [(330.0, 3)]
    assert answers(policy("spare:down=300"), 4, busy(4, kv=0.6), 600) == []


def test_spare_remembers_the_worst_of_its_window() -> None:
    decide = policy("spare:look_back=60,every=30,down=0")
    decide(view(0, busy(4, kv=0.65)))
    assert decide(view(30, busy(4, kv=0.2))).replicas == 4
    assert decide(view(95, busy(4, kv=0.2))).replicas == 3


# --- the others -----------------------------------------------------------------------------


def test_static_is_static() -> None:
    assert policy("static:n=4")(view(0, busy(1, running=99))).replicas == 4


SECOND = Engine(Costs(0.5, 0.1, 0, 0), max_num_seqs=1, token_budget=16, kv_blocks=100)


def test_foresight_has_replicas_ready_when_they_are_needed() -> None:
    calm = [Job(index, float(index), 5, 1) for index in range(0, 200, 4)]
    crowd = [Job(100 + index, 100 + index / 10, 5, 1) for index in range(100)]
    jobs = sorted([*calm, *crowd], key=lambda job: job.at_s)
    size = Fleet(SECOND, start_s=30.0, period_s=1.0, max_replicas=20)
    decide = policies.parse("foresight:share=1", GOAL, size, jobs)
    outcome = fleet.run(size, jobs, decide)
    line = outcome.timeline
    serving = dict(zip(line.t_s, line.serving, strict=True))
    assert serving[95.0] == 1
    assert serving[105.0] > 5
    assert serving[160.0] == 1


def test_foresight_keeps_a_replica_through_a_short_pause() -> None:
    crowds = [Job(index, 50.0 * (index // 20) + index / 100, 5, 1) for index in range(80)]
    size = Fleet(SECOND, start_s=40.0, period_s=1.0, max_replicas=20)
    changes = len(
        fleet.run(size, crowds, policies.parse("foresight", GOAL, size, crowds)).decisions
    )
    quick = Fleet(SECOND, start_s=1.0, period_s=1.0, max_replicas=20)
    more = len(fleet.run(quick, crowds, policies.parse("foresight", GOAL, quick, crowds)).decisions)
    assert changes < more


def test_alternatives_are_every_combination() -> None:
    assert policies.alternatives("serve:target=8|16,up=0|30") == [
        "serve:target=8,up=0",
        "serve:target=8,up=30",
        "serve:target=16,up=0",
        "serve:target=16,up=30",
    ]
    assert policies.alternatives("ours") == ["ours"]
    assert policies.alternatives("spare:kv=0.8,queue=5") == ["spare:kv=0.8,queue=5"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("our", "'ours'"),
        ("serve:targets=3", "'target'"),
        ("serve:target=0", "above 0"),
        ("waiting:per", "has no value"),
        ("spare:kv=1.5", "from 0 to 1"),
        ("ours:speed=1", "no such option"),
    ],
)
def test_a_policy_that_cannot_be_understood(text: str, names: str) -> None:
    with pytest.raises(BenchError, match=names):
        policies.parse(text, GOAL, FLEET, [])
