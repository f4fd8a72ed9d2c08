"""The cluster: made in one go, or completed after an interruption at any step of eksctl."""

import threading
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from kuberay import cluster, stacks
from kuberay.aws import Account
from kuberay.errors import EksError, Refused
from kuberay.stacks import Stacks
from kuberay.target import HERE, Target
from kuberay.tools import Tools
from kuberay.ttl import Ttl
from tests.kuberay import planted
from tests.kuberay.cloud import REGION, Cloud
from tests.kuberay.conftest import Commands

_OURS = {"qwen-ray-serve/cluster": "ours"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_POLL_S", 0.02)


def described() -> dict[str, Any]:
    """cluster.yaml with the node groups of one overlay."""
    config: dict[str, Any] = yaml.safe_load((HERE / "cluster.yaml").read_text())
    return {**config, "managedNodeGroups": config["managedNodeGroups"][:2]}


def target(account: Account | None = None) -> Target:
    to = Target(described(), "ours", REGION)
    if account is not None:
        to.__dict__["account"] = account
    return to


@pytest.fixture(scope="module")
def account(aws_server: Cloud) -> Account:
    """Its clients take a second to make, and know nothing of a test."""
    with pytest.MonkeyPatch.context() as patched:
        for key, value in aws_server.environment.items():
            patched.setenv(key, value)
        result = Account(REGION)
        for service in ("eks", "cloudformation", "logs"):
            result.client(service)
        return result


def create(account: Account, commands: Commands, limit: Ttl | None = None) -> None:
    to, limit = target(account), limit or Ttl()
    run = Tools(to, commands.folder / "kubeconfig")
    cluster.create(to, run, cluster.configured(to, limit), limit)


def parts(cloud: Cloud) -> dict[str, Any]:
    """What there is of the cluster."""
    eks = cloud.client("eks")
    listed = cloud.client("cloudformation").describe_stacks()["Stacks"]
    return {
        "groups": sorted(eks.list_nodegroups(clusterName="ours")["nodegroups"]),
        "addons": cloud.faults.parts.addons.get("ours", {}),
        "identities": cloud.faults.parts.identities.get("ours", {}),
        "stacks": sorted(stack["StackName"] for stack in listed),
    }


def whole(account: Account, cloud: Cloud, commands: Commands) -> dict[str, Any]:
    create(account, commands)
    result = parts(cloud)
    config = described()
    assert set(result["addons"]) == {addon["name"] for addon in config["addons"]}
    assert result["groups"] == sorted(group["name"] for group in config["managedNodeGroups"])
    assert len(result["identities"]) == len(config["iam"]["podIdentityAssociations"])
    return result


def steps() -> int:
    """How many things eksctl makes for cluster.yaml."""
    config = described()
    with_stack = [*config["managedNodeGroups"], *config["iam"]["podIdentityAssociations"]]
    return 2 + len(config["addons"]) + len(_ADDONS_WITH_ROLE) + 2 * len(with_stack)


def mostly_slow(step: int, quick: bool) -> Any:
    """A case for every run of the tests, or for the slow ones: each takes some seconds."""
    return pytest.param(step, marks=() if quick else pytest.mark.slow)


_ADDONS_WITH_ROLE = ("vpc-cni", "aws-ebs-csi-driver")
STEPS = steps()


def test_the_whole_creation_takes_known_steps(
    account: Account, cloud: Cloud, commands: Commands
) -> None:
    commands.rule("eksctl", "create", "cluster", after=STEPS - 1, says="Error: stopped")
    with pytest.raises(EksError, match="stopped"):
        create(account, commands)
    cloud.reset()
    commands.rule("eksctl", "create", "cluster", after=STEPS, says="Error: stopped")
    whole(account, cloud, commands)


@pytest.mark.parametrize("step", [mostly_slow(n, n in (2, 3, 8, STEPS - 1)) for n in range(STEPS)])
def test_a_creation_that_stopped_after_any_step_is_completed(
    account: Account, cloud: Cloud, commands: Commands, step: int
) -> None:
    commands.rule("eksctl", "create", "cluster", after=step, says="Error: stopped")
    with pytest.raises(EksError, match="stopped"):
        create(account, commands)
    result = whole(account, cloud, commands)
    # Everything of one run, and of the other nothing that is left over.
    roles = [stack for stack in result["stacks"] if "podidentityrole" in stack]
    assert len(roles) == 5
    assert len(result["stacks"]) == 1 + 5 + len(result["groups"])
    # Run a third time, nothing is done any more.
    before = len(commands.calls())
    create(account, commands)
    assert len(commands.calls()) == before


@pytest.mark.parametrize("what", ["addon", "nodegroup", "podidentityassociation"])
@pytest.mark.parametrize("step", [mostly_slow(n, n == 1) for n in range(3)])
def test_a_completion_that_stopped_is_completed_too(
    account: Account, cloud: Cloud, commands: Commands, what: str, step: int
) -> None:
    commands.rule("eksctl", "create", "cluster", after=2, says="Error: stopped")
    commands.rule("eksctl", "create", what, after=step, says="Error: stopped again")
    for _ in range(2):
        with pytest.raises(EksError, match="stopped"):
            create(account, commands)
    whole(account, cloud, commands)


def test_parts_whose_creation_failed_are_created_again(
    account: Account, cloud: Cloud, commands: Commands
) -> None:
    create(account, commands)
    cloud.faults.parts.addons["ours"]["aws-ebs-csi-driver"] = "CREATE_FAILED"
    group = backend(cloud, "eks").clusters["ours"].nodegroups["gpu"]
    group.status = "CREATE_FAILED"
    whole(account, cloud, commands)
    assert cloud.faults.parts.addons["ours"]["aws-ebs-csi-driver"] == "ACTIVE"
    assert backend(cloud, "eks").clusters["ours"].nodegroups["gpu"].status == "ACTIVE"
    assert [line.split()[2] for line in commands.calls("eksctl", "create")] == [
        "cluster", "nodegroup", "addon",
    ]  # fmt: skip


def backend(cloud: Cloud, service: str) -> Any:
    """moto's own objects, for states that its API cannot be asked for."""
    from moto.backends import get_backend

    return get_backend(service)["123456789012"][REGION]


def stack_in(cloud: Cloud, status: str) -> Any:
    cloud.client("cloudformation").create_stack(
        StackName="eksctl-ours-cluster",
        TemplateBody=planted.TEMPLATE,
        Tags=planted.pairs(_OURS),
    )
    (stack,) = backend(cloud, "cloudformation").stacks.values()
    stack.status = status
    return stack


def test_a_stack_in_progress_is_waited_for(
    account: Account, cloud: Cloud, commands: Commands
) -> None:
    stack = stack_in(cloud, "CREATE_IN_PROGRESS")

    def finish() -> None:
        cloud.client("eks").create_cluster(
            name="ours", roleArn="arn:aws:iam::123456789012:role/x",
            resourcesVpcConfig={}, tags=_OURS,
        )  # fmt: skip
        stack.status = "CREATE_COMPLETE"

    timer = threading.Timer(0.3, finish)
    timer.start()
    create(account, commands)
    timer.join()
    assert not commands.calls("eksctl", "create", "cluster")
    assert set(cloud.faults.parts.identities["ours"])


@pytest.mark.parametrize("status", ["ROLLBACK_COMPLETE", "CREATE_FAILED", "ROLLBACK_FAILED"])
def test_a_stack_that_failed_is_deleted_and_created_again(
    account: Account, cloud: Cloud, commands: Commands, status: str
) -> None:
    stack_in(cloud, status)
    whole(account, cloud, commands)
    assert commands.calls("eksctl", "create", "cluster")


def test_a_stack_of_somebody_else_is_refused(
    account: Account, cloud: Cloud, commands: Commands
) -> None:
    cloud.client("cloudformation").create_stack(
        StackName="eksctl-ours-cluster", TemplateBody=planted.TEMPLATE
    )
    with pytest.raises(Refused, match="does not carry the tag"):
        create(account, commands)
    with pytest.raises(Refused, match="does not carry the tag"):
        Stacks(account, target().owner).remove("eksctl-ours-cluster")
    assert cloud.client("cloudformation").describe_stacks()["Stacks"]


def test_an_end_is_moved_and_taken_away(account: Account, cloud: Cloud, commands: Commands) -> None:
    def end() -> Ttl:
        return Ttl.of(cloud.client("eks").describe_cluster(name="ours")["cluster"]["tags"])

    now = datetime.now(UTC)
    create(account, commands, Ttl.starting(now, 4, "down"))
    assert end() == Ttl.starting(now, 4, "down")
    create(account, commands, Ttl.starting(now, 9, "report"))
    assert end() == Ttl.starting(now, 9, "report")
    create(account, commands, Ttl())
    assert end() == Ttl()
    tags = cloud.client("eks").describe_cluster(name="ours")["cluster"]["tags"]
    assert set(tags) >= _OURS.keys()
    assert not [key for key in tags if "expir" in key]
