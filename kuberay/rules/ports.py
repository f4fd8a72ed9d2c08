"""Ports that are looked for by name, or where nobody listens."""

from collections.abc import Iterator, Mapping
from typing import Any

from kuberay.lines import at
from kuberay.rayservice import METRICS_PORT, SERVE_PORT, Service
from kuberay.rules.finding import ERROR, WARNING, Finding, rule


@rule("metrics-port")
def _metrics_ports(service: Service) -> Iterator[Finding]:
    """Ports that are scraped by name, and are not declared or are not where Ray listens."""
    for group in service.groups:
        ports = group.ports()
        path = (*group.container_path, "ports")
        listens = int(group.start.get("metrics-export-port", METRICS_PORT))
        declared = ports.get("metrics", METRICS_PORT)  # The operator adds 8080 where none is.
        if listens != declared:
            yield Finding(
                "metrics-port", WARNING,
                service.line(*group.path, "rayStartParams", "metrics-export-port"),
                f"Ray of {group.name} offers its metrics on {listens}, and the port named metrics "
                f"is {declared}: nothing is scraped",
                f"declare {{name: metrics, containerPort: {listens}}}",
            )  # fmt: skip
        if not group.head:
            continue
        wanted = {"dash-metrics": 44227} | ({"as-metrics": 44217} if service.autoscaling else {})
        for name, port in wanted.items():
            if port not in ports.values():
                yield Finding(
                    "metrics-port", WARNING, service.line(*path),
                    f"the head does not declare {name} ({port}): no PodMonitor can name it",
                    f"declare {{name: {name}, containerPort: {port}}}",
                )  # fmt: skip
    for monitor in service.others:
        if at(monitor, "kind") == "PodMonitor":
            yield from _monitored(service, monitor)


def _monitored(service: Service, monitor: Mapping[str, Any]) -> Iterator[Finding]:
    wanted = at(monitor, "spec", "selector", "matchLabels") or {}
    kind = wanted.get("ray.io/node-type")
    for group in service.groups:
        if kind != ("head" if group.head else "worker"):
            continue
        declared = {"metrics", *group.ports()}
        for endpoint in at(monitor, "spec", "podMetricsEndpoints") or []:
            name = at(endpoint, "port")
            if name and name not in declared:
                yield Finding(
                    "metrics-port", WARNING, service.line(*group.container_path, "ports"),
                    f"PodMonitor {at(monitor, 'metadata', 'name')} scrapes the port {name} of "
                    f"{group.name}, which is not declared",
                    f"declare it in {group.name}'s ports",
                )  # fmt: skip


@rule("serve-port")
def _serve_port(service: Service) -> Iterator[Finding]:
    port = int(at(service.serve, "http_options", "port") or SERVE_PORT)
    line = service.line(*service.head.container_path, "ports")
    mend = f"declare {{name: serve, containerPort: {port}}} on the head, even if it serves none"
    served = _served_ports(service)
    if not served:
        yield Finding(
            "serve-port", ERROR, line,
            "the head declares ports, and none is named serve or serve-...: the operator makes no "
            "service for requests",
            mend,
        )  # fmt: skip
    elif "serve" in served and served["serve"] != port:
        yield Finding(
            "serve-port", ERROR, line,
            f"Ray Serve listens on {port}, and the service for requests leads to {served['serve']}",
            mend,
        )  # fmt: skip
    for group in service.workers:
        declared = group.ports().get("serve", SERVE_PORT)
        # The operator asks this port only in the probe that it adds itself.
        if declared != port and "readinessProbe" not in group.container:
            yield Finding(
                "serve-port", ERROR, service.line(*group.container_path, "ports"),
                f"Ray Serve listens on {port}, and the port named serve of {group.name} is "
                f"{declared}: its readiness probe never succeeds",
                f"declare {{name: serve, containerPort: {port}}}",
            )  # fmt: skip


def _served_ports(service: Service) -> dict[str, int]:
    """The ports of the service for requests, as BuildServeService of the operator makes it."""
    ports = {
        name: number
        for name, number in service.head.ports().items()
        if name == "serve" or name.startswith("serve-")
    }
    if not service.head.container.get("ports"):
        ports = {"serve": SERVE_PORT}  # Of a head that declares none, the operator adds its own.
    if service.upgrade == "NewClusterWithIncrementalUpgrade":
        return ports
    for port in at(service.spec, "serveService", "spec", "ports") or []:
        name, target = str(at(port, "name")), at(port, "targetPort") or at(port, "port")
        if (name in ports or not ports) and isinstance(target, int):
            ports[name] = target
    return ports


@rule("serve-host")
def _serve_host(service: Service) -> Iterator[Finding]:
    host = at(service.serve, "http_options", "host")
    if host in ("127.0.0.1", "localhost", "::1"):
        yield Finding(
            "serve-host", ERROR, service.serve_line("http_options", "host"),
            f"Ray Serve listens on {host} of each pod, which its service cannot reach",
            "host: 0.0.0.0",
        )  # fmt: skip
