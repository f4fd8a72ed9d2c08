"""What a scaling policy gets and returns.

These types are the contract between the signals of a replica (signals.py), the policy (policy.py),
its binding to Ray Serve (autoscaler.py) and the simulator of bench.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaLoad:
    """What one replica's engine reports, over the last few seconds.

    Attributes:
        running, waiting: sequences in the engine's batch, and requests that wait for a place, in
            the engine and in the queue before it.
        queued_tokens: prompt tokens of the requests without a first token.
        kv_usage: share of the KV cache in use, 0 to 1.
        max_running: sequences that the engine batches at most.
        ttft_s, itl_s: recent latencies at the goal's percentile; None without a measurement.
        prefill_tokens_per_s, decode_tokens_per_s: recent rates.
        preemptions_per_s: sequences that lost their KV blocks to others.
        arrivals_per_s: new requests.
        steps_per_s: steps of the engine.
        busy: share of the time that the engine spent in steps, 0 to 1.
        finished_per_s, missed_per_s: requests that ended, and those of them that missed the limit
            of the time to the first token, or of the mean time between tokens.
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
        starting: requested replicas that do not serve yet.
        placeable: how many replicas the cluster can hold in all; None where it can grow.
        start_s: the measured duration of a start.
        pending: requests that wait outside replicas, because there is none.
        silent: serving replicas whose report is overdue; `replicas` has their last report.
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
    """The latencies to keep, and the bounds of the number of replicas.

    Attributes:
        ttft_s, itl_s: limits at the percentile; None for no limit. The time between tokens is the
            mean of a stream.
        percentile: 0 to 100.
        min_replicas, max_replicas: bounds; with min 0 an idle application has no replica.
        idle_s: how long an application is idle before its last replica is removed.
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
        load, forecast: in full replicas: now, and when a replica that is started now will serve.
    """

    replicas: int
    reason: str
    load: float = 0.0
    forecast: float = 0.0
