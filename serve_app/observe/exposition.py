"""/metrics of one replica: all of its series, except those of other tenants than the key's.

Prometheus does not use this route: it scrapes Ray's agent of each node, which requires no key
(export.py). Behind a load balancer this route shows one replica of several.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import REGISTRY
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.gates.keys import tenant
from serve_app.observe import metrics


class Exposition:
    """ASGI middleware: answers /metrics.

    Args:
        by_tenant: whether each tenant sees its own series only; without keys there are no tenants.
    """

    def __init__(self, app: ASGIApp, by_tenant: bool) -> None:
        self.app = app
        self._by_tenant = by_tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != "/metrics":
            await self.app(scope, receive, send)
            return
        encode, content_type = choose_encoder(Headers(scope=scope).get("accept", ""))
        # No series has an empty label: who has none of its own is shown no tenant's.
        shown = (metrics.own_label(tenant.get()) or "") if self._by_tenant else None
        body = encode(_FilteredRegistry(shown))
        headers = [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _FilteredRegistry:
    """A registry for prometheus-client's encoders, restricted to one tenant if one is named."""

    def __init__(self, tenant_name: str | None) -> None:
        self._tenant_name = tenant_name

    def collect(self) -> Iterator[Metric]:
        families = REGISTRY.collect()
        return iter(
            families if self._tenant_name is None else of_tenant(families, self._tenant_name)
        )


def of_tenant(families: Iterable[Metric], tenant_name: str) -> Iterator[Metric]:
    """The families without the series of other tenants."""
    for family in families:
        own = [
            sample
            for sample in family.samples
            if sample.labels.get("tenant", tenant_name) == tenant_name
        ]
        filtered = Metric(family.name, family.documentation, family.type, family.unit)
        filtered.samples = own
        if own or not family.samples:
            yield filtered
