"""How many replicas there should be: a pure function of what the engines report.

The types here are the contract between the signals of a replica (signals.py), the policy, its
binding to Ray Serve (autoscaler.py) and the simulator of bench.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaLoad:
    """What one replica's engine reports, over the last few seconds.

    Attributes:
        running, waiting: sequences in the engine's batch, and requests that wait for room, in the
            engine and in the queue before it.
        queued_tokens: prompt tokens of the requests that wait.
        kv_usage: share of the KV cache in use, 0 to 1.
        max_running: sequences that the engine batches at most.
        ttft_s, itl_s: recent latencies at the goal's percentile; None where nothing was measured.
        prefill_tokens_per_s, decode_tokens_per_s: recent rates.
        preemptions_per_s: sequences that lost their KV blocks to others.
        arrivals_per_s: requests that came.
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


@dataclass(frozen=True)
class Snapshot:
    """What is known at one moment.

    Attributes:
        now_s: monotonic.
        replicas: the load of each replica that serves.
        starting: replicas that are asked for and do not serve yet.
        placeable: how many replicas the cluster can hold in all; None where it can grow.
        start_s: how long a replica takes to start, as observed.
        pending: requests that wait where no replica is.
    """

    now_s: float
    replicas: tuple[ReplicaLoad, ...]
    starting: int = 0
    placeable: int | None = None
    start_s: float = 60.0
    pending: int = 0


@dataclass(frozen=True)
class Goal:
    """What to hold, and within which bounds.

    Attributes:
        ttft_s, itl_s: limits at the percentile; None for no limit.
        percentile: 0 to 100.
        min_replicas, max_replicas: bounds; min 0 lets an idle application go.
    """

    ttft_s: float | None = 2.0
    itl_s: float | None = 0.1
    percentile: float = 95.0
    min_replicas: int = 1
    max_replicas: int = 1


@dataclass(frozen=True)
class Decision:
    """How many replicas there should be, and why, in one line."""

    replicas: int
    reason: str
