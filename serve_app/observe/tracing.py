"""OpenTelemetry traces, from the gateway over the replica to vLLM's own span. Off by default.

`traces_endpoint` names a collector that accepts OTLP over HTTP. A span has the tenant, the times
and the status of a request, and none of its content.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract, inject
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind
from starlette.types import Scope

# vLLM makes its exporter from this; its own default is gRPC.
ENVIRONMENT = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}


class Tracer:
    """Makes one span of each request.

    Args:
        endpoint: http://host:4318/v1/traces
        service: the service name of the spans.
    """

    def __init__(self, endpoint: str, service: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("serve_app")

    @contextmanager
    def span(self, scope: Scope, request_id: str) -> Iterator[Span]:
        """A span around a request. Later processes join its trace."""
        given = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        with self._tracer.start_as_current_span(
            f"{scope['method']} {scope['path']}",
            context=extract(given),
            kind=SpanKind.SERVER,
            attributes={"http.request.id": request_id, "url.path": scope["path"]},
        ) as span:
            carried: dict[str, str] = {}
            inject(carried)
            others = [pair for pair in scope["headers"] if pair[0].decode("latin-1") not in carried]
            added = [(name.encode(), value.encode()) for name, value in carried.items()]
            scope["headers"] = [*others, *added]
            yield span

    def close(self) -> None:
        self._provider.shutdown()
