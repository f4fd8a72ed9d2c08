"""Every kind of thing that a cluster can leave behind, in the order of removal.

What holds something else comes before it. A kind's `find` asks its own service, not the tag index,
which lags by minutes; the index serves where a service cannot list tags and, at the end, for
whatever no kind here knows.

Nothing is removed without having been found here: `remove` takes what `find` gave. What merely
looks like the cluster's (a name, a place in its network, another program's tag while no cluster of
ours is there) is given with `tagged=False`, to be reported and left alone.
"""

from kuberay.kinds import balancers, cluster, identity, machines, network, records, storage
from kuberay.kinds.kind import By, Kind
from kuberay.search import Found

KINDS: tuple[Kind, ...] = (
    Kind(
        "node group",
        cluster.node_groups,
        cluster.remove_node_group,
        "eksctl delete nodegroup --region {region} --cluster {cluster} --name {name}",
    ),
    Kind(
        "cluster",
        cluster.clusters,
        By("eks", "delete_cluster", "name"),
        "eksctl delete cluster --region {region} --name {id} --wait",
    ),
    Kind(
        "stack",
        cluster.stacks,
        cluster.remove_stack,
        "aws cloudformation delete-stack --region {region} --stack-name {id}",
    ),
    Kind(
        "load balancer",
        balancers.load_balancers,
        By("elbv2", "delete_load_balancer", "LoadBalancerArn"),
    ),
    Kind(
        "classic load balancer",
        balancers.classic_load_balancers,
        By("elb", "delete_load_balancer", "LoadBalancerName"),
    ),
    Kind(
        "target group",
        balancers.target_groups,
        By("elbv2", "delete_target_group", "TargetGroupArn"),
    ),
    Kind(
        "auto scaling group",
        machines.groups,
        By(
            "autoscaling",
            "delete_auto_scaling_group",
            "AutoScalingGroupName",
            (("ForceDelete", True),),
        ),
    ),
    Kind(
        "spot request",
        machines.spot_requests,
        By("ec2", "cancel_spot_instance_requests", "SpotInstanceRequestIds[]"),
    ),
    Kind(
        "fleet",
        machines.fleets,
        By("ec2", "delete_fleets", "FleetIds[]", (("TerminateInstances", True),)),
    ),
    Kind("instance", machines.instances, By("ec2", "terminate_instances", "InstanceIds[]")),
    Kind("NAT gateway", network.nats, By("ec2", "delete_nat_gateway", "NatGatewayId")),
    Kind("VPC endpoint", network.endpoints, By("ec2", "delete_vpc_endpoints", "VpcEndpointIds[]")),
    Kind(
        "elastic IP",
        network.addresses,
        network.remove_address,
        "aws ec2 release-address --region {region} --allocation-id {id}",
    ),
    Kind(
        "network interface",
        network.interfaces,
        By("ec2", "delete_network_interface", "NetworkInterfaceId"),
    ),
    Kind(
        "security group",
        network.security_groups,
        network.remove_security_group,
        "aws ec2 delete-security-group --region {region} --group-id {id}",
    ),
    Kind(
        "file system",
        storage.file_systems,
        storage.remove_file_system,
        "aws efs delete-file-system --region {region} --file-system-id {id}",
        data=True,
    ),
    Kind("volume", storage.volumes, By("ec2", "delete_volume", "VolumeId"), data=True),
    Kind("snapshot", storage.snapshots, By("ec2", "delete_snapshot", "SnapshotId"), data=True),
    Kind(
        "launch template",
        machines.launch_templates,
        By("ec2", "delete_launch_template", "LaunchTemplateId"),
    ),
    Kind("flow log", network.flow_logs, By("ec2", "delete_flow_logs", "FlowLogIds[]")),
    Kind(
        "log group", records.log_groups, By("logs", "delete_log_group", "logGroupName"), data=True
    ),
    Kind(
        "image repository",
        storage.repositories,
        By("ecr", "delete_repository", "repositoryName", (("force", True),)),
        data=True,
    ),
    Kind(
        "bucket",
        storage.buckets,
        None,
        "aws s3 rb --region {region} --force s3://{id}",
        data=True,
    ),
    Kind(
        "secret",
        identity.secrets,
        By("secretsmanager", "delete_secret", "SecretId", (("RecoveryWindowInDays", 7),)),
        data=True,
    ),
    Kind(
        "hosted zone",
        records.hosted_zones,
        None,
        "aws route53 delete-hosted-zone --id {id}  # once its records are gone",
        data=True,
    ),
    Kind(
        "identity provider",
        identity.identity_providers,
        By("iam", "delete_open_id_connect_provider", "OpenIDConnectProviderArn"),
    ),
    Kind(
        "key",
        identity.keys,
        By("kms", "schedule_key_deletion", "KeyId", (("PendingWindowInDays", 7),)),
        data=True,
    ),
    Kind(
        "role",
        identity.roles,
        identity.remove_role,
        "aws iam delete-role --role-name {id}  # after its policies and instance profiles",
    ),
    Kind(
        "instance profile",
        identity.instance_profiles,
        identity.remove_instance_profile,
        "aws iam delete-instance-profile --instance-profile-name {id}  # once it has no role",
    ),
    Kind(
        "policy",
        identity.policies,
        identity.remove_policy,
        "aws iam delete-policy --policy-arn {id}  # once nothing has it",
    ),
    Kind(
        "user",
        identity.users,
        None,
        "aws iam delete-user --user-name {id}  # after its keys, policies and groups",
    ),
    Kind("subnet", network.subnets, By("ec2", "delete_subnet", "SubnetId")),
    Kind("route table", network.route_tables, By("ec2", "delete_route_table", "RouteTableId")),
    Kind(
        "internet gateway",
        network.internet_gateways,
        network.remove_internet_gateway,
        "aws ec2 delete-internet-gateway --region {region} --internet-gateway-id {id}"
        "  # after detach-internet-gateway",
    ),
    Kind("VPC", network.networks, By("ec2", "delete_vpc", "VpcId")),
    Kind("other", records.others, None, "# no command known here: remove it in its service"),
)
BY_NAME = {kind.name: kind for kind in KINDS}


def command(resource: Found, region: str) -> str:
    """The shell command that removes it."""
    kind = BY_NAME[resource.kind]
    if not kind.command and isinstance(kind.remove, By):
        return kind.remove.command(resource.id, region)
    owner, _, name = resource.id.partition("/")
    return kind.command.format(id=resource.id, region=region, cluster=owner, name=name)
