"""Images, probes, and what stands or falls with the head."""

import re
from collections.abc import Iterator

from kuberay.lines import at
from kuberay.rayservice import Service
from kuberay.rules.finding import ERROR, WARNING, Finding, rule

# Known to have no wget, by the part of the name before the tag; a tag may say so too.
_BARE_IMAGES = re.compile(
    r"(^|/)(vllm-openai|vllm-openai-nightly|distroless[^:]*|cuda|ubuntu|debian|pytorch)(:|@|$)"
    r"|(^|/)python:[^@]*slim|gcr\.io/distroless/|cgr\.dev/chainguard/"
)


@rule("no-wget")
def _no_wget(service: Service) -> Iterator[Finding]:
    for group in service.groups:
        image = str(group.container.get("image", ""))
        if not _BARE_IMAGES.search(image):
            continue
        injected = [p for p in ("livenessProbe", "readinessProbe") if p not in group.container]
        if injected:
            yield Finding(
                "no-wget", ERROR, service.line(*group.container_path, "image"),
                f"{image} has no wget, which the probes call that the operator adds to "
                f"{group.name}: the pod never becomes ready, and is killed",
                f"install wget in the image, or write {' and '.join(injected)} without it",
            )  # fmt: skip


@rule("version-differs")
def _versions(service: Service) -> Iterator[Finding]:
    stated = str(service.cluster.get("rayVersion", ""))
    for group in service.groups:
        image = str(group.container.get("image", ""))
        found = re.search(r"rayproject/ray(?:-ml|-llm)?:(\d+\.\d+\.\d+)", image)
        if found and stated and found[1] != stated:
            yield Finding(
                "version-differs", ERROR, service.line(*group.container_path, "image"),
                f"{image} on {group.name}, and rayVersion is {stated}",
                f"rayVersion: \"{found[1]}\"",
            )  # fmt: skip
    head = service.head.container.get("image")
    for group in service.workers:
        if head and group.container.get("image") != head:
            yield Finding(
                "version-differs", WARNING, service.line(*group.container_path, "image"),
                f"{group.name} has another image than the head: Ray and Python must be the same",
                "one image for both, or one build of both",
            )  # fmt: skip


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
