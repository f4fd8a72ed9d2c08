"""A RayService as its controller reads it: defaults filled in, Ray's container first, the serve
configuration parsed. Every part keeps the path at which it is written, for the line of a finding.

What a manifest leaves to a ConfigMap or a Secret is followed where that is in the same files, and
unknown otherwise: a rule says nothing about what it cannot see.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kuberay.lines import Text, at, line_of, load_all

Path = tuple[str | int, ...]
# What the CRD and the operator fill in.
DEFAULT_GRACE_S = 30
UNBOUNDED = 2**31 - 1
SERVE_PORT, METRICS_PORT = 8000, 8080
# Where builders of ray.serve.llm take one model; build_openai_app takes a list, llm_configs.
_LLM_CONFIGS = ("llm_config", "prefill_config", "decode_config")
# Ray Serve's own, where a deployment says nothing.
DEFAULT_SHUTDOWN_S = 20.0


@dataclass(frozen=True)
class Group:
    """The head, or a group of workers. `path` is that of its group spec."""

    name: str
    path: Path
    spec: Mapping[str, Any]
    head: bool

    @property
    def pod_path(self) -> Path:
        return (*self.path, "template", "spec")

    @property
    def pod(self) -> Mapping[str, Any]:
        return _mapping(at(self.spec, "template", "spec"))

    @property
    def container_path(self) -> Path:
        return (*self.pod_path, "containers", 0)

    @property
    def container(self) -> Mapping[str, Any]:
        """Ray's: the first."""
        return _mapping(at(self.pod, "containers", 0))

    @property
    def start(self) -> Mapping[str, Any]:
        return _mapping(self.spec.get("rayStartParams"))

    @property
    def grace_s(self) -> float:
        seconds = self.pod.get("terminationGracePeriodSeconds")
        return float(DEFAULT_GRACE_S if seconds is None else seconds)

    @property
    def minimum(self) -> int:
        return int(self.spec.get("minReplicas") or 0)

    @property
    def maximum(self) -> int:
        replicas = self.spec.get("maxReplicas")
        return UNBOUNDED if replicas is None else int(replicas)

    @property
    def hosts(self) -> int:
        return int(self.spec.get("numOfHosts") or 1)

    @property
    def gpus(self) -> float | None:
        """The GPUs that the operator tells Ray of, of any vendor; None where Ray counts itself."""
        limits = _mapping(at(self.container, "resources", "limits"))
        # Of several kinds the operator takes the first by name.
        kinds = sorted(key for key in limits if _is_gpu(key) and quantity(limits[key]))
        of_pod = math.ceil(quantity(limits[kinds[0]])) if kinds else None
        gpus = self._resource("num-gpus", _is_gpu, of_pod)
        return None if gpus is None and self._sees_all_gpus else gpus or 0.0

    @property
    def _sees_all_gpus(self) -> bool:
        """Whether NVIDIA's runtime shows this pod the node's GPUs, though it asks for none."""
        names = {str(at(each, "name")) for each in self.container.get("env") or []}
        runtime = str(self.pod.get("runtimeClassName", ""))
        return "nvidia" in runtime or "NVIDIA_VISIBLE_DEVICES" in names

    @property
    def cpus(self) -> float | None:
        """The cores that the operator tells Ray of; None where it says none."""
        resources = _mapping(self.container.get("resources"))
        given = at(resources, "limits", "cpu") or at(resources, "requests", "cpu")
        of_pod = math.ceil(quantity(given)) if given is not None else None
        return self._resource("num-cpus", lambda key: key == "cpu", of_pod)

    def _resource(
        self, parameter: str, named: Callable[[str], bool], of_pod: float | None
    ) -> float | None:
        """A resource of Ray: the group's own, else the parameter's, else the pod's."""
        for key, value in _mapping(self.spec.get("resources")).items():
            if named(str(key).lower()):
                return float(math.ceil(quantity(value)))
        if self.start.get(parameter) not in (None, ""):
            return quantity(self.start[parameter])
        return of_pod

    def ports(self) -> dict[str, int]:
        ports = self.container.get("ports") or []
        return {
            str(port["name"]): int(port["containerPort"])
            for port in ports
            if isinstance(port, dict) and "name" in port and "containerPort" in port
        }


class Service:
    """A RayService document among others."""

    def __init__(self, document: Mapping[str, Any], others: list[Any]) -> None:
        self.document, self.others = document, others
        self.spec = _mapping(document.get("spec"))
        self.name = str(at(document, "metadata", "name") or "?")
        self.namespace = at(document, "metadata", "namespace")
        self.cluster = _mapping(self.spec.get("rayClusterConfig"))

    def line(self, *path: str | int) -> int:
        return line_of(self.document, *path)

    @property
    def cluster_path(self) -> Path:
        return ("spec", "rayClusterConfig")

    @property
    def head(self) -> Group:
        path = (*self.cluster_path, "headGroupSpec")
        return Group("head", path, _mapping(self.cluster.get("headGroupSpec")), True)

    @property
    def workers(self) -> list[Group]:
        path = (*self.cluster_path, "workerGroupSpecs")
        return [
            Group(str(_mapping(spec).get("groupName", "?")), (*path, index), _mapping(spec), False)
            for index, spec in enumerate(self.cluster.get("workerGroupSpecs") or [])
        ]

    @property
    def groups(self) -> list[Group]:
        return [self.head, *self.workers]

    @property
    def autoscaling(self) -> bool:
        return self.cluster.get("enableInTreeAutoscaling") is True

    @property
    def autoscaler_v2(self) -> bool:
        return self.autoscaling and self.asks_for_v2

    @property
    def asks_for_v2(self) -> bool:
        """Whether it names autoscaler v2, switched on or not."""
        return bool(at(self.cluster, "autoscalerOptions", "version") == "v2")

    @property
    def annotations(self) -> Mapping[str, Any]:
        return _mapping(at(self.document, "metadata", "annotations"))

    def ray_at_least(self, *wanted: int) -> bool:
        """Whether rayVersion is a version, and at least this one."""
        match = re.match(r"v?(\d+)\.(\d+)", str(self.cluster.get("rayVersion", "")))
        return match is not None and (int(match[1]), int(match[2])) >= wanted

    @property
    def upgrade(self) -> str:
        return str(at(self.spec, "upgradeStrategy", "type") or "NewCluster")

    # --- the serve configuration -----------------------------------------------------------

    @functools.cached_property
    def serve(self) -> Mapping[str, Any]:
        """serveConfigV2, parsed, with the lines of this file. Empty where it is not YAML."""
        text = self.spec.get("serveConfigV2")
        if not isinstance(text, str):
            # A mapping is a mistake, but what is in it can be judged.
            return _mapping(text)
        # A block begins on the line after its key; its margin is already gone.
        offset = (
            text.first - 1 if isinstance(text, Text) else self.line("spec", "serveConfigV2") - 1
        )
        try:
            documents = load_all(text, offset)
        except yaml.YAMLError:
            return {}
        return _mapping(documents[0]) if documents else {}

    def serve_line(self, *path: str | int) -> int:
        if not self.serve:
            return self.line("spec", "serveConfigV2")
        return line_of(self.serve, *path)

    def deployments(self) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        """Every deployment that the configuration names, with its path inside."""
        for place, application in enumerate(self.serve.get("applications") or []):
            for index, deployment in enumerate(_mapping(application).get("deployments") or []):
                path = ("applications", place, "deployments", index)
                yield path, _mapping(deployment)

    def llms(self) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        """Every model of applications that ray.serve.llm builds, with its path inside."""
        for place, application in enumerate(self.serve.get("applications") or []):
            if not str(at(application, "import_path")).startswith("ray.serve.llm"):
                continue
            arguments = _mapping(at(application, "args"))
            named: list[tuple[Path, Any]] = [
                (("llm_configs", index), config)
                for index, config in enumerate(arguments.get("llm_configs") or [])
            ]
            named += [((key,), arguments.get(key)) for key in _LLM_CONFIGS]
            for path, config in named:
                if isinstance(config, dict):  # A text is the path of a file.
                    yield ("applications", place, "args", *path), config

    def llm_scaling(self) -> Iterator[tuple[Path, Any]]:
        """The autoscaling_config of each of these."""
        for path, config in self.llms():
            scaling = at(config, "deployment_config", "autoscaling_config")
            yield (*path, "deployment_config", "autoscaling_config"), scaling

    # --- the environment -------------------------------------------------------------------

    def environment(self, group: Group) -> tuple[dict[str, str], bool]:
        """Variables of Ray's container with a known value, and whether there may be more."""
        variables: dict[str, str] = {}
        whole = True
        for source in group.container.get("envFrom") or []:
            reference = _mapping(source).get("configMapRef")
            data = self._config_map(_mapping(reference).get("name")) if reference else None
            if data is None:
                # A Secret holds keys, not settings; a ConfigMap elsewhere may hold anything.
                whole = whole and reference is None
                continue
            prefix = str(_mapping(source).get("prefix", ""))
            variables |= {prefix + key: str(value) for key, value in data.items()}
        for entry in group.container.get("env") or []:
            if "value" in entry:
                variables[str(entry.get("name"))] = str(entry["value"])
            elif "name" in entry:
                key = at(entry, "valueFrom", "configMapKeyRef")
                data = self._config_map(_mapping(key).get("name")) if key else None
                referenced = None if data is None else data.get(str(_mapping(key).get("key")))
                variables[str(entry["name"])] = "" if referenced is None else str(referenced)
        return variables, whole

    def environment_line(self, group: Group, name: str) -> int:
        path = (*group.container_path, "env")
        for index, entry in enumerate(group.container.get("env") or []):
            if _mapping(entry).get("name") == name:
                return self.line(*path, index)
        return self.line(*path)

    def _config_map(self, name: object) -> Mapping[str, Any] | None:
        for other in self.others:
            if (
                _mapping(other).get("kind") == "ConfigMap"
                and at(other, "metadata", "name") == name
                and at(other, "metadata", "namespace") == self.namespace
            ):
                return _mapping(other.get("data"))
        return None


def _is_gpu(key: str) -> bool:
    """Whether a resource of Kubernetes is GPUs to the operator (IsGPUResourceKey)."""
    return key.endswith("gpu") or bool(re.search(r"nvidia\.com/mig-\d+g\.\d+gb$", key))


def quantity(value: object) -> float:
    """A Kubernetes quantity as a number; 0 for what is none."""
    text = str(value)
    for suffix, factor in (
        ("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40),
        ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("m", 1e-3),
    ):  # fmt: skip
        if text.endswith(suffix):
            text, scale = text.removesuffix(suffix), float(factor)
            break
    else:
        scale = 1.0
    try:
        return float(text) * scale
    except ValueError:
        return 0.0


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
