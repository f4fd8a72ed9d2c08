"""Policies that size a fleet, ours and those it is compared with, each from a spec:

    ours                                  serve_app/scaling/policy.py, with the goal of the run
    serve:target=2,up=30,down=600         Ray Serve's own: its functions, called with the fleet's
                                          clock; also up_factor=, down_factor=, look_back=
    waiting:per=5,every=15,down=300       KEDA on vllm:num_requests_waiting, as production-stack
                                          sets it up, with the rules of the HPA that KEDA drives
    spare:kv=0.8,queue=5,kv_spare=0.1,queue_spare=3,every=30,look_back=60,down=300
                                          llm-d's variant autoscaler, its saturation rules
    static:n=4                            always so many
    foresight:share=0.7                   knows what will come: see `Foresight`

A value may be several, as in serve:target=8|16|32: each is tried (`alternatives`), and the best one
stands for the policy, so that no rival is judged by a default that does not suit the load.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from bench import spec
from bench.errors import BenchError
from bench.simulation.enginemodel import Engine
from bench.simulation.fleet import Fleet, Policy, View
from bench.simulation.job import Job
from serve_app.scaling.policy import decide
from serve_app.scaling.state import State
from serve_app.scaling.types import Decision, Goal

KINDS = {
    "ours": (),
    "serve": ("target", "up", "down", "up_factor", "down_factor", "look_back"),
    "waiting": ("per", "every", "down"),
    "spare": ("kv", "queue", "kv_spare", "queue_spare", "every", "look_back", "down"),
    "static": ("n",),
    "foresight": ("share",),
}


def alternatives(text: str) -> list[str]:
    """Every spec that `text` stands for: itself, unless a value has several, as in 1|2|3."""
    name, colon, rest = text.strip().partition(":")
    pieces = [piece.split("=", 1) for piece in rest.split(",")] if rest else []
    choices = [
        [f"{piece[0]}={value}" for value in piece[1].split("|")] if len(piece) == 2 else piece
        for piece in pieces
    ]
    return [name + colon + ",".join(chosen) for chosen in itertools.product(*choices)]


def parse(text: str, goal: Goal, fleet: Fleet, jobs: Sequence[Job]) -> Policy:
    """A policy that has not decided anything yet.

    Raises BenchError, which names the key, its value and the nearest valid choice.
    """
    options = spec.parse(text, "policy", KINDS, BenchError)
    makers: dict[str, Callable[[spec.Options], Policy]] = {
        "ours": lambda o: Ours(goal),
        "serve": lambda o: Serve(
            fleet,
            target=o.number("target", 2.0, above=0.0),
            up_s=o.number("up", 30.0),
            down_s=o.number("down", 600.0),
            up_factor=o.number("up_factor", 1.0, above=0.0),
            down_factor=o.number("down_factor", 1.0, above=0.0),
            look_back_s=o.number("look_back", 30.0, above=0.0),
        ),
        "waiting": lambda o: Waiting(
            per=o.number("per", 5.0, above=0.0),
            every_s=o.number("every", 15.0, above=0.0),
            down_s=o.number("down", 300.0),
        ),
        "spare": lambda o: Spare(
            kv=o.number("kv", 0.8, above=0.0, maximum=1.0),
            queue=o.number("queue", 5.0, above=0.0),
            kv_spare=o.number("kv_spare", 0.1),
            queue_spare=o.number("queue_spare", 3.0),
            every_s=o.number("every", 30.0, above=0.0),
            look_back_s=o.number("look_back", 60.0, above=0.0),
            down_s=o.number("down", 300.0),
        ),
        "static": lambda o: _static(o.whole("n", fleet.initial)),
        "foresight": lambda o: Foresight(
            jobs, fleet, o.number("share", 0.7, above=0.0, maximum=10.0), goal.ttft_s
        ),
    }
    return makers[options.name](options)


def _static(replicas: int) -> Policy:
    return lambda view: Decision(replicas, "always")


class Ours:
    """What the application runs, with the goal of the run."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._state = State()

    def __call__(self, view: View) -> Decision:
        decision, self._state = decide(view.snapshot, self._goal, self._state)
        return decision


class Serve:
    """Ray Serve's replica_queue_length policy, with its factors and delays.

    The functions are Serve's, private ones among them, because the public one reads the wall clock:
    what is here is only the order in which its decorator calls them. Requests are averaged over
    `look_back_s`, from one reading a period; they are those that run and those that wait in the
    replicas, of which under direct ingress Serve sees less.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        target: float = 2.0,
        up_s: float = 30.0,
        down_s: float = 600.0,
        up_factor: float = 1.0,
        down_factor: float = 1.0,
        look_back_s: float = 30.0,
    ) -> None:
        from ray.serve import autoscaling_policy
        from ray.serve.config import AutoscalingConfig

        self._serve = autoscaling_policy
        self._config = AutoscalingConfig(
            min_replicas=fleet.min_replicas,
            max_replicas=fleet.max_replicas,
            target_ongoing_requests=target,
            upscale_delay_s=up_s,
            downscale_delay_s=down_s,
            upscaling_factor=up_factor,
            downscaling_factor=down_factor,
        )
        self._look_back_s = look_back_s
        self._seen: deque[tuple[float, int]] = deque()
        self._state: dict[str, object] = {}

    def __call__(self, view: View) -> Decision:
        now_s = view.snapshot.now_s
        seen = self._seen
        seen.append((now_s, view.ongoing))
        while seen[0][0] < now_s - self._look_back_s:
            seen.popleft()
        ongoing = sum(count for _, count in seen) / len(seen)
        # What Serve's functions read of its AutoscalingContext.
        context = SimpleNamespace(
            current_num_replicas=len(view.snapshot.replicas),
            target_num_replicas=view.target,
            total_num_requests=ongoing,
            config=self._config,
        )
        return Decision(self._decide(context, now_s), f"{ongoing:.1f} ongoing requests")

    def _decide(self, context: SimpleNamespace, now_s: float) -> int:
        serve = self._serve
        cold = serve._get_cold_start_scale_up_replicas(context)
        if cold is not None:
            return int(cold)
        wanted, _ = serve._core_replica_queue_length_policy(context)
        current = context.current_num_replicas
        wanted = serve._apply_scaling_factors(wanted, current, self._config)
        if current == 0 and wanted > 0:
            return int(wanted)
        arguments = (max(0, wanted), context.target_num_replicas, self._config, self._state)
        decided, self._state = serve._apply_delay_logic(*arguments, _now=now_s)
        return int(decided)


class _Hold:
    """The HPA's stabilization: never below the highest answer of the last `hold_s`."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._answers: deque[tuple[float, int]] = deque()

    def __call__(self, now_s: float, answer: int, current: int) -> int:
        """`answer`, or less of a step down from `current`."""
        answers = self._answers
        if not answers:  # What was there before counts as an answer.
            answers.append((now_s, current))
        answers.append((now_s, answer))
        while answers[0][0] < now_s - self._hold_s:
            answers.popleft()
        if answer >= current:
            return answer
        return min(current, max(answer for _, answer in answers))


class Waiting:
    """So many replicas that each has at most `per` waiting requests.

    As the HPA does it for an external metric with a target average: no change within a tenth of
    the target; up to twice as many or four more at once; down to the highest answer of `down_s`.
    Requests that run are not in the metric, so a fleet that keeps up looks like one with no load.
    """

    def __init__(self, *, per: float = 5.0, every_s: float = 15.0, down_s: float = 300.0) -> None:
        self._per, self._every_s = per, every_s
        self._hold = _Hold(down_s)
        self._next_s = 0.0

    def __call__(self, view: View) -> Decision:
        now_s, current = view.snapshot.now_s, view.target
        if now_s < self._next_s:
            return Decision(current, "between two looks")
        self._next_s = now_s + self._every_s
        waiting = view.snapshot.pending + sum(load.waiting for load in view.snapshot.replicas)
        wanted = math.ceil(waiting / self._per)
        if current and abs(waiting / (self._per * current) - 1) <= 0.1:
            wanted = current
        wanted = min(wanted, max(2 * current, current + 4))
        return Decision(self._hold(now_s, wanted, current), f"{waiting} waiting requests")


class Spare:
    """One more replica when those that are not saturated have little to spare, one less when they
    would still have enough.

    Saturated is one with `kv` of its cache or `queue` waiting requests, at any time in the last
    `look_back_s`. While a replica starts, nothing is decided.
    """

    def __init__(
        self,
        *,
        kv: float = 0.8,
        queue: float = 5.0,
        kv_spare: float = 0.1,
        queue_spare: float = 3.0,
        every_s: float = 30.0,
        look_back_s: float = 60.0,
        down_s: float = 300.0,
    ) -> None:
        self._limits = (kv, queue)
        self._spares = (kv_spare, queue_spare)
        self._every_s, self._look_back_s = every_s, look_back_s
        self._hold = _Hold(down_s)
        self._seen: dict[int, deque[tuple[float, float, int]]] = {}
        self._next_s = 0.0

    def __call__(self, view: View) -> Decision:
        now_s, current = view.snapshot.now_s, view.target
        self._note(view)
        if now_s < self._next_s:
            return Decision(current, "between two looks")
        self._next_s = now_s + self._every_s
        serving = len(view.snapshot.replicas)
        if not serving:
            return Decision(max(current, bool(view.snapshot.pending)), "no replica serves")
        if view.snapshot.starting:
            return Decision(current, "a replica starts")
        wanted, reason = self._wanted(view)
        return Decision(self._hold(now_s, wanted, current), reason)

    def _note(self, view: View) -> None:
        now_s = view.snapshot.now_s
        gone = self._seen.keys() - set(view.names)
        for name in gone:
            del self._seen[name]
        for name, load in zip(view.names, view.snapshot.replicas, strict=True):
            seen = self._seen.setdefault(name, deque())
            seen.append((now_s, load.kv_usage, load.waiting))
            while seen[0][0] < now_s - self._look_back_s:
                seen.popleft()

    def _wanted(self, view: View) -> tuple[int, str]:
        wanted = [
            (max(kv for _, kv, _ in seen), max(queue for _, _, queue in seen))
            for seen in (self._seen[name] for name in view.names)
        ]
        limits = self._limits
        usable = [load for load in wanted if all(u < limit for u, limit in zip(load, limits))]  # noqa: B905
        serving, count = len(wanted), len(usable)
        if not count:
            return serving + 1, "every replica is saturated"
        used = [sum(load[place] for load in usable) / count for place in (0, 1)]
        spare = [limit - amount for limit, amount in zip(limits, used, strict=True)]
        reason = f"spare: {spare[0]:.2f} of the cache, {spare[1]:.1f} places in the queue"
        if any(amount < least for amount, least in zip(spare, self._spares, strict=True)):
            return serving + 1, reason
        if count > 1:
            more = count / (count - 1)
            left = [limit - amount * more for limit, amount in zip(limits, used, strict=True)]
            if all(amount >= least for amount, least in zip(left, self._spares, strict=True)):
                return serving - 1, reason
        return serving, reason


# --- what can be known beforehand -----------------------------------------------------------


_BIN_S, _SERVICE_S, _FIRST_S = 1.0, 15.0, 2.0


@dataclass(frozen=True)
class _Need:
    """The time span in which at least this many replicas must serve."""

    from_s: float
    to_s: float


class Foresight:
    """Knows every request before it comes, and asks for replicas just in time.

    A replica is taken to do `share` seconds of work a second; how much work a request is comes from
    the engine's constants. Needed are as many as do the work of any 15 seconds, and the prompts of
    any 2 (or of the TTFT limit). A replica is kept through a pause that is shorter than its start,
    as starting one costs as much.

    A bound for policies without foresight in the sense that it pays for no guess; it is the best
    plan of its kind (`share` is searched for), not the best that there is.
    """

    def __init__(
        self, jobs: Sequence[Job], fleet: Fleet, share: float, ttft_s: float | None = None
    ) -> None:
        needed = np.ceil(busy(jobs, fleet.engine, ttft_s or _FIRST_S) / share).astype(int)
        needed = np.clip(needed, fleet.min_replicas, fleet.max_replicas)
        ahead_s = fleet.start_s * (1 + fleet.start_spread) + fleet.period_s
        self._levels = [
            _merged(needed >= level, ahead_s, fleet.period_s)
            for level in range(1, int(needed.max(initial=fleet.min_replicas)) + 1)
        ]

    def __call__(self, view: View) -> Decision:
        now_s = view.snapshot.now_s
        wanted = sum(
            any(need.from_s <= now_s < need.to_s for need in level) for level in self._levels
        )
        return Decision(wanted, "what will come is known")


def _merged(needed: NDArray[np.bool_], ahead_s: float, after_s: float) -> list[_Need]:
    """The spans in which a level is asked for, those that meet made one."""
    merged: list[_Need] = []
    edges = np.flatnonzero(np.diff(np.concatenate([[False], needed, [False]]).astype(int)))
    for begin, end in edges.reshape(-1, 2):
        need = _Need(begin * _BIN_S - ahead_s, end * _BIN_S + after_s)
        if merged and need.from_s <= merged[-1].to_s:
            need = _Need(merged.pop().from_s, need.to_s)
        merged.append(need)
    return merged


def work_s(engine: Engine, job: Job) -> tuple[float, float]:
    """Seconds of an engine that a request is: to read it, and to write its answer.

    Written beside so many others that what they share of a step costs as much as their own.
    """
    costs = engine.costs
    read = costs.prefill_token_s * max(1, job.input_tokens - job.cached_tokens)
    seq_s = costs.decode_seq_s + costs.kv_token_s * (job.input_tokens + job.output_tokens / 2)
    least_s = costs.step_s / engine.max_num_seqs
    return read, job.output_tokens * (seq_s + max(seq_s, least_s))


def busy(jobs: Sequence[Job], engine: Engine, first_s: float) -> NDArray[np.float64]:
    """How many engines the load keeps busy, for each second from 0 on."""
    seconds = math.ceil(jobs[-1].at_s / _BIN_S) + 1 if jobs else 1
    read, whole = np.zeros(seconds), np.zeros(seconds)
    for job in jobs:
        reading_s, writing_s = work_s(engine, job)
        place = int(job.at_s / _BIN_S)
        read[place] += reading_s
        whole[place] += reading_s + writing_s
    return np.maximum(_trailing(whole, _SERVICE_S), _trailing(read, first_s))


def _trailing(amounts: NDArray[np.float64], span_s: float) -> NDArray[np.float64]:
    """The mean a second over the last `span_s`, for each bin."""
    bins = max(1, round(span_s / _BIN_S))
    summed = np.concatenate([np.zeros(bins), np.cumsum(amounts)])
    spans: NDArray[np.float64] = summed[bins:] - summed[:-bins]
    return spans / (bins * _BIN_S)
