"""`python -m kuberay status`: what is up, what it costs an hour now, and how long it may stay.

AWS is asked first and kubectl after it, so that a cluster whose API server does not answer is still
seen, with its bill. Exit status: 0 serving and within its hours; 1 anything else, an outlived
cluster above all, so that a timer or a CI job can watch.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from kuberay import console, kinds, prices, target
from kuberay.aws import Account, tags
from kuberay.errors import AwsError, ToolError
from kuberay.owned import Owner
from kuberay.search import Search
from kuberay.target import Target
from kuberay.tools import Tools, tools
from kuberay.ttl import Ttl


@dataclass(frozen=True)
class Group:
    """A node group now."""

    name: str
    status: str
    nodes: int
    least: int
    most: int
    instance_types: str


@dataclass(frozen=True)
class Served:
    """A RayService now, by its conditions."""

    name: str
    namespace: str
    ready: bool
    upgrading: bool
    message: str


@dataclass(frozen=True)
class Status:
    """A cluster now. `problems` are why the exit status is 1."""

    name: str
    region: str
    state: str
    kubernetes: str
    groups: tuple[Group, ...]
    instances: tuple[str, ...]
    usd_per_hour: float
    services: tuple[Served, ...]
    expires: str | None
    expiry: str
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        shown = [f"{self.name} in {self.region}: {self.state or 'no cluster'} {self.kubernetes}"]
        for group in self.groups:
            size = f"{group.nodes} nodes ({group.least} to {group.most})"
            shown.append(
                f"  node group {group.name}: {group.status}, {size}, {group.instance_types}"
            )
        shown += [f"  instance {instance}" for instance in self.instances]
        for served in self.services:
            state = "ready" if served.ready else f"NOT ready: {served.message}"
            more = ", an upgrade is under way" if served.upgrading else ""
            shown.append(f"  RayService {served.namespace}/{served.name}: {state}{more}")
        if self.state:
            month = prices.monthly(self.usd_per_hour)
            shown.append(f"  costs {self.usd_per_hour:.2f} $/hour now, {month:.0f} $/month so")
            shown.append(f"  hours: {self.expiry}")
        return [*shown, *(f"PROBLEM: {problem}" for problem in self.problems)]


@console.reports_errors
def command(options: argparse.Namespace) -> int:
    to = Target.of(options)
    outcome = status(to, kubernetes=not options.aws_only)
    print(json.dumps(asdict(outcome)) if options.json else "\n".join(outcome.lines()))
    return 1 if outcome.problems else 0


def status(to: Target, kubernetes: bool = True, now: datetime | None = None) -> Status:
    """Look at the account, then at the cluster."""
    now = now or datetime.now(UTC)
    account, owner = to.account, to.owner
    try:
        description = account.call("eks", "describe_cluster", name=owner.name)["cluster"]
    except AwsError as error:
        if not error.absent:
            raise
        problem = "there is no such cluster (python -m kuberay.sweep says what is left of one)"
        empty: tuple[Any, ...] = ()
        return Status(
            owner.name, owner.region, "", "", empty, empty, 0.0, empty, None, "", (problem,)
        )
    problems = []
    if description["status"] != "ACTIVE":
        problems.append(f"EKS says {description['status']}")
    limit = Ttl.of(tags(description, "tags"))
    if limit.expired(now):
        problems.append(
            f"this cluster outlived its hours: {limit.describe(now)}. Take it down: make eks-down"
        )
    groups = tuple(node_groups(account, owner.name))
    problems += [f"node group {g.name} is {g.status}" for g in groups if g.status != "ACTIVE"]
    instances, usd = running(account, owner)
    services: tuple[Served, ...] = ()
    if kubernetes:
        try:
            with tools(to) as run:
                run.connect()
                services = tuple(served(run))
        except ToolError as error:
            problems.append(f"the cluster could not be asked: {error}")
        else:
            if not services:
                problems.append("no RayService is there")
            problems += [f"RayService {s.name}: {s.message}" for s in services if not s.ready]
    return Status(
        name=owner.name,
        region=owner.region,
        state=str(description["status"]),
        kubernetes=f"Kubernetes {description.get('version', '?')}",
        groups=groups,
        instances=instances,
        usd_per_hour=usd + prices.CONTROL_PLANE_PER_HOUR,
        services=services,
        expires=limit.expires.isoformat() if limit.expires else None,
        expiry=limit.describe(now),
        problems=tuple(problems),
    )


def node_groups(account: Account, name: str) -> list[Group]:
    groups = []
    for group in account.pages("eks", "list_nodegroups", "nodegroups", clusterName=name):
        description = account.call(
            "eks", "describe_nodegroup", clusterName=name, nodegroupName=group
        )["nodegroup"]
        sizes = description.get("scalingConfig") or {}
        groups.append(
            Group(
                name=group,
                status=str(description.get("status")),
                nodes=int(sizes.get("desiredSize", 0)),
                least=int(sizes.get("minSize", 0)),
                most=int(sizes.get("maxSize", 0)),
                instance_types=", ".join(description.get("instanceTypes") or ()),
            )
        )
    return groups


def running(account: Account, owner: Owner) -> tuple[tuple[str, ...], float]:
    """Its instances, NAT gateways, load balancers and volumes: the kinds that bill by the hour."""
    search = Search(account, owner)
    shown, usd_per_month = [], 0.0
    for kind in ("instance", "NAT gateway", "elastic IP", "load balancer",
                 "classic load balancer", "volume"):  # fmt: skip
        for resource in kinds.BY_NAME[kind].find(search):
            usd_per_month += resource.usd_per_month or 0.0
            if kind == "instance":
                shown.append(f"{resource.id}: {resource.detail}")
    return tuple(shown), usd_per_month / prices.HOURS_PER_MONTH


def served(run: Tools) -> list[Served]:
    """Every RayService, by what its operator says of it."""
    services = []
    for item in run.items("rayservices.ray.io"):
        conditions = {c["type"]: c for c in (item.get("status") or {}).get("conditions") or ()}
        ready = conditions.get("Ready") or {}
        upgrading = conditions.get("UpgradeInProgress") or {}
        services.append(
            Served(
                name=item["metadata"]["name"],
                namespace=item["metadata"]["namespace"],
                ready=ready.get("status") == "True",
                upgrading=upgrading.get("status") == "True",
                message=str(ready.get("message") or "the operator has not said anything yet"),
            )
        )
    return services


def arguments(parser: argparse.ArgumentParser) -> None:
    target.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--aws-only", action="store_true", help="do not ask the cluster itself")
