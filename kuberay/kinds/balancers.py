"""Load balancers of both generations, and target groups."""

from collections.abc import Iterator
from typing import Any

from kuberay import prices
from kuberay.aws import tags
from kuberay.search import Found, Search

# The most that one call takes.
_AT_ONCE = 20


def _tagged(search: Search, service: str, named: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each of these with its tags."""
    key = "LoadBalancerNames" if service == "elb" else "ResourceArns"
    word = key.removesuffix("s")
    for start in range(0, len(named), _AT_ONCE):
        batch = named[start : start + _AT_ONCE]
        answer = search.account.call(service, "describe_tags", **{key: batch})
        for entry in answer["TagDescriptions"]:
            yield entry[word], tags(entry)


def load_balancers(search: Search) -> Iterator[Found]:
    pages = search.account.pages("elbv2", "describe_load_balancers", "LoadBalancers")
    by_arn: dict[str, Any] = {entry["LoadBalancerArn"]: entry for entry in pages}
    for arn, carried in _tagged(search, "elbv2", sorted(by_arn)):
        item = by_arn[arn]
        kind = item.get("Type", "application")
        usd = prices.monthly(prices.LOAD_BALANCER_PER_HOUR.get(kind, 0.0225))
        detail = f"{kind}, {item.get('Scheme', '')}, {item['LoadBalancerName']}"
        network = str(item.get("VpcId", ""))
        yield from search.resource("load balancer", arn, carried, usd, detail, network=network)


def classic_load_balancers(search: Search) -> Iterator[Found]:
    key = "LoadBalancerDescriptions"
    by_name: dict[str, Any] = {
        entry["LoadBalancerName"]: entry
        for entry in search.account.pages("elb", "describe_load_balancers", key)
    }
    usd = prices.monthly(prices.LOAD_BALANCER_PER_HOUR["classic"])
    for name, carried in _tagged(search, "elb", sorted(by_name)):
        detail, network = by_name[name].get("Scheme", ""), str(by_name[name].get("VPCId", ""))
        yield from search.resource(
            "classic load balancer", name, carried, usd, detail, network=network
        )


def target_groups(search: Search) -> Iterator[Found]:
    pages = search.account.pages("elbv2", "describe_target_groups", "TargetGroups")
    by_arn: dict[str, Any] = {entry["TargetGroupArn"]: entry for entry in pages}
    for arn, carried in _tagged(search, "elbv2", sorted(by_arn)):
        name, network = by_arn[arn]["TargetGroupName"], str(by_arn[arn].get("VpcId", ""))
        yield from search.resource("target group", arn, carried, 0.0, name, network=network)
