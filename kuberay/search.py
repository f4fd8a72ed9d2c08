"""One look at an account: what AWS lists, narrowed to what a cluster owns."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kuberay.aws import Account, tags
from kuberay.errors import AwsError
from kuberay.owned import Owner

# What an account may have by the ten thousand: narrowed by AWS, and then by us. All tag keys of
# owned.py, and that of every EBS CSI driver, match the pattern.
_LONG = (
    "describe_instances",
    "describe_volumes",
    "describe_snapshots",
    "describe_spot_instance_requests",
)
_CLUSTER_KEYS = "*luster*"
# The tag index of what belongs to no region.
_GLOBAL_INDEX = "us-east-1"


@dataclass(frozen=True)
class Found:
    """One thing that is there.

    Attributes:
        id: what its removal needs: an id, a name or an ARN.
        usd_per_month: what its existence costs; None where that is not known.
        detail: what a person wants to know of it.
        leaving: its removal is under way.
        tagged: its tags make it the cluster's. Otherwise it is never removed.
        marked: it carries our own tag, not only one of another program.
        counted: a proof with it is not clean. False for what outlives clusters.
    """

    kind: str
    id: str
    usd_per_month: float | None = 0.0
    detail: str = ""
    leaving: bool = False
    tagged: bool = True
    marked: bool = False
    counted: bool = True


@dataclass
class Memory:
    """What was the cluster's, for finding what belonged to it once it is gone."""

    volumes: set[str] = field(default_factory=set)
    profiles: set[str] = field(default_factory=set)


class Search:
    """One look at an account for one cluster. Whatever several kinds need is read once.

    Args:
        vouched: a cluster of ours exists, or existed as this command began. Then the tags of other
            programs (eksctl, controllers) make a thing the cluster's. Otherwise a cluster of
            another installer may have the name, and only our own tag does.
        memory: of earlier looks of the same command.
    """

    def __init__(
        self, account: Account, owner: Owner, vouched: bool = True, memory: Memory | None = None
    ) -> None:
        self.account, self.owner, self.vouched = account, owner, vouched
        self.memory = Memory() if memory is None else memory

    # --- whose it is ---------------------------------------------------------------------------

    def resource(
        self, kind: str, name: str, carried: dict[str, str], usd: float | None = 0.0,
        detail: str = "", *, leaving: bool = False, network: str = "",
    ) -> Iterator[Found]:  # fmt: skip
        """The thing with these tags, if it is the cluster's.

        Args:
            network: the id of the VPC that it is in. In one with our own tag, any of the tags
                decides; in the cluster's, what has no tag is reported, for it holds the VPC.
        """
        if self.owner.owns(carried):
            marked = self.owner.marks(carried)
            tagged = marked or self.vouched or network in self.marked_networks
            if not tagged:
                detail = f"{detail} named by another program's tags only".lstrip()
            yield Found(kind, name, usd, detail, leaving, tagged, marked)
        elif network and network in self.networks and not self.owner.excludes(carried):
            detail = f"{detail}, in the cluster's VPC"
            yield Found(kind, name, usd, detail, leaving, tagged=False)

    def shared(self, kind: str, name: str, usd: float, detail: str) -> Found:
        """What is the project's, and serves every cluster: named, and no reason to fail."""
        detail = f"{detail}, for all clusters of this project: kept"
        return Found(kind, name, usd, detail, tagged=False, counted=False)

    # --- what AWS lists ------------------------------------------------------------------------

    def ec2(self, operation: str, key: str, **arguments: Any) -> Iterator[Any]:
        """What EC2 lists; of long lists what has a tag that may name a cluster."""
        if operation in _LONG:
            arguments["Filters"] = [{"Name": "tag-key", "Values": [_CLUSTER_KEYS]}]
        yield from self.account.pages("ec2", operation, key, **arguments)

    @functools.cached_property
    def networks(self) -> frozenset[str]:
        """VPCs of the cluster, by any of its tags."""
        return frozenset(
            item["VpcId"]
            for item in self.ec2("describe_vpcs", "Vpcs")
            if self.owner.owns(tags(item))
        )

    @functools.cached_property
    def marked_networks(self) -> frozenset[str]:
        """VPCs that carry our own tag."""
        try:
            vpcs = list(self.ec2("describe_vpcs", "Vpcs"))
        except AwsError:
            return frozenset()  # Then less is removed; the kind VPC says why.
        return frozenset(item["VpcId"] for item in vpcs if self.owner.marks(tags(item)))

    def network_of(self, subnet: str) -> str:
        """The VPC of a subnet; empty where it is not known."""
        return self._subnets.get(subnet, "")

    @functools.cached_property
    def _subnets(self) -> dict[str, str]:
        try:
            listed = list(self.ec2("describe_subnets", "Subnets"))
        except AwsError:
            return {}
        return {item["SubnetId"]: item["VpcId"] for item in listed}

    @functools.cached_property
    def identities(self) -> dict[str, list[Any]]:
        """Roles and users with their tags: a call for each would be throttled at once."""
        by_id: dict[str, list[Any]] = {}
        for key, kind in {"RoleDetailList": "Role", "UserDetailList": "User"}.items():
            operation = "get_account_authorization_details"
            by_id[key] = list(self.account.pages("iam", operation, key, Filter=[kind]))
        return by_id

    # --- the tag index -------------------------------------------------------------------------

    @functools.cached_property
    def index(self) -> dict[str, dict[str, str]]:
        """ARN -> tags of what the tag index of the region knows as the cluster's."""
        return self._indexed(self.account)

    @functools.cached_property
    def global_index(self) -> dict[str, dict[str, str]]:
        """The same for what belongs to no region: IAM, Route 53."""
        index = self._indexed(self.account.elsewhere(_GLOBAL_INDEX))
        # The third field of an ARN is the region; a namesake in us-east-1 has one.
        return {arn: carried for arn, carried in index.items() if not arn.split(":")[3]}

    def _indexed(self, account: Account) -> dict[str, dict[str, str]]:
        by_arn: dict[str, dict[str, str]] = {}
        for key in self.owner.keys:
            # The value of a key that has the name in it is looked at below.
            narrowed = {} if key.endswith(f"/{self.owner.name}") else {"Values": [self.owner.name]}
            for entry in account.pages(
                "resourcegroupstaggingapi",
                "get_resources",
                "ResourceTagMappingList",
                TagFilters=[{"Key": key, **narrowed}],
            ):
                by_arn[entry["ResourceARN"]] = tags(entry)
        return {arn: by_arn[arn] for arn in sorted(by_arn) if self.owner.owns(by_arn[arn])}

    def indexed(self, service: str) -> list[tuple[str, dict[str, str]]]:
        """ARNs of a service in the index, with their tags."""
        return [(arn, tags) for arn, tags in self.index.items() if parsed(arn)[0] == service]

    @property
    def bucket_names(self) -> set[str]:
        return {parsed(arn)[2] for arn, _ in self.indexed("s3")}


def parsed(arn: str) -> tuple[str, str, str]:
    """Service, type and name of an ARN; the type is empty where the service has but one."""
    parts = arn.split(":", 5)
    if len(parts) < 6:
        return "", "", arn
    kind, _, name = re.sub("[/:]", "\0", parts[5], count=1).partition("\0")
    return parts[2], kind if name else "", name or kind
