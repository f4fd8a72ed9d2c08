"""Exports the metrics of this process to Ray's agent of the node, which Prometheus scrapes.

A Ray worker has no port that Prometheus could scrape, and several replicas may share a machine. So
every few seconds each sample of prometheus-client's registry becomes a gauge of Ray with the same
value and labels. Counts and buckets stay exact, and series end with their replica. No request waits
for this.

(Ray's own counters stay in the agent after their process has ended, and its histograms have no
exact sum; vLLM's exporter to Ray uses both for every token.)
"""

import logging
import re
import threading
from collections.abc import Iterable, Mapping

import ray
from prometheus_client import Metric
from prometheus_client.registry import REGISTRY
from ray.util import metrics as ray_metrics

logger = logging.getLogger("serve_app")

# OpenTelemetry, which Ray uses, knows no colons.
_UNSAFE = re.compile(r"[^a-zA-Z0-9_]")
# Of prometheus-client itself, and of what it knows of a process: Ray says that too.
_SKIPPED = ("python_", "process_")


class Exporter:
    """Exports until it is stopped.

    Args:
        labels: of every sample, beside its own.
    """

    def __init__(self, labels: Mapping[str, str], interval_s: float = 5.0) -> None:
        self._labels = dict(labels)
        self._interval_s = interval_s
        self._gauges: dict[str, tuple[ray_metrics.Gauge, tuple[str, ...]]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    @classmethod
    def of_replica(cls) -> "Exporter":
        """For the replica of Ray Serve that this process is."""
        from ray import serve

        context = serve.get_replica_context()
        labels = {"deployment": context.deployment, "replica": context.replica_tag}
        # Ray passes on what it was told last every so often (10 s by default), and forgets a gauge
        # that it was not told again within twice that.
        exporter = cls(labels, ray._config.metrics_report_interval_ms() / 2000)
        exporter._thread.start()
        return exporter

    def stop(self) -> None:
        self._over.set()

    def _run(self) -> None:
        reported = False
        while not self._over.wait(self._interval_s):
            try:
                self.export(REGISTRY.collect())
            except Exception:
                # Once: a metric that cannot be exported must not fill the log, or end the others.
                if not reported:
                    logger.exception("metrics could not be exported")
                reported = True

    def export(self, families: Iterable[Metric]) -> None:
        for family in families:
            if family.name.startswith(_SKIPPED):
                continue
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    self._set(sample.name, family.documentation, sample.labels, sample.value)

    def _set(self, name: str, text: str, labels: Mapping[str, str], value: float) -> None:
        tags = {**labels, **self._labels}
        if name not in self._gauges:
            keys = tuple(tags)
            gauge = ray_metrics.Gauge(_UNSAFE.sub("_", name), text, tag_keys=keys)
            self._gauges[name] = gauge, keys
        gauge, keys = self._gauges[name]
        gauge.set(value, {key: str(tags[key]) for key in keys})
