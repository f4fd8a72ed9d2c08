"""Where nothing answers, or where everybody may ask."""

from collections.abc import Iterator

from kuberay.lines import at
from kuberay.rayservice import Service
from kuberay.rules.finding import ERROR, WARNING, Finding, rule

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Annotations by which a load balancer is internal: AWS's two controllers, Google's, Azure's.
_INTERNAL = {
    "service.beta.kubernetes.io/aws-load-balancer-scheme": ("internal",),
    "service.beta.kubernetes.io/aws-load-balancer-internal": ("true", "0.0.0.0/0"),
    "networking.gke.io/load-balancer-type": ("Internal", "internal"),
    "cloud.google.com/load-balancer-type": ("Internal", "internal"),
    "service.beta.kubernetes.io/azure-load-balancer-internal": ("true",),
}


@rule("dashboard-host")
def _dashboard_host(service: Service) -> Iterator[Finding]:
    host = service.head.start.get("dashboard-host")
    if host in _LOOPBACK:
        yield Finding(
            "dashboard-host", ERROR,
            service.line(*service.head.path, "rayStartParams", "dashboard-host"),
            f"the dashboard listens on {host} of the head, where the operator cannot submit the "
            "application: it never gets ready",
            "remove it (the operator sets 0.0.0.0), and let a NetworkPolicy say who gets in",
        )  # fmt: skip


@rule("no-endpoint")
def _no_endpoint(service: Service) -> Iterator[Finding]:
    """Proxies only where the service for requests sends none."""
    location = service.serve.get("proxy_location")
    line = service.serve_line("proxy_location")
    if location == "Disabled":
        yield Finding(
            "no-endpoint", ERROR, line, "proxy_location Disabled: no pod takes requests",
            "proxy_location: EveryNode",
        )  # fmt: skip
    if service.spec.get("excludeHeadPodFromServeSvc") is not True:
        return
    excluded = service.line("spec", "excludeHeadPodFromServeSvc")
    if location == "HeadOnly":
        yield Finding(
            "no-endpoint", ERROR, line,
            f"only the head takes requests, and excludeHeadPodFromServeSvc (line {excluded}) "
            "leaves it out of the service: none has an endpoint",
            "proxy_location: EveryNode",
        )  # fmt: skip
    variables, whole = service.environment(service.head)
    alone = variables.get("RAY_SERVE_THROUGHPUT_OPTIMIZED") == "1"
    if alone and whole and variables.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        yield Finding(
            "no-endpoint", ERROR,
            service.environment_line(service.head, "RAY_SERVE_THROUGHPUT_OPTIMIZED"),
            "RAY_SERVE_THROUGHPUT_OPTIMIZED alone moves the port to the head, which "
            f"excludeHeadPodFromServeSvc (line {excluded}) leaves out of the service",
            "set RAY_SERVE_ENABLE_HA_PROXY to 1 as well, on head and workers",
        )  # fmt: skip


@rule("open-to-internet")
def _open(service: Service) -> Iterator[Finding]:
    made = service.spec.get("serveService")
    if at(made, "spec", "type") != "LoadBalancer":
        return
    annotations = at(made, "metadata", "annotations") or {}
    # The scheme decides where both of AWS's are given.
    for key, values in _INTERNAL.items():
        if key in annotations:
            if str(annotations[key]) in values:
                return
            break
    yield Finding(
        "open-to-internet", WARNING, service.line("spec", "serveService", "spec", "type"),
        "the API's load balancer is open to the internet, without TLS or a limit on who asks",
        'service.beta.kubernetes.io/aws-load-balancer-internal: "true", and a front that ends TLS',
    )  # fmt: skip
