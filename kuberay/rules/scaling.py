"""Replicas that may grow where nobody adds a worker, or where there is no GPU for them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kuberay.lines import at
from kuberay.rayservice import UNBOUNDED, Group, Path, Service
from kuberay.rules.finding import ERROR, WARNING, Finding, rule
from kuberay.rules.ours import ours

# More GPUs than any pod has.
_MANY = 1e9


@dataclass(frozen=True)
class _Growth:
    """How many replicas of something there may be, and what each needs.

    Attributes:
        spread: a replica may take GPUs of several nodes.
    """

    name: str
    line: int
    minimum: float
    maximum: float
    gpus: float
    cpus: float = 0.0
    spread: bool = False


def _growth(service: Service) -> Iterator[_Growth]:
    for path, deployment in service.deployments():
        yield _of_deployment(service, path, deployment)
    for path, config in service.llms():
        yield _of_llm(service, path, config)
    for place, settings in ours(service):
        path = ("applications", place, "args", "replicas")
        replicas = settings.replicas
        tp = settings.tensor_parallel_size or 1
        gpus = float(tp * (settings.pipeline_parallel_size or 1))
        line = service.serve_line(*path, "max")
        yield _Growth("engine", line, replicas.min, replicas.max, gpus)


def _of_deployment(service: Service, path: Path, deployment: Mapping[str, Any]) -> _Growth:
    minimum, maximum, key = _bounds(deployment, 1)
    bundles = deployment.get("placement_group_bundles") or []
    options = deployment.get("ray_actor_options") or {}
    gpus = sum(map(_gpus_of_bundle, bundles)) or options.get("num_gpus") or 0
    return _Growth(
        name=str(deployment.get("name", "?")),
        line=service.serve_line(*path, key),
        minimum=minimum,
        maximum=maximum,
        gpus=float(gpus),
        cpus=float(options.get("num_cpus") or 0),
        spread=bool(bundles) and deployment.get("placement_group_strategy") != "STRICT_PACK",
    )


def _of_llm(service: Service, path: Path, config: Mapping[str, Any]) -> _Growth:
    """A model of ray.serve.llm, with its replicas of data parallelism, which stand together."""
    deployment = config.get("deployment_config") or {}
    minimum, maximum, key = _bounds(deployment, 1)
    name = str(at(config, "model_loading_config", "model_id") or "the model")
    line = service.serve_line(*path, "deployment_config", key)
    if not deployment:
        line = service.serve_line(*path)
    return _Growth(name, line, minimum, maximum, _llm_gpus(config), spread=True)


def _llm_gpus(config: Mapping[str, Any]) -> float:
    """GPUs of a replica: TP x PP x DP, or what its placement group asks for; 0 on TPUs and CPUs."""
    kind = at(config, "accelerator_config", "kind")
    if kind in ("cpu", "tpu") or str(config.get("accelerator_type")).startswith("TPU"):
        return 0.0
    engine = config.get("engine_kwargs") or {}
    tensor, pipeline, data = (
        int(engine.get(f"{word}_parallel_size") or 1) for word in ("tensor", "pipeline", "data")
    )
    gpus = float(tensor * pipeline)
    placement = config.get("placement_group_config") or {}
    if placement.get("bundle_per_worker") is not None:
        gpus *= _gpus_of_bundle(placement["bundle_per_worker"])
    elif placement.get("bundles") is not None:
        gpus = sum(map(_gpus_of_bundle, placement["bundles"]))
    return gpus * data


def _gpus_of_bundle(bundle: Any) -> float:
    return float(at(bundle, "GPU") or 0)


def _bounds(deployment: Mapping[str, Any], default: int) -> tuple[float, float, str]:
    """Least and most replicas, and the key that says so."""
    scaling, fixed = deployment.get("autoscaling_config") or {}, deployment.get("num_replicas")
    if scaling or fixed == "auto":
        auto = 100 if fixed == "auto" else 1  # Serve's own maximum of each.
        maximum = float(scaling.get("max_replicas", auto))
        key = "autoscaling_config" if scaling else "num_replicas"
        return float(scaling.get("min_replicas", 1)), maximum, key
    count = float(fixed) if isinstance(fixed, int) else float(default)
    return count, count, "num_replicas"


@rule("autoscaler-off")
def _autoscaler_off(service: Service) -> Iterator[Finding]:
    if service.autoscaling:
        return
    growths = [
        growth
        for growth in _growth(service)
        if growth.maximum > growth.minimum
        and not (growth.gpus and growth.maximum <= _room(service, growth))
    ]
    for growth in growths:
        yield Finding(
            "autoscaler-off", WARNING, growth.line,
            f"{growth.name} may grow to {growth.maximum:g} replicas, and no worker is ever added: "
            "enableInTreeAutoscaling is not true",
            "enableInTreeAutoscaling: true, with autoscalerOptions.version: v2",
        )  # fmt: skip
    for group in service.workers:
        if (
            not growths
            and group.maximum < UNBOUNDED
            and group.maximum > max(group.minimum, int(group.spec.get("replicas") or 0))
        ):
            yield Finding(
                "autoscaler-off", WARNING, service.line(*group.path, "maxReplicas"),
                f"worker group {group.name} may have {group.maximum} and nobody adds one: "
                "enableInTreeAutoscaling is not true",
                "enableInTreeAutoscaling: true, or maxReplicas equal to replicas",
            )  # fmt: skip


@rule("too-few-gpus")
def _too_few_gpus(service: Service) -> Iterator[Finding]:
    growths = [growth for growth in _growth(service) if growth.gpus > 0]
    found = [finding for growth in growths for finding in _too_few_for(service, growth)]
    yield from found
    asked = sum(growth.minimum * growth.gpus for growth in growths)
    held = sum(_held_gpus(service))
    if asked > held and not any(finding.severity == ERROR for finding in found):
        names = ", ".join(growth.name for growth in growths)
        yield _few(ERROR, growths[-1], f"{names} need {asked:g} GPUs together, and all pods at "
                   f"their maximum have {held:g}: not all of them get ready",
                   "more GPUs a worker, a higher maxReplicas, or fewer replicas")  # fmt: skip


def _too_few_for(service: Service, growth: _Growth) -> Iterator[Finding]:
    """Findings about one deployment, as if it were alone."""
    room = _room(service, growth)
    if growth.maximum <= room:
        return
    each = f"{growth.gpus:g} GPU{'s' * (growth.gpus != 1)}"
    if not any(group.gpus for group in service.groups):
        yield _few(ERROR, growth, f"{growth.name} needs {each} a replica, and no pod has one",
                   "resources.limits: {nvidia.com/gpu: ...} of a worker group")  # fmt: skip
    elif growth.minimum > room:
        yield _few(ERROR, growth, f"{growth.name} needs {growth.minimum:g} replicas of {each}, "
                   f"and all pods at their maximum hold {room:g}: it never gets ready",
                   "more GPUs a worker, a higher maxReplicas, or a smaller engine")  # fmt: skip
    elif service.autoscaling:  # Without it, another rule says so.
        yield _few(WARNING, growth, f"{growth.name} may grow to {growth.maximum:g} replicas of "
                   f"{each}, and all pods at their maximum hold {room:g}: the rest waits for "
                   "ever", "a higher maxReplicas, or fewer replicas")  # fmt: skip


def _few(severity: str, growth: _Growth, problem: str, mend: str) -> Finding:
    return Finding("too-few-gpus", severity, growth.line, problem, mend)


def _room(service: Service, growth: _Growth) -> float:
    """How many of these replicas the GPUs of all pods at their maximum hold."""
    if growth.spread:
        return sum(_held_gpus(service)) // growth.gpus
    return sum(
        _most_nodes(service, group) * (_gpus(group) // growth.gpus) for group in service.groups
    )


def _held_gpus(service: Service) -> list[float]:
    """The GPUs of each group with all its pods."""
    return [_most_nodes(service, group) * _gpus(group) for group in service.groups]


def _gpus(group: Group) -> float:
    """As many as a pod may have: any number, where Ray counts them itself."""
    return _MANY if group.gpus is None else group.gpus


def _most_nodes(service: Service, group: Group) -> int:
    if group.head:
        return 1
    if service.autoscaling:
        return group.maximum * group.hosts
    # Nobody changes it: as many as are asked for, within the bounds.
    replicas = int(group.spec.get("replicas") or group.minimum)
    return min(max(replicas, group.minimum), group.maximum) * group.hosts


@rule("too-few-cpus")
def _too_few_cpus(service: Service) -> Iterator[Finding]:
    """A replica whose cores no pod has."""
    cores = [group.cpus for group in service.groups if _most_nodes(service, group) > 0]
    if not cores or None in cores:
        return  # A pod without a limit may have any number.
    largest = max(core for core in cores if core is not None)
    for growth in _growth(service):
        if growth.minimum > 0 and growth.cpus > largest:
            yield Finding(
                "too-few-cpus", ERROR, growth.line,
                f"{growth.name} needs {growth.cpus:g} CPUs a replica, and no pod has more than "
                f"{largest:g}: it never starts",
                "a lower ray_actor_options.num_cpus, or a larger worker",
            )  # fmt: skip
