"""The VPC and everything in it."""

from collections.abc import Iterator

from kuberay import prices
from kuberay.aws import Account, tags
from kuberay.errors import AwsError, InUse
from kuberay.search import Found, Search


def nats(search: Search) -> Iterator[Found]:
    usd = prices.monthly(prices.NAT_PER_HOUR)
    for item in search.ec2("describe_nat_gateways", "NatGateways"):
        if item["State"] != "deleted":
            carried = tags(item)
            yield from search.resource(
                "NAT gateway", item["NatGatewayId"], carried, usd, carried.get("Name", ""),
                leaving=item["State"] == "deleting", network=item.get("VpcId", ""),
            )  # fmt: skip


def endpoints(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_vpc_endpoints", "VpcEndpoints"):
        state = item.get("State", "").lower()
        if state == "deleted":
            continue
        zones = len(item.get("SubnetIds", [])) if item["VpcEndpointType"] != "Gateway" else 0
        usd = prices.monthly(prices.ENDPOINT_PER_HOUR) * zones
        yield from search.resource(
            "VPC endpoint", item["VpcEndpointId"], tags(item), usd, item["ServiceName"],
            leaving=state == "deleting", network=item.get("VpcId", ""),
        )  # fmt: skip


def addresses(search: Search) -> Iterator[Found]:
    usd = prices.monthly(prices.PUBLIC_IP_PER_HOUR)
    for item in search.ec2("describe_addresses", "Addresses"):
        carried = tags(item)
        detail = f"{item['PublicIp']} {carried.get('Name', '')}".rstrip()
        yield from search.resource("elastic IP", item["AllocationId"], carried, usd, detail)


def remove_address(account: Account, name: str) -> None:
    try:
        account.call("ec2", "release_address", AllocationId=name)
    except AwsError as error:
        # What EC2 says of an address that a NAT gateway still has.
        if error.code == "AuthFailure":
            raise InUse(f"{name} is still in use", error.code) from error
        raise


def interfaces(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_network_interfaces", "NetworkInterfaces"):
        detail = f"{item['Status']} {item.get('Description', '')}".rstrip()
        # Of network interfaces alone, EC2 calls the tags TagSet.
        yield from search.resource(
            "network interface", item["NetworkInterfaceId"], tags(item, "TagSet"), 0.0, detail,
            network=item.get("VpcId", ""),
        )  # fmt: skip


def security_groups(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_security_groups", "SecurityGroups"):
        # A network's default group goes with the network, and not before it.
        if item["GroupName"] != "default":
            yield from search.resource(
                "security group", item["GroupId"], tags(item), 0.0, item["GroupName"],
                network=item.get("VpcId", ""),
            )  # fmt: skip


def remove_security_group(account: Account, name: str) -> None:
    groups = account.call("ec2", "describe_security_groups", GroupIds=[name])["SecurityGroups"]
    # Groups that name each other in their rules hold each other.
    for rules, operation in (
        ("IpPermissions", "revoke_security_group_ingress"),
        ("IpPermissionsEgress", "revoke_security_group_egress"),
    ):
        references = [rule for rule in groups[0].get(rules, []) if rule.get("UserIdGroupPairs")]
        if references:
            try:
                account.call("ec2", operation, GroupId=name, IpPermissions=references)
            except AwsError as error:
                # The other group is gone already, and the rule with it.
                if not error.absent:
                    raise
    account.call("ec2", "delete_security_group", GroupId=name)


def flow_logs(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_flow_logs", "FlowLogs"):
        # What it writes bills where it is kept.
        detail = f"of {item.get('ResourceId', '')} to {item.get('LogGroupName', 'S3')}"
        yield from search.resource("flow log", item["FlowLogId"], tags(item), 0.0, detail)


def subnets(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_subnets", "Subnets"):
        detail = f"{item['CidrBlock']} of {item['VpcId']}"
        yield from search.resource(
            "subnet", item["SubnetId"], tags(item), 0.0, detail, network=item["VpcId"]
        )


def route_tables(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_route_tables", "RouteTables"):
        # A network's main table goes with the network.
        if not any(link.get("Main") for link in item.get("Associations", [])):
            yield from search.resource(
                "route table", item["RouteTableId"], tags(item), 0.0, item["VpcId"],
                network=item["VpcId"],
            )  # fmt: skip


def internet_gateways(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_internet_gateways", "InternetGateways"):
        attached = [link["VpcId"] for link in item.get("Attachments", [])]
        yield from search.resource(
            "internet gateway", item["InternetGatewayId"], tags(item), 0.0, ", ".join(attached),
            network=attached[0] if attached else "",
        )  # fmt: skip


def remove_internet_gateway(account: Account, name: str) -> None:
    gateways = account.call("ec2", "describe_internet_gateways", InternetGatewayIds=[name])
    for link in gateways["InternetGateways"][0].get("Attachments", []):
        account.call("ec2", "detach_internet_gateway", InternetGatewayId=name, VpcId=link["VpcId"])
    account.call("ec2", "delete_internet_gateway", InternetGatewayId=name)


def networks(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_vpcs", "Vpcs"):
        yield from search.resource("VPC", item["VpcId"], tags(item), 0.0, item["CidrBlock"])
