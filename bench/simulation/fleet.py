"""Replicas that come and go under a load: engines, a balancer, and a loop that asks a policy.

    arrival -> balancer: the replica with the fewest open requests -> its engine (batch.Batch)
    every period_s: what the replicas report -> the policy -> replicas asked for, or let go

A replica that is asked for serves `start_s` later, and costs from when it is asked for. One that is
let go gets no more requests, ends those it has, and costs until then; those still starting are let
go first, then those with the fewest requests. The balancer is HAProxy's leastconn: among equals the
one that has waited longest for a request. While no replica serves, requests wait in their order.

The future is fixed before the run: jobs with their times. A policy sees a `View`, which holds the
`Snapshot` that the real autoscaler works from, so that what is tried here is what is deployed: this
module, `case.py`, `policies.py` and `routing.py` are the only ones of bench that import serve_app.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.errors import BenchError
from bench.records import Record
from bench.simulation.batch import Batch
from bench.simulation.enginemodel import Engine
from bench.simulation.job import Job, clone
from serve_app.scaling.types import Decision, ReplicaLoad, Snapshot


@dataclass(frozen=True)
class Fleet:
    """What does not change during a run.

    Attributes:
        engine: of every replica.
        start_s: from when a replica is asked for until it serves.
        start_spread: its share by which that varies, evenly, from replica to replica.
        period_s: how often the policy is asked.
        window_s: how far back the reports of a replica look; as serve_app/scaling/signals.py does.
        percentile: of the latencies in them.
        ttft_s, tpot_s: limits that requests are counted as having missed; None for no limit.
        min_replicas, max_replicas: bounds, whatever the policy says.
        initial: replicas that serve at the start.
        patience_s: how long after the last request the run goes on; what has not ended then failed.
        seed: of the start times.
    """

    engine: Engine
    start_s: float = 60.0
    start_spread: float = 0.0
    period_s: float = 5.0
    window_s: float = 10.0
    percentile: float = 95.0
    ttft_s: float | None = None
    tpot_s: float | None = None
    min_replicas: int = 1
    max_replicas: int = 16
    initial: int = 1
    patience_s: float = 900.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            problem = f"must be from 0 to max_replicas, {self.max_replicas}, which must be above 0"
            raise BenchError.of("min_replicas", self.min_replicas, problem)
        if not self.min_replicas <= self.initial <= self.max_replicas:
            problem = f"must be from {self.min_replicas} to {self.max_replicas}"
            raise BenchError.of("initial", self.initial, problem)
        if self.period_s <= 0:
            raise BenchError.of("period_s", self.period_s, "must be above 0")
        if self.start_s < 0:
            raise BenchError.of("start_s", self.start_s, "must be at least 0")
        if not 0 <= self.start_spread < 1:
            raise BenchError.of("start_spread", self.start_spread, "must be from 0 to below 1")


@dataclass(frozen=True)
class View:
    """What a policy may see.

    Attributes:
        snapshot: what the replicas report.
        names: of the replicas in it, in their order.
        target: replicas that are wanted now: those that serve, and those that start.
        ongoing: requests that came and have not ended, wherever they are.
    """

    snapshot: Snapshot
    names: tuple[int, ...]
    target: int
    ongoing: int


Policy = Callable[[View], Decision]


@dataclass
class Timeline:
    """The run at each period: one value a period in each list.

    `wanted` is the policy's answer; `gpus` counts what is paid for: replicas that start, serve or
    end their requests. `waiting` is of engines and before them, `running` of batches.
    """

    t_s: list[float] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    serving: list[int] = field(default_factory=list)
    starting: list[int] = field(default_factory=list)
    draining: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    kv_usage: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """The outcome of a simulation.

    Attributes:
        jobs: as they ended, in the order of their times.
        steps_s: of every replica's engine, the end of each step.
        timeline: see there.
        decisions: (when, replicas, reason) of each change of what is wanted.
        spans: (asked for, served from, gone) of every replica; served from is None for one that
            was let go before it served.
        end_s: when the last request ended, or the run was given up.
        preempted: sequences that lost their blocks, over all replicas.
    """

    jobs: list[Job]
    steps_s: list[Sequence[float]]
    timeline: Timeline
    decisions: list[tuple[float, int, str]]
    spans: list[tuple[float, float | None, float]]
    end_s: float
    preempted: int

    def replica_s(self, from_s: float = 0.0) -> float:
        """Seconds that are paid for from a time on, summed over replicas."""
        return sum(
            gone_s - max(asked_s, from_s) for asked_s, _, gone_s in self.spans if gone_s > from_s
        )

    def records(self, whole: bool = True) -> list[Record]:
        """Of every job, in their order; those that were refused or never ended say so.

        Without `whole` as in `Job.record`: for those who only ask whether limits were kept.
        """
        return [
            job.record(self.steps_s[job.replica] if job.replica is not None else (), whole=whole)
            for job in self.jobs
        ]


class _Replica:
    """An engine with its place in the fleet, and what the loop reads from it."""

    def __init__(self, name: int, engine: Engine, asked_s: float, ready_s: float) -> None:
        self.name = name
        self.asked_s, self.ready_s = asked_s, ready_s
        self.gone_s: float | None = None
        self.batch = Batch(engine, ready_s)
        self.open = 0
        self.used = 0  # The turn in which it last got a request.
        self._ending: deque[float] = deque()  # Ends of requests that are still to come.
        self._ended: deque[Job] = deque()  # Of the last window.
        self._next_end_s = ready_s  # Until then its engine can be left alone,
        self.due_s = ready_s  # and until then all of it.
        self._totals = deque([self._total(ready_s)])  # At past reports.

    def advance(self, now_s: float, whole: bool = False) -> None:
        """Count the requests that are open at `now_s`; with `whole`, bring its engine there."""
        if whole or now_s >= self._next_end_s:
            ended = self.batch.advance(now_s)
            self._ending.extend(job.end_s or 0.0 for job in ended)
            self._ended.extend(ended)
            self._next_end_s = self.batch.next_end_s()
        ending = self._ending
        while ending and ending[0] <= now_s:
            ending.popleft()
            self.open -= 1
        self.due_s = min(self._next_end_s, ending[0]) if ending else self._next_end_s

    def take(self, job: Job, now_s: float, turn: int) -> None:
        self.advance(now_s, whole=True)
        job.replica = self.name
        self.batch.add(job, now_s)
        self._next_end_s = self.due_s = now_s
        if not job.error:
            self.open += 1
        self.used = turn

    def load(self, now_s: float, fleet: Fleet) -> ReplicaLoad:
        """Its report: counts of now, rates and latencies of the last `window_s`."""
        batch, window_s, percentile = self.batch, fleet.window_s, fleet.percentile
        now = self._total(now_s)
        totals = self._totals
        while len(totals) > 1 and totals[1][0] <= now_s - window_s:
            totals.popleft()
        span_s = max(now_s - totals[0][0], 1e-9)
        arrived, prefilled, decoded, preempted, steps, busy_s = (
            (after - before) / span_s for after, before in zip(now[1:], totals[0][1:], strict=True)
        )
        totals.append(now)
        while self._ended and (self._ended[0].end_s or 0.0) <= totals[0][0]:
            self._ended.popleft()
        missed = sum(self._missed(job, fleet) for job in self._ended)
        return ReplicaLoad(
            running=batch.running,
            waiting=batch.waiting,
            queued_tokens=batch.unread_tokens,
            kv_usage=batch.kv_usage,
            max_running=batch.engine.max_num_seqs,
            ttft_s=_recent_ttft_s(batch, now_s - window_s, percentile),
            itl_s=_recent_itl_s(batch, now_s - window_s, percentile),
            prefill_tokens_per_s=prefilled,
            decode_tokens_per_s=decoded,
            preemptions_per_s=preempted,
            arrivals_per_s=arrived,
            steps_per_s=steps,
            busy=min(1.0, busy_s),
            finished_per_s=len(self._ended) / span_s,
            missed_per_s=missed / span_s,
        )

    def _missed(self, job: Job, fleet: Fleet) -> bool:
        first_s = self.batch.step_end_s[job.spans[0][0]]
        each_s = ((job.end_s or 0.0) - first_s) / max(1, job.output_tokens - 1)
        late = fleet.ttft_s is not None and first_s - job.at_s > fleet.ttft_s
        return late or (fleet.tpot_s is not None and each_s > fleet.tpot_s)

    def _total(self, now_s: float) -> tuple[float, ...]:
        """What its engine has done until now, and how long that took."""
        batch = self.batch
        counts = (batch.arrived, batch.prefilled, batch.decoded, batch.preempted)
        return (now_s, *counts, len(batch.step_end_s), batch.busy_s)


def _recent_ttft_s(batch: Batch, since_s: float, percentile: float) -> float | None:
    firsts = batch.first_tokens
    while firsts and firsts[0][0] < since_s:
        firsts.popleft()
    if not firsts:
        return None
    took_s = sorted(took_s for _, took_s in firsts)
    return took_s[max(0, math.ceil(percentile / 100 * len(took_s)) - 1)]


def _recent_itl_s(batch: Batch, since_s: float, percentile: float) -> float | None:
    """The percentile of the gaps between tokens: the length of each step, once a sequence."""
    ends_s = np.frombuffer(batch.step_end_s) if batch.step_end_s else np.empty(0)
    first = max(1, int(np.searchsorted(ends_s, since_s)))
    if first >= len(ends_s):
        return None
    gaps_s = np.diff(ends_s[first - 1 :])
    weights = np.frombuffer(batch.step_seqs, dtype=np.dtype("l"))[first:].copy()
    positive = weights > 0
    if not positive.any():
        return None
    gaps_s, weights = gaps_s[positive], weights[positive]
    order = np.argsort(gaps_s)
    reached = np.cumsum(weights[order])
    place = int(np.searchsorted(reached, percentile / 100 * reached[-1]))
    return float(gaps_s[order][min(place, len(order) - 1)])


def run(fleet: Fleet, jobs: Sequence[Job], policy: Policy) -> Outcome:
    """Send `jobs`, in the order of their times, to a fleet that a policy sizes."""
    return _Run(fleet, jobs, policy).go()


class _Run:
    def __init__(self, fleet: Fleet, jobs: Sequence[Job], policy: Policy) -> None:
        self.fleet, self.policy = fleet, policy
        self.jobs = [clone(job) for job in jobs]
        self.rng = random.Random(f"{fleet.seed}/starts")
        self.starting: list[tuple[float, int, _Replica]] = []  # A heap, by when they serve.
        self.serving: list[_Replica] = []
        self.draining: list[_Replica] = []
        self.all: list[_Replica] = []
        self.pending: deque[Job] = deque()
        self.turn = 0
        self.timeline = Timeline()
        self.decisions: list[tuple[float, int, str]] = []
        for _ in range(fleet.initial):
            self.serving.append(self._replica(0.0, 0.0))

    def go(self) -> Outcome:
        """Events in the order of their times; at one time, replicas come before requests."""
        last_s = self.jobs[-1].at_s if self.jobs else 0.0
        tick_s, place = 0.0, 0
        while True:
            ready_s = self.starting[0][0] if self.starting else math.inf
            job_s = self.jobs[place].at_s if place < len(self.jobs) else math.inf
            now_s = min(ready_s, job_s, tick_s)
            if now_s == ready_s:
                self._ready(heapq.heappop(self.starting)[2], now_s)
            elif now_s == job_s:
                self._dispatch(self.jobs[place], now_s)
                place += 1
            else:
                self._control(now_s)
                tick_s += self.fleet.period_s
                if now_s > last_s and (self._done(now_s) or now_s > last_s + self.fleet.patience_s):
                    break
        return self._outcome(now_s)

    def _replica(self, asked_s: float, ready_s: float) -> _Replica:
        made = _Replica(len(self.all), self.fleet.engine, asked_s, ready_s)
        self.all.append(made)
        return made

    # Requests.

    def _dispatch(self, job: Job, now_s: float) -> None:
        least: _Replica | None = None
        for replica in self.serving:
            if replica.due_s <= now_s:
                replica.advance(now_s)
            if (
                least is None
                or replica.open < least.open
                or (replica.open == least.open and replica.used < least.used)
            ):
                least = replica
        if least is None:
            self.pending.append(job)
            return
        self.turn += 1
        least.take(job, now_s, self.turn)

    def _ready(self, replica: _Replica, now_s: float) -> None:
        self.serving.append(replica)
        while self.pending:
            self._dispatch(self.pending.popleft(), now_s)

    def _done(self, now_s: float) -> bool:
        busy = any(replica.open for replica in self.serving + self.draining)
        return not busy and not self.pending

    # Replicas.

    def _control(self, now_s: float) -> None:
        fleet = self.fleet
        for replica in self.serving + self.draining:
            replica.advance(now_s, whole=True)
        self._let_end(now_s)
        loads = tuple(replica.load(now_s, fleet) for replica in self.serving)
        snapshot = Snapshot(
            now_s=now_s,
            replicas=loads,
            starting=len(self.starting),
            start_s=fleet.start_s,
            pending=len(self.pending),
        )
        open_requests = sum(replica.open for replica in self.serving + self.draining)
        target = len(self.serving) + len(self.starting)
        names = tuple(replica.name for replica in self.serving)
        view = View(snapshot, names, target, open_requests + len(self.pending))
        decision = self.policy(view)
        wanted = min(max(decision.replicas, fleet.min_replicas), fleet.max_replicas)
        if wanted != target:
            self.decisions.append((now_s, wanted, decision.reason))
        for _ in range(wanted - target):
            self._start(now_s)
        for _ in range(target - wanted):
            self._stop(now_s)
        self._let_end(now_s)
        self._note(now_s, wanted, loads)

    def _start(self, now_s: float) -> None:
        spread = self.fleet.start_spread * self.rng.uniform(-1, 1)
        replica = self._replica(now_s, now_s + self.fleet.start_s * (1 + spread))
        heapq.heappush(self.starting, (replica.ready_s, replica.name, replica))

    def _stop(self, now_s: float) -> None:
        if self.starting:
            # The one with the longest way to go.
            entry = max(self.starting)
            self.starting.remove(entry)
            heapq.heapify(self.starting)
            entry[2].gone_s = now_s
            return
        least = min(self.serving, key=lambda replica: (replica.open, -replica.name))
        self.serving.remove(least)
        self.draining.append(least)

    def _let_end(self, now_s: float) -> None:
        for replica in self.draining:
            if not replica.open:
                replica.gone_s = now_s
        self.draining = [replica for replica in self.draining if replica.open]

    def _note(self, now_s: float, wanted: int, loads: Sequence[ReplicaLoad]) -> None:
        line = self.timeline
        line.t_s.append(now_s)
        line.wanted.append(wanted)
        line.serving.append(len(self.serving))
        line.starting.append(len(self.starting))
        line.draining.append(len(self.draining))
        batches = [replica.batch for replica in self.serving + self.draining]
        line.running.append(sum(batch.running for batch in batches))
        line.waiting.append(sum(batch.waiting for batch in batches) + len(self.pending))
        line.kv_usage.append(max((load.kv_usage for load in loads), default=0.0))

    def _outcome(self, now_s: float) -> Outcome:
        spans = []
        for replica in self.all:
            gone_s = now_s if replica.gone_s is None else replica.gone_s
            served_s = replica.ready_s if replica.ready_s <= gone_s else None
            spans.append((replica.asked_s, served_s, gone_s))
        preempted = sum(replica.batch.preempted for replica in self.all)
        steps_s: list[Sequence[float]] = [replica.batch.step_end_s for replica in self.all]
        history = (self.timeline, self.decisions, spans, now_s, preempted)
        return Outcome(self.jobs, steps_s, *history)
