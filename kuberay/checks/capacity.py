"""Whether the region, its quotas and its network have room for the node groups."""

import re
from collections.abc import Mapping
from typing import Any

from kuberay import cost, prices, zones
from kuberay.aws import Account
from kuberay.checks.check import FAIL, OK, WARN, Check, unchecked
from kuberay.cluster import status
from kuberay.errors import AwsError
from kuberay.layout import Layout, NodeGroup
from kuberay.target import Target
from kuberay.zones import Zones

# EC2's quotas of running vCPUs, on demand and spot, by the first letter of an instance type.
_VCPU_QUOTAS: Mapping[str, tuple[str, str]] = {
    "g": ("L-DB2E81BA", "L-3819A6DF"),
    "p": ("L-417A185B", "L-7212CCBC"),
    "standard": ("L-1216C47A", "L-34B43A08"),
}
_VPC_QUOTA = ("vpc", "L-F678F1CE", "VPCs")
_ADDRESS_QUOTA = ("ec2", "L-0263D0A3", "elastic IPs")


def zoned(to: Target, plan: Layout) -> tuple[dict[str, Any], list[Check]]:
    """cluster.yaml with the zones that are chosen for the overlay, and the lines about them."""
    try:
        zones_found = zones.find(to.account, to.owner, plan)
    except AwsError as error:
        return dict(to.config), [unchecked("instance types", error)]
    return zones.applied(to.config, plan, zones_found), instance_types(plan, zones_found)


def instance_types(plan: Layout, zones_found: Zones) -> list[Check]:
    """Which zones offer the types of each node group, and which were chosen."""
    where = f"{', '.join(zones_found.network)}{' (of the cluster)' if zones_found.made else ''}"
    for name, own in zones_found.groups.items():
        if own and set(own) != set(zones_found.network):
            where += f"; {name} in {', '.join(own)} only"
    checks = [Check("zones", OK, where)]
    for kind in sorted(zones_found.offered):
        inside = sorted(zones_found.offered[kind] & {*zones_found.network})
        groups = [group for group in plan.groups if kind in group.instance_types]
        name = f"zones of {kind}"
        elsewhere = ", ".join(sorted(zones_found.offered[kind])) or "no zone of this region"
        if not inside and all(zones_found.groups[group.name] for group in groups):
            mend = f"offered in: {elsewhere}; the group's other types are taken"
            checks.append(Check(name, WARN, f"none of {', '.join(zones_found.network)}", mend))
        elif not inside:
            mend = f"offered in: {elsewhere}; change availabilityZones, the type or the region"
            checks.append(Check(name, FAIL, f"none of {', '.join(zones_found.network)}", mend))
        elif len(inside) == 1:
            mend = "one zone that runs out stops scaling: name a second instance type"
            checks.append(Check(name, WARN, inside[0], mend))
        else:
            checks.append(Check(name, OK, ", ".join(inside)))
    return checks


def vcpu_quotas(account: Account, plan: Layout) -> list[Check]:
    """Running vCPUs that each quota allows, against what the node groups may come to."""
    by_quota: dict[tuple[str, bool], list[NodeGroup]] = {}
    for group in plan.groups:
        by_quota.setdefault((_family(group.instance_types[0]), group.spot), []).append(group)
    running = running_vcpus(account)
    checks = []
    for (family, spot), groups in by_quota.items():
        code = _VCPU_QUOTAS[family][spot]
        allowed = quota(account, "ec2", code)
        used = running.get((family, spot), 0)
        least = sum(cost.at_rest(plan, group) * _vcpus(account, group) for group in groups)
        at_most = sum(group.maximum * _vcpus(account, group) for group in groups)
        word = "standard" if family == "standard" else family.upper()
        name = f"quota {word}{' spot' if spot else ''}"
        summary = f"{allowed:.0f} vCPUs, {used} in use; {least} at rest, {at_most} at most"
        mend = (
            f"ask for {used + at_most}: aws service-quotas request-service-quota-increase --region "
            f"{account.region} --service-code ec2 --quota-code {code} "
            f"--desired-value {used + at_most}"
        )
        if used + at_most <= allowed:
            checks.append(Check(name, OK, summary))
        elif used + least <= allowed:
            checks.append(Check(name, WARN, f"{summary}: scaling will stop before the most", mend))
        else:
            checks.append(Check(name, FAIL, summary, mend))
    return checks


def _family(kind: str) -> str:
    letter = re.match(r"[a-z]+", kind)
    first = letter[0] if letter else ""
    # "gr6" and "vt1" count as G; "g5", "g6e" too.
    return "g" if first in ("g", "gr", "vt") else "p" if first == "p" else "standard"


def _vcpus(account: Account, group: NodeGroup) -> int:
    """Of the largest type of a group."""
    kinds = list(group.instance_types)
    if all(kind in prices.INSTANCES for kind in kinds):
        return max(prices.INSTANCES[kind].vcpus for kind in kinds)
    types = account.call("ec2", "describe_instance_types", InstanceTypes=kinds)["InstanceTypes"]
    return max(int(entry["VCpuInfo"]["DefaultVCpus"]) for entry in types)


def running_vcpus(account: Account) -> dict[tuple[str, bool], int]:
    """What runs in the region now, by quota."""
    used: dict[tuple[str, bool], int] = {}
    states = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    for reservation in account.pages("ec2", "describe_instances", "Reservations", Filters=states):
        for instance in reservation["Instances"]:
            # A quota counts a type's vCPUs, however many of them an instance has switched on.
            instance_type = prices.INSTANCES.get(instance["InstanceType"])
            options = instance.get("CpuOptions") or {}
            cpus = int(options.get("CoreCount", 1)) * int(options.get("ThreadsPerCore", 1))
            cpus = instance_type.vcpus if instance_type is not None else cpus
            spot = instance.get("InstanceLifecycle") == "spot"
            key = (_family(instance["InstanceType"]), spot)
            used[key] = used.get(key, 0) + cpus
    return used


def quota(account: Account, service: str, code: str) -> float:
    answer = account.call(
        "service-quotas", "get_service_quota", ServiceCode=service, QuotaCode=code
    )
    return float(answer["Quota"]["Value"])


def network_quotas(account: Account, to: Target, plan: Layout) -> list[Check]:
    """A VPC of its own, and an address for each NAT gateway; none for a cluster that exists."""
    if status(account, to.owner.name):
        return []
    networks = len(list(account.pages("ec2", "describe_vpcs", "Vpcs")))
    addresses = len(account.call("ec2", "describe_addresses")["Addresses"])
    checks = []
    for (service, code, name), used, more in (
        (_VPC_QUOTA, networks, 1),
        (_ADDRESS_QUOTA, addresses, plan.nat_gateways),
    ):
        allowed = quota(account, service, code)
        summary = f"{allowed:.0f}, {used} in use, {more} more needed"
        good = used + more <= allowed
        mend = (
            f"release what is not used, or: aws service-quotas request-service-quota-increase "
            f"--region {account.region} --service-code {service} --quota-code {code} "
            f"--desired-value {used + more}"
        )
        checks.append(Check(name, OK if good else FAIL, summary, "" if good else mend))
    return checks


def subnets(account: Account, config: Mapping[str, Any]) -> list[Check]:
    """Subnets that cluster.yaml brings: there, in two zones, with free addresses."""
    named: list[str] = []
    for side in ((config.get("vpc") or {}).get("subnets") or {}).values():
        for key, entry in side.items():
            name = (entry or {}).get("id") or key
            if str(name).startswith("subnet-"):
                named.append(str(name))
    if not named:
        return [Check("subnets", WARN, "none is named by its id", "name them by id to check them")]
    described = account.call("ec2", "describe_subnets", SubnetIds=named)["Subnets"]
    zones = {item["AvailabilityZone"] for item in described}
    free = min(item["AvailableIpAddressCount"] for item in described)
    summary = (
        f"{len(described)} in {', '.join(sorted(zones))}; {free} free addresses in the fullest"
    )
    if len(zones) < 2:
        return [Check("subnets", FAIL, summary, "EKS needs subnets in two zones")]
    if free < 32:
        return [Check("subnets", WARN, summary, "each pod takes an address: take larger subnets")]
    return [Check("subnets", OK, summary)]
