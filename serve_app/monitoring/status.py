"""A page that shows the essentials live, for where Grafana is not: what `FIGURES` asks Prometheus.

The page (status.html) fetches /status.json every two seconds and draws it. It listens on loopback.
"""

import asyncio
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Route

from serve_app.monitoring.prometheus import Prometheus, QueryError, Sample
from serve_app.observe.phases import PHASES

_PAGE = Path(__file__).with_name("status.html")
_SPAN_S, _POINTS = 900, 90
# Queries are answered from here for so long, however many pages are open.
_KEEP_S = 1.5


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

    async def data(request: Request) -> JSONResponse:
        return JSONResponse(await status.now())

    return Starlette(routes=[Route("/", page), Route("/status.json", data)])


class Status:
    """The data of the page, queried once for all viewers."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus
        self._lock = asyncio.Lock()
        self._snapshot: dict[str, Any] = {}
        self._asked_s = -math.inf

    async def now(self) -> dict[str, Any]:
        async with self._lock:
            if time.monotonic() - self._asked_s >= _KEEP_S:
                self._snapshot = await asyncio.to_thread(self._ask)
                self._asked_s = time.monotonic()
            return self._snapshot

    def _ask(self) -> dict[str, Any]:
        try:
            return {
                "at": time.time(),
                "figures": [self._figure(figure) for figure in FIGURES],
                "replicas": self._replicas(),
                "starts": self._starts(),
                "alerts": [
                    {
                        "name": alert["labels"]["alertname"],
                        "severity": alert["labels"].get("severity", ""),
                        "summary": alert["annotations"].get("summary", ""),
                    }
                    for alert in self._prometheus.alerts()
                    if alert["state"] == "firing"
                ],
            }
        except QueryError as error:
            return {"at": time.time(), "error": str(error)}

    def _figure(self, figure: Figure) -> dict[str, Any]:
        now_s = time.time()
        step_s = _SPAN_S / _POINTS
        series = self._prometheus.span(figure.expression, now_s - _SPAN_S, now_s, step_s)
        now = self._prometheus.instant(figure.expression)
        past = [_number(value) for value in series[0].values] if series else []
        value = _number(now[0].value) if now else None
        bad = figure.bad is not None and value is not None
        return {
            "name": figure.name,
            "unit": figure.unit,
            "value": value,
            "past": past,
            "bad": bad and (value < figure.bad if figure.low else value >= figure.bad),  # type: ignore[operator]
        }

    def _replicas(self) -> list[dict[str, Any]]:
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for column, expression in COLUMNS.items():
            for sample in self._prometheus.instant(expression):
                rows.setdefault(_whose(sample), {})[column] = _number(sample.value)
        return [
            {"replica": f"{deployment} {replica}", **values}
            for (deployment, replica), values in sorted(rows.items())
        ]

    def _starts(self) -> list[dict[str, Any]]:
        """A row for each kind of start: its whole, then its phases in their order."""
        by_replica: dict[str, dict[str, float]] = {}
        for sample in self._prometheus.instant(STARTS):
            labels, value = sample.labels, _number(sample.value)
            if value is not None:
                by_replica.setdefault(labels.get("kind", ""), {})[labels.get("phase", "")] = value
        return [
            {"starts": kind, "whole": sum(took_s.values())}
            | {phase: took_s[phase] for phase in PHASES if phase in took_s}
            for kind, took_s in sorted(by_replica.items(), reverse=True)
        ]


def _whose(sample: Sample) -> tuple[str, str]:
    return sample.labels.get("deployment", ""), sample.labels.get("replica", "")


def _number(value: float) -> float | None:
    """JSON knows no infinity; a rate of nothing is not a number."""
    return value if math.isfinite(value) else None
