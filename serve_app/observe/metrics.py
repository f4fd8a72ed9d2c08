"""Every metric of this application: its name, unit, labels and meaning.

The metrics of a process are in prometheus-client's registry, together with vLLM's. export.py passes
both to Ray's agent of the node, which Prometheus scrapes. Their names then begin with `ray_`, and
they have two more labels:

    deployment   of Ray Serve, such as engine or gateway
    replica      its id; series end with their replica

The autoscaler's metrics are Ray's own gauges, because Ray Serve's controller has no registry
(autoscaler.py).

Labels are bounded: `model` is what this application serves, `route` a path of gates/routes.py or
"other", `status` an HTTP status, `tenant` a name (`tenant_label`), `reason` a code of
errors.py.
"""

import bisect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import REGISTRY, Collector


def _steps(lowest: float, highest: float, ratio: float) -> tuple[float, ...]:
    """Bounds of buckets from `lowest` to `highest`, each `ratio` times the one before."""
    bounds = [lowest]
    while bounds[-1] < highest:
        bounds.append(float(f"{bounds[-1] * ratio:.3g}"))
    return tuple(bounds)


# Fine enough for a median to be right within a tenth.
_LATENCY_S = _steps(0.001, 60.0, 1.25)
_DURATION_S = _steps(0.01, 600.0, 1.5)
_WAIT_S = _steps(0.001, 60.0, 2.0)

# The status of a request whose client left before the end of its answer, as of nginx.
CLIENT_LEFT = 499

# --- requests, counted where clients reach us: the gateway, or a replica without one (meter.py) ---

requests = Counter(
    "serve_app_requests",
    "Completed requests, by the status that the client got.",
    ("model", "route", "status", "tenant"),
)
rejections = Counter(
    "serve_app_rejections",
    "Requests that this application answered with an error of its own, by its code.",
    ("model", "reason"),
)
objectives = Counter(
    "serve_app_slo_requests",
    "Requests to which the objective applies (replicas.ttft_s, itl_s), and whether it was met.",
    ("model", "kept"),
)
durations = Histogram(
    "serve_app_request_duration_seconds",
    "From the first byte of a request to the last of its answer.",
    ("model",),
    buckets=_DURATION_S,
)
first_tokens = Histogram(
    "serve_app_time_to_first_token_seconds",
    "From a request to the first event of its stream, all waiting included.",
    ("model",),
    buckets=_LATENCY_S,
)
under_way = Gauge("serve_app_requests_under_way", "Requests that have no full answer.", ("model",))

# --- the queue before the engine (admission.py) ---

waits = Histogram(
    "serve_app_queue_duration_seconds",
    "How long an admitted request had waited for a place in the engine's batch.",
    ("model",),
    buckets=_WAIT_S,
)
queued = Gauge("serve_app_requests_queued", "Requests that wait for a place.", ("model",))
queue_room = Gauge(
    "serve_app_requests_queued_max", "Requests that may wait; further ones are refused.", ("model",)
)
running = Gauge("serve_app_sequences_running", "Admitted sequences.", ("model",))
room = Gauge("serve_app_sequences_max", "Sequences that the engine batches at most.", ("model",))

# --- the engine (engine.py) ---

prompt_tokens = Counter(
    "serve_app_prompt_tokens",
    "Prompt tokens of completed requests, cached or not.",
    ("model", "tenant"),
)
generated_tokens = Counter(
    "serve_app_generated_tokens",
    "Generated tokens of completed requests.",
    ("model", "tenant"),
)

# --- tenants (serve_app/tenants) ---

tenants = Gauge("serve_app_tenants", "Tenants that are configured.")
tenants_stale = Gauge(
    "serve_app_tenants_stale",
    "1 while tenants cannot be read: the last ones that were read are in force.",
)


@lru_cache(4096)
def series(metric: Any, *labels: str) -> Any:
    """The series of a metric with these labels, without the search that `labels` is each time."""
    return metric.labels(*labels)


# Tenants that have series of their own; those that come later are one, "other".
_MOST_TENANTS = 200
_OTHER_TENANTS = "other"
_tenants: dict[str, str] = {}


def tenant_label(name: str) -> str:
    """The label of a tenant: its name, as long as there are few."""
    if name not in _tenants and len(_tenants) < _MOST_TENANTS:
        _tenants[name] = name
    return _tenants.get(name, _OTHER_TENANTS)


def own_label(name: str) -> str | None:
    """The label that this tenant has alone; None if it is counted together with others."""
    label = tenant_label(name)
    return None if label == _OTHER_TENANTS else label


quota_used = Gauge(
    "serve_app_quota_used_ratio",
    "Used share of a quota, for the tenants that are nearest to it.",
    ("tenant", "limit"),
)
tenant_queue_seconds = Counter(
    "serve_app_tenant_queue_seconds",
    "Seconds that admitted requests had waited for a place, by tenant.",
    ("model", "tenant"),
)
tenant_queue_requests = Counter(
    "serve_app_tenant_queue_requests", "Admitted requests, by tenant.", ("model", "tenant")
)
tenant_cached_tokens = Counter(
    "serve_app_cached_prompt_tokens",
    "Prompt tokens of completed requests that came from the prefix cache.",
    ("model", "tenant"),
)
tenant_gpu_seconds = Counter(
    "serve_app_gpu_seconds", "Seconds of GPUs that requests took, by tenant.", ("model", "tenant")
)
quota_refusals = Counter(
    "serve_app_quota_refusals", "Requests that a limit of their tenant refused.", ("limit",)
)
ledger_away = Gauge(
    "serve_app_ledger_away",
    "1 while the database of tenants is unavailable: no quota is granted, the ledger waits.",
)

# --- the gateway (relay.py) ---

failed_attempts = Counter(
    "serve_app_attempts_failed",
    "Failed attempts at a replica, by reason: connection, died, silent.",
    ("model", "reason"),
)
continuations = Counter(
    "serve_app_continuations",
    "Answers continued by another replica, by method: again (nothing was sent), resume, repeat, "
    "handover (from the fast lane to the full lane; that replica decides).",
    ("model", "method"),
)
retries = Counter(
    "serve_app_attempts_busy",
    "Times that a full replica passed a request on to another one.",
    ("model",),
)
unplaced = Gauge(
    "serve_app_requests_unplaced", "Requests that wait for an available replica.", ("model",)
)
replicas_known = Gauge(
    "serve_app_replicas_usable", "Replicas that are available to this gateway.", ("model",)
)

# --- starts (observation.py) ---

start_phases = Histogram(
    "serve_app_start_phase_seconds",
    "Duration of a replica's start, or its engine's restart or waking, by phase (phases.py).",
    ("model", "kind", "phase"),
    buckets=_steps(0.1, 600.0, 2.0),
)

# --- what it is and costs (replica.py) ---

build = Gauge(
    "serve_app_build_info",
    "Always 1, with the versions as labels.",
    ("version", "vllm", "ray", "model"),
)
gpus = Gauge("serve_app_replica_gpus", "GPUs of this replica; 1 on a CPU.", ("model",))
price = Gauge(
    "serve_app_replica_price_dollars_per_hour",
    "Cost of this replica: its GPUs times price_per_gpu_hour; absent if that is not set.",
    ("model",),
)
healthy = Gauge("serve_app_engine_healthy", "1 while the engine answers its probe.", ("model",))
restarting = Gauge("serve_app_engine_restarting", "1 while a failed engine restarts.", ("model",))
asleep = Gauge(
    "serve_app_engine_asleep",
    "1 while the engine falls asleep, sleeps or wakes.",
    ("model",),
)
engine_restarts = Counter(
    "serve_app_engine_restarts",
    "Engines that died or hung and were restarted in their replica.",
    ("model",),
)
fast_lane = Gauge(
    "serve_app_fast_lane",
    "1 while vllm-rs answers requests; 0 while Python answers all of them.",
    ("model",),
)
frontend_restarts = Counter(
    "serve_app_frontend_restarts",
    "Times that vllm-rs died or hung and was restarted beside its engine.",
    ("model",),
)
objective = Gauge(
    "serve_app_slo_seconds",
    "The configured objective: ttft, itl.",
    ("model", "of"),
)

# --- the autoscaler: Ray's gauges, labelled application and deployment (autoscaler.py) ---

SCALING = {
    "wanted": "Replicas that the policy wants.",
    "running": "Replicas that serve.",
    "starting": "Requested replicas that do not serve yet.",
    "maximum": "Maximum of replicas: the smaller of replicas.max and what the cluster can hold.",
    "load": "Load, as a number of full replicas.",
    "forecast": "Forecast load, as a number of full replicas.",
    "sequences": "Sequences in the batches of all replicas.",
    "waiting": "Waiting requests, in all replicas and outside them.",
    "queued_tokens": "Prompt tokens that no replica has processed yet.",
    "kv_usage_ratio": "Share of the KV cache in use, of the fullest replica.",
    "ttft_seconds": "Time to first token at the goal's percentile, of the slowest replica.",
    "itl_seconds": "Time between tokens at the goal's percentile, of the slowest replica.",
    "start_seconds": "Estimated duration of a start.",
    "start_slow_seconds": "90th percentile of the duration of starts.",
}
SCALING_PREFIX = "serve_app_scaling_"


class Gaps(Collector):
    """A histogram for thousands of observations a second: each is one bisection."""

    def __init__(self, name: str, text: str, bounds: Sequence[float] = _LATENCY_S) -> None:
        self._name, self._text = name, text
        self._bounds = bounds
        self._of: dict[str, Counts] = {}

    def of(self, model: str) -> "Counts":
        return self._of.setdefault(model, Counts(self._bounds))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=("model",))
        for model, counts in list(self._of.items()):
            total, buckets = 0, []
            for bound, count in zip((*self._bounds, "+Inf"), list(counts.counts), strict=True):
                total += count
                buckets.append((str(bound), float(total)))
            family.add_metric((model,), buckets, counts.sum_s)
        yield family


class Counts:
    """Of one model."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum_s = 0.0

    def add(self, gap_s: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self._bounds, gap_s)] += times
        self.sum_s += gap_s * times


gaps = Gaps(
    "serve_app_inter_token_seconds", "Between two events of a stream, each a token or more."
)
REGISTRY.register(gaps)
