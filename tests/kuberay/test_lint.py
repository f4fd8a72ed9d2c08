# ruff: noqa: E501 - the planted texts are lines of YAML.
"""The lint names each planted fault, on its line and with a mend, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kuberay import rules
from kuberay.errors import EksError
from kuberay.lines import line_of, load_all
from kuberay.lint import Found, lint
from kuberay.rules import ERROR, WARNING
from tests.kuberay import console, manifests, schemas
from tests.kuberay.planted_service import SOUND, document, line, planted

ROOT = Path(__file__).parents[2]


def findings(text: str, was: str = "") -> list[Found]:
    return lint([("a.yaml", text)], [("b.yaml", was)] if was else [])


def test_a_sound_service_has_no_finding() -> None:
    assert [each.shown() for each in findings(SOUND)] == []


def test_a_sound_service_is_one_that_the_schema_takes() -> None:
    schemas.check(yaml.safe_load(SOUND))


PAIR = """\
            env:
            - name: RAY_SERVE_ENABLE_HA_PROXY
              value: "1"
            - name: RAY_SERVE_THROUGHPUT_OPTIMIZED
              value: "1"
"""
SERVE = "  serveConfigV2: |\n"
TYPE = "    type: NewCluster\n"
HEAD_ENV = "            env:\n            - name: RAY_SERVE_ENABLE_HA_PROXY\n"
WORKER_IMAGE = "          - name: ray-worker\n            image: rayproject/ray:2.60.0\n"

# What is planted, the rule that finds it, a part of the line that it is on, a part of the mend.
FAULTS = {
    "unhealthy seconds of the service": (
        planted(SERVE, "  serviceUnhealthySecondThreshold: 900\n" + SERVE),
        "no-op-field", "serviceUnhealthySecondThreshold", "livenessProbe",
    ),
    "unhealthy seconds of a deployment": (
        planted(SERVE, "  deploymentUnhealthySecondThreshold: 300\n" + SERVE),
        "no-op-field", "deploymentUnhealthySecondThreshold", "health_check_timeout_s",
    ),
    "options of another strategy": (
        planted(TYPE, TYPE + "    clusterUpgradeOptions: {gatewayClassName: i, stepSizePercent: 5, intervalSeconds: 9}\n"),
        "no-op-field", "clusterUpgradeOptions", "NewClusterWithIncrementalUpgrade",
    ),
    "a strategy misspelt": (
        planted(TYPE, "    type: NewClusterWithIncrementalUpgrades\n"),
        "upgrade-type", "type: New", "NewClusterWithIncrementalUpgrade",
    ),
    "a strategy in lower case": (
        planted(TYPE, "    type: newcluster\n"), "upgrade-type", "type: newcluster", "NewCluster",
    ),
    "an incremental upgrade without a gateway": (
        planted(TYPE, "    type: NewClusterWithIncrementalUpgrade\n"),
        "upgrade-options", "type: New", "GatewayClass",
    ),
    "no maximum": (
        planted("      maxReplicas: 2\n", ""), "no-maximum", "- groupName", "quota",
    ),
    "drain over grace": (
        planted("graceful_shutdown_timeout_s: 60", "graceful_shutdown_timeout_s: 300"),
        "drain-over-grace", "graceful_shutdown_timeout_s: 300", "above 300",
    ),
    "the hook over grace": (
        planted('"drain.py", "90"', '"drain.py", "120"'),
        "drain-over-grace", "preStop", "above 120",
    ),
    "no hook": (
        planted('            lifecycle:\n              preStop:\n                exec:\n                  command: ["python", "drain.py", "90"]\n', ""),
        "no-drain", "- name: ray-worker", "drain.py",
    ),
    "ray stop as the hook": (
        planted('["python", "drain.py", "90"]', '["/bin/sh", "-c", "ray stop"]'),
        "no-drain", "preStop", "drain.py",
    ),
    "a variable of other values": (
        planted(HEAD_ENV, HEAD_ENV.replace("env:\n", "env:\n            - {name: RAY_SERVE_X, value: '1'}\n"), 2)
        .replace("RAY_SERVE_X, value: '1'", "RAY_SERVE_X, value: '2'", 1),
        "one-sided-variable", "RAY_SERVE_X, value: '1'", "one value",
    ),
    "a variable that comes too late": (
        planted("        runtime_env:\n", "        runtime_env:\n          env_vars: {RAY_SERVE_ENABLE_HA_PROXY: '1'}\n"),
        "late-variable", "env_vars", "env of head and workers",
    ),
    "the head does not serve": (
        planted("            - containerPort: 8000\n              name: serve\n            - containerPort: 44217", "            - containerPort: 44217"),
        "serve-port", "ports:", "name: serve",
    ),
    "another port than Serve's": (
        planted("  serveConfigV2: |\n", "  serveConfigV2: |\n    http_options: {port: 9000}\n"),
        "serve-port", "ports:", "9000",
    ),
    "Serve for itself": (
        planted("  serveConfigV2: |\n", "  serveConfigV2: |\n    http_options: {host: 127.0.0.1}\n"),
        "serve-host", "127.0.0.1", "0.0.0.0",
    ),
    "metrics elsewhere": (
        planted("        num-cpus: '0'\n", "        num-cpus: '0'\n        metrics-export-port: '9090'\n"),
        "metrics-port", "metrics-export-port", "9090",
    ),
    "the autoscaler's metrics": (
        planted("            - containerPort: 44217\n              name: as-metrics\n", ""),
        "metrics-port", "ports:", "44217",
    ),
    "a dashboard on a load balancer": (
        planted("serviceType: ClusterIP", "serviceType: LoadBalancer"),
        "dashboard-exposed", "serviceType: LoadBalancer", "port-forward",
    ),
    "a dashboard on every node": (
        planted("serviceType: ClusterIP", "serviceType: NodePort"),
        "dashboard-exposed", "serviceType: NodePort", "port-forward",
    ),
    "a dashboard behind an ingress": (
        planted("      serviceType: ClusterIP\n", "      enableIngress: true\n"),
        "dashboard-exposed", "enableIngress", "port-forward",
    ),
    "no authentication": (
        planted("    authOptions:\n      mode: token\n", ""), "no-token", "rayClusterConfig", "token",
    ),
    "no autoscaler": (
        planted("    enableInTreeAutoscaling: true\n    autoscalerOptions:\n      version: v2\n", "")
        .replace("            - containerPort: 44217\n              name: as-metrics\n", ""),
        "autoscaler-off", "autoscaling_config", "enableInTreeAutoscaling: true",
    ),
    "more replicas than GPUs": (
        planted("              max_replicas: 2\n", "              max_replicas: 5\n"),
        "too-few-gpus", "autoscaling_config", "maxReplicas",
    ),
    "no wget": (
        planted(WORKER_IMAGE, WORKER_IMAGE.replace("rayproject/ray:2.60.0", "vllm/vllm-openai:v0.32.0"))
        .replace("          - name: ray-head\n            image: rayproject/ray:2.60.0", "          - name: ray-head\n            image: vllm/vllm-openai:v0.32.0"),
        "no-wget", "image: vllm", "install wget",
    ),
    "a token in the file": (
        planted(WORKER_IMAGE + HEAD_ENV, WORKER_IMAGE + '            env:\n            - name: HF_TOKEN\n              value: hf_x\n            - name: RAY_SERVE_ENABLE_HA_PROXY\n'),
        "secret-in-file", "HF_TOKEN", "secretKeyRef",
    ),
    "a password in the file": (
        planted("        valueFrom:\n          secretKeyRef:\n            name: redis\n            key: password\n", "        value: '5241590000000000'\n"),
        "secret-in-file", "redisPassword", "secretKeyRef",
    ),
    "a balancer for everybody": (
        planted(SERVE, "  serveService: {spec: {type: LoadBalancer}}\n" + SERVE),
        "open-to-internet", "serveService", "internal",
    ),
    "GPUs without a toleration": (
        planted("          tolerations:\n          - key: nvidia.com/gpu\n            operator: Exists\n", ""),
        "gpu-toleration", "spec:", "tolerations",
    ),
    "replicas on the head": (
        planted("        num-cpus: '0'\n", "        dashboard-host: 0.0.0.0\n"),
        "head-serves", "rayStartParams", "num-cpus",
    ),
    "no fault tolerance": (
        planted("    gcsFaultToleranceOptions:\n      redisAddress: redis:6379\n      redisPassword:\n        valueFrom:\n          secretKeyRef:\n            name: redis\n            key: password\n", ""),
        "head-alone", "rayClusterConfig", "Redis",
    ),
    "another version of Ray": (
        planted(WORKER_IMAGE, WORKER_IMAGE.replace("2.60.0", "2.59.0")),
        "version-differs", "image: rayproject/ray:2.59.0", "2.59.0",
    ),
    "restarts with autoscaler v2": (
        planted("          terminationGracePeriodSeconds: 120\n", "          terminationGracePeriodSeconds: 120\n          restartPolicy: Always\n"),
        "refused", "restartPolicy: Always", "Never",
    ),
    "a name that is too long": (
        planted("  name: rayservice-sample\n", f"  name: {'x' * 48}\n"), "refused", "name: xxx", "47",
    ),
    "an application that is not YAML": (
        planted("      - name: fruit_app\n", "      - name: fruit_app: x\n"),
        "serve-config", "fruit_app: x", "",
    ),
    "two applications on one route": (
        planted("    applications:\n", "    applications:\n      - {name: a, import_path: a.b, route_prefix: /fruit}\n"),
        "serve-config", "route_prefix: /fruit", "route_prefix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_alone_on_its_line_with_a_mend(name: str) -> None:
    text, rule, where, mend = FAULTS[name]
    assert text != SOUND
    named = [each.finding for each in findings(text)]
    assert {each.rule for each in named} == {rule}
    lines = text.splitlines()
    assert any(where in lines[each.line - 1] for each in named), [each.line for each in named]
    assert any(mend in each.mend for each in named)
    assert lint([("a.yaml", text)], ignored=frozenset({rule})) == []


def test_every_rule_has_a_planted_fault() -> None:
    planted_rules = {rule for _, rule, _, _ in FAULTS.values()}
    planted_rules |= {mutation.rule for mutation in manifests.BROKEN}
    elsewhere = {"haproxy-alone", "frozen-edit", "our-settings"}  # Below.
    assert planted_rules | elsewhere == set(rules.RULES)


def errors(text: str) -> set[str]:
    return {e.finding.rule for e in findings(text) if e.finding.severity == ERROR}


@pytest.mark.parametrize("mutation", manifests.HARMLESS, ids=lambda each: each.name)
def test_a_harmless_change_is_no_error(mutation: manifests.Mutation) -> None:
    assert errors(manifests.made(mutation)) == set()


@pytest.mark.parametrize("mutation", manifests.BROKEN, ids=lambda each: each.name)
def test_what_breaks_is_an_error_with_its_line_and_a_mend(mutation: manifests.Mutation) -> None:
    text = manifests.made(mutation)
    named = [e.finding for e in findings(text) if e.finding.rule == mutation.rule]
    assert ERROR in {each.severity for each in named}
    assert all(1 <= each.line <= len(text.splitlines()) and each.mend for each in named)


def test_precision_and_recall_over_manifests_made_by_mutation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each mutation alone, then pairs by chance, in which one change may hide another."""
    cases = [(each,) for each in (*manifests.HARMLESS, *manifests.BROKEN)]
    cases += manifests.pairs(seed=20, count=220)  # type: ignore[arg-type]
    right = false = missed = clean = 0
    wrong = []
    for mutations in cases:
        broken = {each.rule for each in mutations if each.rule}
        output = errors(manifests.made(*mutations))
        if broken:
            right, missed = right + bool(output & broken), missed + (not output & broken)
        else:
            clean, false = clean + (not output), false + bool(output)
        if not output & broken if broken else output:
            wrong.append(([each.name for each in mutations], output))
    precision, recall = right / (right + false), right / (right + missed)
    with capsys.disabled():
        print(
            f"\nlint: {len(cases)} manifests made by mutation, {right + missed} broken and "
            f"{clean + false} sound: precision {precision:.3f}, recall {recall:.3f}"
        )
    assert (false, missed) == (0, 0), wrong


def test_the_keys_of_serve_are_those_of_the_installed_ray() -> None:
    config = pytest.importorskip("ray.serve.config")
    schema = pytest.importorskip("ray.serve.schema")
    from kuberay.rules import fields

    for expected, model in (
        (fields.CONFIG, schema.ServeDeploySchema),
        (fields.HTTP, schema.HTTPOptionsSchema),
        (fields.GRPC, schema.gRPCOptionsSchema),
        (fields.LOGGING, schema.LoggingConfig),
        (fields.APPLICATION, schema.ServeApplicationSchema),
        (fields.DEPLOYMENT, schema.DeploymentSchema),
        (fields.ACTOR, schema.RayActorOptionsSchema),
        (fields.SCALING, config.AutoscalingConfig),
    ):
        assert set(expected) == set(model.model_fields), model.__name__
    assert schema.LoggingConfig.model_config["extra"] == "forbid"
    assert "extra" not in schema.DeploymentSchema.model_config


def test_values_are_refused_as_the_installed_ray_refuses_them() -> None:
    config = pytest.importorskip("ray.serve.config")
    schema = pytest.importorskip("ray.serve.schema")
    pydantic = pytest.importorskip("pydantic")
    from kuberay.rules import fields

    def refused(model: Any, key: str, value: Any) -> bool:
        try:
            model.model_validate({key: value})
        except pydantic.ValidationError as error:
            return any(key in each["loc"] for each in error.errors())
        return False

    for known, model in (
        (fields.HTTP, schema.HTTPOptionsSchema),
        (fields.GRPC, schema.gRPCOptionsSchema),
        (fields.APPLICATION, schema.ServeApplicationSchema),
        (fields.DEPLOYMENT, schema.DeploymentSchema),
        (fields.ACTOR, schema.RayActorOptionsSchema),
        (fields.SCALING, config.AutoscalingConfig),
    ):
        for key, field in known.items():
            # Ray checks it where it starts replicas, and not in the schema.
            if key == "max_replicas_per_node":
                continue
            for value in (-1, 0, 1, 1.5, 1000, "1", "text", [], {}):
                wanted = fields.wanted(field, value)
                assert refused(model, key, value) or not wanted, (key, value, wanted)
                if field.startswith(("number", "integer")) and value in (
                    -1,
                    0,
                    1000,
                    "text",
                    [],
                    {},
                ):
                    assert bool(wanted) == refused(model, key, value), (key, value, wanted)


@pytest.mark.parametrize("side", ["head", "worker"])
def test_a_variable_on_one_side_is_found(side: str) -> None:
    before, _, rest = SOUND.partition(PAIR)
    head, _, worker = rest.partition(PAIR)
    text = before + head + PAIR + worker if side == "head" else before + PAIR + head + worker
    named = [each.finding for each in findings(text)]
    assert [each.rule for each in named] == ["one-sided-variable"] * 2
    assert {each.severity for each in named} == {ERROR}
    missing = "head" if side == "head" else "small-group"
    assert all(f"not on {missing}" in each.found for each in named)
    assert named[0].line == line(text, "RAY_SERVE_ENABLE_HA_PROXY")


def test_variables_from_a_config_map_are_seen_and_those_from_elsewhere_are_not_missed() -> None:
    reference = "            envFrom:\n            - configMapRef: {name: ray}\n"
    before, _, rest = SOUND.partition(PAIR)
    text = before + reference + rest
    # The ConfigMap is not here: nothing can be said.
    assert findings(text) == []
    config_map = """\
        apiVersion: v1
        kind: ConfigMap
        metadata: {name: ray}
        data: {RAY_SERVE_ENABLE_HA_PROXY: "1"}
    """
    named = [each.finding for each in findings(text + document(config_map))]
    assert {each.rule for each in named} == {"one-sided-variable", "haproxy-alone"}
    assert any("RAY_SERVE_THROUGHPUT_OPTIMIZED" in each.found for each in named)


def test_haproxy_without_its_other_half_is_found() -> None:
    part = '            - name: RAY_SERVE_THROUGHPUT_OPTIMIZED\n              value: "1"\n'
    named = [each.finding for each in findings(planted(part, "", times=2))]
    assert [each.rule for each in named] == ["haproxy-alone"] * 2
    assert {each.severity for each in named} == {WARNING}


def test_edits_that_never_arrive_are_found() -> None:
    more = planted("      maxReplicas: 2\n", "      maxReplicas: 8\n")
    (only,) = findings(more, was=SOUND)
    assert only.finding.rule == "frozen-edit"
    assert only.finding.line == line(more, "maxReplicas: 8")
    assert "from 2 to 8" in only.finding.found
    assert "kubectl patch raycluster" in only.finding.mend
    # With another image there is a new cluster, which has the new bound.
    assert findings(more.replace("2.60.0", "2.60.1"), was=SOUND) == []
    # Nothing changed.
    assert findings(SOUND, was=SOUND) == []
    # Nothing arrives where the strategy is None.
    none = planted(TYPE, "    type: None\n").replace("2.60.0", "2.60.1")
    assert [each.finding.rule for each in findings(none, was=SOUND)] == ["frozen-edit"]


def test_a_live_object_says_what_its_cluster_does_not_know() -> None:
    status = "status:\n  activeServiceStatus:\n    rayClusterStatus:\n      maxWorkerReplicas: {}\n"
    assert findings(SOUND + status.format(2)) == []
    (only,) = findings(SOUND + status.format(1))
    assert only.finding.rule == "frozen-edit"
    assert "2 here and to 1 in the cluster" in only.finding.found


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (
            """\
            apiVersion: v1
            kind: Service
            metadata: {name: open}
            spec:
              type: LoadBalancer
              selector: {ray.io/node-type: head}
              ports: [{port: 80, targetPort: 8265}]
            """,
            "Service open",
        ),
        (
            """\
            apiVersion: networking.k8s.io/v1
            kind: Ingress
            metadata: {name: door}
            spec:
              defaultBackend:
                service: {name: rayservice-sample-head-svc, port: {number: 8265}}
            """,
            "Ingress door",
        ),
    ],
)
def test_doors_in_other_documents_are_found(other: str, name: str) -> None:
    text = SOUND + document(other)
    (only,) = findings(text)
    assert only.finding.rule == "dashboard-exposed"
    assert name in only.finding.found
    assert only.finding.line > line(text, "---")


def test_a_monitor_of_a_port_that_is_not_declared_is_found() -> None:
    monitor = """\
        apiVersion: monitoring.coreos.com/v1
        kind: PodMonitor
        metadata: {name: workers}
        spec:
          selector: {matchLabels: {ray.io/node-type: worker}}
          podMetricsEndpoints: [{port: metrics}, {port: vllm}]
    """
    (only,) = findings(SOUND + document(monitor))
    assert only.finding.rule == "metrics-port"
    assert "port vllm" in only.finding.found


def test_our_own_application_is_read_as_it_reads_itself() -> None:
    base = (ROOT / "kuberay" / "base" / "rayservice.yaml").read_text()
    assert findings(base) == []
    short = base.replace("terminationGracePeriodSeconds: 900", "terminationGracePeriodSeconds: 600")
    named = {each.finding.rule for each in findings(short)}
    assert named == {"drain-over-grace"}
    open_ = base.replace("file: /etc/qwen/keys", "file: null")
    (only,) = findings(open_)
    assert "no API keys" in only.finding.found
    assert only.finding.line == line(open_, "api_keys:")
    typo = base.replace("        drain_s: 60.0", "        drain: 60.0")
    (only,) = findings(typo)
    assert "drain_s" in only.finding.found
    assert only.finding.line == line(typo, "        drain: 60.0")


def test_lines_are_those_of_the_file_through_anchors_and_blocks() -> None:
    text = "a: &a\n  b: 1\nc:\n  <<: *a\n  d: [x,\n    y]\ne: |\n  f: 1\n  g: 2\n---\nh: 1\n"
    first, second = load_all(text)
    assert (first["c"]["b"], line_of(first, "c", "b")) == (1, 2)
    assert line_of(first, "c", "d", 1) == 6
    assert line_of(first, "c", "nothing") == 3
    assert first["e"].first == 8
    assert line_of(load_all(first["e"], first["e"].first - 1)[0], "g") == 9
    assert line_of(second, "h") == 11


# --- the command ----------------------------------------------------------------------------


def run(*argv: str, stdin: str = "") -> console.Done:
    return console.run("lint", *argv, stdin=stdin)


def test_the_command_ends_with_what_ci_needs(tmp_path: Path) -> None:
    sound, broken, risky = (tmp_path / f"{name}.yaml" for name in ("sound", "broken", "risky"))
    sound.write_text(SOUND)
    broken.write_text(planted("serviceType: ClusterIP", "serviceType: LoadBalancer"))
    risky.write_text(planted("        num-cpus: '0'\n", "        block: 'true'\n"))
    assert (run(str(sound)).returncode, run("-", stdin=SOUND).returncode) == (0, 0)
    done = run(str(broken))
    assert done.returncode == 1
    where = line(broken.read_text(), "LoadBalancer")
    assert f"{broken}:{where}: error:" in done.stdout
    assert "mend: ClusterIP" in done.stdout
    assert run(str(broken), "--ignore", "dashboard-exposed").returncode == 0
    assert run(str(risky)).returncode == 0
    assert run(str(risky), "--strict").returncode == 1
    shown = json.loads(run(str(broken), "--json").stdout)
    assert (shown["errors"], shown["findings"][0]["rule"]) == (1, "dashboard-exposed")


def test_what_cannot_be_read_is_a_mistake_and_not_a_clean_bill(tmp_path: Path) -> None:
    for text, output in (("a: [", "is not YAML"), ("kind: Pod\n", "no RayService"), ("", "no Ray")):
        done = run("-", stdin=text)
        assert (done.returncode, output in done.stderr) == (2, True), done.stderr
    assert run(str(tmp_path / "absent.yaml")).returncode == 2
    with pytest.raises(EksError, match="no RayService"):
        findings("kind: List\nitems: []\n")


@pytest.mark.parametrize(
    "text",
    [
        "kind: RayService\n",
        "kind: RayService\nspec: {rayClusterConfig: null}\n",
        "kind: RayService\nspec: []\n",
        SOUND.replace(
            "        num-cpus: '0'\n", "        num-cpus: [x]\n        metrics-export-port: y\n"
        ),
        SOUND.replace("          containers:\n", "          containers: [null]\n          was:\n"),
        SOUND.replace("            env:\n", "            env: [null, 3]\n            was:\n"),
    ],
)
def test_what_has_no_schemas_shape_is_an_error_and_no_crash(text: str) -> None:
    assert any(each.finding.severity == ERROR for each in findings(text))


def test_a_list_of_kubectl_is_read() -> None:
    listed = yaml.safe_dump({"kind": "List", "items": [yaml.safe_load(SOUND)]})
    assert findings(listed) == []
