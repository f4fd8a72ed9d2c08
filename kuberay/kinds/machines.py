"""Instances, and everything that starts instances."""

from collections.abc import Iterator
from typing import Any

from kuberay import prices
from kuberay.aws import tags
from kuberay.search import Found, Search


def groups(search: Search) -> Iterator[Found]:
    key = "AutoScalingGroups"
    for group in search.account.pages("autoscaling", "describe_auto_scaling_groups", key):
        detail = f"desired {group['DesiredCapacity']}, maximum {group['MaxSize']}"
        # It has a status only while it is being deleted.
        leaving = bool(group.get("Status"))
        subnets = str(group.get("VPCZoneIdentifier", "")).split(",")
        yield from search.resource(
            "auto scaling group", group["AutoScalingGroupName"], tags(group), 0.0, detail,
            leaving=leaving, network=search.network_of(subnets[0]),
        )  # fmt: skip


def spot_requests(search: Search) -> Iterator[Found]:
    """A persistent one starts a new instance for each that is terminated."""
    for item in search.ec2("describe_spot_instance_requests", "SpotInstanceRequests"):
        if item["State"] in ("open", "active", "disabled"):
            # The instance has the price.
            detail = f"{item.get('Type', '')}, {item['State']}"
            yield from search.resource(
                "spot request", item["SpotInstanceRequestId"], tags(item), 0.0, detail
            )


def fleets(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_fleets", "Fleets"):
        state = item.get("FleetState", "")
        if state not in ("deleted", "deleted_terminating", "failed"):
            leaving = state.startswith("deleted")
            yield from search.resource(
                "fleet", item["FleetId"], tags(item), 0.0, state, leaving=leaving
            )


def instances(search: Search) -> Iterator[Found]:
    for reservation in _reservations(search):
        for instance in reservation["Instances"]:
            state, kind = instance["State"]["Name"], instance["InstanceType"]
            if state == "terminated":
                continue
            carried = tags(instance)
            running = state in ("pending", "running")
            hourly = prices.instance_per_hour(kind) if running else 0.0
            usd = None if hourly is None else prices.monthly(hourly)
            detail = f"{kind}, {state} {carried.get('Name', '')}".rstrip()
            yield from search.resource(
                "instance", instance["InstanceId"], carried, usd, detail,
                leaving=state == "shutting-down", network=instance.get("VpcId", ""),
            )  # fmt: skip


def _reservations(search: Search) -> Iterator[Any]:
    """By the cluster's tags, and by its VPC: those that somebody started there by hand."""
    seen = set()
    for item in search.ec2("describe_instances", "Reservations"):
        seen.add(item["ReservationId"])
        yield item
    if search.networks:
        inside = [{"Name": "vpc-id", "Values": sorted(search.networks)}]
        for item in search.account.pages(
            "ec2", "describe_instances", "Reservations", Filters=inside
        ):
            if item["ReservationId"] not in seen:
                yield item


def launch_templates(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_launch_templates", "LaunchTemplates"):
        name = item["LaunchTemplateName"]
        yield from search.resource(
            "launch template", item["LaunchTemplateId"], tags(item), 0.0, name
        )
