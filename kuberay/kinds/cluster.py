"""The cluster itself, its node groups, and the stacks that made them."""

from collections.abc import Iterator
from typing import Any

from kuberay import prices
from kuberay.aws import Account, tags
from kuberay.errors import AwsError, InUse
from kuberay.search import Found, Search


def _cluster(search: Search) -> dict[str, Any] | None:
    """EKS's description of the cluster, if there is one of this name."""
    try:
        cluster = search.account.call("eks", "describe_cluster", name=search.owner.name)["cluster"]
    except AwsError as error:
        if error.absent:
            return None
        raise
    return dict(cluster) if search.owner.owns(tags(cluster, "tags")) else None


def clusters(search: Search) -> Iterator[Found]:
    description = _cluster(search)
    if description is None:
        return
    usd = prices.monthly(prices.CONTROL_PLANE_PER_HOUR)
    version = f"Kubernetes {description.get('version', '?')}, {description['status']}"
    leaving = description["status"] == "DELETING"
    carried = tags(description, "tags")
    yield from search.resource(
        "cluster", description["name"], carried, usd, version, leaving=leaving
    )


def node_groups(search: Search) -> Iterator[Found]:
    cluster = _cluster(search)
    if cluster is None:
        return
    name = search.owner.name
    for group in search.account.pages("eks", "list_nodegroups", "nodegroups", clusterName=name):
        described = search.account.call(
            "eks", "describe_nodegroup", clusterName=name, nodegroupName=group
        )["nodegroup"]
        size = described.get("scalingConfig", {}).get("desiredSize", 0)
        kinds = ", ".join(described.get("instanceTypes") or ["of its launch template"])
        leaving = described.get("status") == "DELETING"
        # It belongs to its cluster, whatever its own tags are. Its instances have the price.
        carried = tags(cluster, "tags")
        detail = f"{size} x {kinds}"
        yield from search.resource(
            "node group", f"{name}/{group}", carried, 0.0, detail, leaving=leaving
        )


def remove_node_group(account: Account, path: str) -> None:
    cluster, _, group = path.partition("/")
    account.call("eks", "delete_nodegroup", clusterName=cluster, nodegroupName=group)


def stacks(search: Search) -> Iterator[Found]:
    for stack in search.account.pages("cloudformation", "describe_stacks", "Stacks"):
        status = stack["StackStatus"]
        # A nested stack goes with its root.
        if status == "DELETE_COMPLETE" or "RootId" in stack:
            continue
        leaving = status == "DELETE_IN_PROGRESS"
        yield from search.resource(
            "stack", stack["StackName"], tags(stack), 0.0, status, leaving=leaving
        )


def remove_stack(account: Account, name: str) -> None:
    try:
        account.call("cloudformation", "delete_stack", StackName=name)
    except AwsError as error:
        if "is in use by" in str(error) or "exported" in str(error).lower():
            raise InUse(str(error), error.code) from error
        raise
