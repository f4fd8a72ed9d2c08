"""How figures are written for people: the same unit and as many digits everywhere."""

from collections.abc import Mapping
from typing import Any

from bench.digits import plain

_UNIT = {"ttft": ("ms", 1e3), "tpot": ("ms", 1e3), "itl": ("ms", 1e3), "e2e": ("s", 1.0)}


def number(value: float) -> str:
    """A figure with about three significant digits."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else plain(value)


def half(value: float) -> str:
    """Half of an interval, which needs no third digit."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value >= 1e-4 else "0"


def scale(metric: str) -> tuple[str, float]:
    """The unit a metric is shown in, and what its value is multiplied by."""
    if metric.endswith("_share"):
        return "%", 100.0
    return _UNIT.get(metric.partition("_")[0], ("", 1.0))


def is_latency(metric: str) -> bool:
    return metric.partition("_")[0] in _UNIT


def title(metric: str) -> str:
    """The name of a metric for a reader: "TTFT p50", "output tokens/s"."""
    first, _, rest = metric.partition("_")
    if first in _UNIT:
        names = {"e2e": "end to end"}
        return f"{names.get(first, first.upper())} {rest.removesuffix('_s')}"
    return metric.replace("_per_s", "/s").replace("_", " ")


def with_interval(summary: Mapping[str, Any], metric: str) -> tuple[str, str]:
    """The mean of a metric and half of its interval, as texts; empty where they are not known."""
    value = summary.get(metric)
    if not value or value.get("mean") is None:
        return "", ""
    unit, factor = scale(metric)
    low, high = value.get("low"), value.get("high")
    mark = " %" if unit == "%" else ""
    bounded = low is not None and high is not None
    return number(value["mean"] * factor) + mark, half((high - low) / 2 * factor) if bounded else ""
