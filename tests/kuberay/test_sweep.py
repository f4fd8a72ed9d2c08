"""The sweep: it finds one of every kind that a cluster leaves, and nothing of anybody else's."""

import fnmatch
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from kuberay import kinds, prices, search, sweep
from kuberay.aws import Account
from kuberay.kinds import storage
from kuberay.owned import Owner, regions
from kuberay.search import Found, parsed
from kuberay.sweep import Sweep
from tests.kuberay import planted
from tests.kuberay.cli import run
from tests.kuberay.cloud import REGION, Cloud

OWNER = Owner("ours", REGION)
# What belongs to no region.
GLOBAL = ("role", "user", "policy", "instance profile", "identity provider", "hosted zone")


@functools.cache
def account() -> Account:
    # Its clients take a second to make, and know nothing of a test.
    return Account(REGION)


def swept(name: str = "ours") -> Sweep:
    return sweep.sweep(account(), Owner(name, REGION))


def by_kind(expected: Sweep) -> dict[str, list[Found]]:
    remaining: dict[str, list[Found]] = {}
    for entry in expected.left:
        remaining.setdefault(entry.kind, []).append(entry)
    return remaining


# --- what is ours -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "owned"),
    [
        ({"qwen-ray-serve/cluster": "ours"}, True),
        ({"alpha.eksctl.io/cluster-name": "ours"}, True),
        ({"kubernetes.io/cluster/ours": "owned"}, True),
        ({"elbv2.k8s.aws/cluster": "ours"}, True),
        # A network that was there before the cluster, and outlives it.
        ({"kubernetes.io/cluster/ours": "shared"}, False),
        ({"kubernetes.io/cluster/ours-2": "owned"}, False),
        ({"kubernetes.io/cluster/other": "owned"}, False),
        ({"alpha.eksctl.io/cluster-name": "ours-2"}, False),
        # Ours decides alone.
        ({"qwen-ray-serve/cluster": "other", "kubernetes.io/cluster/ours": "owned"}, False),
        ({"Name": "ours"}, False),
        ({"team": "ours", "cluster": "ours"}, False),
        ({}, False),
    ],
)
def test_tags_decide_what_is_ours(tags: dict[str, str], owned: bool) -> None:
    assert OWNER.owns(tags) is owned


def test_long_lists_are_narrowed_to_a_pattern_that_all_keys_match() -> None:
    keys = [*OWNER.keys, storage._CSI]
    assert [key for key in keys if not fnmatch.fnmatchcase(key, search._CLUSTER_KEYS)] == []


def test_what_is_global_names_its_region() -> None:
    assert regions({"qwen-ray-serve/region": "us-west-2"}) == {"us-west-2"}
    assert regions({}, "oidc.eks.us-east-1.amazonaws.com/id/ABC") == {"us-east-1"}
    assert regions({}, "token.actions.githubusercontent.com") == set()


@pytest.mark.parametrize(
    ("arn", "parts"),
    [
        ("arn:aws:ec2:us-west-2:1:volume/vol-1", ("ec2", "volume", "vol-1")),
        ("arn:aws:logs:us-west-2:1:log-group:/aws/eks/x", ("logs", "log-group", "/aws/eks/x")),
        ("arn:aws:sqs:us-west-2:1:queue", ("sqs", "", "queue")),
        ("arn:aws:s3:::bucket", ("s3", "", "bucket")),
        ("arn:aws:ecr:us-west-2:1:repository/a/b", ("ecr", "repository", "a/b")),
    ],
)
def test_an_arn_is_taken_apart(arn: str, parts: tuple[str, str, str]) -> None:
    assert parsed(arn) == parts


# --- what is found ------------------------------------------------------------------------------


def test_an_account_without_the_cluster_is_clean(cloud: Cloud) -> None:
    planted.plant(cloud, "other")
    result = swept()
    assert result.clean, result.lines()
    assert result.lines() == [
        f"ours in {REGION} (account 123456789012): nothing is left; "
        f"{len(kinds.KINDS)} kinds of things were looked for"
    ]


def test_one_of_every_kind_is_found(cloud: Cloud) -> None:
    planted.plant(cloud, "other", octet=30)
    before = planted.everything(cloud)
    planted.plant(cloud, "ours")
    result = by_kind(swept())
    assert set(result) == {kind.name for kind in kinds.KINDS}
    # What the account holds beside, and the sweep says nothing of, is the other's or free.
    mine = planted.minus(planted.everything(cloud), before)
    for kind, entries in result.items():
        if kind in mine:
            # The disks of instances and the main table of a network go with them, without a tag. A
            # user's own policy has none either.
            root = {"volume": 2, "route table": 1, "policy": 1}.get(kind, 0)
            named = {entry.id for entry in entries if entry.tagged}
            assert named <= mine[kind], kind
            assert len(named) == len(mine[kind]) - root, kind
    names = {entry.id + entry.detail for entries in result.values() for entry in entries}
    assert not [name for name in names if "other" in name]


def test_what_is_left_has_its_price(cloud: Cloud) -> None:
    planted.plant(cloud, "ours")
    result = by_kind(swept())

    def usd(kind: str) -> float:
        return sum(entry.usd_per_month or 0 for entry in result[kind])

    assert usd("NAT gateway") == pytest.approx(0.045 * 730)
    assert usd("instance") == pytest.approx(2 * prices.INSTANCES["g6.xlarge"].usd_per_hour * 730)
    assert usd("cluster") == pytest.approx(73.0)
    assert usd("load balancer") == pytest.approx(0.0225 * 730)
    assert usd("classic load balancer") == pytest.approx(0.025 * 730)
    assert usd("elastic IP") == pytest.approx(0.005 * 730)
    assert usd("snapshot") == pytest.approx(100 * 0.05)
    assert usd("key") == pytest.approx(1.0)
    assert any(e.usd_per_month == pytest.approx(8.0) for e in result["volume"])
    assert usd("secret") == pytest.approx(0.40)
    assert usd("hosted zone") == pytest.approx(0.50)
    assert usd("bucket") == pytest.approx(0.023 * 1000 / 1e9)
    (queue,) = result["other"]
    assert queue.usd_per_month == 0.0
    total = swept()
    assert total.usd_per_month == pytest.approx(
        sum(entry.usd_per_month or 0 for entry in total.left)
    )
    assert f"{total.usd_per_month:.2f} $/month" in total.lines()[-1]


def test_each_thing_that_is_left_has_the_command_that_removes_it(cloud: Cloud) -> None:
    planted.plant(cloud, "ours")
    result = swept()
    for entry in result.left:
        command = result.command(entry)
        if entry.kind == "other":
            assert command.startswith("#")
            continue
        assert entry.id.rpartition("/")[2] in command
        assert "{" not in command
        if entry.kind not in GLOBAL:
            assert f"--region {REGION}" in command


def test_a_namesake_in_another_region_keeps_its_role(cloud: Cloud) -> None:
    iam = cloud.client("iam")
    for name, tags in {
        "here": {"alpha.eksctl.io/cluster-name": "ours", "qwen-ray-serve/region": REGION},
        "there": {"alpha.eksctl.io/cluster-name": "ours", "qwen-ray-serve/region": "eu-west-1"},
        "nowhere": {"alpha.eksctl.io/cluster-name": "ours"},
    }.items():
        iam.create_role(
            RoleName=name, AssumeRolePolicyDocument=planted.TRUST, Tags=planted.pairs(tags)
        )
    values = {entry.id: entry for entry in by_kind(swept())["role"]}
    assert set(values) == {"here", "nowhere"}
    assert (values["here"].tagged, values["nowhere"].tagged) == (True, False)


def test_a_log_group_by_name_alone_is_reported_and_is_not_ours_to_remove(cloud: Cloud) -> None:
    logs = cloud.client("logs")
    logs.create_log_group(logGroupName="/aws/eks/ours/cluster")
    logs.create_log_group(logGroupName="/aws/eks/ours-2/cluster")
    logs.create_log_group(logGroupName="/aws/containerinsights/ours/application")
    result = by_kind(swept())["log group"]
    assert {entry.id for entry in result} == {
        "/aws/eks/ours/cluster",
        "/aws/containerinsights/ours/application",
    }
    assert not any(entry.tagged for entry in result)
    assert "does not carry the tag" in "\n".join(swept().lines())


def test_an_interface_without_a_tag_in_our_network_is_reported(cloud: Cloud) -> None:
    ec2 = cloud.client("ec2")
    planted.plant(cloud, "ours", cluster=False)
    vpc = ec2.describe_vpcs(Filters=[{"Name": "tag:qwen-ray-serve/cluster", "Values": ["ours"]}])
    inside = [{"Name": "vpc-id", "Values": [vpc["Vpcs"][0]["VpcId"]]}]
    subnet = ec2.describe_subnets(Filters=inside)["Subnets"][0]["SubnetId"]
    made = ec2.create_network_interface(SubnetId=subnet, Description="Amazon EKS ours")
    name = made["NetworkInterface"]["NetworkInterfaceId"]
    (results,) = [entry for entry in by_kind(swept())["network interface"] if entry.id == name]
    assert not results.tagged
    assert "in the cluster's VPC" in results.detail


def test_what_is_gone_is_not_left(cloud: Cloud) -> None:
    planted.plant(cloud, "ours", cluster=False)
    ec2, kms = cloud.client("ec2"), cloud.client("kms")
    result = by_kind(swept())
    ec2.terminate_instances(InstanceIds=[entry.id for entry in result["instance"]])
    ec2.delete_nat_gateway(NatGatewayId=result["NAT gateway"][0].id)
    kms.schedule_key_deletion(KeyId=result["key"][0].id, PendingWindowInDays=7)
    cloud.client("cloudformation").delete_stack(StackName=result["stack"][0].id)
    after = by_kind(swept())
    assert not {"instance", "NAT gateway", "key", "stack"} & set(after)


def test_what_serves_all_clusters_is_named_and_is_no_reason_to_fail(cloud: Cloud) -> None:
    cloud.client("ecr").create_repository(repositoryName="qwen-ray-serve")
    s3 = cloud.client("s3")
    for name in ("qwen-ray-serve-weights", "somebody-elses"):
        s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
    far = {"LocationConstraint": "eu-west-1"}
    cloud.client("s3", "eu-west-1").create_bucket(
        Bucket="qwen-ray-serve-far", CreateBucketConfiguration=far
    )
    result = swept()
    assert result.clean
    commands = {entry.id: result.command(entry) for entry in result.left}
    assert commands == {
        "qwen-ray-serve": f"aws ecr delete-repository --region {REGION} "
        "--repository-name qwen-ray-serve --force",
        "qwen-ray-serve-weights": f"aws s3 rb --region {REGION} --force s3://qwen-ray-serve-weights",
    }
    for entry in result.left:
        assert not entry.tagged
        assert any(entry.id in line for line in result.lines())


# --- without a cluster that vouches ---------------------------------------------------------------


def test_without_a_cluster_of_ours_only_our_own_tag_makes_a_thing_ours(cloud: Cloud) -> None:
    planted.plant(cloud, "ours", cluster=False)
    ec2 = cloud.client("ec2")
    ran = planted.controller_tags("ours")
    made = ec2.run_instances(
        ImageId="ami-12c6146b", InstanceType="m5.large", MinCount=1, MaxCount=1,
        TagSpecifications=planted.marked("instance", {**ran, "Name": "masters.ours"}),
    )  # fmt: skip
    kops = made["Instances"][0]["InstanceId"]
    result = by_kind(swept())
    removable = {kind: {e.id for e in entries if e.tagged} for kind, entries in result.items()}
    # By the tags of other programs alone: told, and nobody's to remove.
    for kind in ("volume", "snapshot", "identity provider", "classic load balancer"):
        assert result[kind]
        assert not removable[kind], kind
    assert kops in {entry.id for entry in result["instance"]}
    assert kops not in removable["instance"]
    # In a VPC that carries our own tag, theirs are enough.
    for kind in ("VPC", "subnet", "load balancer", "security group", "network interface"):
        assert removable[kind], kind
    # And while a cluster of ours is there, they are everywhere.
    planted._cluster(cloud, "ours", planted.eksctl_tags("ours"), [])
    result = by_kind(swept())
    for kind in ("volume", "snapshot", "instance", "identity provider", "classic load balancer"):
        assert all(entry.tagged for entry in result[kind]), kind


# --- what has no tag of the cluster ---------------------------------------------------------------


def test_snapshots_of_its_volumes_are_reported(cloud: Cloud) -> None:
    ec2 = cloud.client("ec2")
    planted.plant(cloud, "ours")
    (volume,) = by_kind(swept())["volume"]
    name = ec2.create_snapshot(VolumeId=volume.id)["SnapshotId"]
    other = ec2.create_volume(AvailabilityZone=f"{REGION}a", Size=1)["VolumeId"]
    foreign = ec2.create_snapshot(VolumeId=other)["SnapshotId"]
    values = {entry.id: entry for entry in by_kind(swept())["snapshot"]}
    assert not values[name].tagged
    assert values[name].usd_per_month == pytest.approx(5.0)
    assert foreign not in values


def test_a_volume_whose_driver_named_no_cluster_is_reported_until_it_is_told_apart(
    cloud: Cloud,
) -> None:
    ec2 = cloud.client("ec2")
    tags = {"CSIVolumeName": "pvc-1", "ebs.csi.aws.com/cluster": "true"}
    name, other = (
        ec2.create_volume(
            AvailabilityZone=f"{REGION}a", Size=10,
            TagSpecifications=planted.marked("volume", {**tags, **more}),
        )["VolumeId"]
        for more in ({"Name": "x"}, {"kubernetes.io/cluster/other": "owned"})
    )  # fmt: skip
    (result,) = by_kind(swept())["volume"]
    assert (result.id, result.tagged, result.counted) == (name, False, True)
    assert other != name
    ec2.create_tags(Resources=[name], Tags=planted.pairs({"qwen-ray-serve/cluster": "none"}))
    assert swept().clean


def test_gateways_and_endpoints_without_a_tag_in_our_network_are_reported(cloud: Cloud) -> None:
    ec2 = cloud.client("ec2")
    planted.plant(cloud, "ours", cluster=False)
    (vpc,) = (entry.id for entry in by_kind(swept())["VPC"])
    inside = [{"Name": "vpc-id", "Values": [vpc]}]
    subnet = ec2.describe_subnets(Filters=inside)["Subnets"][0]["SubnetId"]
    address = ec2.allocate_address(Domain="vpc")["AllocationId"]
    nat = ec2.create_nat_gateway(SubnetId=subnet, AllocationId=address)["NatGateway"]
    endpoint = ec2.create_vpc_endpoint(
        VpcId=vpc, ServiceName=f"com.amazonaws.{REGION}.ecr.api", VpcEndpointType="Interface",
        SubnetIds=[subnet],
    )["VpcEndpoint"]  # fmt: skip
    made = ec2.run_instances(
        ImageId="ami-12c6146b", InstanceType="g6.xlarge", MinCount=1, MaxCount=1, SubnetId=subnet
    )
    values = {entry.id: entry for entry in swept().left}
    for name in (
        nat["NatGatewayId"], endpoint["VpcEndpointId"], made["Instances"][0]["InstanceId"]
    ):  # fmt: skip
        assert not values[name].tagged
        assert (values[name].usd_per_month or 0) > 5


def test_log_groups_are_known_by_the_clusters_name(cloud: Cloud) -> None:
    logs = cloud.client("logs")
    certain = ("/aws/eks/ours/cluster", "/aws/containerinsights/ours/application", "/ours/pods")
    perhaps = ("/aws/lambda/ours-ttl", "/aws/codebuild/ours-down")
    others = ("/aws/eks/ours-2/cluster", "/aws/lambda/ours-2-ttl", "/aws/lambda/yours", "hours")
    for name in (*certain, *perhaps, *others):
        logs.create_log_group(logGroupName=name)
    cloud.client("eks").create_cluster(
        name="ours-2", roleArn="arn:aws:iam::123456789012:role/x", resourcesVpcConfig={}
    )
    values = {entry.id: entry for entry in by_kind(swept())["log group"]}
    assert set(values) == {*certain, *perhaps}
    assert not any(entry.tagged for entry in values.values())
    assert {name for name, entry in values.items() if entry.counted} == set(certain)


def test_a_group_with_the_autoscalers_tag_alone_is_ours(cloud: Cloud) -> None:
    planted.plant(cloud, "ours")
    for name in ("ours", "other"):
        cloud.client("autoscaling").create_auto_scaling_group(
            AutoScalingGroupName=f"scaled-{name}", MinSize=0, MaxSize=1,
            AvailabilityZones=[f"{REGION}a"], LaunchTemplate={"LaunchTemplateName": "lt-ours"},
            Tags=[{"Key": f"k8s.io/cluster-autoscaler/{name}", "Value": "owned"}],
        )  # fmt: skip
    values = {entry.id: entry.tagged for entry in by_kind(swept())["auto scaling group"]}
    assert values == {"asg-ours": True, "scaled-ours": True}


# --- what AWS does not let it see ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("ec2:DescribeVolumes", "volume"),
        ("ec2:DescribeNatGateways", "NAT gateway"),
        ("elasticloadbalancing:DescribeTargetGroups", "target group"),
        ("ecr:DescribeRepositories", "image repository"),
        ("elasticfilesystem:DescribeFileSystems", "file system"),
        ("autoscaling:DescribeAutoScalingGroups", "auto scaling group"),
    ],
)
def test_a_kind_that_may_not_be_looked_at_is_no_proof(cloud: Cloud, action: str, kind: str) -> None:
    cloud.faults.deny(action)
    result = swept()
    assert not result.clean
    assert not result.left
    (gap,) = result.gaps
    assert (gap.kind, gap.action) == (kind, action)
    assert f"missing permission: {action}" in "\n".join(result.lines())


def test_roles_and_users_that_may_not_be_listed_are_no_proof(cloud: Cloud) -> None:
    cloud.faults.deny("iam:GetAccountAuthorizationDetails")
    result = swept()
    assert not result.clean
    assert [gap.kind for gap in result.gaps] == ["role", "user"]
    assert {gap.action for gap in result.gaps} == {"iam:GetAccountAuthorizationDetails"}


def test_without_the_tag_index_the_other_kinds_are_still_found(cloud: Cloud) -> None:
    planted.plant(cloud, "ours")
    cloud.faults.deny("tag:GetResources")
    result = swept()
    gaps = {gap.kind for gap in result.gaps}
    assert gaps == {"log group", "key", "policy", "other"}
    # The bucket's name and the profile's role say what the index would.
    assert len(by_kind(result)) == len(kinds.KINDS) - len(gaps)


def test_throttling_is_waited_out(cloud: Cloud) -> None:
    planted.plant(cloud, "ours")
    cloud.faults.throttle("ec2:DescribeVolumes", times=2)
    cloud.faults.throttle("ecr:DescribeRepositories", times=1)
    result = swept()
    assert not result.gaps
    assert {"volume", "image repository"} <= set(by_kind(result))
    assert cloud.faults.calls.count("DescribeVolumes") == 3


# --- the command --------------------------------------------------------------------------------


def test_the_report_is_json_and_its_status_says_whether_it_is_clean(
    cloud: Cloud, tmp_path: Path
) -> None:
    planted.plant(cloud, "ours")
    report = tmp_path / "report.json"
    where = ("--name", "ours", "--region", REGION)
    result = run("sweep", *where, "--json", "--report", str(report))
    assert result.returncode == 1, result.stderr
    output: dict[str, Any] = json.loads(result.stdout)
    assert output == {**json.loads(report.read_text()), "swept_at": output["swept_at"]}
    assert output["clean"] is False
    assert output["usd_per_month"] > 100
    assert {entry["kind"] for entry in output["left"]} == set(output["kinds"])
    assert all(entry["command"] for entry in output["left"])
    clean = run("sweep", "--name", "nobody", "--region", REGION)
    assert (clean.returncode, "nothing is left" in clean.stdout) == (0, True), clean.stderr


def test_no_credentials_are_one_sentence(cloud: Cloud) -> None:
    environment = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    result = run("sweep", "--name", "ours", "--region", REGION, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no AWS credentials")
    assert "Traceback" not in result.stderr


def test_credentials_that_ended_are_one_sentence(cloud: Cloud) -> None:
    from tests.kuberay.cloud import Fault

    cloud.faults.planned["GetCallerIdentity"] = Fault("ExpiredToken", "The token is expired", 403)
    result = run("sweep", "--name", "ours", "--region", REGION, AWS_REGION=REGION)
    assert result.returncode == 2
    assert "not accepted (ExpiredToken): sign in again" in result.stderr
