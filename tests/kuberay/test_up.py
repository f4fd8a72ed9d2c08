"""The way up: each step in its order, done again without harm, until the model has answered."""

import base64
import json
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from kuberay import images, up
from kuberay.aws import Account
from kuberay.lines import PARSER
from kuberay.ttl import Ttl
from tests.kuberay import planted
from tests.kuberay.cli import ROOT, run, start
from tests.kuberay.cloud import REGION, Cloud
from tests.kuberay.conftest import Commands
from tests.kuberay.test_preflight import push
from tests.kuberay.test_weights import weigh
from tests.server import wait

WHERE = ("--name", "ours", "--region", REGION)
CASES = ROOT.parent / "shared" / "cases" / "eks"


@pytest.fixture
def account(cloud: Cloud, kustomize: Commands, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """An account that is ready."""
    push(cloud)
    for code in ("L-1216C47A", "L-DB2E81BA", "L-3819A6DF"):
        cloud.extras.quotas[code] = 256.0
    monkeypatch.setattr(up, "_POLL_S", 0.05)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("QWEN_API_KEYS", raising=False)
    return cloud


def tags(cloud: Cloud) -> dict[str, str]:
    result: dict[str, str] = cloud.client("eks").describe_cluster(name="ours")["cluster"]["tags"]
    return result


def first(text: str) -> dict[str, Any]:
    """The first document of what kubectl was given."""
    documents: dict[str, Any] = next(iter(yaml.load_all(text, PARSER)))
    return documents["items"][0] if documents["kind"] == "List" else documents


def test_from_nothing_to_an_answer_and_back(account: Cloud, commands: Commands) -> None:
    before = planted.everything(account)
    result = run("up", *WHERE, "--yes", "--ttl-hours", "4", "--on-expiry", "down")
    assert (result.returncode, result.stdout) == (0, "Hello from Qwen2.5-7B-Instruct\n"), (
        result.stderr
    )
    assert "$/hour" in result.stderr
    assert "waits for its workers" in result.stderr
    steps = [line[4:] for line in result.stderr.splitlines() if line.startswith("==> ")]
    assert [line for line in steps if ":" not in line] == [
        "cluster", "plugin", "operator", "secrets", "manifests", "answer",
    ]  # fmt: skip
    # What teardown goes by, on the cluster and on the logs.
    limit = Ttl.of(tags(account))
    assert limit.action == "down"
    assert limit.hours_left(datetime.now(UTC)) == pytest.approx(4, abs=0.1)
    assert tags(account)["qwen-ray-serve/cluster"] == "ours"
    assert tags(account)["qwen-ray-serve/region"] == REGION
    made = planted.minus(planted.everything(account), before)
    assert made["log group"] == {"/aws/eks/ours/cluster", "/aws/eks/ours/ray"}
    # And down again: what up made, down removes.
    down = run("down", *WHERE, "--yes", "--pause", "0.05", "--patience", "1")
    assert down.returncode == 0, down.stdout
    assert planted.everything(account) == before


def test_the_order_is_that_of_what_needs_what(account: Cloud, commands: Commands) -> None:
    run("up", *WHERE, "--yes")
    order = [
        ("eksctl", "create", "cluster"),
        ("helm", "upgrade", "nvidia-device-plugin"),
        ("helm", "show", "crds"),
        ("helm", "upgrade", "kuberay-operator"),
        ("kubectl", "port-forward"),
    ]
    calls = commands.calls()
    places = [calls.index(commands.calls(*words)[0]) for words in order]
    assert places == sorted(places), calls
    # The CRDs are applied before the operator that needs them.
    kinds = [first(text)["kind"] for text in commands.inputs("kubectl", "apply")]
    assert kinds[0] == "CustomResourceDefinition"
    assert kinds[1:4] == ["Namespace", "Secret", "Secret"]
    operator = commands.calls("helm", "upgrade", "kuberay-operator")[0]
    assert "--version 1.7.0" in operator
    assert "--skip-crds" in operator


def test_monitoring_comes_with_it_where_that_is_asked(account: Cloud, commands: Commands) -> None:
    result = run("up", *WHERE, "--yes", "--monitoring")
    assert result.returncode == 0, result.stderr
    (chart,) = commands.calls("helm", "upgrade", "monitoring")
    assert re.search(r"--version \d+\.\d+\.\d+ ", chart)
    # Its CRDs come with the chart, and its disks are of the class that the manifests have.
    calls = commands.calls()
    assert calls.index(chart) > calls.index(
        commands.calls("helm", "upgrade", "kuberay-operator")[0]
    )
    applied = json.loads(commands.inputs("kubectl", "apply")[-1])["items"]
    assert {"PodMonitor", "PrometheusRule", "ConfigMap"} <= {each["kind"] for each in applied}


def test_the_manifests_are_those_of_this_account_and_cluster(
    account: Cloud, commands: Commands
) -> None:
    weigh(account, "Qwen/Qwen2.5-14B-Instruct")
    run("up", *WHERE, "--yes", "--overlay", "tp2", "--bucket", "qwen-ray-serve-weights")
    applied = json.loads(commands.inputs("kubectl", "apply")[-1])["items"]
    documents = {(each["kind"], each["metadata"]["name"]): each for each in applied}
    assert documents["ConfigMap", "cluster"]["data"] == {"name": "ours", "region": REGION}
    service = documents["RayService", "qwen"]["spec"]
    head = service["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    registry = f"123456789012.dkr.ecr.{REGION}.amazonaws.com"
    address, _, digest = head["image"].partition("@")
    assert address == f"{registry}/qwen-ray-serve:0.1.0"
    # The image that the tag has now: one that is built anew is a change.
    assert digest == image_digest(account)
    push_again(account)
    assert image_digest(account) != digest
    assert images.pinned(Account(REGION), address) == f"{address}@{image_digest(account)}"


def image_digest(cloud: Cloud) -> str:
    of = {"repositoryName": "qwen-ray-serve", "imageIds": [{"imageTag": "0.1.0"}]}
    result: str = cloud.client("ecr").describe_images(**of)["imageDetails"][0]["imageDigest"]
    return result


def push_again(cloud: Cloud) -> None:
    """Another image under the same tag."""
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "x", "size": 2, "digest": "sha256:" + "2" * 64},
        "layers": [],
    }
    cloud.client("ecr").put_image(
        repositoryName="qwen-ray-serve", imageManifest=json.dumps(manifest), imageTag="0.1.0"
    )


def test_secrets_are_made_once_and_are_in_no_command_line(
    account: Cloud, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_API_KEYS", "sk-one, sk-two")
    monkeypatch.setenv("HF_TOKEN", "hf-secret")
    first = run("up", *WHERE, "--yes")
    assert first.returncode == 0, first.stderr

    def stored() -> dict[str, dict[str, str]]:
        result = commands.objects()["secrets"]
        return {
            each["metadata"]["name"]: {
                key: base64.b64decode(value).decode() for key, value in each["data"].items()
            }
            for each in result
        }

    secrets = stored()
    assert secrets["qwen-api-keys"] == {"keys": "sk-one\nsk-two\n"}
    assert secrets["qwen-hub"] == {"HF_TOKEN": "hf-secret"}
    assert len(secrets["qwen-redis"]["password"]) > 30
    assert len(secrets["qwen-lane"]["secret"]) > 30
    # Run again with other values, they arrive, and the answer comes with them; the password stays.
    monkeypatch.setenv("QWEN_API_KEYS", "team sk-three")
    monkeypatch.setenv("HF_TOKEN", "hf-other")
    second = run("up", *WHERE, "--yes")
    assert second.returncode == 0, second.stderr
    assert stored() == {
        "qwen-api-keys": {"keys": "team sk-three\n"},
        "qwen-hub": {"HF_TOKEN": "hf-other"},
        "qwen-redis": secrets["qwen-redis"],
        "qwen-lane": secrets["qwen-lane"],
    }
    assert "workers take it when they start" in second.stderr
    # What the environment does not name stays.
    monkeypatch.delenv("QWEN_API_KEYS")
    monkeypatch.delenv("HF_TOKEN")
    before = stored()
    assert run("up", *WHERE, "--yes").returncode == 0
    assert stored() == before
    made_up = (secrets["qwen-redis"]["password"], secrets["qwen-lane"]["secret"])
    words = "\n".join(commands.calls()) + first.stderr + second.stderr + first.stdout
    for value in ("sk-one", "sk-three", "hf-secret", *made_up):
        assert value not in words
    # A new key beside the earlier, and then alone.
    added = run("rotate", *WHERE)
    new = added.stdout.strip()
    assert stored()["qwen-api-keys"] == {"keys": f"{new}\nteam sk-three\n"}, added.stderr
    alone = run("rotate", *WHERE, "--only").stdout.strip()
    assert stored()["qwen-api-keys"] == {"keys": f"{alone}\n"}
    assert len({new, alone, "sk-three"}) == 3


def test_without_keys_one_is_made_up(account: Cloud, commands: Commands) -> None:
    assert run("up", *WHERE, "--yes").returncode == 0
    (keys,) = [e for e in commands.objects()["secrets"] if e["metadata"]["name"] == "qwen-api-keys"]
    assert base64.b64decode(keys["data"]["keys"]).decode().startswith("sk-")


def test_a_failed_check_stops_it_before_anything_is_made(
    account: Cloud, commands: Commands
) -> None:
    account.extras.quotas["L-DB2E81BA"] = 0.0
    before = planted.everything(account)
    result = run("up", *WHERE, "--yes")
    assert (result.returncode, planted.everything(account)) == (1, before)
    assert "FAIL  quota G" in result.stderr
    assert commands.calls("eksctl") == ["eksctl version"]


def test_without_yes_the_cost_is_shown_and_nothing_is_made(
    account: Cloud, commands: Commands
) -> None:
    result = run("up", *WHERE)
    assert result.returncode == 2
    assert "$/hour until `make eks-down`" in result.stderr
    assert commands.calls("eksctl") == ["eksctl version"]


def test_a_cluster_that_is_there_is_gone_on_with(account: Cloud, commands: Commands) -> None:
    assert run("up", *WHERE, "--yes", "--ttl-hours", "1").returncode == 0
    result = run("up", *WHERE, "--yes", "--ttl-hours", "9")
    assert result.returncode == 0, result.stderr
    assert len(commands.calls("eksctl", "create", "cluster")) == 1
    # It has everything: test_cluster.py shows what is done where it has not.
    assert len(commands.calls("eksctl", "create")) == 1
    assert Ttl.of(tags(account)).hours_left(datetime.now(UTC)) == pytest.approx(9, abs=0.1)


def test_a_service_that_never_gets_ready_says_what_is_missing(
    account: Cloud, commands: Commands
) -> None:
    pod = {
        "metadata": {"name": "qwen-worker-1", "namespace": "qwen"},
        "status": {
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
                }
            ]
        },
    }
    commands.hold(pods=[pod])
    result = run("up", *WHERE, "--yes", "--wait", "0")
    assert result.returncode == 2
    assert "is not ready after 0 s: qwen-worker-1: 0/2 nodes are available" in result.stderr


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_an_interrupted_way_up_is_gone_on_with(
    account: Cloud, commands: Commands, number: signal.Signals
) -> None:
    commands.rule("helm", "upgrade", "kuberay-operator", hang=True)
    with start("up", *WHERE, "--yes") as process:
        assert wait((commands.folder / "hanging").exists)
        process.send_signal(number)
        _, output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    result = run("up", *WHERE, "--yes")
    assert result.returncode == 0, result.stderr
    assert len(commands.calls("eksctl", "create", "cluster")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("eksctl", "create", "cluster"),
        ("eksctl", "utils", "write-kubeconfig"),
        ("helm", "upgrade", "nvidia-device-plugin"),
        ("helm", "show", "crds"),
        ("helm", "upgrade", "kuberay-operator"),
        ("kubectl", "apply"),
        ("kubectl", "get"),
    ],
)
def test_a_step_that_fails_is_gone_on_with(
    account: Cloud, commands: Commands, words: tuple[str, ...]
) -> None:
    commands.rule(*words, says="Error: i/o timeout")
    failed = run("up", *WHERE, "--yes")
    assert (failed.returncode, "i/o timeout" in failed.stderr) == (2, True), failed.stderr
    assert "Traceback" not in failed.stderr
    again = run("up", *WHERE, "--yes")
    assert (again.returncode, again.stdout) == (0, "Hello from Qwen2.5-7B-Instruct\n"), again.stderr


def test_the_last_line_of_eksctl_is_shown(account: Cloud, commands: Commands) -> None:
    commands.rule("eksctl", "create", says="Error: no capacity for m7i.xlarge")
    result = run("up", *WHERE, "--yes")
    assert result.returncode == 2
    assert "error: `eksctl create cluster` failed: Error: no capacity" in result.stderr


def test_status_of_what_is_up(account: Cloud, commands: Commands) -> None:
    run("up", *WHERE, "--yes")
    result = run("status", *WHERE, "--json")
    output = json.loads(result.stdout)
    assert (result.returncode, output["problems"]) == (0, []), result.stdout
    assert output["state"] == "ACTIVE"
    assert [service["ready"] for service in output["services"]] == [True]
    assert {group["name"] for group in output["groups"]} >= {"cpu", "gpu"}
    assert output["usd_per_hour"] >= 0.10
    assert "RayService qwen/qwen: ready" in run("status", *WHERE).stdout


def test_status_of_nothing_is_a_problem(account: Cloud, commands: Commands) -> None:
    result = run("status", *WHERE)
    assert result.returncode == 1
    assert "there is no such cluster" in result.stdout
    # The command that it names is there.
    (named,) = re.findall(r"\((python -m \S+)", result.stdout)
    words = [sys.executable, *named.split()[1:], "--help"]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_status_of_a_cluster_that_does_not_answer_still_has_its_bill(
    account: Cloud, commands: Commands
) -> None:
    planted.plant(account, "ours")
    commands.rule("kubectl", "version", says="Unable to connect to the server", times=9)
    result = run("status", *WHERE)
    assert result.returncode == 1
    assert "could not be asked" in result.stdout
    assert "g6.xlarge, running" in result.stdout
    assert "$/hour now" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is absent")
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("up.py", ["eksctl create podidentityassociation", "tags now {'qwen-ray-serve/cluster': "]),
        ("down.py", ["instance running", "volume there snapshot there"]),
    ],
)
def test_a_reproduction_case_is_right(case: str, said: list[str]) -> None:
    command = [sys.executable, str(CASES / case)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert [text for text in said if text not in process.stdout] == [], process.stdout
    assert "qwen-ray-serve/expires" not in process.stdout
