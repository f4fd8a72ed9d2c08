"""Samples of prometheus-client become gauges of Ray with the same values."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serve_app.observe import export, metrics


class RayGauge:
    """Stands for ray.util.metrics.Gauge; tests/observe/test_observed.py has the real one."""

    made: dict[str, "RayGauge"]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.keys = set(tag_keys)
        self.values: dict[tuple[tuple[str, str], ...], float] = {}
        RayGauge.made[name] = self

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == self.keys
        self.values[tuple(sorted(tags.items()))] = value


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> dict[str, RayGauge]:
    RayGauge.made = {}
    monkeypatch.setattr(export.ray_metrics, "Gauge", RayGauge)
    return RayGauge.made


def test_counts_and_buckets_are_exact(gauges: dict[str, RayGauge]) -> None:
    registry = CollectorRegistry()
    counter = Counter("asks", "Asked.", ("model",), registry=registry)
    histogram = Histogram("wait_seconds", "Waited.", buckets=(0.1, 1.0), registry=registry)
    Gauge("vllm:kv", "With a colon.", registry=registry).set(0.5)
    Gauge("process_x", "Of the process.", registry=registry)
    exporter = export.Exporter({"replica": "r1"})
    counter.labels("m").inc(3)
    for wait_s in (0.05, 0.5, 5.0):
        histogram.observe(wait_s)
    exporter.export(registry.collect())
    assert gauges["asks_total"].values == {(("model", "m"), ("replica", "r1")): 3}
    buckets = {dict(tags)["le"]: v for tags, v in gauges["wait_seconds_bucket"].values.items()}
    assert buckets == {"0.1": 1, "1.0": 2, "+Inf": 3}
    assert gauges["wait_seconds_sum"].values == {(("replica", "r1"),): pytest.approx(5.55)}
    assert set(gauges) == {
        *("asks_total", "wait_seconds_bucket", "wait_seconds_sum", "wait_seconds_count"),
        "vllm_kv",
    }
    counter.labels("m").inc()
    exporter.export(registry.collect())
    assert gauges["asks_total"].values == {(("model", "m"), ("replica", "r1")): 4}


def test_the_fast_histogram_says_what_the_usual_one_does() -> None:
    registry = CollectorRegistry()
    bounds = (0.001, 0.01, 0.1)
    usual = Histogram("a_seconds", "A.", ("model",), buckets=bounds, registry=registry)
    fast = metrics.Gaps("b_seconds", "B.", bounds)
    registry.register(fast)
    for gap_s in (0.0005, 0.001, 0.0011, 0.05, 7.0):
        usual.labels("m").observe(gap_s)
        fast.of("m").add(gap_s)

    def samples(name: str) -> dict[Any, float]:
        return {
            (s.name.removeprefix(name), tuple(sorted(s.labels.items()))): s.value
            for family in registry.collect()
            for s in family.samples
            if s.name.startswith(name) and not s.name.endswith("_created")
        }

    assert samples("b_seconds") == samples("a_seconds")
