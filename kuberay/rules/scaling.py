"""Replicas that may grow where nobody adds a worker, or where there is no GPU for them."""

from collections.abc import Iterator
from dataclasses import dataclass

from kuberay.lines import at
from kuberay.rayservice import UNBOUNDED, Service
from kuberay.rules.finding import ERROR, WARNING, Finding, rule
from kuberay.rules.ours import ours


@dataclass(frozen=True)
class _Growth:
    """How many replicas of something there may be, and what each needs."""

    name: str
    line: int
    least: float
    most: float
    gpus: float


def _growth(service: Service) -> Iterator[_Growth]:
    for path, deployment in service.deployments():
        scaling = deployment.get("autoscaling_config") or {}
        fixed = deployment.get("num_replicas")
        gpus = float(at(deployment, "ray_actor_options", "num_gpus") or 0)
        name = str(deployment.get("name", "?"))
        if scaling or fixed == "auto":
            auto = 100 if fixed == "auto" else 1  # Serve's own maximum of each.
            most = float(scaling.get("max_replicas", auto))
            least = float(scaling.get("min_replicas", 1))
            key = "autoscaling_config" if scaling else "num_replicas"
            yield _Growth(name, service.serve_line(*path, key), least, most, gpus)
        elif isinstance(fixed, int):
            yield _Growth(name, service.serve_line(*path, "num_replicas"), fixed, fixed, gpus)
    for place, settings in ours(service):
        path = ("applications", place, "args", "replicas")
        replicas = settings.replicas
        tp = settings.tensor_parallel_size or 1
        gpus = float(tp * (settings.pipeline_parallel_size or 1))
        line = service.serve_line(*path, "max")
        yield _Growth("engine", line, replicas.min, replicas.max, gpus)


@rule("autoscaler-off")
def _autoscaler_off(service: Service) -> Iterator[Finding]:
    if service.autoscaling:
        return
    grows = [each for each in _growth(service) if each.most > each.least]
    for each in grows:
        yield Finding(
            "autoscaler-off", ERROR, each.line,
            f"{each.name} may grow to {each.most:g} replicas, and no worker is ever added: "
            "enableInTreeAutoscaling is not true",
            "enableInTreeAutoscaling: true, with autoscalerOptions.version: v2",
        )  # fmt: skip
    for group in service.workers:
        if (
            not grows
            and group.most < UNBOUNDED
            and group.most > max(group.least, int(group.spec.get("replicas") or 0))
        ):
            yield Finding(
                "autoscaler-off", WARNING, service.line(*group.path, "maxReplicas"),
                f"worker group {group.name} may have {group.most} and nobody adds one: "
                "enableInTreeAutoscaling is not true",
                "enableInTreeAutoscaling: true, or maxReplicas equal to replicas",
            )  # fmt: skip


@rule("too-few-gpus")
def _too_few_gpus(service: Service) -> Iterator[Finding]:
    each = [(group, group.resource("nvidia.com/gpu")) for group in service.workers]
    if not any(gpus for _, gpus in each):
        return
    for growth in _growth(service):
        if growth.gpus <= 0:
            continue
        room = sum(group.most * group.hosts * (gpus // growth.gpus) for group, gpus in each if gpus)
        if growth.most > room:
            yield Finding(
                "too-few-gpus", ERROR, growth.line,
                f"{growth.name} may grow to {growth.most:g} replicas of {growth.gpus:g} GPUs, and "
                f"all workers at their maximum hold {room:g}: the rest waits for ever",
                "a higher maxReplicas, or fewer replicas",
            )  # fmt: skip
