"""How many replicas there should be: a pure function of what the engines report.

`decide` answers four questions:

    costs.py    What does a step of this engine cost?
    _learn      How many replicas would be just full now? The load is the work that arrives, in
                engines: the time that the tokens of new and queued requests take. A replica is full
                at the share of work at which a step takes as long as the goal allows for a token,
                or when its batch or its KV cache is full.
    forecast.py Which load must a replica that is started now help with, once it serves? Candidates
                are running means of the load, from "as now" to "as ever", each with a margin for
                how far demand has exceeded it over the time of a start. The forecast is the
                candidate that would have needed the fewest replicas.
    _wanted     Scale up at once. Scale down when the forecast has asked for fewer replicas, with a
                margin, during a time in proportion to the duration of a start: a removed replica
                must be worth its next start.
"""

import math
from dataclasses import dataclass, field, replace

from serve_app.scaling.costs import NEGLIGIBLE, Costs, estimate, updated_sums
from serve_app.scaling.forecast import forecast
from serve_app.scaling.state import State
from serve_app.scaling.tuning import DEFAULT, Tuning
from serve_app.scaling.types import Decision, Goal, ReplicaLoad, Snapshot

_NEW = State()


@dataclass(frozen=True)
class _Load:
    """The load of now, in parts that the reason can name."""

    replicas: float = 0.0
    work: float = 0.0
    full: float = DEFAULT.max_work_ratio
    occupancy: float = 0.0
    backlog: float = 0.0
    costs: Costs = field(default_factory=Costs)


def decide(
    snapshot: Snapshot, goal: Goal, state: State = _NEW, tuning: Tuning = DEFAULT
) -> tuple[Decision, State]:
    """How many replicas there should be; call it about once a second, with the state it returned.

    The number counts those that start. It is within the goal's bounds and, unless there are more
    already, what the cluster can hold.
    """
    now_s = snapshot.now_s
    if state.began_s is None:
        state = replace(state, began_s=now_s, now_s=now_s, part_from_s=now_s, busy_s=now_s)
    passed_s = max(0.0, now_s - state.now_s)
    state, load = _learn(snapshot, goal, state, passed_s, tuning)
    state = _remember(snapshot, goal, state, load, passed_s, tuning)
    drain_s = max(tuning.min_drain_s, snapshot.start_s)
    ahead = max(state.ahead, load.replicas) + load.backlog / drain_s
    wanted, state = _wanted(snapshot, goal, state, ahead, tuning)
    idle = _idle(snapshot, goal, state)
    wanted = 0 if idle else max(wanted, 1)
    maximum = _max_replicas(snapshot, goal)
    bounded = min(max(wanted, goal.min_replicas), maximum)
    reason = _reason(snapshot, state, load, ahead)
    if idle:
        reason = f"idle for {now_s - state.busy_s:.0f} s"
    elif wanted > bounded:
        by = "the cluster holds" if maximum < goal.max_replicas else "max is"
        reason = f"{wanted} needed, {by} {bounded}; {reason}"
    return Decision(bounded, reason, load.replicas, ahead), state


def _wanted(
    snapshot: Snapshot, goal: Goal, state: State, ahead: float, tuning: Tuning
) -> tuple[int, State]:
    """Replicas that the load `ahead` needs: more at once, fewer with patience and in small steps.

    No fewer while a replica is silent: one that is too busy to report must not count as idle.
    """
    now_s, target = snapshot.now_s, snapshot.target
    need = math.ceil(ahead - 1e-9)
    patience_s = max(tuning.min_down_s, tuning.down_starts * snapshot.start_s)
    enough = math.ceil(ahead * (1 + tuning.down_margin_ratio) - 1e-9)
    # Only the highest wish of this time matters: drop lower ones before the last.
    wishes = tuple(old for old in state.wishes if old[0] >= now_s - patience_s and old[1] > enough)
    wishes = (*wishes, (now_s, enough))
    state = replace(state, wishes=wishes)
    if target != state.target:
        state = replace(state, target=target, changed_s=now_s)
    if need > target:
        return need, state
    if now_s - (state.began_s or 0.0) < patience_s or snapshot.silent:
        return target, state
    wanted = min(target, max(need, wishes[0][1]))
    if wanted < target:
        # While nothing changes there is one pair of rates, which many costs explain. A step down
        # shows which costs are right, and is small enough to be wrong.
        settled = now_s - state.changed_s >= tuning.settle_s and not _late(snapshot, goal)
        step = max(1, int(target * tuning.max_step_down_ratio))
        wanted = max(wanted, target - step) if settled else target
    return wanted, state


def _idle(snapshot: Snapshot, goal: Goal, state: State) -> bool:
    """Whether the last replica may be removed."""
    if goal.min_replicas or snapshot.silent or _active(snapshot):
        return False
    return not snapshot.target or snapshot.now_s - state.busy_s >= goal.idle_s


def _max_replicas(snapshot: Snapshot, goal: Goal) -> int:
    """The most replicas that the goal and the cluster allow, at least the current number."""
    placeable = goal.max_replicas
    if snapshot.placeable is not None:
        placeable = max(snapshot.placeable, len(snapshot.replicas))
    return max(goal.min_replicas, min(goal.max_replicas, placeable))


def _reason(snapshot: Snapshot, state: State, load: _Load, ahead: float) -> str:
    """The numbers behind the decision."""
    loads = snapshot.replicas
    if not loads:
        return (
            f"no replica serves, {snapshot.starting} starting, {snapshot.pending} requests waiting"
        )
    waiting = snapshot.pending + sum(x.waiting for x in loads)
    parts = [
        f"load {load.replicas:.2f} on {len(loads)}",
        f"forecast {ahead:.2f} in {snapshot.start_s:.0f} s",
        f"work {load.work:.2f} at {load.full:.0%} per replica",
        f"occupancy {load.occupancy:.2f}",
        f"{sum(x.running for x in loads)} running, {waiting} waiting",
    ]
    if load.backlog:
        parts.append(f"backlog {load.backlog:.1f} s")
    if abs(state.factor - 1) > 0.01:
        parts.append(f"load scaled by {state.factor:.2f} for the miss rate")
    for name, values in (
        ("TTFT", [x.ttft_s for x in loads if x.ttft_s is not None]),
        ("ITL", [x.itl_s for x in loads if x.itl_s is not None]),
    ):
        if values:
            parts.append(f"{name} {max(values):.3g} s")
    if snapshot.starting:
        parts.append(f"{snapshot.starting} starting")
    if snapshot.silent:
        parts.append(f"{snapshot.silent} silent")
    return ", ".join(parts)


# --- the load ----------------------------------------------------------------------------------


def _learn(
    snapshot: Snapshot, goal: Goal, state: State, passed_s: float, tuning: Tuning
) -> tuple[State, _Load]:
    """Update the state with this snapshot, and return its load."""
    now_s, loads = snapshot.now_s, snapshot.replicas
    sums = updated_sums(state.sums, loads, passed_s, tuning)
    costs = estimate(sums, tuning)
    work = sum(
        costs.decode_s * load.decode_tokens_per_s + costs.prefill_s * load.prefill_tokens_per_s
        for load in loads
    )
    arrivals_per_s = sum(load.arrivals_per_s for load in loads)
    prefill_per_s = sum(load.prefill_tokens_per_s for load in loads)
    queued, waiting = sum(x.queued_tokens for x in loads), sum(x.waiting for x in loads)
    retained = math.exp(-passed_s / tuning.mix_memory_s)
    queue = tuple(entry for entry in state.queue if entry[0] >= now_s - tuning.queue_window_s)
    after = replace(
        state,
        now_s=now_s,
        sums=sums,
        work=state.work * retained + work * passed_s,
        prompt_tokens=state.prompt_tokens * retained + prefill_per_s * passed_s,
        arrivals=state.arrivals * retained + arrivals_per_s * passed_s,
        queue=(*queue, (now_s, queued)),
        busy_s=now_s if _active(snapshot) else state.busy_s,
    )
    # A full engine does no more than it can. Further work is queued, or was refused.
    a_token = after.work / after.prompt_tokens if after.prompt_tokens > NEGLIGIBLE else 0.0
    then_s, then = after.queue[0]
    work += a_token * max(0.0, queued - then) / max(now_s - then_s, 1.0)
    if waiting and after.arrivals > NEGLIGIBLE:
        work = max(work, arrivals_per_s * after.work / after.arrivals)
    full = _full(costs, goal, tuning)
    occupancy = sum(_occupancy(load, tuning) for load in loads)
    # Prompts that will be processed in time are no backlog.
    in_time = len(loads) * full * (goal.ttft_s or tuning.min_drain_s)
    backlog = max(0.0, a_token * queued - in_time) / full
    replicas = max(work / full * state.factor, work / tuning.max_work_ratio, occupancy)
    return after, _Load(replicas, work, full, occupancy, backlog, costs)


def _active(snapshot: Snapshot) -> bool:
    """Whether there is work, or a requested replica starts."""
    loads = snapshot.replicas
    return bool(snapshot.pending or snapshot.starting) or any(
        x.arrivals_per_s or x.waiting or x.running for x in loads
    )


def _late(snapshot: Snapshot, goal: Goal) -> bool:
    """Whether first tokens are late on any replica."""
    limit_s = goal.ttft_s
    return limit_s is not None and any(
        x.ttft_s is not None and x.ttft_s > limit_s for x in snapshot.replicas
    )


def _occupancy(load: ReplicaLoad, tuning: Tuning) -> float:
    """The occupancy of a replica: the greater share of its batch places and KV blocks in use."""
    kv_usage = 1.0 if load.preemptions_per_s else load.kv_usage
    places = load.running / load.max_running
    return max(kv_usage / tuning.max_kv_ratio, places if places < 1 else tuning.full_batch_load)


def _full(costs: Costs, goal: Goal, tuning: Tuning) -> float:
    """The share of its time that a replica may spend on tokens.

    Steps follow each other: with a share w of the time spent on tokens, the rest is the fixed time
    of steps, so that a step, which is the time between two tokens, takes step_s / (1 - w).
    """
    if goal.itl_s is None or costs.step_s >= goal.itl_s:
        return tuning.max_work_ratio
    return min(tuning.max_work_ratio, 1 - costs.step_s / goal.itl_s)


# --- the forecast ------------------------------------------------------------------------------


def _remember(
    snapshot: Snapshot, goal: Goal, state: State, load: _Load, passed_s: float, tuning: Tuning
) -> State:
    """Record the load; at the end of an interval, compute a new forecast."""
    now_s, start_s = snapshot.now_s, snapshot.start_s
    if not snapshot.replicas and (snapshot.starting or snapshot.pending):
        # No replica reports the load.
        return replace(state, part=0.0, part_from_s=now_s)
    state = replace(
        _judge(snapshot, goal, state, passed_s, tuning), part=state.part + load.replicas * passed_s
    )
    part_s = max(tuning.min_part_s, start_s / tuning.parts_per_start)
    over_s = now_s - state.part_from_s
    if over_s < part_s - 1e-6:
        return state
    if state.part_from_s == state.began_s:
        # The first reports cover no time, and the costs are not estimated yet.
        return replace(state, part=0.0, part_from_s=now_s)
    memory_s = max(tuning.memory_s, tuning.memory_starts * start_s)
    means = (*state.means, state.part / over_s)[-max(2, int(memory_s / part_s)) :]
    cover = max(tuning.min_cover, 1 - tuning.misses_per_excess * (1 - goal.percentile / 100))
    ahead = forecast(means, max(1, math.ceil(start_s / part_s)), cover, tuning)
    return replace(state, part=0.0, part_from_s=now_s, means=means, ahead=ahead)


def _judge(snapshot: Snapshot, goal: Goal, state: State, passed_s: float, tuning: Tuning) -> State:
    """Adjust the factor of the load, by the requests that ended."""
    finished = sum(x.finished_per_s for x in snapshot.replicas)
    missed = min(finished, sum(x.missed_per_s for x in snapshot.replicas))
    if finished <= NEGLIGIBLE:
        return state
    usual = state.finished_per_s + (finished - state.finished_per_s) * min(
        1.0, passed_s / tuning.typical_s
    )
    # The weight of a moment grows with its requests, up to a bound.
    allowed = tuning.target_miss_ratio * (1 - goal.percentile / 100) * finished
    excess = (missed - allowed) / max(usual, finished)
    if excess > 0:
        # Starting replicas already respond to the misses.
        excess *= max(0.0, 1 - snapshot.starting / len(snapshot.replicas))
    gain_a_s = min(tuning.gain_per_s, tuning.gain_per_start / max(1.0, snapshot.start_s))
    factor = state.factor * math.exp(min(1.0, gain_a_s * passed_s * excess))
    factor = min(max(factor, tuning.min_factor), tuning.max_factor)
    return replace(state, factor=factor, finished_per_s=usual)
