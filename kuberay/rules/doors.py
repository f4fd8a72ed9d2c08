"""Who may reach Ray, and secrets that are none."""

import re
from collections.abc import Iterator
from typing import Any

from kuberay.lines import at
from kuberay.rayservice import Service
from kuberay.rules.finding import ERROR, WARNING, Finding, rule

_OPEN = ("LoadBalancer", "NodePort")


@rule("dashboard-exposed")
def _dashboard(service: Service) -> Iterator[Finding]:
    """Whoever reaches the dashboard, its jobs API or the client server runs code."""
    head, path = service.head, service.head.path
    doors = []
    if head.spec.get("serviceType") in _OPEN:
        doors.append(
            ((*path, "serviceType"), f"headGroupSpec.serviceType: {head.spec['serviceType']}")
        )
    kind = at(head.spec, "headService", "spec", "type")
    if kind in _OPEN:
        doors.append(((*path, "headService", "spec", "type"), f"a head service of type {kind}"))
    if head.spec.get("enableIngress") is True:
        doors.append(((*path, "enableIngress"), "enableIngress: true"))
    if head.pod.get("hostNetwork") is True:
        doors.append(((*head.pod_path, "hostNetwork"), "hostNetwork: true on the head"))
    for where, what in doors:
        yield _door(service.line(*where), what)
    for other in service.others:
        yield from _exposed_by(service, other)


def _exposed_by(service: Service, other: Any) -> Iterator[Finding]:
    """Services and Ingresses of the same files that lead to the head."""
    ports = {8265, 10001, "dashboard", "client"}
    if at(other, "kind") == "Service" and at(other, "spec", "type") in _OPEN:
        selector = at(other, "spec", "selector") or {}
        targets = {
            at(port, key)
            for port in at(other, "spec", "ports") or []
            for key in ("port", "targetPort")
        }
        leads = selector.get("ray.io/node-type") == "head" or "headgroup" in selector.values()
        if leads and targets & ports:
            yield _door(other.line, f"Service {at(other, 'metadata', 'name')}")
    if at(other, "kind") == "Ingress":
        text = str(at(other, "spec"))
        if f"{service.name}-head-svc" in text:
            yield _door(other.line, f"Ingress {at(other, 'metadata', 'name')}")


def _door(line: int, what: str) -> Finding:
    return Finding(
        "dashboard-exposed", ERROR, line,
        f"{what} offers Ray's dashboard and its jobs beyond the cluster: who reaches it runs code",
        "ClusterIP, and `kubectl port-forward` for who may; expose serve-svc only",
    )  # fmt: skip


@rule("no-token")
def _no_token(service: Service) -> Iterator[Finding]:
    if at(service.cluster, "authOptions", "mode") != "token":
        yield Finding(
            "no-token", WARNING, service.line(*service.cluster_path, "authOptions"),
            "Ray asks nobody who they are: every pod that reaches the head can run code there",
            "authOptions: {mode: token} (Ray 2.52 or later), and a NetworkPolicy",
        )  # fmt: skip


_SECRET = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEYS?|ACCESS_KEY)$", re.IGNORECASE)


@rule("secret-in-file")
def _secret(service: Service) -> Iterator[Finding]:
    for group in service.groups:
        for index, container in enumerate(group.pod.get("containers") or []):
            for place, entry in enumerate(at(container, "env") or []):
                name, value = str(at(entry, "name")), at(entry, "value")
                if value and _SECRET.search(name):
                    line = service.line(*group.pod_path, "containers", index, "env", place)
                    yield _written(line, name)
        password = str(group.start.get("redis-password", "$"))
        if not password.startswith("$"):
            line = service.line(*group.path, "rayStartParams", "redis-password")
            yield _written(line, "redis-password")
    if at(service.cluster, "gcsFaultToleranceOptions", "redisPassword", "value"):
        line = service.line(*service.cluster_path, "gcsFaultToleranceOptions", "redisPassword")
        yield _written(line, "redisPassword")


def _written(line: int, name: str) -> Finding:
    return Finding(
        "secret-in-file", WARNING, line, f"{name} is written in the manifest",
        "valueFrom: {secretKeyRef: ...}, and a new secret: this one has been seen",
    )  # fmt: skip
