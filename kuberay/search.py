"""One look at an account: what AWS lists, narrowed to what a cluster owns."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kuberay.aws import Account, tags
from kuberay.owned import Owner

# What an account may have by the ten thousand: narrowed by AWS, and then by us.
_LONG = ("describe_instances", "describe_volumes", "describe_snapshots")


@dataclass(frozen=True)
class Found:
    """One thing that is there.

    Attributes:
        id: what its removal needs: an id, a name or an ARN.
        usd_per_month: what its existence costs; None where that is not known.
        detail: what a person wants to know of it.
        leaving: its removal is under way.
        tagged: it carries the cluster's tag. Without it, it is never removed.
    """

    kind: str
    id: str
    usd_per_month: float | None = 0.0
    detail: str = ""
    leaving: bool = False
    tagged: bool = True


class Search:
    """One look at an account for one cluster. The tag index is read once a look."""

    def __init__(self, account: Account, owner: Owner) -> None:
        self.account, self.owner = account, owner

    @functools.cached_property
    def index(self) -> dict[str, dict[str, str]]:
        """ARN -> tags of what the tag index knows as the cluster's."""
        found: dict[str, dict[str, str]] = {}
        for key in self.owner.keys:
            value = "owned" if key.startswith("kubernetes.io/") else self.owner.name
            for entry in self.account.pages(
                "resourcegroupstaggingapi",
                "get_resources",
                "ResourceTagMappingList",
                TagFilters=[{"Key": key, "Values": [value]}],
            ):
                found[entry["ResourceARN"]] = tags(entry)
        return {arn: carried for arn, carried in found.items() if self.owner.owns(carried)}

    def indexed(self, service: str) -> list[str]:
        """ARNs of a service in the index."""
        return sorted(arn for arn in self.index if parsed(arn)[0] == service)

    def ec2(self, operation: str, key: str, **arguments: Any) -> Iterator[tuple[Any, str]]:
        """What EC2 lists and the cluster owns, each with its name."""
        if operation in _LONG:
            # AWS can look for any of many keys, but not for any of many keys with their values.
            arguments["Filters"] = [{"Name": "tag-key", "Values": self.owner.keys}]
        for item in self.account.pages("ec2", operation, key, **arguments):
            # Of network interfaces alone, EC2 calls them otherwise.
            carried = tags(item, "TagSet" if "TagSet" in item else "Tags")
            if self.owner.owns(carried):
                yield item, carried.get("Name", "")


def parsed(arn: str) -> tuple[str, str, str]:
    """Service, type and name of an ARN; the type is empty where the service has but one."""
    parts = arn.split(":", 5)
    if len(parts) < 6:
        return "", "", arn
    kind, _, name = re.sub("[/:]", "\0", parts[5], count=1).partition("\0")
    return parts[2], kind if name else "", name or kind
