"""AWS's errors as sentences, and its prices."""

import pytest
from botocore.config import Config

from kuberay import prices
from kuberay.aws import Account, tags
from kuberay.errors import AwsError, InUse, PermissionMissing
from tests.kuberay.cloud import REGION, Cloud, Fault

EC2 = ("ec2", "describe_volumes")


def account() -> Account:
    return Account(REGION)


@pytest.mark.parametrize(
    "resource",
    ["*", "arn:aws:ec2:us-west-2:123456789012:volume/vol-1"],
)
def test_a_missing_permission_names_action_and_resource(cloud: Cloud, resource: str) -> None:
    cloud.faults.deny("ec2:DescribeVolumes", resource)
    with pytest.raises(PermissionMissing) as raised:
        account().call(*EC2)
    assert (raised.value.action, raised.value.resource) == ("ec2:DescribeVolumes", resource)
    assert str(raised.value) == f"missing permission: ec2:DescribeVolumes on {resource}"


@pytest.mark.parametrize(
    ("service", "operation", "action"),
    [
        ("ec2", "describe_volumes", "ec2:DescribeVolumes"),
        ("elbv2", "describe_load_balancers", "elasticloadbalancing:DescribeLoadBalancers"),
        ("efs", "describe_file_systems", "elasticfilesystem:DescribeFileSystems"),
        ("ecr", "describe_repositories", "ecr:DescribeRepositories"),
    ],
)
def test_a_refusal_that_says_nothing_is_named_by_the_call(
    cloud: Cloud, service: str, operation: str, action: str
) -> None:
    planned = Fault("AccessDenied", "denied", 403)
    cloud.faults.planned[action.partition(":")[2]] = planned
    with pytest.raises(PermissionMissing) as raised:
        list(account().pages(service, operation, "any"))
    assert raised.value.action == action


@pytest.mark.parametrize("code", ["DependencyViolation", "VolumeInUse"])
def test_what_is_in_use_is_told_from_what_is_wrong(cloud: Cloud, code: str) -> None:
    cloud.faults.planned["DescribeVolumes"] = Fault(code, "still there")
    with pytest.raises(InUse):
        account().call(*EC2)
    cloud.faults.planned["DescribeVolumes"] = Fault("InvalidParameterValue", "what is this?")
    with pytest.raises(AwsError, match="InvalidParameterValue: what is this") as raised:
        account().call(*EC2)
    assert not isinstance(raised.value, InUse)


_CALLS = {
    "DescribeVolumes": ("ec2", "describe_volumes", "Volumes", {}),
    "DescribeLoadBalancers": ("elbv2", "describe_load_balancers", "LoadBalancers", {}),
    "DescribeCluster": ("eks", "describe_cluster", "cluster", {"name": "ours"}),
    "DescribeRepositories": ("ecr", "describe_repositories", "repositories", {}),
    "ListBucket": ("s3", "list_objects_v2", "Contents", {"Bucket": "weights"}),
}


@pytest.mark.parametrize("action", _CALLS)
@pytest.mark.parametrize("status", [200, 403, 407, 503])
@pytest.mark.parametrize("page", ["<!doctype html><p>Sign in<br>", "<html><p>Sign in</p></html>"])
def test_a_proxys_page_is_one_sentence_and_no_empty_answer(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, action: str, status: int, page: str
) -> None:
    once = Config(retries={"total_max_attempts": 1})
    monkeypatch.setattr("kuberay.aws._PATIENT", once)
    cloud.faults.planned[action] = Fault("", page, status, page=True)
    service, operation, key, arguments = _CALLS[action]
    with pytest.raises(AwsError) as raised:
        list(account().pages(service, operation, key, **arguments))
    output = str(raised.value)
    assert "a web page answered in place of AWS" in output
    assert "Sign in" not in output
    assert len(output.splitlines()) == 1


def test_what_is_not_there_is_absent(cloud: Cloud) -> None:
    with pytest.raises(AwsError) as raised:
        account().call("ec2", "delete_volume", VolumeId="vol-0123456789abcdef0")
    assert raised.value.absent
    with pytest.raises(AwsError) as raised:
        account().call("eks", "describe_cluster", name="nobody")
    assert raised.value.absent


def test_throttling_is_waited_out(cloud: Cloud) -> None:
    cloud.faults.throttle("ec2:DescribeVolumes", times=3)
    account().call(*EC2)
    assert cloud.faults.calls.count("DescribeVolumes") == 4


def test_an_address_that_does_not_answer_is_one_sentence(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("kuberay.aws._PATIENT", prices_config())
    with pytest.raises(AwsError, match="Could not connect"):
        account().call(*EC2)


def prices_config() -> object:
    from kuberay import aws

    return aws._BRIEF


def test_a_profile_that_is_not_there_is_one_sentence(cloud: Cloud) -> None:
    with pytest.raises(AwsError, match="nobody"):
        Account(REGION, "nobody")


def test_tags_have_three_forms() -> None:
    expected = {"a": "1"}
    assert tags({"Tags": [{"Key": "a", "Value": "1"}]}) == expected
    assert tags({"Tags": [{"TagKey": "a", "TagValue": "1"}]}) == expected
    assert tags({"tags": {"a": "1"}}, "tags") == expected
    assert tags({}) == {}


# --- prices -------------------------------------------------------------------------------------


def test_a_price_is_live_where_the_price_list_answers(cloud: Cloud) -> None:
    cloud.extras.prices["g6.xlarge"] = 0.9
    assert prices.rate(account(), "g6.xlarge") == prices.Rate(0.9, "live")


def test_a_price_is_the_tables_where_it_does_not(cloud: Cloud) -> None:
    expected = prices.Rate(0.8048, f"table of {prices.AS_OF}")
    assert prices.rate(account(), "g6.xlarge") == expected
    cloud.extras.down = True
    assert prices.rate(account(), "g6.xlarge") == expected


def test_an_unknown_type_has_no_price(cloud: Cloud) -> None:
    assert prices.rate(account(), "x9.large") is None


def test_the_table_is_of_real_gpus() -> None:
    from serve_app.planning.hardware import ACCELERATORS

    for kind, instance in prices.INSTANCES.items():
        assert bool(instance.gpus) == bool(instance.gpu), kind
        assert not instance.gpu or instance.gpu in ACCELERATORS, kind
        assert kind[0] in "gp" or not instance.gpus
        assert 0.02 < instance.usd_per_hour < 100


def test_within_a_family_more_gpus_cost_more() -> None:
    for family in ("g5", "g6", "g6e"):
        of = {k: v for k, v in prices.INSTANCES.items() if k.split(".")[0] == family}
        by_gpus = {n: min(v.usd_per_hour for v in of.values() if v.gpus == n) for n in (1, 4, 8)}
        assert by_gpus[1] < by_gpus[4] < by_gpus[8]


@pytest.mark.parametrize(
    ("kind", "size", "iops", "throughput", "usd"),
    [
        ("gp3", 100, 3000, 125, 8.0),
        ("gp3", 100, 6000, 125, 8.0 + 15.0),
        ("gp3", 100, 3000, 500, 8.0 + 15.0),
        ("gp2", 100, 300, 0, 10.0),
        ("io2", 100, 1000, 0, 12.5 + 65.0),
    ],
)
def test_a_volume_costs_what_was_provisioned(
    kind: str, size: int, iops: int, throughput: int, usd: float
) -> None:
    assert prices.volume_per_month(kind, size, iops, throughput) == pytest.approx(usd)
