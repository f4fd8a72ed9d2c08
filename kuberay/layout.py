"""What is to be built, read from the manifests: node groups, and the service that runs on them.

The manifests are the only place where these figures live. Here they are read as eksctl and the
operator read them, so that cost, quotas and the peak of an upgrade are those of what is deployed.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kuberay import prices
from kuberay.errors import EksError
from kuberay.lines import PARSER

# The operator's own, where a RayService says nothing.
DEFAULT_STRATEGY = "NewCluster"
DEFAULT_SURGE_PERCENT = 100


@dataclass(frozen=True)
class NodeGroup:
    """A managed node group of cluster.yaml. All its instance types have the same GPUs."""

    name: str
    instance_types: tuple[str, ...]
    minimum: int
    maximum: int
    spot: bool = False
    volume_gb: int = 80
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def gpus_per_node(self) -> int:
        """Of the smallest type: what a node gives for certain. 0 for a type that is not known."""
        gpus = [prices.INSTANCES[kind].gpus for kind in self.instance_types if kind in _KNOWN]
        return min(gpus, default=0)

    @property
    def most_gpus(self) -> int:
        return self.maximum * self.gpus_per_node


_KNOWN = prices.INSTANCES.keys()


@dataclass(frozen=True)
class Workers:
    """A worker group of the RayService."""

    name: str
    minimum: int
    maximum: int
    gpus: int
    selector: Mapping[str, str]


@dataclass(frozen=True)
class Service:
    """What a RayService asks for.

    Attributes:
        prefix: what stands before the paths of its first application; empty for `route_prefix: /`.
    """

    name: str
    namespace: str
    ray_version: str
    images: tuple[str, ...]
    strategy: str
    surge_percent: int
    workers: tuple[Workers, ...]
    arguments: Mapping[str, Any]
    prefix: str = ""

    @property
    def least_gpus(self) -> int:
        return sum(group.minimum * group.gpus for group in self.workers)

    @property
    def most_gpus(self) -> int:
        return sum(group.maximum * group.gpus for group in self.workers)

    @property
    def gpus_per_worker(self) -> int:
        return max((group.gpus for group in self.workers), default=0)

    @property
    def peak_gpus(self) -> int:
        """The most GPUs at one time in an upgrade that begins with every worker there.

        None changes the running cluster, or nothing. NewCluster has the old one whole until the
        new one serves. The incremental upgrade never has more than the surge beside what is
        there, in whole workers.
        """
        if self.strategy == "None":
            return self.most_gpus
        if self.strategy == "NewClusterWithIncrementalUpgrade":
            extra = sum(
                math.ceil(group.maximum * self.surge_percent / 100) * group.gpus
                for group in self.workers
            )
            return self.most_gpus + extra
        return 2 * self.most_gpus


@dataclass(frozen=True)
class Layout:
    """The service, and the node groups that it uses: with GPUs only those that its workers select.

    Another overlay's GPU group stays empty, and costs and counts for nothing.
    """

    groups: tuple[NodeGroup, ...]
    service: Service | None
    nat_gateways: int
    zones: tuple[str, ...]
    own_network: bool
    kubernetes: str
    load_balancers: int

    @property
    def gpu_groups(self) -> tuple[NodeGroup, ...]:
        return tuple(group for group in self.groups if group.gpus_per_node > 0)

    @property
    def most_gpus(self) -> int:
        """As many GPUs as the node groups may ever have."""
        return sum(group.most_gpus for group in self.gpu_groups)


def layout(config: Mapping[str, Any], documents: Iterable[Mapping[str, Any]]) -> Layout:
    """Read cluster.yaml and the manifests that are to be applied.

    Raises:
        EksError: a node group has no instance type or no maximum.
    """
    manifests = list(documents)
    vpc = config.get("vpc") or {}
    zones = tuple(config.get("availabilityZones") or ())
    gateway = (vpc.get("nat") or {}).get("gateway", "Single")
    # eksctl takes three zones where none are named.
    nat = {"Disable": 0, "Single": 1, "HighlyAvailable": len(zones) or 3}.get(str(gateway), 1)
    services = [item for item in manifests if item.get("kind") == "RayService"]
    service = _service(services[0]) if services else None
    groups = [_node_group(group) for group in config.get("managedNodeGroups") or ()]
    return Layout(
        groups=tuple(group for group in groups if _used(group, service)),
        service=service,
        nat_gateways=0 if vpc.get("id") or vpc.get("subnets") else nat,
        zones=zones,
        own_network=not (vpc.get("id") or vpc.get("subnets")),
        kubernetes=str((config.get("metadata") or {}).get("version", "")),
        load_balancers=sum(_balanced(item) for item in manifests),
    )


def _used(group: NodeGroup, service: Service | None) -> bool:
    if group.gpus_per_node == 0 or service is None:
        return True
    return any(workers.selector.items() <= group.labels.items() for workers in service.workers)


def _balanced(item: Mapping[str, Any]) -> bool:
    """Whether a manifest brings a load balancer."""
    spec = item.get("spec") or {}
    if item.get("kind") == "RayService":
        spec = (spec.get("serveService") or {}).get("spec") or {}
    elif item.get("kind") != "Service":
        return item.get("kind") == "Ingress"
    return bool(spec.get("type") == "LoadBalancer")


def _node_group(group: Mapping[str, Any]) -> NodeGroup:
    name = str(group.get("name", "?"))
    kinds = group.get("instanceTypes") or [group.get("instanceType")]
    if not kinds or not kinds[0]:
        raise EksError(f"node group {name}: has no instanceType")
    minimum = int(group.get("minSize", group.get("desiredCapacity", 2)))
    maximum = int(group.get("maxSize", max(minimum, int(group.get("desiredCapacity", minimum)))))
    return NodeGroup(
        name=name,
        instance_types=tuple(str(kind) for kind in kinds),
        minimum=max(minimum, int(group.get("desiredCapacity", minimum))),
        maximum=maximum,
        spot=bool(group.get("spot", False)),
        volume_gb=int(group.get("volumeSize", 80)),
        labels=group.get("labels") or {},
    )


def _service(item: Mapping[str, Any]) -> Service:
    spec = item["spec"]
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or {}
    upgrade = spec.get("upgradeStrategy") or {}
    options = upgrade.get("clusterUpgradeOptions") or {}
    head = cluster.get("headGroupSpec") or {}
    groups = cluster.get("workerGroupSpecs") or []
    serve = yaml.load(str(spec.get("serveConfigV2") or ""), PARSER) or {}
    applications = serve.get("applications") or [{}]
    return Service(
        name=str(item["metadata"]["name"]),
        namespace=str(item["metadata"].get("namespace", "default")),
        ray_version=str(cluster.get("rayVersion", "")),
        images=tuple(dict.fromkeys(image for group in [head, *groups] for image in _images(group))),
        strategy=str(upgrade.get("type") or DEFAULT_STRATEGY),
        surge_percent=int(options.get("maxSurgePercent", DEFAULT_SURGE_PERCENT)),
        workers=tuple(_workers(group) for group in groups),
        arguments=applications[0].get("args") or {},
        prefix=str(applications[0].get("route_prefix") or "").removesuffix("/"),
    )


def _pod(group: Mapping[str, Any]) -> Mapping[str, Any]:
    spec: Mapping[str, Any] = (group.get("template") or {}).get("spec") or {}
    return spec


def _images(group: Mapping[str, Any]) -> list[str]:
    # The first container is Ray's. The others are told by their own checks.
    return [str(container["image"]) for container in (_pod(group).get("containers") or [])[:1]]


def _workers(group: Mapping[str, Any]) -> Workers:
    pod = _pod(group)
    limits = [
        (container.get("resources") or {}).get("limits") or {} for container in pod["containers"]
    ]
    gpus = sum(int(container.get("nvidia.com/gpu", 0)) for container in limits)
    hosts = int(group.get("numOfHosts", 1))
    minimum = int(group.get("minReplicas", 0))
    return Workers(
        name=str(group.get("groupName", "?")),
        minimum=max(minimum, int(group.get("replicas", minimum))) * hosts,
        maximum=int(group.get("maxReplicas", 2**31 - 1)) * hosts,
        gpus=gpus,
        selector=pod.get("nodeSelector") or {},
    )
