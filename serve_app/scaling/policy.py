"""How many replicas there should be: a pure function of what the engines report.

The types here are the contract between the signals of a replica (signals.py), the policy, its
binding to Ray Serve (autoscaler.py) and the simulator of bench.

`decide` asks four questions, one function each:

    _costs      What does a step of this engine cost? A step takes a fixed time and some for each
                token that it reads or writes. Time spent, steps and tokens are reported; the three
                costs are what explains them best. Nothing about model or GPU is configured.
    _load       How many replicas would be just full now? Work in engines: the time that the tokens
                take which came, those that still queue included. A replica is full at the share of
                work at which a step takes as long as the goal allows a token to, or when its batch
                or its KV cache is.
    _forecast   What load must be ready for when a replica that is asked for now will serve? Of
                guesses between "as now" and "as ever", the one that has led to the fewest replicas,
                plus what demand has been above it before, over the same time.
    decide      Up at once. Down when the forecast has asked for fewer, with a margin, all through a
                time in proportion to the start: what is let go must be worth its next start.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import sub

from serve_app.scaling.tuning import DEFAULT, Tuning

# A sum below this is the rest of something long ago; dividing by it would give absurd costs.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class ReplicaLoad:
    """What one replica's engine reports, over the last few seconds.

    Attributes:
        running, waiting: sequences in the engine's batch, and requests that wait for room, in the
            engine and in the queue before it.
        queued_tokens: prompt tokens of the requests without a first token.
        kv_usage: share of the KV cache in use, 0 to 1.
        max_running: sequences that the engine batches at most.
        ttft_s, itl_s: recent latencies at the goal's percentile; None where nothing was measured.
        prefill_tokens_per_s, decode_tokens_per_s: recent rates.
        preemptions_per_s: sequences that lost their KV blocks to others.
        arrivals_per_s: requests that came.
        steps_per_s: steps of the engine.
        busy: share of the time in which it was in one, 0 to 1.
        finished_per_s, missed_per_s: requests that ended, and those of them that missed a limit:
            to the first token, or between tokens as the mean of the stream.
    """

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    kv_usage: float = 0.0
    max_running: int = 1
    ttft_s: float | None = None
    itl_s: float | None = None
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    preemptions_per_s: float = 0.0
    arrivals_per_s: float = 0.0
    steps_per_s: float = 0.0
    busy: float = 0.0
    finished_per_s: float = 0.0
    missed_per_s: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """The state of the fleet at one moment.

    Attributes:
        now_s: monotonic.
        replicas: the load of each replica that serves.
        starting: replicas that are asked for and do not serve yet.
        placeable: how many replicas the cluster can hold in all; None where it can grow.
        start_s: how long a replica takes to start, as observed.
        pending: requests that wait where no replica is.
        silent: serving replicas whose report is overdue; their last one stands in `replicas`.
    """

    now_s: float
    replicas: tuple[ReplicaLoad, ...]
    starting: int = 0
    placeable: int | None = None
    start_s: float = 60.0
    pending: int = 0
    silent: int = 0

    @property
    def target(self) -> int:
        """Replicas that serve or start."""
        return len(self.replicas) + self.starting


@dataclass(frozen=True)
class Goal:
    """What to hold, and within which bounds.

    Attributes:
        ttft_s, itl_s: limits at the percentile; None for no limit. The time between tokens is the
            mean of a stream.
        percentile: 0 to 100.
        min_replicas, max_replicas: bounds; min 0 lets an idle application go.
        idle_s: how long nothing must have come before the last replica goes.
    """

    ttft_s: float | None = 2.0
    itl_s: float | None = 0.1
    percentile: float = 95.0
    min_replicas: int = 1
    max_replicas: int = 1
    idle_s: float = 300.0


@dataclass(frozen=True)
class Decision:
    """How many replicas there should be, and why, in one line.

    Attributes:
        load, forecast: in replicas that are just full: now, and when one asked for now will serve.
    """

    replicas: int
    reason: str
    load: float = 0.0
    forecast: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Seconds of an engine: a step, a token written, a token of a prompt read."""

    step_s: float = 0.0
    decode_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(frozen=True)
class State:
    """What `decide` remembers; bounded.

    Attributes:
        began_s, now_s: the first call and the last.
        sums: of products of steps, tokens and time, from which the costs are found.
        work, prompt_tokens, arrivals: recent totals: engine seconds, and what they were for.
        queue: (when, queued tokens) of the last seconds.
        means: load, as means over equal times, oldest first.
        part_s, part_from_s: the part of the next mean that is over: load times seconds, its start.
        ahead: the forecast; how it was made.
        wishes: (when, replicas that would do) over the time of patience.
        busy_s: when there was last anything to do.
        target, changed_s: how many there are to be, and since when.
        factor: of the load, from the requests that missed the goal.
        finished_per_s: of requests, usually.
    """

    began_s: float | None = None
    now_s: float = 0.0
    sums: tuple[float, ...] = (0.0,) * 9
    work: float = 0.0
    prompt_tokens: float = 0.0
    arrivals: float = 0.0
    queue: tuple[tuple[float, int], ...] = ()
    means: tuple[float, ...] = ()
    part: float = 0.0
    part_from_s: float = 0.0
    ahead: float = 0.0
    wishes: tuple[tuple[float, int], ...] = ()
    busy_s: float = 0.0
    target: int = -1
    changed_s: float = 0.0
    factor: float = DEFAULT.first_factor
    finished_per_s: float = 0.0


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
        reason = f"{wanted} would be right, {by} {bounded}; {reason}"
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
    # Only the highest of the time of patience matters: a lower one before the last is no news.
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
        # While nothing changes, one pair of rates is all that is known, which many costs explain.
        # A step down shows which, and is small enough to be wrong.
        settled = now_s - state.changed_s >= tuning.settle_s and not _late(snapshot, goal)
        step = max(1, int(target * tuning.max_step_down_ratio))
        wanted = max(wanted, target - step) if settled else target
    return wanted, state


def _idle(snapshot: Snapshot, goal: Goal, state: State) -> bool:
    """Whether the last replica may go."""
    if goal.min_replicas or snapshot.silent or _active(snapshot):
        return False
    return not snapshot.target or snapshot.now_s - state.busy_s >= goal.idle_s


def _max_replicas(snapshot: Snapshot, goal: Goal) -> int:
    """The most replicas that the goal and the cluster allow; never fewer than there are."""
    placeable = goal.max_replicas
    if snapshot.placeable is not None:
        placeable = max(snapshot.placeable, len(snapshot.replicas))
    return max(goal.min_replicas, min(goal.max_replicas, placeable))


def resumed(state: State, now_s: float, keep_load: bool = True) -> State:
    """The state of another process or clock, as if the time between had not passed.

    Args:
        now_s: on the clock of the snapshots to come.
        keep_load: False forgets what the load was, and keeps what engines cost.
    """
    if state.began_s is None:
        return state
    if not keep_load:
        return State(sums=state.sums, factor=state.factor)
    shift_s = now_s - state.now_s
    return replace(
        state,
        began_s=state.began_s + shift_s,
        now_s=now_s,
        queue=tuple((when_s + shift_s, tokens) for when_s, tokens in state.queue),
        part_from_s=state.part_from_s + shift_s,
        wishes=tuple((when_s + shift_s, replicas) for when_s, replicas in state.wishes),
        busy_s=state.busy_s + shift_s,
        changed_s=state.changed_s + shift_s,
    )


def _reason(snapshot: Snapshot, state: State, load: _Load, ahead: float) -> str:
    """The numbers that decided."""
    loads = snapshot.replicas
    if not loads:
        return f"no replica serves, {snapshot.starting} start, {snapshot.pending} requests wait"
    waiting = snapshot.pending + sum(x.waiting for x in loads)
    parts = [
        f"load {load.replicas:.2f} on {len(loads)}",
        f"{ahead:.2f} to be ready for in {snapshot.start_s:.0f} s",
        f"work {load.work:.2f} at {load.full:.0%} a replica",
        f"held {load.occupancy:.2f}",
        f"{sum(x.running for x in loads)} run and {waiting} wait",
    ]
    if load.backlog:
        parts.append(f"backlog {load.backlog:.1f} s")
    if abs(state.factor - 1) > 0.01:
        parts.append(f"load taken {state.factor:.2f}-fold for who misses the goal")
    for name, values in (
        ("TTFT", [x.ttft_s for x in loads if x.ttft_s is not None]),
        ("ITL", [x.itl_s for x in loads if x.itl_s is not None]),
    ):
        if values:
            parts.append(f"{name} {max(values):.3g} s")
    if snapshot.starting:
        parts.append(f"{snapshot.starting} start")
    if snapshot.silent:
        parts.append(f"{snapshot.silent} silent")
    return ", ".join(parts)


# --- what there is to do --------------------------------------------------------------------


def _learn(
    snapshot: Snapshot, goal: Goal, state: State, passed_s: float, tuning: Tuning
) -> tuple[State, _Load]:
    """What this snapshot teaches, and the load that it shows."""
    now_s, loads = snapshot.now_s, snapshot.replicas
    sums = _summed(state.sums, loads, passed_s, tuning)
    costs = _costs(sums, tuning)
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
    # An engine that is full does no more than it can. What came besides is in the queue, or was
    # turned away at its end.
    a_token = after.work / after.prompt_tokens if after.prompt_tokens > _NEGLIGIBLE else 0.0
    then_s, then = after.queue[0]
    work += a_token * max(0.0, queued - then) / max(now_s - then_s, 1.0)
    if waiting and after.arrivals > _NEGLIGIBLE:
        work = max(work, arrivals_per_s * after.work / after.arrivals)
    full = _full(costs, goal, tuning)
    occupancy = sum(_occupancy(load, tuning) for load in loads)
    # What is read before it is late is no backlog.
    in_time = len(loads) * full * (goal.ttft_s or tuning.min_drain_s)
    backlog = max(0.0, a_token * queued - in_time) / full
    replicas = max(work / full * state.factor, work / tuning.max_work_ratio, occupancy)
    return after, _Load(replicas, work, full, occupancy, backlog, costs)


def _active(snapshot: Snapshot) -> bool:
    """Whether there is anything to do, or something starts that was asked for."""
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
    """How full a replica is: the greater of its shares of batch places and KV blocks in use."""
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


def _summed(
    sums: tuple[float, ...], loads: Sequence[ReplicaLoad], passed_s: float, tuning: Tuning
) -> tuple[float, ...]:
    """The sums of least squares, older reports with less weight."""
    retained = math.exp(-passed_s / tuning.cost_memory_s)
    decayed = [value * retained for value in sums]
    for load in loads:
        if load.busy < tuning.min_busy_ratio:
            continue
        s, d, p = load.steps_per_s, load.decode_tokens_per_s, load.prefill_tokens_per_s
        b = load.busy
        for place, product in enumerate((s * s, s * d, s * p, d * d, d * p, p * p)):
            decayed[place] += product * passed_s
        for place, product in enumerate((s * b, d * b, p * b), 6):
            decayed[place] += product * passed_s
    return tuple(decayed)


def _costs(sums: Sequence[float], tuning: Tuning = DEFAULT) -> Costs:
    """The costs, none below 0, that explain best how busy the engines were.

    Coordinate descent, each cost in turn; a few rounds, unless two of them go together. Written
    out, since it is most of what a decision takes.
    """
    ss, sd, sp, dd, dp, pp, sb, db, pb = sums
    # By their own size, so that a token weighs as much as a step.
    of_s, of_d, of_p = (math.sqrt(value) if value > _NEGLIGIBLE else 1.0 for value in (ss, dd, pp))
    sd, sp, dp = sd / (of_s * of_d), sp / (of_s * of_p), dp / (of_d * of_p)
    sb, db, pb = sb / of_s, db / of_d, pb / of_p
    ridge = tuning.ridge
    ss, dd, pp = ss / of_s**2 + ridge, dd / of_d**2 + ridge, pp / of_p**2 + ridge
    sd, sp, sb, ds, dp, db, ps, pd, pb = (
        sd / ss, sp / ss, sb / ss, sd / dd, dp / dd, db / dd, sp / pp, dp / pp, pb / pp,
    )  # fmt: skip
    s = d = p = 0.0
    for _ in range(200):
        before_s, before_d, before_p = s, d, p
        # Conditions in place of max() and abs(): calls would be most of a round.
        s = sb - sd * d - sp * p
        s = s if s > 0.0 else 0.0
        d = db - ds * s - dp * p
        d = d if d > 0.0 else 0.0
        p = pb - ps * s - pd * d
        p = p if p > 0.0 else 0.0
        near = 1e-9 * (s if s > d else d)
        near = near if near > 1e-9 * p else 1e-9 * p
        if (
            -near <= s - before_s <= near
            and -near <= d - before_d <= near
            and -near <= p - before_p <= near
        ):
            break
    return Costs(s / of_s, d / of_d, p / of_p)


# --- what there will be to do ---------------------------------------------------------------


def _remember(
    snapshot: Snapshot, goal: Goal, state: State, load: _Load, passed_s: float, tuning: Tuning
) -> State:
    """Record the load; at the end of an interval, compute a new forecast."""
    now_s, start_s = snapshot.now_s, snapshot.start_s
    if not snapshot.replicas and (snapshot.starting or snapshot.pending):
        # Nobody is there to say what the load is.
        return replace(state, part=0.0, part_from_s=now_s)
    state = replace(
        _judge(snapshot, goal, state, passed_s, tuning), part=state.part + load.replicas * passed_s
    )
    part_s = max(tuning.min_part_s, start_s / tuning.parts_per_start)
    over_s = now_s - state.part_from_s
    if over_s < part_s - 1e-6:
        return state
    if state.part_from_s == state.began_s:
        # The first reports are of no time at all, and the costs are not known yet.
        return replace(state, part=0.0, part_from_s=now_s)
    memory_s = max(tuning.memory_s, tuning.memory_starts * start_s)
    means = (*state.means, state.part / over_s)[-max(2, int(memory_s / part_s)) :]
    cover = max(tuning.min_cover, 1 - tuning.misses_per_excess * (1 - goal.percentile / 100))
    ahead = _forecast(means, max(1, math.ceil(start_s / part_s)), cover, tuning)
    return replace(state, part=0.0, part_from_s=now_s, means=means, ahead=ahead)


def _judge(snapshot: Snapshot, goal: Goal, state: State, passed_s: float, tuning: Tuning) -> State:
    """Adjust the factor of the load, by the requests that ended."""
    finished = sum(x.finished_per_s for x in snapshot.replicas)
    missed = min(finished, sum(x.missed_per_s for x in snapshot.replicas))
    if finished <= _NEGLIGIBLE:
        return state
    usual = state.finished_per_s + (finished - state.finished_per_s) * min(
        1.0, passed_s / tuning.typical_s
    )
    # A moment with few requests says little, one with many no more than so much.
    allowed = tuning.target_miss_ratio * (1 - goal.percentile / 100) * finished
    excess = (missed - allowed) / max(usual, finished)
    if excess > 0:
        # What starts is the answer to what is missed, as far as it goes.
        excess *= max(0.0, 1 - snapshot.starting / len(snapshot.replicas))
    gain_a_s = min(tuning.gain_per_s, tuning.gain_per_start / max(1.0, snapshot.start_s))
    factor = state.factor * math.exp(min(1.0, gain_a_s * passed_s * excess))
    factor = min(max(factor, tuning.min_factor), tuning.max_factor)
    return replace(state, factor=factor, finished_per_s=usual)


def _forecast(means: Sequence[float], parts: int, cover: float, tuning: Tuning) -> float:
    """The load that will not be exceeded, `parts` means from now, with the chance `cover`.

    Each guess is a running mean; how far what came `parts` later was above it, in the past, is what
    is put on top. Weighed by load, since it is requests that count, and the older the less.
    """
    count = len(means)
    if count <= parts:
        return max(means) * (1 + tuning.first_headroom_ratio)
    ages = [math.exp(-(count - 1 - i) / (parts * tuning.forget_starts)) for i in range(count)]
    weights = [(means[i] + 1e-9) * ages[i] for i in range(parts, count)]
    total = sum(weights)
    # Surprises one after the other are one surprise: so many starts, so many of them.
    unseen = max(0.0, -math.log((1 - cover) * ((count - parts) / parts + 1)))
    best: tuple[float, float] | None = None
    for share in tuning.smoothings:
        guess, guesses = means[0], []
        for mean in means:
            guess += share * (mean - guess)
            guesses.append(guess)
        above = list(map(sub, means[parts:], guesses))
        mean_above = sum(a * w for a, w in zip(above, weights, strict=True) if a > 0.0) / total
        mean_guess = sum(guesses) / count
        # Surprises as large as the load itself come in bursts, and the largest is still to come;
        # those of a tenth of it are noise, which has an end.
        burst = min(1.0, mean_above / max(mean_guess, 1e-9)) ** 2
        margin = max(0.0, _quantile(above, weights, cover * total))
        margin += tuning.tail_ratio * burst * mean_above * unseen
        price = mean_guess + margin
        if best is None or price < best[0]:
            best = price, guess + margin
    assert best is not None
    return best[1]


def _quantile(values: Sequence[float], weights: Sequence[float], wanted: float) -> float:
    reached = 0.0
    for place in sorted(range(len(values)), key=values.__getitem__):
        reached += weights[place]
        if reached >= wanted:
            return values[place]
    return max(values)
