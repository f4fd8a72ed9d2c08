"""What the operator (KubeRay 1.7) refuses, rule by rule of its own validation.

The API server accepts all of it: the operator says it in an event and a condition only, and does
nothing for the whole RayService. Read from ray-operator/controllers/ray/utils/validation.go at
v1.7.0; where a function below follows one of it, it has its name. `minReplicas` and `maxReplicas`
are not required here, because the CRD gives both a default.
"""

import re
from collections.abc import Iterator
from typing import Any

from kuberay.lines import at
from kuberay.rayservice import Group, Service
from kuberay.rules.finding import ERROR, Finding, rule

# Fields behind an alpha feature gate: refused by an operator that was not told otherwise.
_GATED = {
    "historyServerOptions": "RayClusterHistoryServer",
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
}
_V2 = "RAY_enable_autoscaler_v2"
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_DURATION = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")


@rule("refused")
def _refused(service: Service) -> Iterator[Finding]:
    yield from _metadata(service)
    yield from _groups(service)
    yield from _fault_tolerance(service)
    yield from _autoscaler(service)
    yield from _authentication(service)
    yield from _service_spec(service)


def _no(line: int, what: str, mend: str) -> Finding:
    return Finding("refused", ERROR, line, f"the operator refuses {what}", mend)


# --- metadata ------------------------------------------------------------------------------------


def _metadata(service: Service) -> Iterator[Finding]:
    """ValidateRayServiceMetadata."""
    if len(service.name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", service.name):
        yield _no(
            service.line("metadata", "name"), f"the name {service.name!r}",
            "at most 47 of a-z, 0-9 and -, a letter first and no - last",
        )  # fmt: skip
    key = "ray.io/initializing-timeout"
    given = service.annotations.get(key)
    if given and not _positive_duration(str(given)):
        yield _no(
            service.line("metadata", "annotations", key), f"{key}: {given}",
            "a positive number of seconds, or a duration as 5m or 1h",
        )  # fmt: skip


def _positive_duration(text: str) -> bool:
    """Whether Go's time.ParseDuration or strconv.Atoi makes something positive of it."""
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text) > 0
    sign = text.startswith("-")
    parts = list(_DURATION.finditer(text.lstrip("+-")))
    whole = "".join(part[0] for part in parts) == text.lstrip("+-")
    return bool(parts) and whole and not sign and any(float(part[1]) > 0 for part in parts)


# --- groups --------------------------------------------------------------------------------------


def _groups(service: Service) -> Iterator[Finding]:
    for group in service.groups:
        if not at(group.pod, "containers"):
            yield _no(service.line(*group.path), f"{group.name} without a container", "add Ray's")
        yield from _group_resources(service, group)
        yield from _group_labels(service, group)
    for group in service.workers:
        yield from _bounds(service, group)
        yield from _needs_autoscaler_v2(service, group)
        if service.autoscaling and group.spec.get("suspend") is True:
            yield _no(
                service.line(*group.path, "suspend"),
                "a suspended group with the autoscaler", "minReplicas and maxReplicas 0",
            )  # fmt: skip


def _group_resources(service: Service, group: Group) -> Iterator[Finding]:
    """validateRayGroupResources."""
    both = [k for k in ("num-cpus", "num-gpus", "memory", "resources") if group.start.get(k)]
    if both and group.spec.get("resources"):
        yield _no(
            service.line(*group.path, "resources"),
            f"resources of {group.name} beside rayStartParams {', '.join(both)}", "use one",
        )  # fmt: skip


def _group_labels(service: Service, group: Group) -> Iterator[Finding]:
    """validateRayGroupLabels."""
    if "labels" in group.start:
        yield _no(
            service.line(*group.path, "rayStartParams", "labels"),
            "rayStartParams.labels", "use the group's own labels",
        )  # fmt: skip
    for key, value in (group.spec.get("labels") or {}).items():
        prefix, slash, name = str(key).rpartition("/")
        good = _LABEL.fullmatch(name) and (not slash or _PREFIX.fullmatch(prefix))
        if not good or (str(value) and not _LABEL.fullmatch(str(value))):
            yield _no(
                service.line(*group.path, "labels", str(key)),
                f"the label {key}: {value} of {group.name}", "as Kubernetes writes its labels",
            )  # fmt: skip


def _bounds(service: Service, group: Group) -> Iterator[Finding]:
    minimum, maximum = group.spec.get("minReplicas"), group.spec.get("maxReplicas")
    for key, given in (("minReplicas", minimum), ("maxReplicas", maximum)):
        if isinstance(given, int) and given < 0:
            yield _no(service.line(*group.path, key), f"{key} {given} of {group.name}", "0 or more")
    if group.minimum > group.maximum >= 0:
        yield _no(
            service.line(*group.path, "minReplicas"),
            f"minReplicas {group.minimum} above maxReplicas {group.maximum} of {group.name}",
            "the one at most as large as the other",
        )  # fmt: skip


def _needs_autoscaler_v2(service: Service, group: Group) -> Iterator[Finding]:
    """validateWorkerGroupIdleTimeout, validateWorkerGroupPriority."""
    idle_s, priority = group.spec.get("idleTimeoutSeconds"), group.spec.get("priority")
    variable, _ = service.environment(service.head)
    version_2 = service.asks_for_v2 or variable.get(_V2) in ("1", "true")
    instead = "autoscalerOptions: {version: v2}"
    if idle_s is not None:
        line = service.line(*group.path, "idleTimeoutSeconds")
        if int(idle_s) < 0:
            yield _no(line, f"idleTimeoutSeconds {idle_s} of {group.name}", "0 or more")
        elif not version_2:
            yield _no(line, f"idleTimeoutSeconds of {group.name} without autoscaler v2", instead)
    if priority:
        line = service.line(*group.path, "priority")
        if not service.ray_at_least(2, 56):
            yield _no(line, f"priority of {group.name} before Ray 2.56", 'rayVersion: "2.56.0"')
        elif not version_2:
            yield _no(line, f"priority of {group.name} without autoscaler v2", instead)


# --- fault tolerance of the GCS ------------------------------------------------------------------


def _fault_tolerance(service: Service) -> Iterator[Finding]:
    head, options = service.head, service.cluster.get("gcsFaultToleranceOptions")
    variables, _ = service.environment(head)
    annotated, external = "ray.io/ft-enabled", "ray.io/external-storage-namespace"
    start, instead = (*head.path, "rayStartParams"), "use gcsFaultToleranceOptions"
    if options is None:
        tolerant = str(service.annotations.get(annotated, "")).lower() == "true"
        if "RAY_REDIS_ADDRESS" in variables and not tolerant:
            line = service.environment_line(head, "RAY_REDIS_ADDRESS")
            yield _no(line, "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions", instead)
    else:
        for key in (annotated, external):
            if service.annotations.get(key):
                line = service.line("metadata", "annotations", key)
                yield _no(line, f"{key} beside gcsFaultToleranceOptions", "remove the annotation")
        for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD"):
            if name in variables:
                line = service.environment_line(head, name)
                yield _no(line, f"{name} beside gcsFaultToleranceOptions", instead)
        if head.start.get("redis-password"):
            line = service.line(*start, "redis-password")
            yield _no(line, "redis-password beside gcsFaultToleranceOptions", instead)
        yield from _backend(service, options)
    if "REDIS_USERNAME" in variables:
        yield _no(service.environment_line(head, "REDIS_USERNAME"), "REDIS_USERNAME", instead)
    if head.start.get("redis-username"):
        yield _no(service.line(*start, "redis-username"), "redis-username", instead)


def _backend(service: Service, options: Any) -> Iterator[Finding]:
    """validateGcsFaultToleranceBackend."""
    path = (*service.cluster_path, "gcsFaultToleranceOptions")
    if at(options, "backend") == "rocksdb":
        yield _gate(service.line(*path, "backend"), "backend: rocksdb",
                    "GCSFaultToleranceEmbeddedStorage")  # fmt: skip
        for key in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
            if at(options, key):
                line = service.line(*path, key)
                yield _no(line, f"{key} with the backend rocksdb", "remove it")
    elif at(options, "storage") is not None:
        line = service.line(*path, "storage")
        yield _no(line, "storage with the backend redis", "remove it, or backend: rocksdb")


# --- autoscaler ----------------------------------------------------------------------------------


def _autoscaler(service: Service) -> Iterator[Finding]:
    head, options = service.head, (*service.cluster_path, "autoscalerOptions")
    variables, _ = service.environment(head)
    if _V2 in variables:
        line = service.environment_line(head, _V2)
        if not service.autoscaling and variables[_V2] in ("1", "true"):
            yield _no(line, f"{_V2} without the autoscaler", "enableInTreeAutoscaling: true")
        if service.autoscaling and at(service.cluster, "autoscalerOptions", "version"):
            yield _no(line, f"{_V2} beside autoscalerOptions.version", "keep the latter")
    if service.autoscaler_v2:
        for group in service.groups:
            policy = group.pod.get("restartPolicy")
            if policy not in (None, "", "Never"):
                yield _no(
                    service.line(*group.pod_path, "restartPolicy"),
                    f"restartPolicy {policy} with autoscaler v2", "restartPolicy: Never, or none",
                )  # fmt: skip
    idle_s = at(service.cluster, "autoscalerOptions", "idleTimeoutSeconds")
    if isinstance(idle_s, int) and idle_s < 0:
        line = service.line(*options, "idleTimeoutSeconds")
        yield _no(line, f"autoscalerOptions.idleTimeoutSeconds {idle_s}", "0 or more")
    own = "KUBERAY_GEN_AUTOSCALER_START_CMD"
    for index, entry in enumerate(at(service.cluster, "autoscalerOptions", "env") or []):
        if at(entry, "name") == own:
            yield _no(service.line(*options, "env", index), own, "remove it: the operator sets it")


# --- authentication, upgrades, gates -------------------------------------------------------------


def _authentication(service: Service) -> Iterator[Finding]:
    auth, path = service.cluster.get("authOptions"), (*service.cluster_path, "authOptions")
    if at(auth, "enableK8sTokenAuth") is True:
        line = service.line(*path, "enableK8sTokenAuth")
        yield _no(line, "Kubernetes' tokens for a RayService", "mode: token alone")
    if at(auth, "mode") == "token" and not service.ray_at_least(2, 52):
        version = service.cluster.get("rayVersion") or "(none)"
        line = service.line(*service.cluster_path, "rayVersion")
        yield _no(line, f"token authentication with rayVersion {version}", "2.52.0 or later")


def _service_spec(service: Service) -> Iterator[Finding]:
    """ValidateRayServiceSpec, and what the RayCluster that comes of it is refused for."""
    head = service.head
    if at(head.spec, "headService", "metadata", "name"):
        line = service.line(*head.path, "headService", "metadata", "name")
        yield _no(line, "a name of headService", "leave it to the operator")
    delay_s = service.spec.get("rayClusterDeletionDelaySeconds")
    if isinstance(delay_s, int) and delay_s < 0:
        line = service.line("spec", "rayClusterDeletionDelaySeconds")
        yield _no(line, f"rayClusterDeletionDelaySeconds {delay_s}", "0 or more")
    if at(service.cluster, "upgradeStrategy", "type") is not None:
        line = service.line(*service.cluster_path, "upgradeStrategy")
        yield _no(line, "upgradeStrategy in rayClusterConfig", "spec.upgradeStrategy")


@rule("feature-gate")
def _gated(service: Service) -> Iterator[Finding]:
    for field, gate in _GATED.items():
        if service.cluster.get(field) is not None:
            yield _gate(service.line(*service.cluster_path, field), field, gate)
    if service.cluster.get("networkPolicy") is not None:
        yield from _network_policy(service)


def _gate(line: int, what: str, gate: str) -> Finding:
    return Finding(
        "feature-gate", ERROR, line,
        f"the operator refuses {what} unless its feature gate {gate} is on: it is off by default",
        f"featureGates: [{{name: {gate}, enabled: true}}] in the operator's values, or remove it",
    )  # fmt: skip


def _network_policy(service: Service) -> Iterator[Finding]:
    """validateNetworkPolicy: rules of a direction that nothing denies."""
    policy, path = service.cluster["networkPolicy"], (*service.cluster_path, "networkPolicy")
    unread = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}.get(
        str(at(policy, "mode"))
    )
    places: list[tuple[str | int, ...]] = [("head",), ("worker",)]
    named = at(policy, "workerGroups") or []
    places += [("workerGroups", index) for index in range(len(named))]
    for place in places:
        if unread and at(policy, *place, unread):
            line = service.line(*path, *place, unread)
            yield _no(line, f"{unread} with mode {at(policy, 'mode')}", "DenyAll, or remove them")
    names = {group.name for group in service.workers}
    for index, each in enumerate(named):
        if at(each, "groupName") not in names:
            line = service.line(*path, "workerGroups", index)
            yield _no(line, f"a policy of {at(each, 'groupName')}, which is no group", "its name")
