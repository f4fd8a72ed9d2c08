"""The guard: a cluster that outlived its hours is seen, and goes where it is so tagged."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from kuberay.errors import EksError
from kuberay.ttl import Ttl
from tests.kuberay import planted
from tests.kuberay.cli import run
from tests.kuberay.cloud import REGION, Cloud
from tests.kuberay.conftest import Commands

WHERE = ("--name", "ours", "--region", REGION)
QUICK = ("--pause", "0.05", "--patience", "1")
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


def age(cloud: Cloud, hours: float, action: str) -> None:
    """Let the planted cluster's hours end `hours` from now."""
    eks = cloud.client("eks")
    arn = eks.describe_cluster(name="ours")["cluster"]["arn"]
    eks.tag_resource(resourceArn=arn, tags=Ttl.starting(datetime.now(UTC), hours, action).tags)


def test_what_is_written_is_read() -> None:
    limit = Ttl.starting(NOW, 8, "down")
    assert Ttl.of(limit.tags) == limit
    assert not limit.expired(NOW + timedelta(hours=7.9))
    assert limit.expired(NOW + timedelta(hours=8))
    assert limit.hours_left(NOW) == pytest.approx(8)
    assert "OUTLIVED by 2.0 hours" in limit.describe(NOW + timedelta(hours=10))
    assert Ttl.of({}).expired(NOW) is False


def test_a_tag_that_is_no_time_is_an_error() -> None:
    with pytest.raises(EksError, match="is not a time"):
        Ttl.of({"qwen-ray-serve/expires": "tomorrow"})


def test_a_time_without_a_zone_is_utc() -> None:
    limit = Ttl.of({"qwen-ray-serve/expires": "2026-11-24T11:00:00"})
    assert limit.expired(NOW)


@pytest.mark.parametrize("action", ["report", "down"])
def test_status_reports_an_outlived_cluster(cloud: Cloud, commands: Commands, action: str) -> None:
    planted.plant(cloud, "ours")
    age(cloud, -3, action)
    result = run("status", *WHERE, "--aws-only")
    assert result.returncode == 1, result.stderr
    assert "PROBLEM: this cluster outlived its hours: OUTLIVED by 3.0 hours" in result.stdout
    age(cloud, 3, action)
    result = run("status", *WHERE, "--aws-only")
    assert result.returncode == 0, result.stdout
    assert "3.0 hours left" in result.stdout


def test_down_if_expired_leaves_a_young_cluster(cloud: Cloud, commands: Commands) -> None:
    planted.plant(cloud, "ours")
    age(cloud, 3, "down")
    before = planted.everything(cloud)
    result = run("down", *WHERE, *QUICK, "--if-expired")
    assert (result.returncode, planted.everything(cloud)) == (0, before), result.stderr
    assert not commands.calls()


def test_down_if_expired_only_reports_where_it_is_so_tagged(
    cloud: Cloud, commands: Commands
) -> None:
    planted.plant(cloud, "ours")
    age(cloud, -3, "report")
    before = planted.everything(cloud)
    result = run("down", *WHERE, *QUICK, "--if-expired")
    assert (result.returncode, planted.everything(cloud)) == (1, before)
    assert "OUTLIVED" in result.stderr


def test_down_if_expired_takes_it_down_where_it_is_so_tagged(
    cloud: Cloud, commands: Commands
) -> None:
    planted.plant(cloud, "ours")
    age(cloud, -3, "down")
    run("down", *WHERE, *QUICK, "--if-expired")
    left = planted.everything(cloud)
    assert not left["cluster"]
    assert not left["instance"]
    # What is left is told again by the next run of the timer, though no cluster tells of its end.
    result = run("down", *WHERE, *QUICK, "--if-expired", "--json")
    assert result.returncode == 1
    left_kinds = {entry["kind"] for entry in json.loads(result.stdout)["left"]}
    assert left_kinds == {"other", "bucket", "hosted zone", "user"}


def test_stacks_without_a_cluster_keep_its_end(cloud: Cloud, commands: Commands) -> None:
    before = planted.everything(cloud)
    cloud.client("cloudformation").create_stack(
        StackName="eksctl-ours-cluster",
        TemplateBody=planted.TEMPLATE,
        Tags=planted.pairs(
            {
                **planted.eksctl_tags("ours"),
                **Ttl.starting(datetime.now(UTC), -1, "down").tags,
            }
        ),
    )
    result = run("down", *WHERE, *QUICK, "--if-expired")
    assert result.returncode == 0, result.stdout + result.stderr
    assert planted.everything(cloud) == before
