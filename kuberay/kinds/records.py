"""Log groups, hosted zones, and what carries the tag and is of no other kind."""

from collections.abc import Iterator
from typing import Any

from kuberay import prices
from kuberay.aws import tags
from kuberay.errors import AwsError
from kuberay.search import Found, Search, parsed

# Below these the part after the prefix is a cluster's name, whole.
_OF_CLUSTERS = ("/aws/eks/", "/aws/containerinsights/")
# Services of which existence costs nothing; use does.
_FREE_AT_REST = ("sqs", "sns", "events", "scheduler", "ssm", "lambda", "codebuild")


def log_groups(search: Search) -> Iterator[Found]:
    """By their tag, and by the cluster's name: EKS and others make theirs without a tag."""
    cluster = search.owner.name
    tagged = {parsed(arn)[2].removesuffix(":*") for arn, _ in search.indexed("logs")}
    groups: dict[str, Any] = {}
    for entry in _described(search, logGroupNamePattern=cluster):
        groups[entry["logGroupName"]] = entry
    for name in sorted(tagged - set(groups)):
        for entry in _described(search, logGroupNamePrefix=name):
            groups[entry["logGroupName"]] = entry
    others = _longer_names(search)
    for name in sorted(groups):
        likeness = _likeness(name, cluster, others)
        if name not in tagged and not likeness:
            continue
        arn = groups[name]["arn"].removesuffix(":*")
        answer = search.account.call("logs", "list_tags_for_resource", resourceArn=arn)
        carried = tags(answer, "tags")
        usd = groups[name].get("storedBytes", 0) / prices.GB * prices.LOGS_PER_GB_MONTH
        retention_days = groups[name].get("retentionInDays")
        detail = f"kept {retention_days} days" if retention_days else "kept for good"
        by_tag = list(search.resource("log group", name, carried, usd, detail))
        yield from by_tag
        if not by_tag and likeness:
            detail = f"{detail}; by its name {likeness}"
            counted = likeness == _CERTAIN
            yield Found("log group", name, usd, detail, tagged=False, counted=counted)


_CERTAIN, _LIKELY = "the cluster's", "perhaps the cluster's"


def _likeness(group: str, cluster: str, others: list[str]) -> str:
    """What the name of a log group says of whose it is; empty for nothing."""
    parts = group.split("/")
    if cluster in parts:
        return _CERTAIN
    if group.startswith(_OF_CLUSTERS):
        return ""
    for part in parts:
        longer = any(part == other or part.startswith(f"{other}-") for other in others)
        if part.startswith(f"{cluster}-") and not longer:
            return _LIKELY
    return ""


def _longer_names(search: Search) -> list[str]:
    """Other clusters whose names begin with this one's: `mine-2` is not `mine`."""
    try:
        pages = search.account.pages("eks", "list_clusters", "clusters")
        return [name for name in pages if name.startswith(f"{search.owner.name}-")]
    except AwsError:
        return []  # More is reported then, and nothing more is removed.


def _described(search: Search, **narrowed: str) -> Iterator[Any]:
    yield from search.account.pages("logs", "describe_log_groups", "logGroups", **narrowed)


def hosted_zones(search: Search) -> Iterator[Found]:
    zones = {
        zone["Id"].rpartition("/")[2]: zone
        for zone in search.account.pages("route53", "list_hosted_zones", "HostedZones")
    }
    names = sorted(zones)
    for start in range(0, len(names), 10):  # As many as one call takes.
        batch = names[start : start + 10]
        answer = search.account.call(
            "route53", "list_tags_for_resources", ResourceType="hostedzone", ResourceIds=batch
        )
        for entry in answer["ResourceTagSets"]:
            name = entry["ResourceId"]
            detail = f"{zones[name]['Name']} {zones[name].get('ResourceRecordSetCount', 0)} records"
            usd = prices.ZONE_PER_MONTH
            yield from search.resource("hosted zone", name, tags(entry), usd, detail)


# What the other kinds look at themselves, and what goes with it: where the index still knows such a
# thing, the index is late. A type of None is the whole service.
_COVERED = {
    *(("ec2", kind) for kind in (
        "instance", "volume", "snapshot", "natgateway", "elastic-ip", "network-interface",
        "security-group", "security-group-rule", "launch-template", "subnet", "route-table",
        "internet-gateway", "vpc", "vpc-endpoint", "fleet", "spot-instances-request",
        "spot-instance-request", "vpc-flow-log", "flow-logs",
    )),
    ("eks", None),
    ("cloudformation", None),
    ("elasticloadbalancing", None),
    ("autoscaling", None),
    ("elasticfilesystem", None),
    ("logs", "log-group"),
    ("ecr", "repository"),
    ("kms", "key"),
    ("iam", None),
    ("s3", None),
    ("secretsmanager", "secret"),
    ("route53", "hostedzone"),
}  # fmt: skip


def others(search: Search) -> Iterator[Found]:
    """What carries the tag and is of no other kind: reported, and left to its service."""
    for arn, carried in [*search.index.items(), *search.global_index.items()]:
        service, kind, _ = parsed(arn)
        if (service, kind) not in _COVERED and (service, None) not in _COVERED:
            usd = 0.0 if service in _FREE_AT_REST else None
            yield from search.resource("other", arn, carried, usd, f"{service} {kind}".rstrip())
