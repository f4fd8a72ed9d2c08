"""A page that shows the essentials live without Grafana: the results of the queries in `FIGURES`.

The page (status.html) fetches /status.json every two seconds and draws it. It listens on loopback.
"""

import asyncio
import math
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from serve_app.monitoring.prometheus import Prometheus, QueryError, Sample
from serve_app.observe.phases import PHASES

_PAGE = Path(__file__).with_name("status.html")
_SPAN_S, _POINTS = 900, 90
# How long a snapshot is shown, however many pages are open.
_SNAPSHOT_S = 1.5


@dataclass(frozen=True)
class Figure:
    """One number of the page and its recent past.

    Attributes:
        unit: "s", "/s", "%", "$" or "" for a count.
        bad: a value from which it is marked; below which, if `low`.
    """

    name: str
    expression: str
    unit: str = ""
    bad: float | None = None
    low: bool = False


def _quantile(quantile: float, metric: str) -> str:
    return f"histogram_quantile({quantile}, sum by (le) (rate({metric}_bucket[1m])))"


_FIRST, _GAP = "ray_serve_app_time_to_first_token_seconds", "ray_serve_app_inter_token_seconds"
_REQUESTS = "ray_serve_app_requests_total"

FIGURES = (
    Figure("replicas", "count(ray_serve_app_engine_healthy == 1) or vector(0)", bad=0.5, low=True),
    Figure("requests", f"sum(rate({_REQUESTS}[1m]))", "/s"),
    Figure("under way", "sum(ray_serve_app_requests_under_way)"),
    Figure("queued", "sum(ray_serve_app_requests_queued)"),
    Figure("first token, median", _quantile(0.5, _FIRST), "s"),
    Figure("first token, 95%", _quantile(0.95, _FIRST), "s"),
    Figure("between tokens, median", _quantile(0.5, _GAP), "s"),
    Figure("between tokens, 95%", _quantile(0.95, _GAP), "s"),
    Figure("generated tokens", "sum(rate(ray_vllm_generation_tokens_total[1m]))", "/s"),
    Figure("KV cache, fullest", "max(ray_vllm_kv_cache_usage_perc) * 100", "%", bad=95.0),
    Figure(
        "prefix hits",
        "100 * sum(rate(ray_vllm_prefix_cache_hits_total[5m]))"
        " / sum(rate(ray_vllm_prefix_cache_queries_total[5m]))",
        "%",
    ),
    Figure(
        "errors",
        f'100 * (sum(rate({_REQUESTS}{{status=~"5.."}}[1m])) or vector(0))'
        f" / sum(rate({_REQUESTS}[1m]))",
        "%",
        bad=1.0,
    ),
    Figure(
        "a million tokens",
        "1e6 * sum(ray_serve_app_replica_price_dollars_per_hour)"
        " / (3600 * sum(rate(ray_serve_app_generated_tokens_total[5m])))",
        "$",
    ),
)
# Of each replica, by the column.
_BY_REPLICA = "sum by (deployment, replica)"
COLUMNS = {
    "healthy": "ray_serve_app_engine_healthy",
    "asleep": "ray_serve_app_engine_asleep",
    "sequences": f"{_BY_REPLICA} (ray_serve_app_sequences_running)",
    "queued": f"{_BY_REPLICA} (ray_serve_app_requests_queued)",
    "tokens/s": f"{_BY_REPLICA} (rate(ray_vllm_generation_tokens_total[1m]))",
    "KV cache %": "max by (deployment, replica) (ray_vllm_kv_cache_usage_perc) * 100",
    "preempted": f"{_BY_REPLICA} (increase(ray_vllm_num_preemptions_total[5m]))",
}

# Seconds that each phase of a start took, as a mean of the replicas that run.
STARTS = (
    "sum by (kind, phase) (ray_serve_app_start_phase_seconds_sum)"
    " / sum by (kind, phase) (ray_serve_app_start_phase_seconds_count)"
)


def app(prometheus: Prometheus) -> Starlette:
    """The page and its data."""
    status = Status(prometheus)

    async def page(request: Request) -> FileResponse:
        return FileResponse(_PAGE)

    async def data(request: Request) -> Response:
        return Response(msgspec.json.encode(await status.now()), media_type="application/json")

    return Starlette(routes=[Route("/", page), Route("/status.json", data)])


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """A figure now, and its values over the last `_SPAN_S`; None without a measurement."""

    name: str
    unit: str
    value: float | None
    past: list[float | None]
    bad: bool


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """An alert that fires."""

    name: str
    severity: str
    summary: str


# A row of a table by column; which columns it has depends on the series that there are.
Row = dict[str, str | float | None]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The content of /status.json.

    Attributes:
        at: Unix time.
        error: why Prometheus did not answer; empty if it did.
    """

    at: float
    error: str = ""
    figures: list[Value] = []
    replicas: list[Row] = []
    starts: list[Row] = []
    alerts: list[Alert] = []


class Status:
    """The data of the page, queried once for all viewers."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus
        self._lock = asyncio.Lock()
        self._snapshot = Snapshot(at=0.0)
        self._taken_s = -math.inf

    async def now(self) -> Snapshot:
        async with self._lock:
            if time.monotonic() - self._taken_s >= _SNAPSHOT_S:
                self._snapshot = await asyncio.to_thread(self._query)
                self._taken_s = time.monotonic()
            return self._snapshot

    def _query(self) -> Snapshot:
        try:
            return Snapshot(
                at=time.time(),
                figures=[self._value(figure) for figure in FIGURES],
                replicas=self._replicas(),
                starts=self._starts(),
                alerts=self._alerts(),
            )
        except QueryError as error:
            return Snapshot(at=time.time(), error=str(error))

    def _alerts(self) -> list[Alert]:
        return [
            Alert(
                name=alert["labels"]["alertname"],
                severity=alert["labels"].get("severity", ""),
                summary=alert["annotations"].get("summary", ""),
            )
            for alert in self._prometheus.alerts()
            if alert["state"] == "firing"
        ]

    def _value(self, figure: Figure) -> Value:
        now_s = time.time()
        step_s = _SPAN_S / _POINTS
        series = self._prometheus.span(figure.expression, now_s - _SPAN_S, now_s, step_s)
        now = self._prometheus.instant(figure.expression)
        past = [_number(value) for value in series[0].values] if series else []
        value = _number(now[0].value) if now else None
        bad = False
        if value is not None and figure.bad is not None:
            bad = value < figure.bad if figure.low else value >= figure.bad
        return Value(name=figure.name, unit=figure.unit, value=value, past=past, bad=bad)

    def _replicas(self) -> list[Row]:
        rows: dict[tuple[str, str], Row] = {}
        for column, expression in COLUMNS.items():
            for sample in self._prometheus.instant(expression):
                rows.setdefault(_replica_of(sample), {})[column] = _number(sample.value)
        return [
            {"replica": f"{deployment} {replica}", **values}
            for (deployment, replica), values in sorted(rows.items())
        ]

    def _starts(self) -> list[Row]:
        """A row for each kind of start: its duration, then its phases in their order."""
        by_kind: dict[str, dict[str, float]] = {}
        for sample in self._prometheus.instant(STARTS):
            labels, value = sample.labels, _number(sample.value)
            if value is not None:
                by_kind.setdefault(labels.get("kind", ""), {})[labels.get("phase", "")] = value
        rows: list[Row] = []
        for kind, took_s in sorted(by_kind.items(), reverse=True):
            row: Row = {"starts": kind, "whole": sum(took_s.values())}
            rows.append(row | {phase: took_s[phase] for phase in PHASES if phase in took_s})
        return rows


def _replica_of(sample: Sample) -> tuple[str, str]:
    return sample.labels.get("deployment", ""), sample.labels.get("replica", "")


def _number(value: float) -> float | None:
    """JSON knows no infinity; a rate of nothing is not a number."""
    return value if math.isfinite(value) else None
