"""What a cluster leaves behind, planted in an account, and what an account holds.

`plant` makes one of every kind; `everything` lists an account with no regard to tags, by other
calls than those of the code under test, so that what was left alone can be told from what was not
looked at.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.kuberay.cloud import REGION, Cloud

TEMPLATE = json.dumps({"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}})
_ANYBODY = {"Effect": "Allow", "Principal": "*", "Action": "sts:AssumeRole"}
TRUST = json.dumps({"Version": "2012-10-17", "Statement": [_ANYBODY]})
_READ = {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}
POLICY = json.dumps({"Version": "2012-10-17", "Statement": [_READ]})
Tags = Mapping[str, str]


def pairs(tags: Tags) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def marked(kind: str, tags: Tags) -> list[dict[str, Any]]:
    return [{"ResourceType": kind, "Tags": pairs(tags)}]


def eksctl_tags(name: str) -> dict[str, str]:
    """What eksctl puts on all it makes, our own among them from cluster.yaml."""
    return {
        "alpha.eksctl.io/cluster-name": name,
        "qwen-ray-serve/cluster": name,
        "qwen-ray-serve/region": REGION,
    }


def controller_tags(name: str) -> dict[str, str]:
    """What knows only Kubernetes' own tag puts on."""
    return {f"kubernetes.io/cluster/{name}": "owned"}


def plant(cloud: Cloud, name: str, cluster: bool = True, octet: int = 20) -> None:
    """One thing of every kind, tagged as this cluster's."""
    made, ran = eksctl_tags(name), controller_tags(name)
    ec2 = cloud.client("ec2")
    vpc = ec2.create_vpc(CidrBlock=f"10.{octet}.0.0/16", TagSpecifications=marked("vpc", made))
    vpc_id = vpc["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(
            VpcId=vpc_id,
            CidrBlock=f"10.{octet}.{n}.0/24",
            AvailabilityZone=f"{REGION}{zone}",
            TagSpecifications=marked("subnet", made),
        )["Subnet"]["SubnetId"]
        for n, zone in enumerate("ab")
    ]
    gateway = ec2.create_internet_gateway(TagSpecifications=marked("internet-gateway", made))
    gateway_id = gateway["InternetGateway"]["InternetGatewayId"]
    ec2.attach_internet_gateway(InternetGatewayId=gateway_id, VpcId=vpc_id)
    ec2.create_route_table(VpcId=vpc_id, TagSpecifications=marked("route-table", made))
    ec2.create_vpc_endpoint(
        VpcId=vpc_id,
        ServiceName=f"com.amazonaws.{REGION}.s3",
        VpcEndpointType="Gateway",
        TagSpecifications=marked("vpc-endpoint", made),
    )
    address = ec2.allocate_address(Domain="vpc", TagSpecifications=marked("elastic-ip", made))
    ec2.create_nat_gateway(
        SubnetId=subnets[0],
        AllocationId=address["AllocationId"],
        TagSpecifications=marked("natgateway", made),
    )
    _network_of_pods(ec2, name, vpc_id, subnets, ran)
    ec2.run_instances(
        ImageId="ami-12c6146b",
        InstanceType="g6.xlarge",
        MinCount=1,
        MaxCount=1,
        SubnetId=subnets[0],
        TagSpecifications=marked("instance", {"eks:cluster-name": name}),
    )
    volume = ec2.create_volume(
        AvailabilityZone=f"{REGION}a",
        Size=100,
        VolumeType="gp3",
        TagSpecifications=marked("volume", ran),
    )
    ec2.create_snapshot(VolumeId=volume["VolumeId"], TagSpecifications=marked("snapshot", ran))
    template = ec2.create_launch_template(
        LaunchTemplateName=f"lt-{name}",
        LaunchTemplateData={"InstanceType": "g6.xlarge", "ImageId": "ami-12c6146b"},
        TagSpecifications=marked("launch-template", made),
    )
    cloud.client("autoscaling").create_auto_scaling_group(
        AutoScalingGroupName=f"asg-{name}",
        LaunchTemplate={"LaunchTemplateId": template["LaunchTemplate"]["LaunchTemplateId"]},
        MinSize=0,
        MaxSize=2,
        DesiredCapacity=0,
        VPCZoneIdentifier=subnets[0],
        Tags=[{**pair, "PropagateAtLaunch": True} for pair in pairs(ran)],
    )
    _starters(ec2, subnets[0], template["LaunchTemplate"]["LaunchTemplateId"], made)
    ec2.create_flow_logs(
        ResourceIds=[vpc_id],
        ResourceType="VPC",
        TrafficType="ALL",
        LogGroupName="/flows",
        DeliverLogsPermissionArn="arn:aws:iam::123456789012:role/flows",
        TagSpecifications=marked("vpc-flow-log", made),
    )
    _balancers(cloud, name, vpc_id, subnets, ran)
    _storage(cloud, name, made)
    _identities(cloud, name, made)
    cloud.client("cloudformation").create_stack(
        StackName=f"eksctl-{name}-cluster", TemplateBody=TEMPLATE, Tags=pairs(made)
    )
    if cluster:
        _cluster(cloud, name, made, subnets)


def _starters(ec2: Any, subnet: str, template: str, tags: Tags) -> None:
    """A spot request and a fleet, which start instances."""
    request = ec2.request_spot_instances(
        SpotPrice="1",
        Type="persistent",
        LaunchSpecification={
            "ImageId": "ami-12c6146b", "InstanceType": "g6.xlarge", "SubnetId": subnet,
        },
        TagSpecifications=marked("spot-instances-request", tags),
    )  # fmt: skip
    number = request["SpotInstanceRequests"][0]["SpotInstanceRequestId"]
    started = ec2.describe_spot_instance_requests(SpotInstanceRequestIds=[number])
    instance = started["SpotInstanceRequests"][0]["InstanceId"]
    ec2.create_tags(Resources=[number, instance], Tags=pairs(tags))
    ec2.create_fleet(
        LaunchTemplateConfigs=[
            {"LaunchTemplateSpecification": {"LaunchTemplateId": template, "Version": "1"}}
        ],
        TargetCapacitySpecification={
            "TotalTargetCapacity": 0, "OnDemandTargetCapacity": 0, "SpotTargetCapacity": 0,
            "DefaultTargetCapacityType": "on-demand",
        },
        Type="maintain",
        TagSpecifications=marked("fleet", tags),
    )  # fmt: skip


def _network_of_pods(ec2: Any, name: str, vpc_id: str, subnets: list[str], tags: Tags) -> None:
    """An interface, and two security groups that name each other."""
    groups = [
        ec2.create_security_group(
            GroupName=f"{name}-{n}",
            Description="pods",
            VpcId=vpc_id,
            TagSpecifications=marked("security-group", tags),
        )["GroupId"]
        for n in range(2)
    ]
    for mine, other in (groups, reversed(groups)):
        ec2.authorize_security_group_ingress(
            GroupId=mine,
            IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": other}]}],
        )
    ec2.create_network_interface(
        SubnetId=subnets[0],
        Groups=[groups[0]],
        TagSpecifications=marked("network-interface", {"cluster.k8s.amazonaws.com/name": name}),
    )


def _balancers(cloud: Cloud, name: str, vpc_id: str, subnets: list[str], tags: Tags) -> None:
    elbv2 = cloud.client("elbv2")
    elbv2.create_load_balancer(
        Name=f"nlb-{name}",
        Subnets=subnets,
        Type="network",
        Scheme="internal",
        Tags=pairs({"elbv2.k8s.aws/cluster": name}),
    )
    elbv2.create_target_group(
        Name=f"tg-{name}",
        Protocol="TCP",
        Port=8000,
        VpcId=vpc_id,
        Tags=pairs({"elbv2.k8s.aws/cluster": name}),
    )
    cloud.client("elb").create_load_balancer(
        LoadBalancerName=f"clb-{name}",
        Listeners=[{"Protocol": "tcp", "LoadBalancerPort": 80, "InstancePort": 80}],
        AvailabilityZones=[f"{REGION}a"],
        Tags=pairs(tags),
    )


def _storage(cloud: Cloud, name: str, tags: Tags) -> None:
    cloud.client("efs").create_file_system(CreationToken=name, Tags=pairs(tags))
    cloud.client("ecr").create_repository(repositoryName=f"repo-{name}", tags=pairs(tags))
    logs = cloud.client("logs")
    logs.create_log_group(logGroupName=f"/aws/eks/{name}/cluster", tags=dict(tags))
    logs.create_log_group(logGroupName=f"/{name}/pods", tags=dict(tags))
    cloud.client("kms").create_key(
        Description=name,
        Tags=[{"TagKey": key, "TagValue": value} for key, value in tags.items()],
    )
    bucket = f"qwen-ray-serve-weights-{name}"
    s3 = cloud.client("s3")
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_object(Bucket=bucket, Key="model.safetensors", Body=b"0" * 1000)
    s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": pairs(tags)})
    cloud.client("secretsmanager").create_secret(
        Name=f"{name}/keys", SecretString="x", Tags=pairs(tags)
    )
    zone = cloud.client("route53").create_hosted_zone(Name=f"{name}.example.", CallerReference=name)
    cloud.client("route53").change_tags_for_resource(
        ResourceType="hostedzone",
        ResourceId=zone["HostedZone"]["Id"].rpartition("/")[2],
        AddTags=pairs(tags),
    )
    # Of no kind that the sweep knows: Karpenter's queue of interruptions.
    cloud.client("sqs").create_queue(QueueName=f"karpenter-{name}", tags=dict(tags))


def _identities(cloud: Cloud, name: str, tags: Tags) -> None:
    iam = cloud.client("iam")
    role = f"eksctl-{name}-node"
    iam.create_role(RoleName=role, AssumeRolePolicyDocument=TRUST, Tags=pairs(tags))
    iam.put_role_policy(RoleName=role, PolicyName="inline", PolicyDocument=POLICY)
    policy = iam.create_policy(PolicyName=f"users-{name}", PolicyDocument=POLICY)["Policy"]["Arn"]
    iam.attach_role_policy(RoleName=role, PolicyArn=policy)
    iam.create_policy(PolicyName=f"balancers-{name}", PolicyDocument=POLICY, Tags=pairs(tags))
    iam.create_user(UserName=f"ci-{name}", Tags=pairs(tags))
    iam.create_instance_profile(InstanceProfileName=role, Tags=pairs(tags))
    iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
    iam.create_open_id_connect_provider(
        Url=f"https://oidc.eks.{REGION}.amazonaws.com/id/{name.upper()}",
        ThumbprintList=["9e99a48a9960b14926bb7f3b02e22da2b0ab7280"],
        Tags=pairs({"alpha.eksctl.io/cluster-name": name}),
    )


def _cluster(cloud: Cloud, name: str, tags: Tags, subnets: list[str]) -> None:
    eks = cloud.client("eks")
    role = f"arn:aws:iam::123456789012:role/eksctl-{name}-node"
    eks.create_cluster(
        name=name, roleArn=role, resourcesVpcConfig={"subnetIds": subnets}, tags=dict(tags)
    )
    eks.create_nodegroup(
        clusterName=name,
        nodegroupName="gpu",
        nodeRole=role,
        subnets=subnets,
        instanceTypes=["g6.xlarge"],
        scalingConfig={"minSize": 0, "maxSize": 4, "desiredSize": 1},
        tags=dict(tags),
    )


# --- what an account holds ------------------------------------------------------------------


def everything(cloud: Cloud) -> dict[str, set[str]]:
    """Every thing in the account, by kind. Instances that are over, and what AWS made, left out."""
    ec2 = cloud.client("ec2")

    def ids(operation: str, key: str, name: str, keep: Callable[[Any], bool] = bool) -> set[str]:
        arguments = {"OwnerIds": ["self"]} if operation == "describe_snapshots" else {}
        return {item[name] for item in getattr(ec2, operation)(**arguments)[key] if keep(item)}

    instances = {
        instance["InstanceId"]
        for reservation in ec2.describe_instances()["Reservations"]
        for instance in reservation["Instances"]
        if instance["State"]["Name"] != "terminated"
    }
    elbv2, iam, eks = cloud.client("elbv2"), cloud.client("iam"), cloud.client("eks")
    kms, logs = cloud.client("kms"), cloud.client("logs")
    stacks = cloud.client("cloudformation").describe_stacks()["Stacks"]
    clusters = eks.list_clusters()["clusters"]
    keys = [kms.describe_key(KeyId=key["KeyId"])["KeyMetadata"] for key in kms.list_keys()["Keys"]]
    return {
        "cluster": set(clusters),
        "node group": {
            f"{name}/{group}"
            for name in clusters
            for group in eks.list_nodegroups(clusterName=name)["nodegroups"]
        },
        "stack": {stack["StackName"] for stack in stacks},
        "load balancer": {
            each["LoadBalancerArn"] for each in elbv2.describe_load_balancers()["LoadBalancers"]
        },
        "classic load balancer": {
            each["LoadBalancerName"]
            for each in cloud.client("elb").describe_load_balancers()["LoadBalancerDescriptions"]
        },
        "target group": {
            each["TargetGroupArn"] for each in elbv2.describe_target_groups()["TargetGroups"]
        },
        "auto scaling group": {
            each["AutoScalingGroupName"]
            for each in cloud.client("autoscaling").describe_auto_scaling_groups()[
                "AutoScalingGroups"
            ]
        },
        "instance": instances,
        "NAT gateway": ids(
            "describe_nat_gateways",
            "NatGateways",
            "NatGatewayId",
            lambda item: item["State"] != "deleted",
        ),
        "VPC endpoint": ids(
            "describe_vpc_endpoints",
            "VpcEndpoints",
            "VpcEndpointId",
            lambda item: item["State"].lower() != "deleted",
        ),
        "elastic IP": ids("describe_addresses", "Addresses", "AllocationId"),
        # moto leaves behind what goes with a NAT gateway, an instance or a network: interfaces
        # without a tag, and default groups.
        "network interface": ids(
            "describe_network_interfaces",
            "NetworkInterfaces",
            "NetworkInterfaceId",
            lambda item: bool(item["TagSet"]),
        ),
        "security group": ids(
            "describe_security_groups",
            "SecurityGroups",
            "GroupId",
            lambda item: not item["GroupName"].startswith("default"),
        ),
        "file system": {
            each["FileSystemId"]
            for each in cloud.client("efs").describe_file_systems()["FileSystems"]
        },
        "volume": ids("describe_volumes", "Volumes", "VolumeId"),
        "snapshot": ids("describe_snapshots", "Snapshots", "SnapshotId"),
        "launch template": ids(
            "describe_launch_templates", "LaunchTemplates", "LaunchTemplateId"
        ),
        "log group": {each["logGroupName"] for each in logs.describe_log_groups()["logGroups"]},
        "image repository": {
            each["repositoryName"]
            for each in cloud.client("ecr").describe_repositories()["repositories"]
        },
        "identity provider": {
            each["Arn"]
            for each in iam.list_open_id_connect_providers()["OpenIDConnectProviderList"]
        },
        "key": {key["KeyId"] for key in keys if key["KeyState"] != "PendingDeletion"},
        "role": {role["RoleName"] for role in iam.list_roles()["Roles"]},
        "subnet": ids("describe_subnets", "Subnets", "SubnetId"),
        "route table": ids("describe_route_tables", "RouteTables", "RouteTableId"),
        "internet gateway": ids(
            "describe_internet_gateways", "InternetGateways", "InternetGatewayId"
        ),
        "VPC": ids("describe_vpcs", "Vpcs", "VpcId"),
        "spot request": {
            each["SpotInstanceRequestId"]
            for each in ec2.describe_spot_instance_requests()["SpotInstanceRequests"]
            if each["State"] != "cancelled"
        },
        "fleet": {
            each["FleetId"]
            for each in ec2.describe_fleets()["Fleets"]
            if not each["FleetState"].startswith("deleted")
        },
        "flow log": {each["FlowLogId"] for each in ec2.describe_flow_logs()["FlowLogs"]},
        "bucket": {each["Name"] for each in cloud.client("s3").list_buckets()["Buckets"]},
        "secret": {
            each["ARN"] for each in cloud.client("secretsmanager").list_secrets()["SecretList"]
        },
        "hosted zone": {
            each["Id"].rpartition("/")[2]
            for each in cloud.client("route53").list_hosted_zones()["HostedZones"]
        },
        "user": {each["UserName"] for each in iam.list_users()["Users"]},
        "queue": set(cloud.client("sqs").list_queues().get("QueueUrls", [])),
        "policy": {
            policy["Arn"] for policy in iam.list_policies(Scope="Local")["Policies"]
        },
        "instance profile": {
            each["InstanceProfileName"]
            for each in iam.list_instance_profiles()["InstanceProfiles"]
        },
    }  # fmt: skip


def minus(first: Mapping[str, set[str]], other: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """What is in `single` and not in `other`, by kind; no kind that has nothing."""
    left = {kind: first[kind] - other.get(kind, set()) for kind in first}
    return {kind: names for kind, names in left.items() if names}
