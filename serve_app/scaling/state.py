"""What the scaling policy remembers from call to call."""

from dataclasses import dataclass, replace

from serve_app.scaling.tuning import DEFAULT


@dataclass(frozen=True)
class State:
    """What `decide` remembers; bounded.

    Attributes:
        began_s, now_s: the first call and the last.
        sums: of products of steps, tokens and time, from which costs.py estimates the costs.
        work, prompt_tokens, arrivals: recent totals: engine seconds, and the prompt tokens and
            requests that they served.
        queue: (when, queued tokens) of the last seconds.
        means: load, as means over equal times, oldest first.
        part, part_from_s: the next mean so far: load times seconds, and its start.
        ahead: the forecast.
        wishes: (when, replicas that would have been enough) since the last possible scale-down.
        busy_s: when there was last work.
        target, changed_s: the number of replicas, and when it changed.
        factor: scales the load, so that the miss rate equals the allowed one.
        finished_per_s: the usual rate of completed requests.
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
