"""The restricted profile of the Pod Security Standards, and what scanners of manifests add to it.

`restricted` is what the namespace enforces, so anything it finds is a pod that never starts.
`hardening` is advice, and what we do not take is in ACCEPTED with its reason.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip

# Advice that is not taken, by check and container: why.
ACCEPTED: Mapping[tuple[str, str], str] = {
    ("digest", "*"): "tags of fixed versions: a digest is one for each registry that an image is "
    "copied to, and the copy is the user's",
    ("high-uid", "redis"): "999 is the user that owns redis in its image",
    ("high-uid", "ray-head"): "1001 is the user of the image",
    ("high-uid", "ray-worker"): "1001 is the user of the image",
    ("high-uid", "logs"): "shares the user of the logs that it reads",
    ("probes", "ray-head"): "the operator adds them, of Ray's processes",
    ("probes", "logs"): "logs that are late are no reason to end a pod that serves",
    ("probes", "cluster-autoscaler"): "nobody sends it requests: alive is all there is to know",
    ("account-token", "ray-head"): "Ray's autoscaler asks the API server for pods",
    ("account-token", "cluster-autoscaler"): "it asks the API server for nodes",
    ("cpu-limit", "cluster-autoscaler"): "throttled it scales late; it may use an idle node's CPU",
    ("env-secret", "ray-head"): "HAProxy's Lua, once it has started, can read no file",
    ("env-secret", "ray-worker"): "HAProxy's Lua, once it has started, can read no file",
    ("env-secret", "redis"): "redis reads a password from its configuration only",
}


def restricted(pod: Mapping[str, Any]) -> Iterator[str]:
    """Everything that the profile forbids."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield f"{key} is set"
    for volume in pod.get("volumes") or []:
        for kind in set(volume) - {"name"} - _VOLUMES:
            yield f"volume {volume['name']} is a {kind}"
    whole = pod.get("securityContext") or {}
    for container in containers(pod):
        name, own = container["name"], container.get("securityContext") or {}
        if own.get("privileged"):
            yield f"{name} is privileged"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may escalate"
        capabilities = own.get("capabilities") or {}
        if "ALL" not in (capabilities.get("drop") or []):
            yield f"{name} keeps capabilities"
        if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
            yield f"{name} adds capabilities"
        if not own.get("runAsNonRoot", whole.get("runAsNonRoot")):
            yield f"{name} may run as root"
        if own.get("runAsUser", whole.get("runAsUser")) == 0:
            yield f"{name} runs as root"
        profile = (own.get("seccompProfile") or whole.get("seccompProfile") or {}).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            yield f"{name} has no seccomp profile"
        for port in container.get("ports") or []:
            if port.get("hostPort"):
                yield f"{name} takes a port of the host"


def hardening(pod: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Check and container of everything that a scanner would advise otherwise."""
    whole = pod.get("securityContext") or {}
    sidecars = {each["name"] for each in pod.get("initContainers") or []}
    for container in containers(pod):
        name, own = container["name"], container.get("securityContext") or {}
        limits = (container.get("resources") or {}).get("limits") or {}
        requests = (container.get("resources") or {}).get("requests") or {}
        image = container.get("image", "")
        if "@sha256:" not in image:
            yield "digest", name
        if ":" not in image.rpartition("/")[2] or image.endswith(":latest"):
            yield "moving-tag", name
        if own.get("readOnlyRootFilesystem") is not True:
            yield "writable-root", name
        if "memory" not in limits or "memory" not in requests or "cpu" not in requests:
            yield "resources", name
        if "cpu" not in limits:
            yield "cpu-limit", name
        if own.get("runAsUser", whole.get("runAsUser", 0)) < 10000:
            yield "high-uid", name
        if "livenessProbe" not in container or "readinessProbe" not in container:
            yield "probes", name
        if pod.get("automountServiceAccountToken") is not False and name not in sidecars:
            yield "account-token", name
        for entry in container.get("env") or []:
            if "secretKeyRef" in (entry.get("valueFrom") or {}):
                yield "env-secret", name


def containers(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*(pod.get("initContainers") or []), *(pod.get("containers") or [])]


def pods(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pod templates of a manifest, by name."""
    spec = document.get("spec") or {}
    if document["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        yield "head", cluster["headGroupSpec"]["template"]["spec"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]["spec"]
        # The operator adds this container to the head.
        options = cluster.get("autoscalerOptions") or {}
        yield (
            "autoscaler",
            {
                **cluster["headGroupSpec"]["template"]["spec"],
                "initContainers": [],
                "containers": [{"name": "autoscaler", **options}],
            },
        )
    elif "template" in spec:
        yield document["metadata"]["name"], spec["template"]["spec"]
