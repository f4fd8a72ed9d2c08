"""The scaling policy as Ray Serve asks for it: `Autoscaler`, in Serve's controller.

    replica: record_autoscaling_stats -> `report`     once a second
    controller: `Autoscaler.__call__` -> `Snapshot` -> scaling.decide -> replicas wanted

Serve imports it by the name in the deployment's autoscaling_config, makes one object for each
deployment and version, and calls that ten times a second in the controller's own event loop. So it
decides once a second, and must neither block nor raise: what Serve does between two calls, such as
replacing a replica that died, would not be done.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from ray.serve.config import AutoscalingContext
from ray.util import metrics

from serve_app.observe.metrics import SCALING, SCALING_PREFIX
from serve_app.progress import say
from serve_app.scaling.policy import Decision, Goal, ReplicaLoad, Snapshot, State, decide

# Serve's own logger: what is said here is in the controller's log, beside what it does about it.
logger = logging.getLogger("ray.serve")

_PERIOD_S = 1.0
# How often the cluster is asked for its size: a call to another process, and nodes come slowly.
_CLUSTER_S = 10.0
# So many of the last starts say how long the next one takes: the longest of them.
_STARTS = 3
# Serve takes numbers only, of the same names each time.
_NOTHING = -1.0
_COUNTS = frozenset({"running", "waiting", "queued_tokens", "max_running"})


def report(load: ReplicaLoad) -> dict[str, float]:
    """A load as `record_autoscaling_stats` may return it."""
    return {
        name: _NOTHING if value is None else float(value) for name, value in asdict(load).items()
    }


def load_of(numbers: Mapping[str, float]) -> ReplicaLoad:
    """The load that `report` made numbers of; what is missing is taken for nothing."""
    known: dict[str, Any] = {}
    for field in fields(ReplicaLoad):
        value = numbers.get(field.name, _NOTHING)
        if value != _NOTHING:
            known[field.name] = round(value) if field.name in _COUNTS else value
    return ReplicaLoad(**known)


class Starts:
    """How long replicas take to start, as seen from outside: from when one is wanted until it runs.

    With it what no replica can tell: the wait for a node, its image and its weights.
    """

    def __init__(self, start_s: float) -> None:
        self._assumed_s = start_s
        self._wanted: deque[float] = deque()
        self._took_s: deque[float] = deque(maxlen=_STARTS)
        self._target = self._running = 0

    @property
    def start_s(self) -> float:
        return max(self._took_s, default=self._assumed_s)

    def see(self, now_s: float, target: int, running: int) -> None:
        """Take note of how many are wanted and how many run."""
        self._wanted.extend([now_s] * (target - self._target))
        # The last ones that were wanted are the first to be given up.
        for _ in range(min(self._target - target, len(self._wanted))):
            self._wanted.pop()
        for _ in range(min(running - self._running, len(self._wanted))):
            self._took_s.append(now_s - self._wanted.popleft())
        if running >= target:
            self._wanted.clear()
        self._target, self._running = target, running


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
        start_s: how long a replica takes to start, until one was seen to.
        bundles: resources of one replica.
        nodes, clock: for tests.
    """

    def __init__(
        self,
        goal: Mapping[str, Any],
        start_s: float,
        bundles: Sequence[Mapping[str, float]],
        nodes: Callable[[], Sequence[Mapping[str, float]] | None] = cluster_nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._goal = Goal(**goal)
        self._starts = Starts(start_s)
        self._cluster = Cluster(bundles, nodes)
        self._clock = clock
        self._state = State()
        self._asked_s = -_PERIOD_S
        self._wanted: int | None = None
        self._said: tuple[int, int] | None = None
        self._gauges = Gauges()

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many replicas there should be, and nothing for Serve to keep: the state is here."""
        now_s = self._clock()
        if self._wanted is None or now_s - self._asked_s >= _PERIOD_S:
            self._asked_s = now_s
            try:
                self._wanted = self._ask(context, now_s)
            except Exception:
                logger.exception("The scaling policy failed; the number of replicas stays.")
                self._wanted = context.target_num_replicas
        return self._wanted, {}

    def _ask(self, context: AutoscalingContext, now_s: float) -> int:
        target, running = context.target_num_replicas, context.current_num_replicas
        self._starts.see(now_s, target, running)
        loads = loads_of(context)
        snapshot = Snapshot(
            now_s=now_s,
            replicas=loads,
            starting=max(0, target - running),
            placeable=self._cluster.placeable(now_s),
            start_s=self._starts.start_s,
            pending=round(context.total_queued_requests + 0.49),
        )
        # Serve's bounds follow its target capacity, which is for a change of clusters.
        goal = replace(
            self._goal,
            min_replicas=context.capacity_adjusted_min_replicas,
            max_replicas=context.capacity_adjusted_max_replicas,
        )
        decision, self._state = decide(snapshot, goal, self._state)
        self._say(target, decision)
        self._gauges.set(context, snapshot, decision, goal.max_replicas)
        return decision.replicas

    def _say(self, target: int, decision: Decision) -> None:
        """One line for each change, and only one while Serve has not made it."""
        if decision.replicas == target or self._said == (target, decision.replicas):
            return
        self._said = target, decision.replicas
        line = f"replicas {target} -> {decision.replicas}: {decision.reason}"
        logger.info(line)
        say(line)


def loads_of(context: AutoscalingContext) -> tuple[ReplicaLoad, ...]:
    """What each replica that runs has last reported; nothing of one that has not yet."""
    latest: dict[Any, dict[str, float]] = {replica: {} for replica in context.running_replicas}
    for name, series_of in context.raw_metrics.items():
        for replica, series in series_of.items():
            if series and replica in latest:
                latest[replica][name] = series[-1].value
    return tuple(load_of(numbers) for numbers in latest.values())


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
        }
        tags = {"application": context.app_name or "", "deployment": context.deployment_name}
        for name, value in values.items():
            self._gauges[name].set(value, tags)
