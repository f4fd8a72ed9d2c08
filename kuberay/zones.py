"""The zones of a cluster and of each of its node groups: those that offer their instance types.

eksctl takes zones by chance, of those that offer every type of every group. So a region in which
one overlay's type is missing could hold no overlay at all. Here they are chosen for the one that
is deployed; preflight shows the same choice that `up` gives to eksctl.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kuberay.aws import Account, tags
from kuberay.errors import AwsError
from kuberay.layout import Layout, NodeGroup
from kuberay.owned import Owner

# Zones in which EKS puts no control plane, as eksctl leaves them out (pkg/az/az.go).
_WITHOUT_EKS = ("use1-az3", "usw1-az2", "cac1-az3", "cnn1-az4")
_WANTED = 3


@dataclass(frozen=True)
class Zones:
    """Where things go.

    Attributes:
        network: zones of the cluster's network.
        offered: zones of the region that offer a type, by type.
        groups: zones of the network in which a node group can start nodes, by its name.
        made: the network exists already.
    """

    network: tuple[str, ...]
    offered: Mapping[str, frozenset[str]]
    groups: Mapping[str, tuple[str, ...]]
    made: bool = False

    def types(self, group: NodeGroup) -> tuple[str, ...]:
        """The types of a group that the network's zones offer."""
        return tuple(kind for kind in group.instance_types if self.offered[kind] & {*self.network})


def choose(
    groups: Iterable[NodeGroup],
    offered: Mapping[str, frozenset[str]],
    usable: Iterable[str],
    named: Iterable[str] = (),
    made: bool = False,
) -> Zones:
    """Choose zones for node groups.

    Args:
        usable: zones in which a control plane may stand.
        named: zones that are given: those of cluster.yaml, or of a network that exists.
    """
    listed = list(groups)
    network = tuple(named) or _network(listed, offered, sorted(usable))
    own = {group.name: _of_group(group, offered, network) for group in listed}
    return Zones(network, offered, own, made)


def _network(
    groups: list[NodeGroup], offered: Mapping[str, frozenset[str]], usable: list[str]
) -> tuple[str, ...]:
    """Three zones, or two, that hold as many of the groups as there are."""

    def holds(zone: str) -> int:
        return sum(zone in _of_group(group, offered, usable) for group in groups)

    best = sorted(usable, key=lambda zone: (-holds(zone), zone))
    whole = [zone for zone in best if holds(zone) == len(groups)]
    # EKS wants two zones, also where one of them starts no GPU node.
    return tuple(sorted(whole[:_WANTED] if len(whole) >= 2 else best[:2]))


def _of_group(
    group: NodeGroup, offered: Mapping[str, frozenset[str]], zones: Iterable[str]
) -> tuple[str, ...]:
    """Zones that offer all the group's types that are offered here; else those that offer one."""
    inside = {*zones}
    offering = [offered[kind] & inside for kind in group.instance_types if offered[kind] & inside]
    if not offering:
        return ()
    return tuple(sorted(frozenset.intersection(*offering) or frozenset.union(*offering)))


# --- asked -------------------------------------------------------------------------------------


def find(account: Account, owner: Owner, plan: Layout) -> Zones:
    """Ask AWS for what is offered where, and choose."""
    kinds = sorted({kind for group in plan.groups for kind in group.instance_types})
    offered: dict[str, set[str]] = {kind: set() for kind in kinds}
    for entry in account.pages(
        "ec2",
        "describe_instance_type_offerings",
        "InstanceTypeOfferings",
        LocationType="availability-zone",
        Filters=[{"Name": "instance-type", "Values": kinds}],
    ):
        offered[entry["InstanceType"]].add(entry["Location"])
    listed = account.call("ec2", "describe_availability_zones")["AvailabilityZones"]
    usable = [
        zone["ZoneName"]
        for zone in listed
        if zone["State"] == "available"
        and zone.get("ZoneType", "availability-zone") == "availability-zone"
        and zone.get("ZoneId") not in _WITHOUT_EKS
    ]
    current = _of_cluster(account, owner)
    frozen = {kind: frozenset(zones) for kind, zones in offered.items()}
    return choose(plan.groups, frozen, usable, current or plan.zones, made=bool(current))


def _of_cluster(account: Account, owner: Owner) -> tuple[str, ...]:
    """The zones of the network of a cluster of ours; none where there is no such cluster."""
    try:
        description = account.call("eks", "describe_cluster", name=owner.name)["cluster"]
    except AwsError as error:
        if error.absent:
            return ()
        raise
    subnets = (description.get("resourcesVpcConfig") or {}).get("subnetIds") or []
    if not owner.marks(tags(description, "tags")) or not subnets:
        return ()
    described = account.call("ec2", "describe_subnets", SubnetIds=subnets)["Subnets"]
    return tuple(sorted({item["AvailabilityZone"] for item in described}))


# --- given to eksctl -----------------------------------------------------------------------------


def applied(config: Mapping[str, Any], plan: Layout, zones: Zones) -> dict[str, Any]:
    """cluster.yaml with these zones, and the node groups that the overlay uses.

    Another overlay's group is made with that overlay: its types may not be offered here.
    """
    used = {group.name: group for group in plan.groups}
    groups = []
    for given in config.get("managedNodeGroups") or ():
        group = used.get(str(given.get("name")))
        if group is None:
            continue
        changed = dict(given)
        if "instanceTypes" in given and (types := zones.types(group)):
            changed["instanceTypes"] = list(types)
        own = zones.groups[group.name]
        if plan.own_network and own and set(own) != set(zones.network):
            changed["availabilityZones"] = list(own)
        groups.append(changed)
    patched = {**config, "managedNodeGroups": groups}
    if plan.own_network and not zones.made:
        patched["availabilityZones"] = list(zones.network)
    return patched
