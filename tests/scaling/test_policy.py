"""The scaling policy, against a fleet of engines that are a formula, and on single snapshots."""

import math
import random
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.scaling.costs import estimate
from serve_app.scaling.policy import decide
from serve_app.scaling.state import State
from serve_app.scaling.types import Decision, Goal, ReplicaLoad, Snapshot

GOAL = Goal(ttft_s=2.0, itl_s=0.1, percentile=95.0, min_replicas=1, max_replicas=32)
# Of an engine: seconds of a step, of a token written, of a token read.
STEP_S, DECODE_S, PREFILL_S = 0.010, 0.0001, 0.00002
PROMPT, OUTPUT = 1000, 100
# Of a request, without the fixed time of steps.
WORK_S = PROMPT * PREFILL_S + OUTPUT * DECODE_S


@dataclass
class Fleet:
    """Engines that share what comes evenly, a second at a time, and a policy that sizes them."""

    goal: Goal = GOAL
    start_s: float = 60.0
    serving: int = 1
    placeable: int | None = None
    now_s: float = 0.0
    queue: float = 0.0  # Requests that nobody has read.
    starting: list[float] = field(default_factory=list)  # When each will serve.
    # The estimate alone: what the margin does that it begins with has tests of its own.
    state: State = field(default_factory=lambda: State(factor=1.0))
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=10))
    history: list[int] = field(default_factory=list)
    decision: Decision | None = None
    last_queue: float = 0.0

    @property
    def target(self) -> int:
        return self.serving + len(self.starting)

    def second(self, arrivals: float) -> int:
        """One second in which so many requests come; returns how many replicas are wanted."""
        self.now_s += 1
        ready = [when for when in self.starting if when <= self.now_s]
        self.starting = [when for when in self.starting if when > self.now_s]
        self.serving += len(ready)
        self.queue += arrivals
        done = min(self.queue, 0.999 * self.serving / WORK_S)
        self.queue -= done
        self.recent.append((arrivals, done))
        self.decision, self.state = decide(self.snapshot(), self.goal, self.state)
        self._follow(self.decision.replicas)
        self.history.append(self.target)
        return self.target

    def run(self, seconds: int, rate: float, rng: random.Random | None = None) -> None:
        for _ in range(seconds):
            self.second(rate if rng is None else poisson(rng, rate))

    def snapshot(self) -> Snapshot:
        count = len(self.recent)
        came = sum(arrivals for arrivals, _ in self.recent) / count
        done = sum(done for _, done in self.recent) / count
        load = ReplicaLoad()
        if self.serving:
            share = done / self.serving
            work = share * WORK_S
            running = min(256.0, share * OUTPUT * STEP_S / max(1 - work, 0.01))
            load = ReplicaLoad(
                running=math.ceil(running),
                waiting=round(self.queue / self.serving),
                queued_tokens=round(self.queue * PROMPT / self.serving),
                kv_usage=min(1.0, running / 500),
                max_running=256,
                ttft_s=0.1 + self.queue * WORK_S / self.serving if done else None,
                itl_s=STEP_S / max(1 - work, 0.01) if done else None,
                prefill_tokens_per_s=share * PROMPT,
                decode_tokens_per_s=share * OUTPUT,
                arrivals_per_s=came / self.serving,
                steps_per_s=(1 - work) / STEP_S if done else 0.0,
                busy=1.0 if done else 0.0,
            )
        return Snapshot(
            self.now_s,
            (load,) * self.serving,
            starting=len(self.starting),
            placeable=self.placeable,
            start_s=self.start_s,
            pending=0 if self.serving else math.ceil(self.queue),
        )

    def _follow(self, wanted: int) -> None:
        for _ in range(wanted - self.target):
            self.starting.append(self.now_s + self.start_s)
        while self.target > wanted:
            if self.starting:
                self.starting.pop()
            else:
                self.serving -= 1

    @property
    def reversals(self) -> int:
        """How often it went up after it had gone down, or down after up."""
        steps = [b - a for a, b in pairwise(self.history) if b != a]
        return sum(a * b < 0 for a, b in pairwise(steps))


def poisson(rng: random.Random, rate: float) -> int:
    count, left = 0, rng.expovariate(1.0)
    while left < rate:
        count += 1
        left += rng.expovariate(1.0)
    return count


def rate_of(replicas: float) -> float:
    """Requests a second that keep so many replicas just full: at work 0.9 a step takes 0.1 s."""
    return replicas * 0.9 / WORK_S


# --- what is learnt -------------------------------------------------------------------------


def test_the_costs_of_a_step_are_found_from_the_reports() -> None:
    rng, fleet = random.Random(1), Fleet(serving=3)
    for second in range(300):
        fleet.second(poisson(rng, rate_of(1 + math.sin(second / 40))))
    costs = estimate(fleet.state.sums)
    assert costs.step_s == pytest.approx(STEP_S, rel=0.1)
    read, written = costs.prefill_s * PROMPT, costs.decode_s * OUTPUT
    # Both rates rise and fall together here, so that only their sum can be known.
    assert read + written == pytest.approx(WORK_S, rel=0.1)


def test_reads_and_writes_are_told_apart_where_their_mix_changes() -> None:
    state, rng = State(), random.Random(2)
    for second in range(200):
        read, written = rng.uniform(0, 20000), rng.uniform(0, 2000)
        work = read * PREFILL_S + written * DECODE_S
        load = ReplicaLoad(
            prefill_tokens_per_s=read,
            decode_tokens_per_s=written,
            steps_per_s=(1 - work) / STEP_S,
            busy=1.0,
        )
        _, state = decide(Snapshot(float(second), (load,)), GOAL, state)
    costs = estimate(state.sums)
    assert costs.prefill_s == pytest.approx(PREFILL_S, rel=0.05)
    assert costs.decode_s == pytest.approx(DECODE_S, rel=0.05)
    assert costs.step_s == pytest.approx(STEP_S, rel=0.05)


@pytest.mark.parametrize("replicas", [0.5, 1.5, 2.5, 6.5])
def test_the_load_is_how_many_replicas_would_be_just_full(replicas: float) -> None:
    fleet = Fleet(serving=math.ceil(replicas) + 2)
    fleet.run(300, rate_of(replicas))
    assert fleet.decision is not None
    assert fleet.decision.load == pytest.approx(replicas, rel=0.1)


def test_work_that_a_full_fleet_cannot_do_is_seen_in_its_queue() -> None:
    fleet = Fleet(serving=2, goal=replace(GOAL, max_replicas=2))
    fleet.run(50, rate_of(1))
    fleet.run(12, rate_of(6))
    assert fleet.decision is not None
    assert 4 <= fleet.decision.load <= 7  # The two can do 2.


# --- up -------------------------------------------------------------------------------------


def test_a_burst_is_answered_at_once_and_in_its_size() -> None:
    fleet = Fleet(serving=2)
    fleet.run(300, rate_of(1))
    fleet.run(12, rate_of(8))  # The reports are of the last ten seconds.
    assert fleet.target >= 8
    fleet.run(60, rate_of(8))
    assert 8 <= max(fleet.history) <= 18


def test_replicas_that_start_are_counted() -> None:
    fleet = Fleet(serving=1, start_s=120)
    fleet.run(200, rate_of(0.5))
    fleet.run(30, rate_of(0.95))
    settled = fleet.target
    assert settled >= 2
    fleet.run(80, rate_of(0.95))
    assert fleet.target == settled


def test_a_slower_start_is_prepared_for_earlier() -> None:
    """The same rise: who needs longer must ask while less is there."""

    def ready_at(start_s: float) -> float:
        fleet = Fleet(serving=4, start_s=start_s)
        fleet.run(1800, rate_of(2))
        for second in range(1800):
            fleet.second(rate_of(2 + second / 300))
            if fleet.target >= 5:
                return float(second)
        raise AssertionError("never")

    assert ready_at(300) < ready_at(30)


def test_bursts_that_come_again_are_expected() -> None:
    fleet = Fleet(serving=1, start_s=120)
    for _ in range(10):
        fleet.run(240, rate_of(0.5))
        fleet.run(60, rate_of(6))
    fleet.run(240, rate_of(0.5))
    assert fleet.serving >= 6


@pytest.mark.parametrize(
    "full",
    [{"kv_usage": 0.97}, {"running": 64, "max_running": 64}, {"preemptions_per_s": 0.5}],
)
def test_a_replica_may_be_full_without_work(full: dict[str, float]) -> None:
    load = replace(ReplicaLoad(max_running=64, arrivals_per_s=1.0), **full)  # type: ignore[arg-type]
    state = State()
    for second in range(120):
        decision, state = decide(Snapshot(float(second), (load,)), GOAL, state)
    assert decision.replicas >= 2


def busy(second: int, replicas: float = 1.0, missed: float = 0.0, **expected: Any) -> ReplicaLoad:
    """An engine's share of some work, which varies, so that its costs can be found.

    Args:
        replicas: that share it; with one, tokens take it 0.7 of its time.
        missed: share of the requests that ended.
    """
    work = (0.8 if second % 2 else 0.6) / replicas
    load = ReplicaLoad(
        prefill_tokens_per_s=work / PREFILL_S,
        steps_per_s=(1 - work) / STEP_S,
        busy=1.0,
        arrivals_per_s=5 / replicas,
        finished_per_s=5 / replicas,
        missed_per_s=5 * missed / replicas,
    )
    return replace(load, **expected)


_ALONE = State(factor=1.0)


def decided(
    seconds: int,
    missed: float = 0.0,
    replicas: int = 2,
    starting: int = 0,
    start_s: float = 30.0,
    state: State = _ALONE,
    **expected: Any,
) -> tuple[Decision, State]:
    """After so long with so many replicas that all report the same."""
    for second in range(seconds):
        loads = (busy(second, missed=missed, **expected),) * replicas
        snapshot = Snapshot(float(second), loads, starting=starting, start_s=start_s)
        decision, state = decide(snapshot, GOAL, state)
    return decision, state


def test_requests_that_missed_the_goal_are_believed_more_than_the_estimate() -> None:
    estimate, _ = decided(600, missed=0.03)  # A twentieth may.
    decision, _ = decided(600, missed=0.2)
    assert decision.load > 1.3 * estimate.load
    assert decision.replicas > 2
    assert "for the miss rate" in decision.reason
    decision, _ = decided(3000, missed=1.0)
    assert decision.replicas <= 6  # It may be that no number helps.


def test_where_no_request_misses_the_estimate_was_too_high() -> None:
    _, early = decided(30)
    decision, late = decided(3000)
    assert late.factor < early.factor <= 1
    # But no engine is planned to work all the time.
    assert decision.forecast >= 2 * 0.7 / 0.95 - 1e-3


def test_it_begins_with_a_margin_which_is_learned_away() -> None:
    fleet = Fleet(serving=6, state=State())
    fleet.run(300, rate_of(2))
    assert fleet.decision is not None
    assert fleet.decision.load == pytest.approx(1.5 * 2, rel=0.1)
    _, early = decided(30, state=State())
    _, late = decided(3000, state=State())
    assert 1 > late.factor < early.factor > 1.3


@pytest.mark.parametrize(("start_s", "share"), [(30.0, 1.0), (120.0, 0.5), (600.0, 0.1)])
def test_what_shows_later_is_learned_slower(start_s: float, share: float) -> None:
    _, quick = decided(10, missed=1.0, start_s=0.0)
    _, slow = decided(10, missed=1.0, start_s=start_s)
    assert math.log(slow.factor) == pytest.approx(share * math.log(quick.factor), rel=0.01)


def test_over_time_no_more_miss_than_may() -> None:
    """A tail that is worse than the mean tells: how many miss depends on how many replicas are."""
    state, replicas, shares = State(), 4, []
    for second in range(6000):
        shares.append(min(1.0, 1.6 / replicas**2))  # 4: 10 %. 6: 4.4 %. 8: 2.5 %.
        loads = (busy(second, replicas / 3, shares[-1]),) * replicas
        decision, state = decide(Snapshot(float(second), loads), GOAL, state)
        replicas = decision.replicas
    late = shares[3000:]
    assert 0.02 <= sum(late) / len(late) <= 0.05  # And not by far more than that needs.


def test_while_what_was_asked_for_starts_its_lack_is_no_news() -> None:
    _, idle = decided(120, missed=1.0)
    _, starting = decided(120, missed=1.0, starting=2)
    assert idle.factor > 2
    assert starting.factor == pytest.approx(1.0)
    # Where many serve, one that starts explains little.
    _, partly = decided(60, missed=1.0, replicas=10, starting=1)
    assert partly.factor > 2


def test_first_tokens_that_are_late_keep_every_replica() -> None:
    decision, _ = decided(600, replicas=4, ttft_s=9.0)
    assert decision.replicas >= 4  # None goes, though the estimate says that fewer would do.


# --- down -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start_s", [10.0, 60.0, 300.0])
def test_down_comes_with_patience(start_s: float) -> None:
    fleet = Fleet(serving=8, start_s=start_s)
    fleet.run(int(3 * start_s) + 120, rate_of(6))
    patience_s = int(max(60, start_s))
    fleet.run(patience_s - 5, rate_of(1))
    assert fleet.target >= 6  # What was asked for before is still there.
    for _ in range(int(30 * start_s) + 600):
        if fleet.second(rate_of(1)) <= 3:
            break
    assert fleet.target <= 3


def test_a_fleet_that_just_began_is_not_cut() -> None:
    fleet = Fleet(serving=8, start_s=60)
    fleet.run(55, rate_of(0.1))
    assert fleet.target == 8


# --- noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "replicas", "start_s"),
    [
        (1, 0.7, 10.0),
        (2, 2.5, 10.0),
        (1, 5.8, 10.0),
        (2, 0.7, 180.0),
        (1, 2.5, 180.0),
        (2, 5.8, 180.0),
    ],
)
def test_a_steady_load_with_noise_is_met_with_a_steady_fleet(
    seed: int, replicas: float, start_s: float
) -> None:
    fleet = Fleet(serving=math.ceil(replicas), start_s=start_s)
    rng = random.Random(seed)
    fleet.run(900, rate_of(replicas), rng)
    fleet.history.clear()
    fleet.run(1800, rate_of(replicas), rng)
    assert fleet.reversals <= 4  # In half an hour.
    assert max(fleet.history) - min(fleet.history) <= 2
    assert replicas <= max(fleet.history) <= 1.8 * replicas + 2


# --- bounds ---------------------------------------------------------------------------------


loads = st.builds(
    ReplicaLoad,
    running=st.integers(0, 300),
    waiting=st.integers(0, 500),
    queued_tokens=st.integers(0, 10**6),
    kv_usage=st.floats(0, 1),
    max_running=st.integers(1, 256),
    ttft_s=st.none() | st.floats(0, 100),
    itl_s=st.none() | st.floats(0, 10),
    prefill_tokens_per_s=st.floats(0, 1e5),
    decode_tokens_per_s=st.floats(0, 1e5),
    preemptions_per_s=st.floats(0, 10),
    arrivals_per_s=st.floats(0, 1000),
    steps_per_s=st.floats(0, 1000),
    busy=st.floats(0, 1),
    finished_per_s=st.floats(0, 1000),
    missed_per_s=st.floats(0, 1000),
)
snapshots = st.builds(
    Snapshot,
    now_s=st.just(0.0),
    replicas=st.lists(loads, max_size=6).map(tuple),
    starting=st.integers(0, 5),
    placeable=st.none() | st.integers(0, 12),
    start_s=st.floats(1, 600),
    pending=st.integers(0, 50),
)
goals = st.tuples(st.integers(0, 4), st.integers(0, 6)).map(
    lambda x: replace(GOAL, min_replicas=x[0], max_replicas=max(1, x[0] + x[1]))
)


# Rates next to nothing, beside a queue: what a token costs is not found by dividing by them.
_FAINT = Snapshot(
    now_s=0.0,
    replicas=(
        ReplicaLoad(waiting=1, queued_tokens=10**6, prefill_tokens_per_s=5e-324, busy=1.0),
        ReplicaLoad(decode_tokens_per_s=1e5, arrivals_per_s=5e-324, steps_per_s=1e-170, busy=1.0),
    ),
)


@settings(max_examples=150)
@example(goal=GOAL, seen=[_FAINT] * 3, gap_s=10.0)
@given(goal=goals, seen=st.lists(snapshots, min_size=1, max_size=10), gap_s=st.floats(0, 100))
def test_whatever_is_reported_the_answer_is_within_the_bounds(
    goal: Goal, seen: list[Snapshot], gap_s: float
) -> None:
    state = State()
    for turn, snapshot in enumerate(seen):
        now = replace(snapshot, now_s=turn * gap_s)
        decision, state = decide(now, goal, state)
        assert goal.min_replicas <= decision.replicas <= goal.max_replicas
        if now.placeable is not None:
            maximum = max(now.placeable, len(now.replicas), goal.min_replicas)
            assert decision.replicas <= maximum
        if now.pending or any(x.waiting or x.running for x in now.replicas):
            assert decision.replicas >= 1 or now.placeable == 0
        assert "\n" not in decision.reason
        assert math.isfinite(decision.load)
        assert math.isfinite(decision.forecast)


def test_what_the_cluster_cannot_hold_is_not_requested_and_is_logged() -> None:
    fleet = Fleet(serving=2, placeable=3)
    fleet.run(120, rate_of(6))
    assert fleet.target == 3
    assert fleet.decision is not None
    assert "the cluster holds 3" in fleet.decision.reason


def test_the_bound_is_logged() -> None:
    fleet = Fleet(serving=2, goal=replace(GOAL, max_replicas=3))
    fleet.run(120, rate_of(6))
    assert fleet.decision is not None
    assert "needed, max is 3" in fleet.decision.reason


def test_a_goal_that_no_replica_reaches_does_not_ask_for_all() -> None:
    """A step alone takes longer than the goal allows: more replicas would not help."""
    fleet = Fleet(serving=2, goal=replace(GOAL, itl_s=STEP_S / 2))
    fleet.run(300, rate_of(1.5))
    assert fleet.target <= 4


def test_a_tighter_goal_takes_more_replicas() -> None:
    counts = []
    for itl_s in (0.012, 0.02, 0.1):
        fleet = Fleet(serving=4, goal=replace(GOAL, itl_s=itl_s))
        fleet.run(300, rate_of(2))
        assert fleet.decision is not None
        counts.append(fleet.decision.load)
    assert counts[0] > counts[1] > counts[2]


def test_one_goal_is_enough() -> None:
    for goal in (replace(GOAL, itl_s=None), replace(GOAL, ttft_s=None)):
        fleet = Fleet(serving=1, goal=goal)
        fleet.run(300, rate_of(3))
        assert fleet.target >= 3


# --- to zero and back -----------------------------------------------------------------------

ZERO = replace(GOAL, min_replicas=0, idle_s=120.0)


def test_an_idle_application_goes_and_comes_back_at_once() -> None:
    fleet = Fleet(goal=ZERO, serving=1, start_s=20)
    fleet.run(120, 1)
    fleet.run(110, 0)
    assert fleet.target == 1
    fleet.run(30, 0)
    assert fleet.target == 0
    assert fleet.decision is not None
    assert fleet.decision.reason.startswith("idle for")
    fleet.run(600, 0)
    assert fleet.target == 0
    fleet.second(1)
    assert fleet.target == 1
    fleet.run(25, 0)
    assert (fleet.serving, fleet.queue) == (1, 0)


def test_a_start_longer_than_idle_is_not_idle() -> None:
    fleet = Fleet(goal=replace(ZERO, idle_s=10.0), serving=0, start_s=60)
    fleet.second(1)
    assert fleet.target == 1
    fleet.run(58, 0)
    assert fleet.target == 1
    fleet.run(10, 0)
    assert fleet.serving == 1


def test_a_long_answer_is_not_idle() -> None:
    load = ReplicaLoad(running=1, max_running=8)
    state = State()
    for second in range(1000):
        decision, state = decide(Snapshot(float(second), (load,)), ZERO, state)
        assert decision.replicas == 1


def test_with_a_minimum_the_last_replica_stays() -> None:
    fleet = Fleet(serving=1)
    fleet.run(2000, 0)
    assert fleet.target == 1


# --- what it is -----------------------------------------------------------------------------


def test_it_is_pure() -> None:
    fleet = Fleet(serving=3)
    fleet.run(200, rate_of(2))
    snapshot, state = replace(fleet.snapshot(), now_s=fleet.now_s + 1), fleet.state
    assert decide(snapshot, GOAL, state) == decide(snapshot, GOAL, state)
    assert hash(state) == hash(fleet.state)


def test_what_it_remembers_is_bounded() -> None:
    fleet, rng = Fleet(serving=2, start_s=60), random.Random(3)
    fleet.run(3300, rate_of(1), rng)  # A mean each 5 s: 660 of them.
    state = fleet.state
    assert len(state.means) <= 40 * 12
    assert len(state.queue) <= 12
    assert len(state.wishes) <= 151


def test_calls_more_often_than_needed_change_nothing() -> None:
    """Serve may ask at any time: the same moment again is no news."""
    fleet = Fleet(serving=2)
    fleet.run(100, rate_of(1))
    again, state = decide(fleet.snapshot(), GOAL, fleet.state)
    assert again.replicas == fleet.target
    assert state.means == fleet.state.means
    assert state.sums == fleet.state.sums


def test_the_reason_names_the_numbers() -> None:
    fleet = Fleet(serving=2, start_s=45)
    fleet.run(200, rate_of(1))
    assert fleet.decision is not None
    for part in ("load 1.0", "on 2", "in 45 s", "per replica", "running", "TTFT 0.1 s", "ITL"):
        assert part in fleet.decision.reason
