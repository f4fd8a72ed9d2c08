"""Preflight: each check fails for what it is there for, on accounts that lack something."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kuberay import layout, prices, releases, render
from kuberay.checks import access, service
from kuberay.layout import Layout
from kuberay.target import HERE
from serve_app.launch import doctor
from tests.kuberay import planted
from tests.kuberay.cli import Ran, run
from tests.kuberay.cloud import ACCOUNT_ID, REGION, Cloud, Fault
from tests.kuberay.conftest import Commands

IMAGE = "0.1.0"


@pytest.fixture
def account(cloud: Cloud, kustomize: Commands) -> Cloud:
    """An account that is ready: the image is there, the quotas are wide."""
    push(cloud)
    for code in ("L-1216C47A", "L-DB2E81BA", "L-3819A6DF"):
        cloud.extras.quotas[code] = 256.0
    return cloud


def push(cloud: Cloud, tag: str = IMAGE) -> None:
    ecr = cloud.client("ecr")
    ecr.create_repository(repositoryName="qwen-ray-serve")
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "x", "size": 1, "digest": "sha256:" + "0" * 64},
        "layers": [{"mediaType": "x", "size": 9_000_000_000, "digest": "sha256:" + "1" * 64}],
    }
    ecr.put_image(repositoryName="qwen-ray-serve", imageManifest=json.dumps(manifest), imageTag=tag)


def checked(*argv: str) -> tuple[Ran, dict[str, dict[str, str]]]:
    result = run("preflight", "--json", *argv)
    output = json.loads(result.stdout)
    return result, {check["name"]: check for check in output["checks"]}


def config(tmp_path: Path, **changes: Any) -> tuple[str, str]:
    """cluster.yaml with top-level keys replaced."""
    path = tmp_path / "cluster.yaml"
    result = yaml.safe_load((HERE / "cluster.yaml").read_text())
    path.write_text(yaml.safe_dump({**result, **changes}))
    return ("--cluster", str(path))


def of(overlay: str) -> Layout:
    result = yaml.safe_load((HERE / "cluster.yaml").read_text())
    return layout.layout(result, render.documents(overlay))


# --- an account that is ready -------------------------------------------------------------------


def test_an_account_that_is_ready_is_good(account: Cloud) -> None:
    result = run("preflight")
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    assert lines[-1] == "ready to go up"
    assert not [line for line in lines if line.startswith("FAIL")]
    for word in ("credentials", "zones of g6.2xlarge", "quota G", "model on g6.2xlarge",
                 "GPUs in an upgrade", "KubeRay", "Ray", "image", "EKS control plane"):  # fmt: skip
        assert word in result.stdout, word


def test_the_bill_is_what_the_parts_cost(account: Cloud) -> None:
    output = json.loads(run("preflight", "--json").stdout)["usd_per_hour"]
    rates, disk = prices.INSTANCES, 0.08 / 730
    fixed = 0.10 + 0.045 + 0.005 + 0.0225
    node = rates["g5.2xlarge"].usd_per_hour + 120 * disk
    cpu = rates["m7i.xlarge"].usd_per_hour + 50 * disk
    assert output["at_rest"] == pytest.approx(fixed + 2 * cpu + 1 * node, abs=1e-3)
    assert output["at_most"] == pytest.approx(fixed + 2 * cpu + 6 * node, abs=1e-3)
    assert not output["not_known"]


def test_prices_are_live_where_aws_answers(account: Cloud) -> None:
    account.extras.prices = {"g6.2xlarge": 2.0, "g5.2xlarge": 1.0}
    output = json.loads(run("preflight", "--json").stdout)["usd_per_hour"]
    (gpu,) = [item for item in output["items"] if item["name"].startswith("gpu")]
    assert (gpu["source"], gpu["at_rest"] > 2.0) == ("live", True)


@pytest.mark.parametrize("overlay", ["one-gpu", "tp2", "qwen-72b", "spot"])
def test_every_overlay_fits_its_nodes_and_its_upgrade(account: Cloud, overlay: str) -> None:
    account.extras.quotas |= {"L-DB2E81BA": 256.0, "L-3819A6DF": 256.0}
    _, checks = checked("--overlay", overlay)
    assert checks["GPUs in an upgrade"]["status"] == "ok", checks
    on = [check for name, check in checks.items() if name.startswith("model on")]
    assert on
    assert {check["status"] for check in on} == {"ok"}, on


# --- and accounts that are not ------------------------------------------------------------------


def test_without_credentials_nothing_else_is_asked(account: Cloud) -> None:
    account.faults.planned["GetCallerIdentity"] = Fault("ExpiredToken", "expired", 403)
    result = run("preflight", AWS_REGION=REGION)
    assert result.returncode == 1
    assert "FAIL  credentials" in result.stdout
    assert "DescribeVpcs" not in account.faults.calls


def test_a_quota_too_small_for_the_first_replica_fails(account: Cloud) -> None:
    account.extras.quotas["L-DB2E81BA"] = 4.0
    result, checks = checked()
    assert result.returncode == 1
    quota = checks["quota G"]
    assert (quota["status"], quota["found"]) == (
        "FAIL", "4 vCPUs, 0 in use; 8 at rest, 48 at most",
    )  # fmt: skip
    assert "--quota-code L-DB2E81BA --desired-value 48" in quota["mend"]


def test_a_quota_too_small_for_full_size_warns(account: Cloud) -> None:
    account.extras.quotas["L-DB2E81BA"] = 16.0
    result, checks = checked()
    assert (result.returncode, checks["quota G"]["status"]) == (0, "warn")


def test_what_runs_already_counts(account: Cloud) -> None:
    account.extras.quotas["L-DB2E81BA"] = 52.0
    assert checked()[1]["quota G"]["status"] == "ok"
    account.client("ec2").run_instances(
        ImageId="ami-12c6146b", InstanceType="g6.2xlarge", MinCount=1, MaxCount=1
    )
    quota = checked()[1]["quota G"]
    assert quota["status"] == "warn"
    assert ", 0 in use" not in quota["found"]


def test_spot_has_a_quota_of_its_own(account: Cloud) -> None:
    account.extras.quotas |= {"L-DB2E81BA": 0.0, "L-3819A6DF": 0.0}
    _, checks = checked("--overlay", "spot")
    assert checks["quota G spot"]["status"] == "FAIL"
    assert "quota G" not in checks


def test_a_quota_that_may_not_be_read_warns_and_names_the_permission(account: Cloud) -> None:
    account.extras.denied = {"GetServiceQuota"}
    result, checks = checked()
    assert result.returncode == 0
    assert checks["quota"]["status"] == "warn"
    assert "servicequotas:GetServiceQuota" in checks["quota"]["found"]


def test_no_room_for_a_network_or_an_address_fails(account: Cloud) -> None:
    account.extras.quotas |= {"L-F678F1CE": 1.0, "L-0263D0A3": 0.0}
    result, checks = checked()
    assert result.returncode == 1
    assert checks["VPCs"]["status"] == "FAIL"
    assert checks["elastic IPs"]["status"] == "FAIL"
    assert checks["VPCs"]["found"] == "1, 1 in use, 1 more needed"


def test_a_type_that_no_zone_offers_fails(account: Cloud, tmp_path: Path) -> None:
    where = config(tmp_path, availabilityZones=["us-west-2x", "us-west-2y"])
    result, checks = checked(*where)
    zones = checks["zones of g6.2xlarge"]
    assert (result.returncode, zones["status"]) == (1, "FAIL")
    assert "us-west-2a" in zones["mend"]


def test_a_type_that_one_zone_offers_warns(account: Cloud, tmp_path: Path) -> None:
    where = config(tmp_path, availabilityZones=["us-west-2a", "us-west-2y"])
    assert checked(*where)[1]["zones of m7i.xlarge"]["status"] == "warn"


def test_subnets_that_are_brought_are_looked_at(account: Cloud, tmp_path: Path) -> None:
    ec2 = account.client("ec2")
    subnets = ec2.describe_subnets()["Subnets"]
    first = {"private": {"a": {"id": subnets[0]["SubnetId"]}}}
    checks = checked(*config(tmp_path, vpc={"id": subnets[0]["VpcId"], "subnets": first}))[1]
    assert checks["subnets"]["status"] == "FAIL"
    assert "VPCs" not in checks
    two = {"private": {n: {"id": s["SubnetId"]} for n, s in zip("ab", subnets, strict=False)}}
    checks = checked(*config(tmp_path, vpc={"id": subnets[0]["VpcId"], "subnets": two}))[1]
    assert checks["subnets"]["status"] == "ok"


def test_a_model_too_large_for_the_gpu_fails(account: Cloud, tmp_path: Path) -> None:
    # The dimensions of a 32B, on one GPU of 24 GB.
    shape = {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064,
        "model_type": "qwen2",
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shape))
    result, checks = checked("--model-config", str(path))
    model = checks["model on g6.2xlarge"]
    assert (result.returncode, model["status"]) == (1, "FAIL")
    assert "GiB" in model["found"]


def test_the_config_of_a_model_in_s3_is_read_there(account: Cloud) -> None:
    from kuberay.aws import Account

    s3 = account.client("s3")
    s3.create_bucket(Bucket="weights", CreateBucketConfiguration={"LocationConstraint": REGION})
    body = json.dumps(
        {
            "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100,
        }
    )  # fmt: skip
    s3.put_object(Bucket="weights", Key="mine/config.json", Body=body)
    shape = service._shape(Account(REGION), "s3://weights/mine", None)
    assert shape is not None
    assert (shape.hidden_size, shape.num_hidden_layers) == (64, 2)


@pytest.mark.parametrize(
    ("least", "status"), [(3, "warn"), (2, "FAIL")], ids=["no upgrade", "not even full size"]
)
def test_node_groups_too_small_are_reported(
    account: Cloud, tmp_path: Path, least: int, status: str
) -> None:
    groups = yaml.safe_load((HERE / "cluster.yaml").read_text())["managedNodeGroups"]
    for group in groups:
        group["maxSize"] = least if group["name"] == "gpu" else group["maxSize"]
    checks = checked(*config(tmp_path, managedNodeGroups=groups))[1]
    name = "GPUs in an upgrade" if status == "warn" else "GPUs at full size"
    assert checks[name]["status"] == status
    assert "NewCluster: 6 GPUs at the peak, 3 without" in checks[name]["found"]


def test_an_image_that_is_not_there_fails(cloud: Cloud, kustomize: Commands) -> None:
    result, checks = checked()
    registry = f"{ACCOUNT_ID}.dkr.ecr.{REGION}.amazonaws.com/qwen-ray-serve:{IMAGE}"
    assert (result.returncode, checks["image"]["status"]) == (1, "FAIL")
    assert checks["image"]["found"] == f"{registry}: not in its repository"
    push(cloud, tag="9.9.9")
    assert checked()[1]["image"]["status"] == "FAIL"
    other = checked("--image", "docker.io/me/qwen:1")[1]["image"]
    assert (other["status"], "not in ECR" in other["found"]) == ("warn", True)


def test_a_name_that_is_somebody_elses_fails(account: Cloud) -> None:
    account.client("eks").create_cluster(
        name="qwen-ray-serve",
        roleArn="arn:aws:iam::123456789012:role/x",
        resourcesVpcConfig={},
    )
    result, checks = checked()
    assert (result.returncode, checks["name"]["status"]) == (1, "FAIL")


def test_ours_is_gone_on_with(account: Cloud) -> None:
    planted.plant(account, "ours")
    check = checked("--name", "ours")[1]["name"]
    assert (check["status"], "up goes on" in check["found"]) == ("ok", True)


def test_versions_that_disagree_fail(account: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "KUBERAY", "1.8.0")
    monkeypatch.setitem(doctor.PINS, "ray", "2.61.0")
    result, checks = checked()
    assert result.returncode == 1
    assert checks["KubeRay"]["status"] == "FAIL"
    assert checks["Ray"]["status"] == "FAIL"
    assert "2.61.0" in checks["Ray"]["mend"]


def test_a_missing_command_is_reported(
    account: Cloud, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    (commands.folder.parent / "bin" / "eksctl").unlink()
    monkeypatch.setenv("PATH", str(commands.folder.parent / "bin"))
    result, checks = checked()
    assert (result.returncode, checks["eksctl"]["status"]) == (1, "FAIL")
    assert "https://eksctl.io" in checks["eksctl"]["mend"]


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        ("eksctl", "0.180.0"),
        ("kubectl", '{"clientVersion": {"gitVersion": "v1.29.1"}}'),
        ("helm", "v3.9.4+gdbc6d8e"),
    ],
)
def test_a_command_that_is_too_old_fails(
    account: Cloud, commands: Commands, tool: str, says: str
) -> None:
    path = commands.folder.parent / "bin" / tool
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    check = {each.name: each for each in access.programs()}[tool]
    assert (check.status, "install" in check.mend) == ("FAIL", True)
    path.write_text("#!/bin/sh\necho nothing to say\n")
    check = {each.name: each for each in access.programs()}[tool]
    assert (check.status, "says no version" in check.found) == ("warn", True)


@pytest.mark.parametrize("name", ["", "a b", "1st", "x" * 51, "mine;rm", "ours_2", "../x", "-a"])
def test_a_name_that_is_none_is_one_sentence(account: Cloud, commands: Commands, name: str) -> None:
    result = run("preflight", f"--name={name}" if name else "--name=~")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert "is no name for a cluster" in result.stderr
    assert set(account.faults.calls) == {"CreateRepository", "PutImage"}  # Those of the fixture.


def test_a_region_or_a_bucket_that_is_none_is_one_sentence(
    account: Cloud, commands: Commands
) -> None:
    result = run("preflight", "--region", "us west 2")
    assert (result.returncode, "is no region of AWS" in result.stderr) == (2, True)
    checks = checked("--bucket", "Not_A_Bucket")[1]
    assert "is no bucket's name" in checks["manifests"]["found"]


# --- the peak of an upgrade ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "peak"),
    [
        ({}, 6),
        ({"type": "NewCluster"}, 6),
        ({"type": "None"}, 3),
        ({"type": "NewClusterWithIncrementalUpgrade"}, 6),
        (
            {
                "type": "NewClusterWithIncrementalUpgrade",
                "clusterUpgradeOptions": {"maxSurgePercent": 33},
            },
            4,
        ),
    ],
)
def test_each_strategy_has_its_peak(
    kustomize: Commands, strategy: dict[str, Any], peak: int
) -> None:
    documents = render.documents("one-gpu")
    (service,) = [each for each in documents if each["kind"] == "RayService"]
    service["spec"]["upgradeStrategy"] = strategy
    parsed = layout.layout({}, documents).service
    assert parsed is not None
    assert (parsed.most_gpus, parsed.peak_gpus) == (3, peak)


def test_only_the_groups_that_an_overlay_uses_count(kustomize: Commands) -> None:
    assert [group.name for group in of("one-gpu").groups] == ["cpu", "gpu"]
    assert [group.name for group in of("qwen-72b").groups] == ["cpu", "gpu-72b"]
    assert of("tp2").most_gpus == 8
    assert of("one-gpu").load_balancers == 1
