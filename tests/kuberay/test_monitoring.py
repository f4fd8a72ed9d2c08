"""What Prometheus is told to scrape is there under that name, and its rules are rules."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kuberay import render
from kuberay.errors import EksError
from kuberay.lint import lint

HERE = Path(render.__file__).parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rules and a dashboard as the local ones are written."""
    rule = {"alert": "Slow", "expr": 'x{a="b"} > 1', "annotations": {"summary": "{{ $value }}"}}
    groups = {"groups": [{"name": "llm", "rules": [rule]}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(groups))
    (tmp_path / "dashboards").mkdir()
    (tmp_path / "dashboards" / "Serving_1.json").write_text(
        '{"title": "Serving",\n "panels": []}\n'
    )
    return tmp_path


def monitors() -> list[dict[str, Any]]:
    text = (HERE / "monitoring" / "monitors.yaml").read_text()
    return [document for document in yaml.safe_load_all(text) if document["kind"] == "PodMonitor"]


def base(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((HERE / "base" / name).read_text()))


def labels_and_ports() -> list[tuple[dict[str, str], str, set[str]]]:
    """Labels, namespace and port names of the pods that there are, as their makers label them."""
    (service,) = base("rayservice.yaml")
    cluster = service["spec"]["rayClusterConfig"]
    groups = [("head", cluster["headGroupSpec"]), ("worker", cluster["workerGroupSpecs"][0])]
    collected = []
    for kind, group in groups:
        template = group["template"]
        labels = {**template["metadata"]["labels"], "ray.io/node-type": kind}
        ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        collected.append((labels, "qwen", ports))
    (scaler,) = [d for d in base("cluster-autoscaler.yaml") if d["kind"] == "Deployment"]
    template = scaler["spec"]["template"]
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    collected.append((template["metadata"]["labels"], "kube-system", ports))
    # The chart's: KubeRay 1.7.0, deployment.yaml.
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    return [*collected, (operator, "kuberay-operator", {"http"})]


def test_each_monitor_meets_a_pod_that_declares_its_ports() -> None:
    assert len(monitors()) == 4
    for monitor in monitors():
        spec = monitor["spec"]
        wanted = spec["selector"]["matchLabels"]
        met = [
            ports
            for labels, namespace, ports in labels_and_ports()
            if wanted.items() <= labels.items()
            and spec["namespaceSelector"]["matchNames"] == [namespace]
        ]
        assert len(met) == 1, monitor["metadata"]["name"]
        assert {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]} <= met[0]


def test_the_lint_reads_monitor_and_service_together() -> None:
    text = (HERE / "base" / "rayservice.yaml").read_text()
    shown = (HERE / "monitoring" / "monitors.yaml").read_text()
    assert lint([("service", text), ("monitors", shown)]) == []
    undeclared = text.replace("- { name: as-metrics, containerPort: 44217 } # Of", "# Of")
    assert undeclared != text
    rules = {each.finding.rule for each in lint([("service", undeclared), ("monitors", shown)])}
    assert rules == {"metrics-port"}


def test_local_rules_and_dashboards_become_objects(source: Path) -> None:
    result = list(render.monitoring(source))
    rules = {d["metadata"]["name"]: d for d in result if d["kind"] == "PrometheusRule"}
    assert set(rules) == {"qwen-kuberay", "qwen-rules"}
    # A rule's own braces are Prometheus', and stay as they are.
    (rule,) = rules["qwen-rules"]["spec"]["groups"][0]["rules"]
    assert rule["annotations"]["summary"] == "{{ $value }}"
    (dashboard,) = [d for d in result if d["kind"] == "ConfigMap"]
    assert dashboard["metadata"]["name"] == "qwen-serving-1"
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["Serving_1.json"])["title"] == "Serving"
    assert {d["metadata"]["namespace"] for d in result} == {"monitoring"}


def test_a_dashboard_or_a_rule_that_is_none_is_refused(source: Path) -> None:
    (source / "broken.json").write_text("{")
    with pytest.raises(EksError, match=r"broken\.json: is not JSON"):
        list(render.monitoring(source))
    (source / "broken.json").unlink()
    (source / "other-rules.yml").write_text("rules: []\n")
    with pytest.raises(EksError, match="no groups"):
        list(render.monitoring(source))


def test_the_dashboards_of_the_application_are_wired_in() -> None:
    result = list(render.monitoring())
    boards = list(render.MONITORING.rglob("*.json"))
    assert len([d for d in result if d["kind"] == "ConfigMap"]) == len(boards) > 0
    names = [(d["kind"], d["metadata"]["name"]) for d in result]
    assert len(set(names)) == len(names)
    rules = yaml.safe_load((render.MONITORING / "rules.yaml").read_text())
    made = {d["metadata"]["name"]: d for d in result if d["kind"] == "PrometheusRule"}
    assert made["qwen-rules"]["spec"]["groups"] == rules["groups"]
    # A ConfigMap holds a mebibyte.
    assert all(path.stat().st_size < 2**20 for path in boards)


def test_an_alert_knows_the_jobs_by_the_monitors_names() -> None:
    """The operator of Prometheus calls a PodMonitor's job NAMESPACE/NAME."""
    rules = (render.MONITORING / "rules.yaml").read_text()
    jobs = {f"{m['metadata']['namespace']}/{m['metadata']['name']}" for m in monitors()}
    (pattern,) = set(re.findall(r'job=~"([^"]+)"', rules))
    met = {job for job in jobs if re.fullmatch(pattern, job)}
    assert met == {"monitoring/qwen-head", "monitoring/qwen-worker"}


def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool comes with Debian's prometheus")
    for document in render.monitoring():
        if document["kind"] == "PrometheusRule":
            path = tmp_path / f"{document['metadata']['name']}.yaml"
            path.write_text(yaml.safe_dump({"groups": document["spec"]["groups"]}))
            done = subprocess.run(
                [promtool, "check", "rules", str(path)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr


# Each of our own alerts: series that are to raise it, when, and series that are not.
_READY = 'kuberay_service_condition_ready{condition="false", name="qwen", namespace="qwen"}'
_UPGRADE = (
    'kuberay_service_condition_upgrade_in_progress{condition="true", name="qwen", namespace="qwen"}'
)
_FAILED = 'kube_pod_status_phase{namespace="qwen", phase="Failed", pod="w"}'
_PENDING = 'kube_pod_status_phase{namespace="qwen", phase="Pending", pod="w"}'
_WAITING = "cluster_autoscaler_unschedulable_pods_count"
_REFUSED = 'cluster_autoscaler_failed_scale_ups_total{reason="outOfResource"}'


@pytest.mark.parametrize(
    ("alert", "raised", "quiet", "after"),
    [
        ("RayServiceNotReady", {_READY: "1x99"}, {_READY: "0x99"}, "6m"),
        ("RayServiceUpgradeStuck", {_UPGRADE: "1x99"}, {_UPGRADE: "0x99"}, "46m"),
        ("WorkerPodPending", {_PENDING: "1x99"}, {_PENDING: "0x99"}, "21m"),
        ("RayPodFailed", {_FAILED: "1x99"}, {_FAILED: "0x99"}, "1m"),
        (
            "GpuNodesAtMaximum",
            {_WAITING: "2x99", _REFUSED: "0+1x99"},
            {_WAITING: "2x99", _REFUSED: "3x99"},
            "15m",
        ),
    ],
)
def test_each_of_our_alerts_is_raised_and_only_then(
    tmp_path: Path, alert: str, raised: dict[str, str], quiet: dict[str, str], after: str
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool comes with Debian's prometheus")
    (ours,) = [d for d in render.monitoring() if d["metadata"]["name"] == "qwen-kuberay"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": ours["spec"]["groups"]}))
    for series, seen in ((raised, 1), (quiet, 0)):
        request = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)'
        tests = {
            "rule_files": ["rules.yaml"],
            "tests": [{
                "interval": "1m",
                "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "promql_expr_test": [
                    {"expr": request, "eval_time": after,
                     "exp_samples": [{"labels": "{}", "value": seen}]}
                ],
            }],
        }  # fmt: skip
        (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
        words = [promtool, "test", "rules", "tests.yaml"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_logs_go_to_a_group_that_teardown_finds() -> None:
    conf = (HERE / "base" / "pod" / "fluent-bit.conf").read_text()
    assert "log_group_name      /aws/eks/${CLUSTER_NAME}/ray" in conf
    assert "log_retention_days  14" in conf
    assert "/tmp/ray/session_latest/logs/serve/*.log" in conf
    # The role may write there, and nowhere else.
    cluster = yaml.safe_load((HERE / "cluster.yaml").read_text())
    for account in ("qwen-head", "qwen-worker"):
        (bound,) = [
            each
            for each in cluster["iam"]["podIdentityAssociations"]
            if each["serviceAccountName"] == account
        ]
        statements = bound["permissionPolicy"]["Statement"]
        (logs,) = [each for each in statements if "logs:PutLogEvents" in each["Action"]]
        assert logs["Resource"] == "arn:aws:logs:*:*:log-group:/aws/eks/*"
