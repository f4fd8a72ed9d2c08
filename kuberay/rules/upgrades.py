"""Fields that nobody reads, edits that never arrive, and upgrades that never end."""

from collections.abc import Iterator
from typing import Any

from kuberay.lines import at
from kuberay.rayservice import UNBOUNDED, Service
from kuberay.rules.finding import ERROR, WARNING, Finding, rule
from serve_app.errors import nearest


@rule("no-op-field")
def _no_op_fields(service: Service) -> Iterator[Finding]:
    for key in ("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"):
        if key in service.spec:
            yield Finding(
                "no-op-field", WARNING, service.line("spec", key),
                f"{key} is read by nobody: no cluster is replaced for being unhealthy so long",
                "remove it; a livenessProbe on the workers, health_check_timeout_s in "
                "serveConfigV2 and an alert on RayServiceReady do what it once did",
            )  # fmt: skip
    options = at(service.spec, "upgradeStrategy", "clusterUpgradeOptions")
    if options is not None and service.upgrade != "NewClusterWithIncrementalUpgrade":
        yield Finding(
            "no-op-field", WARNING,
            service.line("spec", "upgradeStrategy", "clusterUpgradeOptions"),
            f"clusterUpgradeOptions do nothing with the type {service.upgrade}",
            "set type: NewClusterWithIncrementalUpgrade, or remove them",
        )  # fmt: skip
    if service.cluster.get("autoscalerOptions") is not None and not service.autoscaling:
        yield Finding(
            "no-op-field", WARNING, service.line(*service.cluster_path, "autoscalerOptions"),
            "autoscalerOptions do nothing without enableInTreeAutoscaling: true",
            "set enableInTreeAutoscaling: true, or remove them",
        )  # fmt: skip


_STRATEGIES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")


@rule("upgrade-type")
def _upgrade_type(service: Service) -> Iterator[Finding]:
    given = at(service.spec, "upgradeStrategy", "type")
    if given is None or given in _STRATEGIES:
        return
    near = nearest(str(given), list(_STRATEGIES)) or "NewCluster"
    yield Finding(
        "upgrade-type", ERROR, service.line("spec", "upgradeStrategy", "type"),
        f"upgradeStrategy.type {given!r} passes the schema, and the operator then refuses the "
        "whole RayService: nothing in it is reconciled any more",
        f"type: {near}",
    )  # fmt: skip


@rule("upgrade-options")
def _upgrade_options(service: Service) -> Iterator[Finding]:
    if service.upgrade != "NewClusterWithIncrementalUpgrade":
        return
    line = service.line("spec", "upgradeStrategy", "type")
    options = at(service.spec, "upgradeStrategy", "clusterUpgradeOptions") or {}
    if not service.autoscaling:
        yield Finding(
            "upgrade-options", ERROR, line,
            "the operator refuses an incremental upgrade without Ray's autoscaler",
            "enableInTreeAutoscaling: true",
        )  # fmt: skip
    yield from _upgrade_bounds(service, options, line)
    if "serveService" in service.spec:
        yield Finding(
            "upgrade-options", WARNING, service.line("spec", "serveService"),
            "clients of serveService bypass the Gateway that an incremental upgrade shifts traffic "
            "with, and its type and annotations are not used",
            "let clients reach the Gateway, and annotate that",
        )  # fmt: skip


def _upgrade_bounds(service: Service, options: Any, line: int) -> Iterator[Finding]:
    """ValidateClusterUpgradeOptions."""
    missing = [
        key
        for key in ("gatewayClassName", "intervalSeconds", "stepSizePercent")
        if options.get(key) in (None, "")
    ]
    if missing:
        yield Finding(
            "upgrade-options", ERROR, line,
            f"clusterUpgradeOptions lack {', '.join(missing)}",
            "name a GatewayClass of the cluster, a step and an interval",
        )  # fmt: skip
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
    interval_s = options.get("intervalSeconds")
    wrong = []
    if not 0 <= surge <= 100:
        wrong.append(("maxSurgePercent", f"maxSurgePercent {surge}", "0 to 100"))
    if step is not None and not 0 <= step <= 100:
        wrong.append(("stepSizePercent", f"stepSizePercent {step}", "0 to 100"))
    elif step is not None and step > surge:
        problem = f"stepSizePercent {step} above maxSurgePercent {surge}"
        wrong.append(("stepSizePercent", problem, "a step of at most the surge"))
    if interval_s is not None and interval_s <= 0:
        wrong.append(("intervalSeconds", f"intervalSeconds {interval_s}", "1 or more"))
    path = ("spec", "upgradeStrategy", "clusterUpgradeOptions")
    for key, problem, mend in wrong:
        yield Finding(
            "upgrade-options", ERROR, service.line(*path, key),
            f"the operator refuses {problem}", mend,
        )  # fmt: skip
    if step == 0:
        yield Finding(
            "upgrade-options", WARNING, service.line(*path, "stepSizePercent"),
            "a step of 0 % moves no request to the new cluster: the upgrade never ends",
            "1 or more",
        )  # fmt: skip


@rule("frozen-edit")
def _frozen(service: Service) -> Iterator[Finding]:
    """Of a live object: bounds that its running cluster has never heard of."""
    state = at(service.document, "status", "activeServiceStatus", "rayClusterStatus") or {}
    running = state.get("maxWorkerReplicas")
    if running is None or not service.workers:
        return
    written = min(UNBOUNDED, sum(group.maximum * group.hosts for group in service.workers))
    if int(running) != written:
        group = service.workers[0]
        yield Finding(
            "frozen-edit", ERROR, service.line(*group.path, "maxReplicas"),
            f"maxReplicas come to {written} here and to {running} in the cluster that runs: an "
            "edit of them never reaches it",
            _PATCH,
        )  # fmt: skip


_PATCH = (
    "patch the RayCluster too: kubectl patch raycluster NAME --type json --patch "
    '\'[{"op":"replace","path":"/spec/workerGroupSpecs/0/maxReplicas","value":N}]\''
)
# What the operator leaves out when it compares, and so does not act on.
_LEFT_OUT = ("replicas", "minReplicas", "maxReplicas")


def edits(before: Service, after: Service) -> list[Finding]:
    """What of an edit would never arrive at the cluster that runs."""
    changed = []
    earlier = {group.name: group for group in before.workers}
    for group in after.workers:
        for key in _LEFT_OUT:
            old = earlier.get(group.name)
            if old is None or old.spec.get(key) == group.spec.get(key):
                continue
            if _without_bounds(before) != _without_bounds(after) and after.upgrade != "None":
                continue  # Something else changes too: a new cluster, which has all of it.
            changed.append(Finding(
                "frozen-edit", ERROR, after.line(*group.path, key),
                f"{key} of {group.name} goes from {old.spec.get(key)} to {group.spec.get(key)}, "
                "and the operator compares without it: the cluster that runs keeps the old one",
                _PATCH.replace("maxReplicas", key),
            ))  # fmt: skip
    if after.upgrade == "None" and _without_bounds(before) != _without_bounds(after):
        changed.append(Finding(
            "frozen-edit", ERROR, after.line(*after.cluster_path),
            "rayClusterConfig changes, and upgradeStrategy.type is None: the cluster that runs "
            "stays as it is",
            "type: NewCluster for this change, or delete the RayCluster in a quiet hour",
        ))  # fmt: skip
    return changed


def _without_bounds(service: Service) -> dict[str, Any]:
    rest = dict(service.cluster)
    rest.pop("upgradeStrategy", None)
    rest["workerGroupSpecs"] = [
        {key: value for key, value in group.spec.items() if key not in _LEFT_OUT}
        for group in service.workers
    ]
    return rest


@rule("no-maximum")
def _no_maximum(service: Service) -> Iterator[Finding]:
    for group in service.workers:
        if group.maximum >= UNBOUNDED:
            yield Finding(
                "no-maximum", WARNING, service.line(*group.path),
                f"worker group {group.name} has no maxReplicas: the default is {UNBOUNDED}, and a "
                "lower one set later does not reach a cluster that runs",
                "maxReplicas: what your node group and your quota hold",
            )  # fmt: skip
