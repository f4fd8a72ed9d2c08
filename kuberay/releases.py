"""What helm installs, each at the one version that this was made for."""

import json
from pathlib import Path
from typing import Any

import yaml

from kuberay.errors import EksError
from kuberay.tools import Tools

KUBERAY = "1.7.0"
VALUES = Path(__file__).parent / "operator-values.yaml"
_OPERATOR = ("kuberay-operator", "--repo", "https://ray-project.github.io/kuberay-helm/")
_PLUGIN = ("nvidia-device-plugin", "--repo", "https://nvidia.github.io/k8s-device-plugin")
_PLUGIN_VERSION = "0.17.1"
MONITORING_VALUES = Path(__file__).parent / "monitoring" / "values.yaml"
_MONITORING = (
    "kube-prometheus-stack",
    "--repo",
    "https://prometheus-community.github.io/helm-charts",
)
_MONITORING_VERSION = "89.2.2"


def operator_version(values: Path = VALUES) -> str:
    """The operator that the values name."""
    try:
        chart: dict[str, Any] = yaml.safe_load(values.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise EksError(f"{values}: {error}") from error
    return str((chart.get("image") or {}).get("tag", KUBERAY)).removeprefix("v")


def install_operator(run: Tools) -> None:
    """KubeRay. helm installs a chart's CRDs once and never upgrades them, so they come first."""
    chart, *source = _OPERATOR
    at = (*source, "--version", KUBERAY)
    crds = run.ask("helm", "show", "crds", chart, *at, timeout_s=120)
    # Server-side: the CRDs are larger than the annotation in which a plain apply keeps them.
    run.kubectl("apply", "--server-side", "--force-conflicts", "--filename", "-", stdin=crds)
    run.helm(
        "upgrade", "--install", chart, chart, *at, "--namespace", "kuberay-operator",
        "--create-namespace", "--values", str(VALUES), "--skip-crds", "--wait", "--timeout", "10m",
    )  # fmt: skip


def install_plugin(run: Tools) -> None:
    """NVIDIA's device plugin, without which a GPU node has no GPUs.

    eksctl installs it with a cluster that has GPU groups; a cluster that came otherwise lacks it.
    """
    if any("nvidia-device-plugin" in item["metadata"]["name"] for item in run.items("daemonsets")):
        return
    chart, *source = _PLUGIN
    run.helm(
        "upgrade", "--install", chart, chart, *source, "--version", _PLUGIN_VERSION,
        "--namespace", "kube-system",
        # Its affinity asks for labels that node feature discovery would put on.
        "--set", "affinity=null", "--set", "failOnInitError=false",
    )  # fmt: skip


def install_monitoring(run: Tools) -> None:
    """Prometheus' operator, Prometheus, Alertmanager and Grafana."""
    chart, *source = _MONITORING
    run.helm(
        "upgrade", "--install", "monitoring", chart, *source, "--version", _MONITORING_VERSION,
        "--namespace", "monitoring", "--create-namespace", "--values", str(MONITORING_VALUES),
        "--wait", "--timeout", "15m",
    )  # fmt: skip


def installed(run: Tools) -> list[tuple[str, str]]:
    """Name and namespace of each release."""
    listed = json.loads(run.ask("helm", "list", "--all-namespaces", "--output", "json") or "[]")
    return [(entry["name"], entry["namespace"]) for entry in listed]
