"""The binding of the scaling policy to Ray Serve: `Autoscaler`, in Serve's controller.

    replica: record_autoscaling_stats -> `report`     once a second
    controller: `Autoscaler.__call__` -> `Snapshot` -> scaling.decide -> replicas wanted

Serve imports it by the name in the deployment's autoscaling_config and calls it ten times a second
in the controller's own event loop. It decides once a second, and must neither block nor raise:
until it returns, Serve does nothing else, such as replacing a replica that died.

Serve creates a new object when the controller restarts and at each deploy that changes the
deployment. The new object resumes from the state that the previous one saved (memory.py), and does
not change the number of running replicas.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext
from ray.util import metrics

from serve_app.observe.metrics import SCALING, SCALING_PREFIX
from serve_app.progress import say
from serve_app.scaling.memory import ClusterStore, Memory, Store
from serve_app.scaling.policy import decide
from serve_app.scaling.starts import PARTS, Starts
from serve_app.scaling.state import State, resumed
from serve_app.scaling.types import Decision, Goal, ReplicaLoad, Snapshot

# Serve's own logger: these lines are in the controller's log, beside what it does about them.
logger = logging.getLogger("ray.serve")

_PERIOD_S = 1.0
# How often the cluster is asked for its size: a call to another process, and nodes come slowly.
_CLUSTER_S = 10.0
# How often the memory is saved, unless the target changes.
_SAVE_S = 10.0
# A target saved longer ago is not returned to: it may be another day's.
_TARGET_S = 60.0
# Likewise the load history: what came since is unknown.
_HISTORY_S = 900.0
# A replica reports once a second. One that is silent for longer is too busy to.
_SILENT_S = 5.0
# Serve takes numbers only, and the same names each time: this stands for None.
_NOTHING = -1.0
_COUNTS = frozenset({"running", "waiting", "queued_tokens", "max_running"})


# Before the name of a part of a replica's start, among the numbers that it reports.
_START = "start_"


def report(load: ReplicaLoad, start_s: Mapping[str, float] | None = None) -> dict[str, float]:
    """A load, and the parts of the replica's start, as `record_autoscaling_stats` may return
    them."""
    numbers = {
        name: _NOTHING if value is None else float(value) for name, value in asdict(load).items()
    }
    return numbers | {f"{_START}{part}": (start_s or {}).get(part, 0.0) for part in PARTS}


def load_of(numbers: Mapping[str, float]) -> ReplicaLoad:
    """The load from the numbers of `report`; a missing number counts as 0."""
    values: dict[str, float] = {}
    for field in fields(ReplicaLoad):
        value = numbers.get(field.name, _NOTHING)
        if value != _NOTHING:
            values[field.name] = round(value) if field.name in _COUNTS else value
    return ReplicaLoad(**values)  # type: ignore[arg-type]  # Counts are whole by `_COUNTS`.


class OngoingRequests:
    """Ray Serve's own policy, which starts one replica at first where none need stay.

    Only a replica that has started shows that one can. Serve's `initial_replicas` would show it
    too, but applies at every deploy, and would stop the others.
    """

    def __init__(self) -> None:
        self._started = False

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        if not self._started and not context.current_num_replicas:
            return 1, context.policy_state
        self._started = True
        decision: tuple[float, dict[str, Any]] = replica_queue_length_autoscaling_policy(context)
        return decision


class Cluster:
    """How many replicas the cluster can hold.

    Args:
        bundles: resources of one replica, one mapping for each part that must be on one node.
        nodes: resources of every node, and those it may grow to; None where it may grow on.
    """

    def __init__(
        self,
        bundles: Sequence[Mapping[str, float]],
        nodes: Callable[[], Sequence[Mapping[str, float]] | None],
    ) -> None:
        self._bundles = bundles
        self._nodes = nodes
        self._asked_s = -_CLUSTER_S
        self._placeable: int | None = None

    def placeable(self, now_s: float) -> int | None:
        if now_s - self._asked_s >= _CLUSTER_S:
            self._asked_s = now_s
            nodes = self._nodes()
            self._placeable = None if nodes is None else fitting(self._bundles, nodes)
        return self._placeable


def fitting(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> int:
    """How many times all `bundles` fit on `nodes`, each bundle on one of them, largest first."""
    free = [dict(node) for node in nodes]
    wanted = sorted(bundles, key=lambda bundle: -sum(bundle.values()))
    if not any(amount > 0 for bundle in wanted for amount in bundle.values()):
        return 10**6  # They ask for nothing.
    count = 0
    while True:
        for bundle in wanted:
            for node in free:
                if all(node.get(name, 0.0) >= amount for name, amount in bundle.items()):
                    for name, amount in bundle.items():
                        node[name] = node.get(name, 0.0) - amount
                    break
            else:
                return count
        count += 1


def cluster_nodes() -> Sequence[Mapping[str, float]] | None:
    """Resources of every node that lives; None where an autoscaler of Ray may add some."""
    import ray
    from ray._private.state import state

    # Only a cluster with an autoscaler has a configuration.
    if state.get_max_resources_from_cluster_config() is not None:
        return None
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class Autoscaler:
    """Ray Serve's custom autoscaling policy.

    Args:
        goal: the fields of a `scaling.Goal`.
        start_s: how long a replica takes to start, until starts were measured.
        bundles: resources of one replica.
        release: what was learned on another one (`Plan.release`) does not hold for this.
        nodes, clock, store: for tests.
    """

    def __init__(
        self,
        goal: Mapping[str, Any],
        start_s: float,
        bundles: Sequence[Mapping[str, float]],
        release: str = "",
        nodes: Callable[[], Sequence[Mapping[str, float]] | None] = cluster_nodes,
        clock: Callable[[], float] = time.monotonic,
        store: Store | None = None,
    ) -> None:
        self._goal = Goal(**goal)
        self._release = release
        self._start_s = start_s
        self._starts = Starts(start_s)
        self._cluster = Cluster(bundles, nodes)
        self._clock = clock
        self._store = ClusterStore() if store is None else store
        self._saved: tuple[float, Memory] | None = None
        self._reports = Reports()
        self._state = State()
        self._started = False
        self._asked_s = -_PERIOD_S
        self._wanted: int | None = None
        self._announced: tuple[int, int] | None = None
        self._gauges = Gauges()

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many replicas there should be, and nothing for Serve to keep: the state is here."""
        now_s = self._clock()
        if self._wanted is None or now_s - self._asked_s >= _PERIOD_S:
            first = self._wanted is None
            self._asked_s = now_s
            # What was last wanted, should the policy fail.
            self._wanted = context.target_num_replicas
            try:
                at_least = self._resume(context, now_s) if first else 0
                self._started = self._started or context.current_num_replicas > 0
                # Only a replica that has started shows that one can, also where none need stay.
                at_least = max(at_least, int(not self._started))
                self._wanted = max(at_least, self._ask(context, now_s))
                self._save(context, now_s, self._wanted)
            except Exception:
                logger.exception("The scaling policy failed; the number of replicas stays.")
        return self._wanted, {}

    def _resume(self, context: AutoscalingContext, now_s: float) -> int:
        """Restore what was learned before. Returns how many replicas must stay.

        Neither a deploy nor the controller's restart is a reason to stop a replica.
        """
        running: int = context.current_num_replicas
        memory = self._store.load(_key(context))
        if memory is None:
            return running
        age_s = max(0.0, context.current_time - memory.saved_unix_s)
        took_s: tuple[float, ...] = ()
        parts_s: tuple[dict[str, float], ...] = ()
        if memory.release == self._release:
            self._state = resumed(memory.state, now_s, keep_load=age_s <= _HISTORY_S)
            took_s, parts_s = memory.took_s, memory.parts_s
            self._started = memory.started
        self._starts = Starts(self._start_s, took_s, parts_s, resumed=True)
        return max(running, memory.target) if running and age_s <= _TARGET_S else running

    def _save(self, context: AutoscalingContext, now_s: float, wanted: int) -> None:
        memory = Memory(
            self._release,
            context.current_time,
            self._started,
            wanted,
            self._starts.took_s,
            self._state,
            tuple(dict(parts_s) for parts_s in self._starts.parts_s),
        )
        if self._saved is not None:
            saved_s, saved = self._saved
            if now_s - saved_s < _SAVE_S and memory.learned == saved.learned:
                return
        self._saved = now_s, memory
        self._store.save(_key(context), memory)

    def _ask(self, context: AutoscalingContext, now_s: float) -> int:
        target, running = context.target_num_replicas, context.current_num_replicas
        scaled_up = context.last_scale_up_time
        scaled_up_s = None if scaled_up is None else now_s - (context.current_time - scaled_up)
        loads, silent = self._reports.read(context, now_s)
        self._starts.see(now_s, target, running, scaled_up_s)
        for parts_s in self._reports.started():
            self._starts.report(parts_s)
        snapshot = Snapshot(
            now_s=now_s,
            replicas=loads,
            starting=max(0, target - running),
            placeable=self._cluster.placeable(now_s),
            start_s=self._starts.start_s,
            pending=round(context.total_queued_requests + 0.49),
            silent=silent,
        )
        # Serve's bounds follow its target capacity, which is for a change of clusters.
        goal = replace(
            self._goal,
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
        )
        decision, self._state = decide(snapshot, goal, self._state)
        self._announce(target, decision)
        slow_start_s = self._starts.quantile_s(0.9)
        self._gauges.set(context, snapshot, decision, goal.max_replicas, slow_start_s)
        return decision.replicas

    def _announce(self, target: int, decision: Decision) -> None:
        """One line for each change, and only one while Serve has not made it."""
        if decision.replicas == target or self._announced == (target, decision.replicas):
            return
        self._announced = target, decision.replicas
        line = f"replicas {target} -> {decision.replicas}: {decision.reason}"
        logger.info(line)
        say(line)


def _key(context: AutoscalingContext) -> str:
    return f"scaling/{context.app_name}/{context.deployment_name}"


class Reports:
    """The last load that each running replica reported."""

    def __init__(self) -> None:
        # By replica: the time stamp of its last report, when that was first read, the load.
        self._last: dict[Any, tuple[float | None, float, ReplicaLoad]] = {}
        # Replicas whose start is known, or began before the first look.
        self._started: set[Any] | None = None
        self._starts: list[dict[str, float]] = []

    def read(
        self, context: AutoscalingContext, now_s: float
    ) -> tuple[tuple[ReplicaLoad, ...], int]:
        """The load of each running replica, and how many of them are silent.

        The last report of a silent replica stands. One that has not reported yet is silent, and
        stands for nothing.
        """
        latest: dict[Any, dict[str, float]] = {replica: {} for replica in context.running_replicas}
        stamps: dict[Any, float] = {}
        for name, series_of in context.raw_metrics.items():
            for replica, series in series_of.items():
                if series and replica in latest:
                    latest[replica][name] = series[-1].value
                    stamps[replica] = max(stamps.get(replica, 0.0), series[-1].timestamp)
        last = {}
        for replica, numbers in latest.items():
            stamp, read_s, load = self._last.get(replica, (None, now_s, ReplicaLoad()))
            if replica in stamps and stamps[replica] != stamp:
                stamp, read_s, load = stamps[replica], now_s, load_of(numbers)
            last[replica] = stamp, read_s, load
        self._last = last
        if self._started is None:
            self._started = set(latest)
        for replica, numbers in latest.items():
            parts_s = {part: numbers.get(_START + part, 0.0) for part in PARTS}
            if replica not in self._started and any(parts_s.values()):
                self._started.add(replica)
                self._starts.append(parts_s)
        self._started &= set(latest)
        silent = sum(
            stamp is None or now_s - read_s > _SILENT_S for stamp, read_s, _ in last.values()
        )
        return tuple(load for _, _, load in last.values()), silent

    def started(self) -> list[dict[str, float]]:
        """What the replicas that reported for the first time say of their starts; once."""
        starts, self._starts = self._starts, []
        return starts


class Gauges:
    """Decision and signals as metrics of Ray, by application and deployment."""

    def __init__(self) -> None:
        self._gauges = {
            name: metrics.Gauge(SCALING_PREFIX + name, text, ("application", "deployment"))
            for name, text in SCALING.items()
        }

    def set(
        self,
        context: AutoscalingContext,
        snapshot: Snapshot,
        decision: Decision,
        max_replicas: int,
        slow_start_s: float,
    ) -> None:
        loads, placeable = snapshot.replicas, snapshot.placeable
        values = {
            "wanted": decision.replicas,
            "running": len(loads),
            "starting": snapshot.starting,
            "maximum": max_replicas if placeable is None else min(max_replicas, placeable),
            "load": decision.load,
            "forecast": decision.forecast,
            "sequences": sum(load.running for load in loads),
            "waiting": snapshot.pending + sum(load.waiting for load in loads),
            "queued_tokens": sum(load.queued_tokens for load in loads),
            "kv_usage_ratio": max((load.kv_usage for load in loads), default=0.0),
            "ttft_seconds": max((load.ttft_s or 0.0 for load in loads), default=0.0),
            "itl_seconds": max((load.itl_s or 0.0 for load in loads), default=0.0),
            "start_seconds": snapshot.start_s,
            "start_slow_seconds": slow_start_s,
        }
        tags = {"application": context.app_name or "", "deployment": context.deployment_name}
        for name, value in values.items():
            self._gauges[name].set(value, tags)
