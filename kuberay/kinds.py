"""Every kind of thing that a cluster can leave behind: how to find it, price it and remove it.

`KINDS` is in the order of removal: what holds something else comes before it. A kind's `find` asks
its own service, not the tag index, which lags by minutes; the index serves where a service cannot
list tags (keys, log groups) and, at the end, for whatever no kind here knows.

Nothing is removed here without having been found here: `remove` takes what `find` gave, and `find`
gives what `Owner` owns. What merely looks like the cluster's (a name, a place in its network) is
given with `tagged=False`, to be reported and left alone.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from botocore import xform_name

from kuberay import prices
from kuberay.aws import Account, tags
from kuberay.errors import AwsError, InUse
from kuberay.owned import regions
from kuberay.search import Found, Search, parsed

GIB = 2**30
Find = Callable[[Search], Iterator[Found]]


@dataclass(frozen=True)
class By:
    """A removal that is one call of AWS, and so also one command of its command line.

    Attributes:
        argument: takes the id; a list of it where the name ends in `[]`.
        more: arguments beside it.
    """

    service: str
    operation: str
    argument: str
    more: tuple[tuple[str, Any], ...] = ()

    def __call__(self, account: Account, name: str) -> None:
        key = self.argument.removesuffix("[]")
        value = name if key == self.argument else [name]
        account.call(self.service, self.operation, **{key: value}, **dict(self.more))

    def command(self, name: str, region: str) -> str:
        flags = [f"--{_flag(self.argument.removesuffix('[]'))} {name}"]
        for key, value in self.more:
            flags.append(f"--{_flag(key)}" if value is True else f"--{_flag(key)} {value}")
        where = "" if self.service == "iam" else f" --region {region}"
        return f"aws {self.service} {_flag(self.operation)}{where} {' '.join(flags)}"


def _flag(name: str) -> str:
    return str(xform_name(name, "-")).replace("_", "-")


@dataclass(frozen=True)
class Kind:
    """How to deal with one kind of thing.

    Attributes:
        remove: None where it is only ever reported.
        command: the shell command that removes it, with {id} and {region}; that of `remove` where
            it is empty.
        data: whether it holds what cannot be made again.
    """

    name: str
    find: Find
    remove: By | Callable[[Account, str], None] | None = None
    command: str = ""
    data: bool = False


# --- the cluster ----------------------------------------------------------------------------


def _cluster(search: Search) -> dict[str, Any] | None:
    """EKS's description of the cluster, if it is there and owned."""
    try:
        found = search.account.call("eks", "describe_cluster", name=search.owner.name)["cluster"]
    except AwsError as error:
        if error.absent:
            return None
        raise
    return found if search.owner.owns(tags(found, "tags")) else None


def _clusters(search: Search) -> Iterator[Found]:
    found = _cluster(search)
    if found is not None:
        usd = prices.monthly(prices.CONTROL_PLANE_PER_HOUR)
        version = f"Kubernetes {found.get('version', '?')}, {found['status']}"
        yield Found("cluster", found["name"], usd, version, found["status"] == "DELETING")


def _node_groups(search: Search) -> Iterator[Found]:
    if _cluster(search) is None:
        return
    name = search.owner.name
    for group in search.account.pages("eks", "list_nodegroups", "nodegroups", clusterName=name):
        found = search.account.call(
            "eks", "describe_nodegroup", clusterName=name, nodegroupName=group
        )["nodegroup"]
        size = found.get("scalingConfig", {}).get("desiredSize", 0)
        kinds = ", ".join(found.get("instanceTypes") or ["of its launch template"])
        leaving = found.get("status") == "DELETING"
        # Its instances are counted as instances.
        yield Found("node group", f"{name}/{group}", 0.0, f"{size} x {kinds}", leaving)


def _remove_node_group(account: Account, path: str) -> None:
    cluster, _, group = path.partition("/")
    account.call("eks", "delete_nodegroup", clusterName=cluster, nodegroupName=group)


def _stacks(search: Search) -> Iterator[Found]:
    for stack in search.account.pages("cloudformation", "describe_stacks", "Stacks"):
        status = stack["StackStatus"]
        # A nested stack goes with its root.
        if status == "DELETE_COMPLETE" or "RootId" in stack:
            continue
        if search.owner.owns(tags(stack)):
            leaving = status == "DELETE_IN_PROGRESS"
            yield Found("stack", stack["StackName"], 0.0, status, leaving)


def _remove_stack(account: Account, name: str) -> None:
    try:
        account.call("cloudformation", "delete_stack", StackName=name)
    except AwsError as error:
        if "is in use by" in str(error) or "exported" in str(error).lower():
            raise InUse(str(error), error.code) from error
        raise


# --- load balancers -------------------------------------------------------------------------


def _owned_arns(search: Search, service: str, arns: list[str]) -> set[str]:
    """Which of these load balancers or target groups are owned. Twenty is the most of one call."""
    owned = set()
    for start in range(0, len(arns), 20):
        some = arns[start : start + 20]
        key, word = (
            ("LoadBalancerNames", "LoadBalancerName")
            if service == "elb"
            else (
                "ResourceArns",
                "ResourceArn",
            )
        )
        answer = search.account.call(service, "describe_tags", **{key: some})
        for entry in answer["TagDescriptions"]:
            if search.owner.owns(tags(entry)):
                owned.add(entry[word])
    return owned


def _load_balancers(search: Search) -> Iterator[Found]:
    pages = search.account.pages("elbv2", "describe_load_balancers", "LoadBalancers")
    found = {entry["LoadBalancerArn"]: entry for entry in pages}
    for arn in sorted(_owned_arns(search, "elbv2", list(found))):
        kind = found[arn].get("Type", "application")
        usd = prices.monthly(prices.LOAD_BALANCER_PER_HOUR.get(kind, 0.0225))
        detail = f"{kind}, {found[arn].get('Scheme', '')}, {found[arn]['LoadBalancerName']}"
        yield Found("load balancer", arn, usd, detail)


def _classic_load_balancers(search: Search) -> Iterator[Found]:
    key = "LoadBalancerDescriptions"
    found = {
        entry["LoadBalancerName"]: entry
        for entry in search.account.pages("elb", "describe_load_balancers", key)
    }
    usd = prices.monthly(prices.LOAD_BALANCER_PER_HOUR["classic"])
    for name in sorted(_owned_arns(search, "elb", list(found))):
        yield Found("classic load balancer", name, usd, found[name].get("Scheme", ""))


def _target_groups(search: Search) -> Iterator[Found]:
    pages = search.account.pages("elbv2", "describe_target_groups", "TargetGroups")
    found = {entry["TargetGroupArn"]: entry for entry in pages}
    for arn in sorted(_owned_arns(search, "elbv2", list(found))):
        yield Found("target group", arn, 0.0, found[arn]["TargetGroupName"])


# --- machines -------------------------------------------------------------------------------


def _groups(search: Search) -> Iterator[Found]:
    key = "AutoScalingGroups"
    for group in search.account.pages("autoscaling", "describe_auto_scaling_groups", key):
        if search.owner.owns(tags(group)):
            detail = f"desired {group['DesiredCapacity']}, maximum {group['MaxSize']}"
            # It has a status only while it is being deleted.
            name, leaving = group["AutoScalingGroupName"], bool(group.get("Status"))
            yield Found("auto scaling group", name, 0.0, detail, leaving)


def _instances(search: Search) -> Iterator[Found]:
    arguments = {"Filters": [{"Name": "tag-key", "Values": search.owner.keys}]}
    for reservation in search.account.pages(
        "ec2", "describe_instances", "Reservations", **arguments
    ):
        for instance in reservation["Instances"]:
            state, kind = instance["State"]["Name"], instance["InstanceType"]
            carried = tags(instance)
            if state == "terminated" or not search.owner.owns(carried):
                continue
            running = state in ("pending", "running")
            hourly = prices.instance_per_hour(kind) if running else 0.0
            usd = None if hourly is None else prices.monthly(hourly)
            detail = f"{kind}, {state} {carried.get('Name', '')}".rstrip()
            leaving = state == "shutting-down"
            yield Found("instance", instance["InstanceId"], usd, detail, leaving)


# --- network --------------------------------------------------------------------------------


def _nats(search: Search) -> Iterator[Found]:
    for item, name in search.ec2("describe_nat_gateways", "NatGateways"):
        if item["State"] != "deleted":
            usd = prices.monthly(prices.NAT_PER_HOUR)
            leaving = item["State"] == "deleting"
            yield Found("NAT gateway", item["NatGatewayId"], usd, name, leaving)


def _endpoints(search: Search) -> Iterator[Found]:
    for item, _ in search.ec2("describe_vpc_endpoints", "VpcEndpoints"):
        state = item.get("State", "").lower()
        if state == "deleted":
            continue
        zones = len(item.get("SubnetIds", [])) if item["VpcEndpointType"] != "Gateway" else 0
        usd = prices.monthly(prices.ENDPOINT_PER_HOUR) * zones
        leaving = state == "deleting"
        yield Found("VPC endpoint", item["VpcEndpointId"], usd, item["ServiceName"], leaving)


def _addresses(search: Search) -> Iterator[Found]:
    usd = prices.monthly(prices.PUBLIC_IP_PER_HOUR)
    for item, name in search.ec2("describe_addresses", "Addresses"):
        yield Found("elastic IP", item["AllocationId"], usd, f"{item['PublicIp']} {name}".rstrip())


def _remove_address(account: Account, name: str) -> None:
    try:
        account.call("ec2", "release_address", AllocationId=name)
    except AwsError as error:
        # What EC2 says of an address that a NAT gateway still has.
        if error.code == "AuthFailure":
            raise InUse(f"{name} is still in use", error.code) from error
        raise


def _interfaces(search: Search) -> Iterator[Found]:
    seen = set()
    for item, _ in search.ec2("describe_network_interfaces", "NetworkInterfaces"):
        seen.add(item["NetworkInterfaceId"])
        detail = f"{item['Status']} {item.get('Description', '')}".rstrip()
        yield Found("network interface", item["NetworkInterfaceId"], 0.0, detail)
    # AWS's own services put theirs into the network without a tag, and they hold it.
    networks = [item["VpcId"] for item, _ in search.ec2("describe_vpcs", "Vpcs")]
    if not networks:
        return
    inside = [{"Name": "vpc-id", "Values": networks}]
    for item in search.account.pages(
        "ec2", "describe_network_interfaces", "NetworkInterfaces", Filters=inside
    ):
        if item["NetworkInterfaceId"] not in seen:
            detail = f"{item['Status']} {item.get('Description', '')}, in the cluster's VPC"
            yield Found("network interface", item["NetworkInterfaceId"], 0.0, detail, tagged=False)


def _security_groups(search: Search) -> Iterator[Found]:
    for item, _ in search.ec2("describe_security_groups", "SecurityGroups"):
        # A network's default group goes with the network, and not before it.
        if item["GroupName"] != "default":
            yield Found("security group", item["GroupId"], 0.0, item["GroupName"])


def _remove_security_group(account: Account, name: str) -> None:
    found = account.call("ec2", "describe_security_groups", GroupIds=[name])["SecurityGroups"]
    # Groups that name each other in their rules hold each other.
    for rules, operation in (
        ("IpPermissions", "revoke_security_group_ingress"),
        ("IpPermissionsEgress", "revoke_security_group_egress"),
    ):
        held = [rule for rule in found[0].get(rules, []) if rule.get("UserIdGroupPairs")]
        if held:
            try:
                account.call("ec2", operation, GroupId=name, IpPermissions=held)
            except AwsError as error:
                # The other group is gone already, and the rule with it.
                if not error.absent:
                    raise
    account.call("ec2", "delete_security_group", GroupId=name)


def _subnets(search: Search) -> Iterator[Found]:
    for item, _ in search.ec2("describe_subnets", "Subnets"):
        yield Found("subnet", item["SubnetId"], 0.0, f"{item['CidrBlock']} of {item['VpcId']}")


def _route_tables(search: Search) -> Iterator[Found]:
    for item, _ in search.ec2("describe_route_tables", "RouteTables"):
        # A network's main table goes with the network.
        if not any(link.get("Main") for link in item.get("Associations", [])):
            yield Found("route table", item["RouteTableId"], 0.0, item["VpcId"])


def _internet_gateways(search: Search) -> Iterator[Found]:
    for item, _ in search.ec2("describe_internet_gateways", "InternetGateways"):
        held = ", ".join(link["VpcId"] for link in item.get("Attachments", []))
        yield Found("internet gateway", item["InternetGatewayId"], 0.0, held)


def _remove_internet_gateway(account: Account, name: str) -> None:
    found = account.call("ec2", "describe_internet_gateways", InternetGatewayIds=[name])
    for link in found["InternetGateways"][0].get("Attachments", []):
        account.call("ec2", "detach_internet_gateway", InternetGatewayId=name, VpcId=link["VpcId"])
    account.call("ec2", "delete_internet_gateway", InternetGatewayId=name)


def _networks(search: Search) -> Iterator[Found]:
    for item, _ in search.ec2("describe_vpcs", "Vpcs"):
        yield Found("VPC", item["VpcId"], 0.0, item["CidrBlock"])


# --- storage --------------------------------------------------------------------------------


def _volumes(search: Search) -> Iterator[Found]:
    for item, name in search.ec2("describe_volumes", "Volumes"):
        kind = item["VolumeType"]
        usd = prices.volume_per_month(
            kind, item["Size"], item.get("Iops", 0), item.get("Throughput", 0)
        )
        detail = f"{item['Size']} GiB {kind}, {item['State']} {name}".rstrip()
        yield Found("volume", item["VolumeId"], usd, detail, item["State"] == "deleting")


def _snapshots(search: Search) -> Iterator[Found]:
    for item, _ in search.ec2("describe_snapshots", "Snapshots", OwnerIds=["self"]):
        usd = item["VolumeSize"] * prices.SNAPSHOT_PER_GB_MONTH
        detail = f"at most {item['VolumeSize']} GiB, of {item.get('VolumeId', '')}"
        yield Found("snapshot", item["SnapshotId"], usd, detail)


def _file_systems(search: Search) -> Iterator[Found]:
    for item in search.account.pages("efs", "describe_file_systems", "FileSystems"):
        if search.owner.owns(tags(item)):
            size_gib = item.get("SizeInBytes", {}).get("Value", 0) / GIB
            usd = size_gib * prices.EFS_PER_GB_MONTH
            leaving = item["LifeCycleState"] == "deleting"
            yield Found("file system", item["FileSystemId"], usd, f"{size_gib:.1f} GiB", leaving)


def _remove_file_system(account: Account, name: str) -> None:
    targets = account.pages("efs", "describe_mount_targets", "MountTargets", FileSystemId=name)
    for target in list(targets):
        if target["LifeCycleState"] != "deleting":
            account.call("efs", "delete_mount_target", MountTargetId=target["MountTargetId"])
    account.call("efs", "delete_file_system", FileSystemId=name)


# --- the rest -------------------------------------------------------------------------------


def _launch_templates(search: Search) -> Iterator[Found]:
    for item, _ in search.ec2("describe_launch_templates", "LaunchTemplates"):
        yield Found("launch template", item["LaunchTemplateId"], 0.0, item["LaunchTemplateName"])


def _log_groups(search: Search) -> Iterator[Found]:
    cluster = search.owner.name
    tagged = {parsed(arn)[2].removesuffix(":*") for arn in search.indexed("logs")}
    # EKS and the log collectors make these by name, with no tag; `up` makes them first, with one.
    named: set[str] = set()
    found: dict[str, Any] = {}
    for prefix in (f"/aws/eks/{cluster}/", f"/aws/containerinsights/{cluster}/"):
        named |= {entry["logGroupName"] for entry in _described_logs(search, prefix, found)}
    for name in sorted(tagged - named):
        list(_described_logs(search, name, found))
    for name in sorted((tagged | named) & set(found)):
        arn = found[name]["arn"].removesuffix(":*")
        carried = search.account.call("logs", "list_tags_for_resource", resourceArn=arn)
        usd = found[name].get("storedBytes", 0) / prices.GB * prices.LOGS_PER_GB_MONTH
        kept = found[name].get("retentionInDays")
        detail = f"kept {kept} days" if kept else "kept for good"
        owned = search.owner.owns(tags(carried, "tags"))
        yield Found("log group", name, usd, detail, tagged=owned)


def _described_logs(search: Search, prefix: str, into: dict[str, Any]) -> Iterator[Any]:
    for entry in search.account.pages(
        "logs", "describe_log_groups", "logGroups", logGroupNamePrefix=prefix
    ):
        into[entry["logGroupName"]] = entry
        yield entry


def _repositories(search: Search) -> Iterator[Found]:
    for item in search.account.pages("ecr", "describe_repositories", "repositories"):
        arn = item["repositoryArn"]
        carried = search.account.call("ecr", "list_tags_for_resource", resourceArn=arn)
        if not search.owner.owns(tags(carried, "tags")):
            continue
        name = item["repositoryName"]
        images = search.account.pages("ecr", "describe_images", "imageDetails", repositoryName=name)
        size_gb = sum(image.get("imageSizeInBytes", 0) for image in images) / prices.GB
        usd = size_gb * prices.ECR_PER_GB_MONTH
        yield Found("image repository", name, usd, f"{size_gb:.1f} GB of images")


def _identity_providers(search: Search) -> Iterator[Found]:
    listed = search.account.call("iam", "list_open_id_connect_providers")
    for item in listed["OpenIDConnectProviderList"]:
        arn = item["Arn"]
        key = "OpenIDConnectProviderArn"
        answer = search.account.call("iam", "list_open_id_connect_provider_tags", **{key: arn})
        address = arn.partition("oidc-provider/")[2]
        yield from _global(search, Found("identity provider", arn, 0.0, address), tags(answer))


def _keys(search: Search) -> Iterator[Found]:
    for arn in search.indexed("kms"):
        found = search.account.call("kms", "describe_key", KeyId=arn)["KeyMetadata"]
        # A key on its way out costs nothing, and cannot go faster than in seven days.
        if found["KeyState"] not in ("PendingDeletion", "PendingReplicaDeletion"):
            detail = f"{found['KeyState']} {found.get('Description', '')}".rstrip()
            yield Found("key", found["KeyId"], prices.KEY_PER_MONTH, detail)


def _roles(search: Search) -> Iterator[Found]:
    # The one call that lists roles with their tags: a call for each role is throttled at once.
    for role in search.account.pages(
        "iam", "get_account_authorization_details", "RoleDetailList", Filter=["Role"]
    ):
        yield from _global(search, Found("role", role["RoleName"]), tags(role))


def _global(search: Search, found: Found, carried: dict[str, str]) -> Iterator[Found]:
    """What belongs to no region, unless it is that of a namesake in another one."""
    if not search.owner.owns(carried):
        return
    named = regions(carried, found.detail)
    if not named:
        detail = f"{found.detail} its region is not known".strip()
        yield dataclasses.replace(found, detail=detail, tagged=False)
    elif search.owner.region in named:
        yield found


def _remove_role(account: Account, name: str) -> None:
    of = {"RoleName": name}
    for policy in list(account.pages("iam", "list_role_policies", "PolicyNames", **of)):
        account.call("iam", "delete_role_policy", PolicyName=policy, **of)
    attached = account.pages("iam", "list_attached_role_policies", "AttachedPolicies", **of)
    for entry in list(attached):
        account.call("iam", "detach_role_policy", PolicyArn=entry["PolicyArn"], **of)
    profiles = account.pages("iam", "list_instance_profiles_for_role", "InstanceProfiles", **of)
    for profile in list(profiles):
        named = {"InstanceProfileName": profile["InstanceProfileName"]}
        account.call("iam", "remove_role_from_instance_profile", **named, **of)
    account.call("iam", "delete_role", **of)


# What the kinds above look at themselves, and what goes with it: where the index still knows such a
# thing, the index is late. A type of None is the whole service.
_COVERED = {
    *(("ec2", kind) for kind in (
        "instance", "volume", "snapshot", "natgateway", "elastic-ip", "network-interface",
        "security-group", "security-group-rule", "launch-template", "subnet", "route-table",
        "internet-gateway", "vpc", "vpc-endpoint", "fleet", "spot-instances-request",
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
}  # fmt: skip


def _others(search: Search) -> Iterator[Found]:
    """What carries the tag and is of no kind above: reported, and left to its service."""
    for arn in sorted(search.index):
        service, kind, _ = parsed(arn)
        if (service, kind) not in _COVERED and (service, None) not in _COVERED:
            yield Found("other", arn, None, f"{service} {kind}".rstrip())


KINDS: tuple[Kind, ...] = (
    Kind(
        "node group",
        _node_groups,
        _remove_node_group,
        "eksctl delete nodegroup --region {region} --cluster {cluster} --name {name}",
    ),
    Kind(
        "cluster",
        _clusters,
        By("eks", "delete_cluster", "name"),
        "eksctl delete cluster --region {region} --name {id} --wait",
    ),
    Kind(
        "stack",
        _stacks,
        _remove_stack,
        "aws cloudformation delete-stack --region {region} --stack-name {id}",
    ),
    Kind("load balancer", _load_balancers, By("elbv2", "delete_load_balancer", "LoadBalancerArn")),
    Kind(
        "classic load balancer",
        _classic_load_balancers,
        By("elb", "delete_load_balancer", "LoadBalancerName"),
    ),
    Kind("target group", _target_groups, By("elbv2", "delete_target_group", "TargetGroupArn")),
    Kind(
        "auto scaling group",
        _groups,
        By(
            "autoscaling",
            "delete_auto_scaling_group",
            "AutoScalingGroupName",
            (("ForceDelete", True),),
        ),
    ),
    Kind("instance", _instances, By("ec2", "terminate_instances", "InstanceIds[]")),
    Kind("NAT gateway", _nats, By("ec2", "delete_nat_gateway", "NatGatewayId")),
    Kind("VPC endpoint", _endpoints, By("ec2", "delete_vpc_endpoints", "VpcEndpointIds[]")),
    Kind(
        "elastic IP",
        _addresses,
        _remove_address,
        "aws ec2 release-address --region {region} --allocation-id {id}",
    ),
    Kind(
        "network interface",
        _interfaces,
        By("ec2", "delete_network_interface", "NetworkInterfaceId"),
    ),
    Kind(
        "security group",
        _security_groups,
        _remove_security_group,
        "aws ec2 delete-security-group --region {region} --group-id {id}",
    ),
    Kind(
        "file system",
        _file_systems,
        _remove_file_system,
        "aws efs delete-file-system --region {region} --file-system-id {id}",
        data=True,
    ),
    Kind("volume", _volumes, By("ec2", "delete_volume", "VolumeId"), data=True),
    Kind("snapshot", _snapshots, By("ec2", "delete_snapshot", "SnapshotId"), data=True),
    Kind(
        "launch template",
        _launch_templates,
        By("ec2", "delete_launch_template", "LaunchTemplateId"),
    ),
    Kind("log group", _log_groups, By("logs", "delete_log_group", "logGroupName"), data=True),
    Kind(
        "image repository",
        _repositories,
        By("ecr", "delete_repository", "repositoryName", (("force", True),)),
        data=True,
    ),
    Kind(
        "identity provider",
        _identity_providers,
        By("iam", "delete_open_id_connect_provider", "OpenIDConnectProviderArn"),
    ),
    Kind(
        "key",
        _keys,
        By("kms", "schedule_key_deletion", "KeyId", (("PendingWindowInDays", 7),)),
        data=True,
    ),
    Kind(
        "role",
        _roles,
        _remove_role,
        "aws iam delete-role --role-name {id}  # after its policies and instance profiles",
    ),
    Kind("subnet", _subnets, By("ec2", "delete_subnet", "SubnetId")),
    Kind("route table", _route_tables, By("ec2", "delete_route_table", "RouteTableId")),
    Kind(
        "internet gateway",
        _internet_gateways,
        _remove_internet_gateway,
        "aws ec2 delete-internet-gateway --region {region} --internet-gateway-id {id}"
        "  # after detach-internet-gateway",
    ),
    Kind("VPC", _networks, By("ec2", "delete_vpc", "VpcId")),
    Kind("other", _others, None, "# no command known here: remove it in its service"),
)
BY_NAME = {kind.name: kind for kind in KINDS}


def command(found: Found, region: str) -> str:
    """The shell command that removes it."""
    kind = BY_NAME[found.kind]
    if not kind.command and isinstance(kind.remove, By):
        return kind.remove.command(found.id, region)
    cluster, _, name = found.id.partition("/")
    return kind.command.format(id=found.id, region=region, cluster=cluster, name=name)
