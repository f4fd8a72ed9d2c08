"""The manifests as they would be applied: accepted, agreeing with each other, and tight."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from kuberay import layout, lint, prices, render
from kuberay.owned import CLUSTER
from kuberay.rayservice import quantity
from serve_app.planning.hardware import ACCELERATORS
from serve_app.planning.plan import Plan
from serve_app.planning.sizing import DEFAULT_UTILIZATION, QWEN25, needed_bytes
from serve_app.settings import Settings
from tests.kuberay import podsecurity, programs, schemas

ROOT = Path(__file__).parents[2]
HERE = ROOT / "kuberay"
OVERLAYS = render.overlays()


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def documents(overlay: str) -> Iterator[list[dict[str, Any]]]:
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{programs.folder()}{os.pathsep}{path}"
    try:
        yield render.documents(overlay)
    finally:
        os.environ["PATH"] = path


def of(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (results,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return results


def service(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return of(documents, "RayService", "qwen")


def cluster() -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load((HERE / "cluster.yaml").read_text())
    return result


# --- accepted -------------------------------------------------------------------------------


def test_overlays_are_those_that_are_documented() -> None:
    assert OVERLAYS == ["one-gpu", "qwen-72b", "spot", "tp2"]


def test_kubernetes_accepts_every_manifest_of_every_overlay(
    documents: list[dict[str, Any]],
) -> None:
    for document in documents:
        schemas.check(document)


def test_the_schemas_refuse_what_kubernetes_would_drop(documents: list[dict[str, Any]]) -> None:
    broken = json.loads(json.dumps(service(documents)))
    broken["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["tolerates"] = []
    with pytest.raises(AssertionError, match="tolerates"):
        schemas.check(broken)
    policy = json.loads(json.dumps(of(documents, "NetworkPolicy", "dns")))
    policy["spec"]["egres"] = []
    with pytest.raises(Exception, match="egres"):
        schemas.check(policy)


def test_eksctl_accepts_the_cluster() -> None:
    schema = json.loads(schemas.shared("eksctl-0.230.0.json").read_text())
    errors = jsonschema.Draft7Validator(schema).iter_errors(cluster())
    assert [f"{list(error.absolute_path)}: {error.message[:200]}" for error in errors] == []


def test_karpenter_accepts_its_manifests() -> None:
    parsed = list(yaml.safe_load_all((HERE / "karpenter.yaml").read_text()))
    assert [document["kind"] for document in parsed] == ["EC2NodeClass", *["NodePool"] * 4]
    for document in parsed:
        schemas.check(document)


def test_a_newer_image_replaces_no_node_of_karpenter() -> None:
    """al2023@latest moves; a node that serves is not ended for it."""
    node_class, *pools = yaml.safe_load_all((HERE / "karpenter.yaml").read_text())
    assert node_class["spec"]["amiSelectorTerms"] == [{"alias": "al2023@latest"}]
    for pool in pools:
        budgets = pool["spec"]["disruption"]["budgets"]
        assert {"nodes": "0", "reasons": ["Drifted"]} in budgets, pool["metadata"]["name"]


def test_helm_takes_the_operators_values(tmp_path: Path) -> None:
    defaults = schemas.shared("kuberay-1.7.0/operator-values.yaml")
    values = yaml.safe_load((HERE / "operator-values.yaml").read_text())
    expected = yaml.safe_load(defaults.read_text())
    assert set(values) <= set(expected)
    assert expected["image"]["tag"] == values["image"]["tag"] == "v1.7.0"
    # A chart that prints what it was given stands in for KubeRay's.
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("apiVersion: v2\nname: told\nversion: 1.7.0\n")
    (tmp_path / "values.yaml").write_text(defaults.read_text())
    (tmp_path / "templates" / "told.yaml").write_text("{{ toYaml .Values }}\n")
    values_file = str(HERE / "operator-values.yaml")
    shown = yaml.safe_load(programs.run("helm", "template", str(tmp_path), "--values", values_file))
    assert shown["replicas"] == 2
    assert shown["nodeSelector"] == {"qwen-ray-serve/workers": "cpu"}
    assert shown["image"]["repository"] == expected["image"]["repository"]
    gates = {gate["name"]: gate["enabled"] for gate in shown["featureGates"]}
    assert gates["RayServiceIncrementalUpgrade"]


def test_our_own_lint_finds_nothing(overlay: str, documents: list[dict[str, Any]]) -> None:
    text = yaml.safe_dump_all(documents)
    assert [each.shown() for each in lint.lint([(overlay, text)])] == []


# --- agreeing -------------------------------------------------------------------------------


def test_replicas_and_workers_have_the_same_bounds(documents: list[dict[str, Any]]) -> None:
    plan = layout.layout(cluster(), documents)
    assert plan.service is not None
    settings = Settings.parse(plan.service.arguments)
    (workers,) = plan.service.workers
    assert (workers.minimum, workers.maximum) == (settings.replicas.min, settings.replicas.max)
    assert workers.gpus == settings.tensor_parallel_size


def groups_for(documents: list[dict[str, Any]]) -> list[layout.NodeGroup]:
    """The node groups on which an overlay's workers may run."""
    plan = layout.layout(cluster(), documents)
    assert plan.service is not None
    (workers,) = plan.service.workers
    named = [
        group["name"]
        for group in cluster()["managedNodeGroups"]
        if workers.selector.items() <= group["labels"].items()
    ]
    return [group for group in plan.groups if group.name in named]


def test_each_overlay_has_a_node_group_that_holds_its_workers(
    documents: list[dict[str, Any]],
) -> None:
    (group,) = groups_for(documents)
    (spec,) = service(documents)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group.minimum == 0
    for kind in group.instance_types:
        instance = prices.INSTANCES[kind]
        pods = instance.gpus // int(limits["nvidia.com/gpu"])
        assert pods >= 1
        # What EKS and the daemons leave.
        assert pods * float(limits["cpu"]) + 0.5 < instance.vcpus


def test_the_node_groups_hold_the_peak_of_an_upgrade(documents: list[dict[str, Any]]) -> None:
    plan = layout.layout(cluster(), documents)
    assert plan.service is not None
    (group,) = groups_for(documents)
    assert plan.service.peak_gpus == 2 * plan.service.most_gpus
    assert group.most_gpus >= plan.service.peak_gpus


def test_the_model_fits_every_gpu_that_it_may_get(documents: list[dict[str, Any]]) -> None:
    plan = layout.layout(cluster(), documents)
    assert plan.service is not None
    settings = Settings.parse(plan.service.arguments)
    (group,) = groups_for(documents)
    for kind in group.instance_types:
        memory, _ = ACCELERATORS[prices.INSTANCES[kind].gpu]
        needed = needed_bytes(
            QWEN25[settings.model],
            settings.engine.get("max_model_len"),
            settings.tensor_parallel_size or 1,
            1,
        )
        assert needed <= memory * DEFAULT_UTILIZATION, kind


def test_nothing_outlives_the_grace_of_its_pod(documents: list[dict[str, Any]]) -> None:
    parsed = service(documents)
    config = yaml.safe_load(parsed["spec"]["serveConfigV2"])
    shutdown_s = Plan.shutdown_s(Settings.parse(config["applications"][0]["args"]))
    (group,) = parsed["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    hook_s = float(hook[-1])
    assert shutdown_s <= hook_s < pod["terminationGracePeriodSeconds"]
    # The old cluster of an upgrade serves what it has to its end.
    assert parsed["spec"]["rayClusterDeletionDelaySeconds"] > shutdown_s
    autoscaler = of(documents, "Deployment", "cluster-autoscaler")
    words = autoscaler["spec"]["template"]["spec"]["containers"][0]["command"]
    (given,) = [w for w in words if w.startswith("--max-graceful-termination-sec=")]
    assert int(given.partition("=")[2]) > pod["terminationGracePeriodSeconds"]


def test_spot_gives_its_streams_no_longer_than_ec2_gives_it() -> None:
    patches = yaml.safe_load((HERE / "overlays" / "spot" / "workers.yaml").read_text())
    by_path = {patch["path"].rpartition("spec/")[2]: patch["value"] for patch in patches}
    assert by_path["terminationGracePeriodSeconds"] < 120


def test_every_version_is_said_once_or_the_same(documents: list[dict[str, Any]]) -> None:
    pins = (ROOT / "pyproject.toml").read_text()
    version = service(documents)["spec"]["rayClusterConfig"]["rayVersion"]
    assert f'"ray[serve]=={version}"' in pins
    kubernetes = cluster()["metadata"]["version"]
    image = of(documents, "Deployment", "cluster-autoscaler")["spec"]["template"]["spec"]
    assert image["containers"][0]["image"].rpartition(":v")[2].startswith(f"{kubernetes}.")


def test_what_is_mounted_and_named_is_there(documents: list[dict[str, Any]]) -> None:
    there = {(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents}
    for document in documents:
        namespace = document["metadata"].get("namespace")
        for _, pod in podsecurity.pods(document):
            volumes = {volume["name"] for volume in pod.get("volumes") or []}
            claims = document["spec"].get("volumeClaimTemplates") or []
            volumes |= {claim["metadata"]["name"] for claim in claims}
            for container in podsecurity.containers(pod):
                mounted = {each["name"] for each in container.get("volumeMounts") or []}
                assert mounted <= volumes
                for entry in container.get("env") or []:
                    key = (entry.get("valueFrom") or {}).get("configMapKeyRef")
                    if key:
                        assert ("ConfigMap", namespace, key["name"]) in there
            for volume in pod.get("volumes") or []:
                if "configMap" in volume:
                    assert ("ConfigMap", namespace, volume["configMap"]["name"]) in there
            if "serviceAccountName" in pod:
                assert ("ServiceAccount", namespace, pod["serviceAccountName"]) in there


def test_roles_are_bound_to_accounts_that_are_there(documents: list[dict[str, Any]]) -> None:
    accounts = {
        (d["metadata"]["namespace"], d["metadata"]["name"])
        for d in documents
        if d["kind"] == "ServiceAccount"
    }
    bound = {
        (each["namespace"], each["serviceAccountName"])
        for each in cluster()["iam"]["podIdentityAssociations"]
    }
    assert bound <= accounts


def test_no_secret_is_in_a_file(documents: list[dict[str, Any]]) -> None:
    assert not [d for d in documents if d["kind"] == "Secret"]
    wanted = set()
    text = json.dumps(documents)
    for name in ("qwen-redis", "qwen-api-keys", "qwen-hub", "qwen-lane"):
        assert name in text
        wanted.add(name)
    assert "hf_" not in text


# --- tight ----------------------------------------------------------------------------------


def test_pods_pass_the_restricted_profile_that_their_namespace_enforces(
    documents: list[dict[str, Any]],
) -> None:
    labels = of(documents, "Namespace", "qwen")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    seen = []
    for document in documents:
        for name, pod in podsecurity.pods(document):
            seen.append(name)
            assert list(podsecurity.restricted(pod)) == [], name
    assert {"head", "autoscaler", "redis", "cluster-autoscaler"} < set(seen)


def test_advice_that_is_not_taken_has_a_reason(documents: list[dict[str, Any]]) -> None:
    seen = set()
    for document in documents:
        for name, pod in podsecurity.pods(document):
            if name != "autoscaler":  # The operator writes most of it.
                seen |= set(podsecurity.hardening(pod))
    accepted = podsecurity.ACCEPTED
    open_ = {each for each in seen if each not in accepted and (each[0], "*") not in accepted}
    assert open_ == set()
    stale = {each for each in accepted if each[1] != "*" and each not in seen}
    assert stale == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"securityContext": {}}, "may run as root"),
    ],
)
def test_the_restricted_profile_is_really_checked(
    documents: list[dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    _, pod = next(iter(podsecurity.pods(service(documents))))
    assert message in " ".join(podsecurity.restricted({**pod, **change}))


def policies(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions") or []:
        assert each["operator"] == "In"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def reaches(
    documents: list[dict[str, Any]],
    to: dict[str, str],
    port: int,
    by: dict[str, str],
    namespace: str = "qwen",
) -> bool:
    """Whether NetworkPolicies let a pod of some namespace in."""
    for policy in policies(documents):
        if "Ingress" not in policy["policyTypes"] or not selects(policy["podSelector"], to):
            continue
        for rule in policy.get("ingress") or []:
            ports = [each["port"] for each in rule.get("ports") or []]
            if ports and port not in ports:
                continue
            for peer in rule.get("from") or []:
                where = {"kubernetes.io/metadata.name": namespace}
                if "ipBlock" in peer:
                    continue
                if "namespaceSelector" in peer:
                    if not selects(peer["namespaceSelector"], where):
                        continue
                elif namespace != "qwen":
                    continue
                if selects(peer.get("podSelector") or {}, by):
                    return True
    return False


def test_who_may_reach_whom(documents: list[dict[str, Any]]) -> None:
    head, worker = {"ray.io/node-type": "head"}, {"ray.io/node-type": "worker"}
    redis = {"app.kubernetes.io/name": "redis"}
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    cleanup = {"ray.io/node-type": "redis-cleanup"}
    assert reaches(documents, head, 6379, worker)
    assert reaches(documents, worker, 30001, worker)
    assert reaches(documents, redis, 6379, head)
    assert reaches(documents, redis, 6379, cleanup)
    assert reaches(documents, head, 8265, operator, "kuberay-operator")
    assert reaches(documents, worker, 8080, prometheus, "monitoring")
    assert reaches(documents, head, 44217, prometheus, "monitoring")
    # And nobody else.
    assert not reaches(documents, redis, 6379, worker)
    assert not reaches(documents, head, 8265, {"app": "x"}, "default")
    assert not reaches(documents, head, 8265, prometheus, "monitoring")
    assert not reaches(documents, worker, 8080, {"app": "x"}, "default")
    assert not reaches(documents, head, 8265, {"app": "x"})


def test_by_default_nothing_comes_in_and_nothing_goes_out(
    documents: list[dict[str, Any]],
) -> None:
    deny = of(documents, "NetworkPolicy", "deny")["spec"]
    assert deny["podSelector"] == {}
    assert set(deny["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in deny
    assert "egress" not in deny
    # Clients come from private ranges to workers only; nothing goes to the metadata service.
    for policy in policies(documents):
        for rule in policy.get("ingress") or []:
            for peer in rule.get("from") or []:
                if "ipBlock" in peer:
                    assert policy["podSelector"] == {"matchLabels": {"ray.io/node-type": "worker"}}
                    assert peer["ipBlock"]["cidr"].split(".")[0] in ("10", "172", "192")
        for rule in policy.get("egress") or []:
            for peer in rule.get("to") or []:
                if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0":
                    assert peer["ipBlock"]["except"] == ["169.254.0.0/16"]
    addon = [each for each in cluster()["addons"] if each["name"] == "vpc-cni"]
    assert json.loads(addon[0]["configurationValues"]) == {"enableNetworkPolicy": "true"}


def test_the_service_is_reached_from_inside_only(documents: list[dict[str, Any]]) -> None:
    made = service(documents)["spec"]["serveService"]
    internal = "service.beta.kubernetes.io/aws-load-balancer-internal"
    assert made["metadata"]["annotations"][internal] == "true"
    assert made["metadata"]["name"] == "qwen-serve-svc"
    others = [d for d in documents if d["kind"] in ("Service", "Ingress")]
    assert all(d["spec"].get("type", "ClusterIP") == "ClusterIP" for d in others)


def test_streams_come_in_through_nodes_that_stay(documents: list[dict[str, Any]]) -> None:
    """An NLB resets what goes through a target that it finds unhealthy or that ends."""
    made = service(documents)["spec"]["serveService"]
    # With Local a node is unhealthy once its worker drains, while its streams go on.
    assert made["spec"]["externalTrafficPolicy"] == "Cluster"
    targets = "service.beta.kubernetes.io/aws-load-balancer-target-node-labels"
    key, _, value = made["metadata"]["annotations"][targets].partition("=")
    through = [g for g in cluster()["managedNodeGroups"] if g["labels"].get(key) == value]
    (group,) = through
    # In two zones, on demand, and nobody takes one away to save money.
    assert group["minSize"] == group["desiredCapacity"] == group["maxSize"] >= 2
    assert not group.get("spot")
    assert not group.get("taints")
    # The pods see a node's address, so who may connect is said before the node.
    ranges = made["spec"]["loadBalancerSourceRanges"]
    (clients,) = of(documents, "NetworkPolicy", "clients")["spec"]["ingress"]
    assert {peer["ipBlock"]["cidr"] for peer in clients["from"]} == set(ranges)


def test_two_heads_fit_the_nodes_that_do_not_scale(documents: list[dict[str, Any]]) -> None:
    """An upgrade starts a second head beside the first, and nothing adds a node for it."""
    spec = service(documents)["spec"]["rayClusterConfig"]
    template = spec["headGroupSpec"]["template"]["spec"]
    parts = [*podsecurity.containers(template), spec["autoscalerOptions"]]
    request = [part["resources"]["requests"] for part in parts]
    (group,) = [g for g in cluster()["managedNodeGroups"] if g["name"] == "cpu"]
    for kind in group["instanceTypes"]:
        cpus = prices.INSTANCES[kind].vcpus
        # A head a node; a core of each is for Redis, the operator, the add-ons and monitoring.
        assert sum(quantity(each["cpu"]) for each in request) <= cpus - 1
        assert sum(quantity(each["memory"]) for each in request) <= (4 * cpus - 4) * 2**30


def test_nodes_are_private_encrypted_and_tagged() -> None:
    config = cluster()
    assert config["metadata"]["tags"]["qwen-ray-serve/cluster"] == config["metadata"]["name"]
    for group in config["managedNodeGroups"]:
        assert group["privateNetworking"] is True
        assert (group["volumeType"], group["volumeEncrypted"]) == ("gp3", True)
        assert group["disablePodIMDS"] is True
        assert group["maxSize"] > 0
        if group["name"].startswith("gpu"):
            assert group["minSize"] == group["desiredCapacity"] == 0
            (taint,) = group["taints"]
            assert (taint["key"], taint["effect"]) == ("nvidia.com/gpu", "NoSchedule")
    name = config["metadata"]["name"]
    for storage in yaml.safe_load_all((HERE / "base" / "storage.yaml").read_text()):
        assert storage["parameters"]["tagSpecification_1"] == f"{CLUSTER}={name}"
        assert (storage["parameters"]["type"], storage["parameters"]["encrypted"]) == (
            "gp3",
            "true",
        )
        assert storage["reclaimPolicy"] == "Delete"


def test_a_node_whose_driver_is_being_installed_is_one_with_gpus() -> None:
    """The Cluster Autoscaler's label of AWS: without it, it would start a second node."""
    for group in cluster()["managedNodeGroups"]:
        gpus = any(prices.INSTANCES[kind].gpus for kind in group["instanceTypes"])
        assert bool(group["labels"].get("k8s.amazonaws.com/accelerator")) == gpus, group["name"]


def test_nodes_are_repaired_by_what_an_add_on_sees() -> None:
    repaired = [g for g in cluster()["managedNodeGroups"] if g.get("nodeRepairConfig")]
    assert repaired
    assert "eks-node-monitoring-agent" in {addon["name"] for addon in cluster()["addons"]}


def test_no_budget_forbids_to_drain_the_nodes_of_the_head(
    documents: list[dict[str, Any]],
) -> None:
    """A budget of one for a single pod holds up an upgrade of its node group for ever."""
    labels = {"app.kubernetes.io/part-of": "qwen"}
    single = [
        {**labels, "ray.io/node-type": "head"},
        {"app.kubernetes.io/name": "redis"},
        {"app.kubernetes.io/name": "cluster-autoscaler"},
    ]
    for budget in (d["spec"] for d in documents if d["kind"] == "PodDisruptionBudget"):
        for pod in single:
            if selects(budget["selector"], pod):
                assert budget.get("minAvailable", 0) == 0
                assert budget["maxUnavailable"] >= 1


def test_weights_are_written_and_read_in_minutes(documents: list[dict[str, Any]]) -> None:
    """From the disk of the pod: its size holds them, and its throughput moves them in time."""
    plan = layout.layout(cluster(), documents)
    assert plan.service is not None
    shape = QWEN25[Settings.parse(plan.service.arguments).model]
    (spec,) = service(documents)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (claim,) = [
        volume["ephemeral"]["volumeClaimTemplate"]["spec"]
        for volume in spec["template"]["spec"]["volumes"]
        if "ephemeral" in volume
    ]
    storage = of(documents, "StorageClass", claim["storageClassName"])["parameters"]
    throughput = int(storage.get("throughput", 125))
    assert throughput * 4 <= max(3000, int(storage.get("iops", 0)))
    weights = shape.weights_bytes
    assert weights < 0.8 * quantity(claim["resources"]["requests"]["storage"])
    assert weights / (throughput * 2**20) < 300


def test_the_image_has_what_the_probes_call(documents: list[dict[str, Any]]) -> None:
    steps = (ROOT / "runpod" / "install.sh").read_text()
    assert " wget" in steps
    assert "useradd --uid 1001" in steps
    (group,) = service(documents)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["template"]["spec"]["securityContext"]["runAsUser"] == 1001


def test_the_table_of_peaks_is_that_of_the_manifests(
    overlay: str, documents: list[dict[str, Any]]
) -> None:
    text = (HERE / "upgrades.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith(f"| `{overlay}` |")]
    plan = layout.layout(cluster(), documents)
    assert plan.service is not None
    (group,) = groups_for(documents)
    example = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    strategy = example["spec"]["upgradeStrategy"]
    incremental = json.loads(json.dumps(service(documents)))
    del incremental["spec"]["serveService"]
    incremental["spec"]["upgradeStrategy"] = strategy
    schemas.check(incremental)
    assert lint.lint([("incremental", yaml.safe_dump(incremental))]) == []
    surge = strategy["clusterUpgradeOptions"]["maxSurgePercent"]
    assert f"surge {surge} %" in text
    changed = layout.layout(cluster(), [incremental]).service
    assert changed is not None
    results = [plan.service.most_gpus, plan.service.peak_gpus, changed.peak_gpus, group.most_gpus]
    assert [int(cell) for cell in row.split("|")[2:6]] == results


def test_the_gpus_of_workers_that_are_still_to_come_are_stated(
    documents: list[dict[str, Any]],
) -> None:
    """The operator submits the application once the head is ready, minutes before any GPU is."""
    spec = service(documents)["spec"]["rayClusterConfig"]
    (worker,) = spec["workerGroupSpecs"]
    pods = [spec["headGroupSpec"], worker]
    values = {
        entry["value"]
        for pod in pods
        for entry in pod["template"]["spec"]["containers"][0]["env"]
        if entry["name"] == "SERVE_APP_NODE_GPUS"
    }
    (shown,) = values
    name, _, count = shown.partition(":")
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert count == limits["nvidia.com/gpu"]
    (group,) = groups_for(documents)
    names = {prices.INSTANCES[kind].gpu for kind in group.instance_types}
    assert ACCELERATORS[name][0] == min(ACCELERATORS[each][0] for each in names)


def test_the_prefix_of_the_application_is_that_of_its_manifest(
    documents: list[dict[str, Any]],
) -> None:
    """The completion that `up` asks for goes there."""
    for given, prefix in (("/", ""), ("/team/a", "/team/a")):
        changed = json.loads(json.dumps(service(documents)))
        serve = yaml.safe_load(changed["spec"]["serveConfigV2"])
        serve["applications"][0]["route_prefix"] = given
        changed["spec"]["serveConfigV2"] = yaml.safe_dump(serve)
        parsed = layout.layout(cluster(), [changed]).service
        assert parsed is not None
        assert parsed.prefix == prefix
