"""Teardown: in order, of this cluster alone, and again after whatever came between."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.kuberay import planted
from tests.kuberay.cli import run, start
from tests.kuberay.cloud import REGION, Cloud
from tests.kuberay.conftest import Commands
from tests.server import wait

WHERE = ("--name", "ours", "--region", REGION)
# Rounds of leftovers follow one another at once: nothing here takes AWS's time.
QUICK = ("--pause", "0.05", "--patience", "1")
# The same where nothing is left in the end, however long a round takes.
PATIENT = ("--pause", "0.05", "--patience", "60")
# Left on purpose by every teardown: of no kind that may be removed.
REPORTED = {"queue", "policy", "bucket", "hosted zone", "user"}


def named(name: str, namespace: str = "default", **more: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, **more.pop("metadata", {})}
    return {"metadata": metadata, **more}


def fill(cloud: Cloud, commands: Commands, stuck: bool = False) -> None:
    """A cluster at work: a service, its load balancer, Redis with a volume, releases."""
    planted.plant(cloud, "ours")
    result = cloud.client("elbv2").describe_load_balancers(Names=["nlb-ours"])
    balancer = result["LoadBalancers"][0]
    volume = cloud.client("ec2").describe_volumes(
        Filters=[{"Name": "tag:kubernetes.io/cluster/ours", "Values": ["owned"]}]
    )["Volumes"][0]["VolumeId"]
    waiting = {"finalizers": ["ray.io/gcs-ft-redis-cleanup-finalizer"]} if stuck else {}
    commands.hold(
        rayservices__ray__io=[named("llm")],
        rayclusters__ray__io=[named("llm-abcde", metadata=waiting)],
        services=[
            named("kubernetes", spec={"type": "ClusterIP"}),
            named(
                "llm",
                spec={"type": "LoadBalancer"},
                metadata={"annotations": {"fake/balancer": balancer["LoadBalancerArn"]}},
            ),
        ],
        statefulsets=[named("redis")],
        persistentvolumeclaims=[
            named("data-redis-0", metadata={"annotations": {"fake/volume": volume}})
        ],
        nodepools__karpenter__sh=[{"metadata": {"name": "gpu"}}],
        helm=[
            {"name": "kuberay-operator", "namespace": "kuberay-system"},
            {"name": "monitoring", "namespace": "monitoring"},
        ],
    )


def left(cloud: Cloud, before: dict[str, set[str]]) -> dict[str, set[str]]:
    result = planted.minus(planted.everything(cloud), before)
    return {kind: names for kind, names in result.items() if kind not in REPORTED}


def remove_queue(cloud: Cloud) -> None:
    sqs = cloud.client("sqs")
    for url in sqs.list_queues().get("QueueUrls", []):
        sqs.delete_queue(QueueUrl=url)


def remove_reported(cloud: Cloud) -> None:
    """What a person removes, with the commands that the proof names."""
    s3, iam, route53 = cloud.client("s3"), cloud.client("iam"), cloud.client("route53")
    s3.delete_object(Bucket="qwen-ray-serve-weights-ours", Key="model.safetensors")
    s3.delete_bucket(Bucket="qwen-ray-serve-weights-ours")
    iam.delete_user(UserName="ci-ours")
    for zone in route53.list_hosted_zones()["HostedZones"]:
        if zone["Name"] == "ours.example.":
            route53.delete_hosted_zone(Id=zone["Id"])
    for bucket in s3.list_buckets()["Buckets"]:
        assert "ours" not in bucket["Name"]


# --- the whole way ------------------------------------------------------------------------------


def test_everything_of_the_cluster_goes_and_nothing_else(
    cloud: Cloud, commands: Commands, tmp_path: Path
) -> None:
    planted.plant(cloud, "other", octet=30)
    before = planted.everything(cloud)
    fill(cloud, commands)
    report = tmp_path / "proof.json"
    result = run("down", *WHERE, *QUICK, "--yes", "--report", str(report))
    assert left(cloud, before) == {}, result.stderr
    assert planted.minus(before, planted.everything(cloud)) == {}
    # Karpenter's queue is of no kind that this removes: it is reported, and is no success.
    assert result.returncode == 1, result.stderr
    proof = json.loads(report.read_text())
    assert {entry["kind"] for entry in proof["left"]} == {"other", "bucket", "hosted zone", "user"}
    assert [entry["id"] for entry in proof["left"] if "karpenter-ours" in entry["id"]]
    assert commands.objects()["helm"] == []
    remove_queue(cloud)
    remove_reported(cloud)
    again = run("down", *WHERE, *QUICK, "--yes")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing is left" in again.stdout
    assert planted.minus(before, planted.everything(cloud)).keys() <= REPORTED


def test_the_order_leaves_no_orphan(cloud: Cloud, commands: Commands) -> None:
    fill(cloud, commands)
    run("down", *WHERE, *QUICK, "--yes")
    order = [
        ("kubectl", "delete", "rayservices.ray.io"),
        ("kubectl", "delete", "rayclusters.ray.io"),
        ("kubectl", "delete", "services"),
        ("helm", "uninstall", "monitoring"),
        ("kubectl", "delete", "statefulsets"),
        ("kubectl", "delete", "persistentvolumeclaims"),
        ("kubectl", "delete", "nodepools.karpenter.sh"),
        ("eksctl", "delete", "nodegroup"),
        ("helm", "uninstall", "kuberay-operator"),
        ("eksctl", "delete", "cluster"),
    ]
    calls = commands.calls()
    places = [calls.index(commands.calls(*words)[0]) for words in order]
    assert places == sorted(places), calls
    # Of the services only the one that holds a load balancer.
    assert not commands.calls("kubectl", "delete", "services", "kubernetes")


def test_a_finalizer_that_hangs_is_taken_off(cloud: Cloud, commands: Commands) -> None:
    before = planted.everything(cloud)
    fill(cloud, commands, stuck=True)
    result = run("down", *WHERE, *QUICK, "--yes")
    assert commands.calls("kubectl", "patch", "rayclusters.ray.io", "llm-abcde")
    assert commands.objects()["rayclusters.ray.io"] == []
    assert left(cloud, before) == {}, result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("kubectl", "get"),
        ("eksctl", "delete", "cluster"),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (
                ("eksctl", "utils"),
                ("kubectl", "version"),
                ("eksctl", "delete", "nodegroup"),
                ("helm", "list"),
            )
        ),
    ],
)
def test_a_step_that_fails_is_made_up_for(
    cloud: Cloud, commands: Commands, words: tuple[str, ...]
) -> None:
    before = planted.everything(cloud)
    fill(cloud, commands)
    commands.rule(*words, says="Error: it did not work", times=99)
    result = run("down", *WHERE, *QUICK, "--yes")
    assert left(cloud, before) == {}, result.stderr
    assert "it did not work; going on" in result.stderr


def test_a_creation_that_never_finished_goes_too(cloud: Cloud, commands: Commands) -> None:
    before = planted.everything(cloud)
    planted.plant(cloud, "ours", cluster=False)
    result = run("down", *WHERE, *QUICK, "--yes")
    assert not commands.calls("kubectl")
    assert commands.calls("eksctl", "delete", "cluster", "--force")
    # No cluster vouches for what carries the tags of other programs only, outside its VPC.
    assert left(cloud, before).keys() == {
        "volume", "snapshot", "identity provider", "classic load balancer",
    }, result.stderr  # fmt: skip
    assert "named by another program's tags only" in result.stdout


def test_what_only_looks_like_the_clusters_stays(cloud: Cloud, commands: Commands) -> None:
    planted.plant(cloud, "ours")
    remove_queue(cloud)
    logs, ec2, iam = cloud.client("logs"), cloud.client("ec2"), cloud.client("iam")
    logs.create_log_group(logGroupName="/aws/eks/ours/untagged")
    shared = {"kubernetes.io/cluster/ours": "shared", "Name": "ours"}
    vpc = ec2.create_vpc(CidrBlock="10.99.0.0/16", TagSpecifications=planted.marked("vpc", shared))
    ec2.create_volume(
        AvailabilityZone=f"{REGION}a",
        Size=1,
        TagSpecifications=planted.marked("volume", {"Name": "ours", "team": "ours"}),
    )
    namesake = {"alpha.eksctl.io/cluster-name": "ours", "qwen-ray-serve/region": "eu-west-1"}
    for name, tags in {"there": namesake, "nowhere": {"KubernetesCluster": "ours"}}.items():
        iam.create_role(
            RoleName=name, AssumeRolePolicyDocument=planted.TRUST, Tags=planted.pairs(tags)
        )
    result = run("down", *WHERE, *QUICK, "--yes", "--json")
    after = planted.everything(cloud)
    assert "/aws/eks/ours/untagged" in after["log group"]
    assert vpc["Vpc"]["VpcId"] in after["VPC"]
    assert len(after["volume"]) == 1
    assert {"there", "nowhere"} <= after["role"]
    # What may be the cluster's is told; what is another's is not.
    assert result.returncode == 1
    shown = {(each["kind"], each["id"]) for each in json.loads(result.stdout)["left"]}
    named = {(kind, name) for kind, name in shown if kind not in REPORTED}
    assert named == {("log group", "/aws/eks/ours/untagged"), ("role", "nowhere")}


# --- whose it is --------------------------------------------------------------------------------


def test_nothing_of_another_installers_cluster_of_the_name_is_touched(
    cloud: Cloud, commands: Commands
) -> None:
    """kops, or an eksctl of somebody else: no EKS cluster of ours, and things with their tags."""
    ec2 = cloud.client("ec2")
    kops = {"KubernetesCluster": "ours", "kubernetes.io/cluster/ours": "owned"}
    made = ec2.run_instances(
        ImageId="ami-12c6146b", InstanceType="m5.large", MinCount=1, MaxCount=1,
        TagSpecifications=planted.marked("instance", {**kops, "Name": "masters.ours"}),
    )  # fmt: skip
    volume = ec2.create_volume(
        AvailabilityZone=f"{REGION}a", Size=500,
        TagSpecifications=planted.marked("volume", {**kops, "Name": "etcd"}),
    )["VolumeId"]  # fmt: skip
    ec2.create_snapshot(VolumeId=volume, TagSpecifications=planted.marked("snapshot", kops))
    eksctl = {"alpha.eksctl.io/cluster-name": "ours"}
    cloud.client("cloudformation").create_stack(
        StackName="eksctl-ours-nodegroup-1", TemplateBody=planted.TEMPLATE,
        Tags=planted.pairs(eksctl),
    )  # fmt: skip
    before = planted.everything(cloud)
    result = run("down", *WHERE, *QUICK, "--yes", "--json")
    assert planted.everything(cloud) == before
    assert result.returncode == 1
    assert not commands.calls("eksctl")
    shown = {entry["kind"]: entry for entry in json.loads(result.stdout)["left"]}
    assert {"instance", "volume", "snapshot", "stack"} <= set(shown)
    assert not any(entry["tagged"] for entry in shown.values())
    assert made["Instances"][0]["InstanceId"] == shown["instance"]["id"]


def test_eksctl_is_not_let_loose_on_stacks_of_somebody_else(
    cloud: Cloud, commands: Commands
) -> None:
    cfn = cloud.client("cloudformation")
    stacks = {"eksctl-ours-cluster": planted.eksctl_tags("ours"),
              "eksctl-ours-nodegroup-x": {"alpha.eksctl.io/cluster-name": "ours"}}  # fmt: skip
    for name, tags in stacks.items():
        cfn.create_stack(StackName=name, TemplateBody=planted.TEMPLATE, Tags=planted.pairs(tags))
    result = run("down", *WHERE, *QUICK, "--yes")
    assert not commands.calls("eksctl")
    assert planted.everything(cloud)["stack"] == {"eksctl-ours-nodegroup-x"}, result.stderr


def test_what_controllers_made_is_marked_while_the_cluster_vouches_for_it(
    cloud: Cloud, commands: Commands
) -> None:
    """So that the run after an interrupted one still knows it."""
    before = planted.everything(cloud)
    fill(cloud, commands)
    commands.rule("kubectl", "delete", "rayservices.ray.io", hang=True)
    with start("down", *WHERE, *QUICK, "--yes") as process:
        assert wait((commands.folder / "hanging").exists)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    eks = cloud.client("eks")
    eks.delete_nodegroup(clusterName="ours", nodegroupName="gpu")
    eks.delete_cluster(name="ours")
    result = run("down", *WHERE, *QUICK, "--yes")
    # IAM's own tags are not given anew: of eksctl's provider the address is not enough.
    assert left(cloud, before).keys() == {"identity provider"}, result.stderr


# --- interrupted --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("kubectl", "delete", "rayservices.ray.io"), marks=pytest.mark.slow),
        ("eksctl", "delete", "cluster"),
    ],
)
def test_an_interrupted_teardown_is_run_again(
    cloud: Cloud, commands: Commands, words: tuple[str, ...], number: signal.Signals
) -> None:
    before = planted.everything(cloud)
    fill(cloud, commands)
    commands.rule(*words, hang=True)
    with start("down", *WHERE, *QUICK, "--yes") as process:
        assert wait((commands.folder / "hanging").exists)
        process.send_signal(number)
        _, output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "interrupted: run the same command again" in output
    assert "Traceback" not in output
    assert left(cloud, before)
    again = run("down", *WHERE, *QUICK, "--yes")
    assert left(cloud, before) == {}, again.stderr


# --- what AWS does not let it do ----------------------------------------------------------------


def test_a_missing_permission_is_named_and_costs_only_what_it_protects(
    cloud: Cloud, commands: Commands
) -> None:
    before = planted.everything(cloud)
    fill(cloud, commands)
    arn = f"arn:aws:ec2:{REGION}:123456789012:natgateway/*"
    cloud.faults.deny("ec2:DeleteNatGateway", arn)
    result = run("down", *WHERE, *QUICK, "--yes", "--json")
    assert result.returncode == 1
    proof = json.loads(result.stdout)
    assert {"action": "ec2:DeleteNatGateway", "resource": arn}.items() <= next(
        entry for entry in proof["not_removed"] if "NAT gateway" in entry["kind"]
    ).items()
    assert f"missing permission: ec2:DeleteNatGateway on {arn}" in result.stderr
    assert "NAT gateway" in left(cloud, before)
    assert not {"instance", "volume", "load balancer", "cluster"} & left(cloud, before).keys()
    cloud.faults.planned.clear()
    run("down", *WHERE, *QUICK, "--yes")
    assert left(cloud, before) == {}


@pytest.mark.slow  # tests/kuberay/test_aws.py and test_sweep.py have it without a teardown.
def test_throttling_is_waited_out(cloud: Cloud, commands: Commands) -> None:
    before = planted.everything(cloud)
    planted.plant(cloud, "ours")
    cloud.faults.throttle("ec2:DeleteVolume", times=2)
    cloud.faults.throttle("elasticloadbalancing:DeleteTargetGroup", times=1)
    result = run("down", *WHERE, *PATIENT, "--yes")
    assert left(cloud, before) == {}, result.stderr
    assert cloud.faults.calls.count("DeleteTargetGroup") == 2


def test_what_is_still_in_use_is_tried_again(cloud: Cloud, commands: Commands) -> None:
    before = planted.everything(cloud)
    planted.plant(cloud, "ours")
    from tests.kuberay.cloud import Fault

    output = "resource sg-1 has a dependent object"
    cloud.faults.planned["DeleteSecurityGroup"] = Fault("DependencyViolation", output, times=4)
    result = run("down", *WHERE, *PATIENT, "--yes")
    assert "not yet (DependencyViolation)" in result.stderr
    assert left(cloud, before) == {}, result.stderr


# --- what it refuses ----------------------------------------------------------------------------


def test_a_cluster_of_somebody_else_is_refused(cloud: Cloud, commands: Commands) -> None:
    planted.plant(cloud, "ours", cluster=False)
    cloud.client("eks").create_cluster(
        name="ours",
        roleArn="arn:aws:iam::123456789012:role/x",
        resourcesVpcConfig={},
        tags={"alpha.eksctl.io/cluster-name": "ours"},
    )
    before = planted.everything(cloud)
    result = run("down", *WHERE, *QUICK, "--yes")
    assert result.returncode == 2
    assert "does not carry the tag qwen-ray-serve/cluster=ours" in result.stderr
    assert planted.everything(cloud) == before
    assert not commands.calls()


def test_without_yes_it_shows_what_would_go_and_changes_nothing(
    cloud: Cloud, commands: Commands
) -> None:
    fill(cloud, commands)
    before = planted.everything(cloud)
    result = run("down", *WHERE, *QUICK)
    assert result.returncode == 2
    assert "NAT gateway" in result.stderr
    assert "which cannot be made again" in result.stderr
    assert "give --yes" in result.stderr
    assert planted.everything(cloud) == before
    assert not commands.calls()


def test_data_is_kept_where_it_is_asked_to_be(cloud: Cloud, commands: Commands) -> None:
    before = planted.everything(cloud)
    fill(cloud, commands)
    result = run("down", *WHERE, *QUICK, "--yes", "--keep-data")
    assert result.returncode == 1
    assert set(left(cloud, before)) == {
        "file system", "volume", "snapshot", "log group", "image repository", "key", "secret",
    }  # fmt: skip
    assert "snapshot" in result.stdout


@pytest.mark.parametrize("tool", ["eksctl", "kubectl", "helm"])
def test_a_command_that_is_not_there_is_one_sentence(
    cloud: Cloud, commands: Commands, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = planted.everything(cloud)
    (commands.folder.parent / "bin" / tool).unlink()
    monkeypatch.setenv("PATH", str(commands.folder.parent / "bin"))
    result = run("down", *WHERE, *QUICK, "--yes")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tool} is not on PATH: install {tool}")
    assert len(result.stderr.splitlines()) == 1
    assert planted.everything(cloud) == before
