"""Images, probes, and what stands or falls with the head."""

import re
from collections.abc import Iterator

from kuberay.lines import at
from kuberay.rayservice import Group, Service
from kuberay.rules.finding import ERROR, WARNING, Finding, rule

# Images without wget, by the part of the name before the tag; a tag may say so too. vLLM's had it
# before version 0.11.
_BARE_IMAGES = re.compile(
    r"(^|/)(vllm-openai(?!:v0\.(\d|10)\.)|vllm-openai-nightly|distroless[^:]*|cuda|ubuntu|debian|pytorch)(:|@|$)"
    r"|(^|/)python:[^@]*slim|gcr\.io/distroless/|cgr\.dev/chainguard/"
)


@rule("no-wget")
def _no_wget(service: Service) -> Iterator[Finding]:
    for group in service.groups:
        image = str(group.container.get("image", ""))
        if not _BARE_IMAGES.search(image):
            continue
        injected = _probes_with_wget(service, group)
        if injected:
            yield Finding(
                "no-wget", ERROR, service.line(*group.container_path, "image"),
                f"{image} has no wget, which the probes call that the operator adds to "
                f"{group.name}: the pod never becomes ready, and is killed",
                f"install wget in the image, or write {' and '.join(injected)} without it",
            )  # fmt: skip


def _probes_with_wget(service: Service, group: Group) -> list[str]:
    """Which of the probes that the operator adds call wget.

    From Ray 2.53 on they ask over HTTP, but for a worker's readiness, which asks its proxy too.
    """
    lacking = [p for p in ("livenessProbe", "readinessProbe") if p not in group.container]
    if not service.ray_at_least(2, 53):
        return lacking
    return [] if group.head else [probe for probe in lacking if probe == "readinessProbe"]


@rule("gpu-toleration")
def _gpu_toleration(service: Service) -> Iterator[Finding]:
    """GPU nodes are tainted, so that nothing else fills them."""
    for group in service.workers:
        if not group.gpus or _tolerates_gpus(group):
            continue
        selector = group.pod.get("nodeSelector") or {}
        # Those of cluster.yaml, which are known to be tainted.
        ours = selector.get("qwen-ray-serve/workers") not in (None, "cpu")
        yield Finding(
            "gpu-toleration", ERROR if ours else WARNING, service.line(*group.pod_path),
            f"pods of {group.name} ask for GPUs and do not tolerate the taint nvidia.com/gpu: "
            + ("the nodes that they choose have it" if ours else "where nodes have it, they wait"),
            "tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]",
        )  # fmt: skip


def _tolerates_gpus(group: Group) -> bool:
    for each in group.pod.get("tolerations") or []:
        key, operator = at(each, "key"), at(each, "operator") or "Equal"
        effect = at(each, "effect") in (None, "", "NoSchedule")
        of_gpus = key == "nvidia.com/gpu" and (operator == "Exists" or at(each, "value") == "true")
        if effect and (of_gpus or (not key and operator == "Exists")):
            return True
    return False


@rule("version-differs")
def _versions(service: Service) -> Iterator[Finding]:
    stated = str(service.cluster.get("rayVersion", ""))
    for group in service.groups:
        version = _ray_of(group)
        if version and stated and version != stated:
            yield Finding(
                "version-differs", WARNING, service.line(*group.container_path, "image"),
                f"{group.container['image']} on {group.name}, and rayVersion is {stated}: the "
                "operator writes probes and options for the latter",
                f"rayVersion: \"{version}\"",
            )  # fmt: skip
    head, of_head = service.head.container.get("image"), _ray_of(service.head)
    for group in service.workers:
        if of_head and _ray_of(group) and _ray_of(group) != of_head:
            yield Finding(
                "version-differs", ERROR, service.line(*group.container_path, "image"),
                f"{group.name} has Ray {_ray_of(group)} and the head {of_head}: no worker joins",
                "one version on both",
            )  # fmt: skip
        elif head and group.container.get("image") != head:
            yield Finding(
                "version-differs", WARNING, service.line(*group.container_path, "image"),
                f"{group.name} has another image than the head: Ray and Python must be the same",
                "one image for both, or one build of both",
            )  # fmt: skip


def _ray_of(group: Group) -> str | None:
    """The version of Ray in an image of the Ray project; None of another image."""
    image = str(group.container.get("image", ""))
    match = re.search(r"rayproject/ray(?:-ml|-llm)?:(\d+\.\d+\.\d+)", image)
    return match[1] if match else None


@rule("head-serves")
def _head_serves(service: Service) -> Iterator[Finding]:
    if (
        str(service.head.start.get("num-cpus", "")) != "0"
        and str(at(service.head.spec, "resources", "CPU") or "") != "0"
    ):
        yield Finding(
            "head-serves", WARNING, service.line(*service.head.path, "rayStartParams"),
            "replicas may be put on the head: one that fills its memory takes the controller along",
            'rayStartParams: {num-cpus: "0"} on the head',
        )  # fmt: skip


@rule("head-alone")
def _head_alone(service: Service) -> Iterator[Finding]:
    annotations = at(service.document, "metadata", "annotations") or {}
    if (
        "gcsFaultToleranceOptions" not in service.cluster
        and annotations.get("ray.io/ft-enabled") != "true"
    ):
        yield Finding(
            "head-alone", WARNING, service.line(*service.cluster_path),
            "no GCS fault tolerance: when the head's pod goes, all workers restart and nothing is "
            "served meanwhile",
            "gcsFaultToleranceOptions, with a Redis",
        )  # fmt: skip
