"""What the operator's own validation refuses, which it tells in an event only, and the text that
Kubernetes does not look into.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from kuberay.lines import at
from kuberay.rayservice import Service
from kuberay.rules.finding import ERROR, Finding, rule
from serve_app.errors import ConfigError
from serve_app.settings import Settings


@rule("refused")
def _refused(service: Service) -> Iterator[Finding]:
    """The operator's own validation, which tells it in an event and a condition only."""
    name_line = service.line("metadata", "name")
    if len(service.name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", service.name):
        yield _no(
            name_line, f"the name {service.name!r}", "at most 47 of a-z, 0-9 and -, a letter first"
        )
    head = service.head
    if at(head.spec, "headService", "metadata", "name"):
        yield _no(
            service.line(*head.path, "headService", "metadata", "name"),
            "a name of headService", "leave it to the operator",
        )  # fmt: skip
    for group in service.groups:
        both = [k for k in ("num-cpus", "num-gpus", "memory", "resources") if k in group.start]
        if both and group.spec.get("resources"):
            yield _no(
                service.line(*group.path, "resources"),
                f"resources of {group.name} beside rayStartParams {', '.join(both)}", "use one",
            )  # fmt: skip
        if "labels" in group.start:
            yield _no(
                service.line(*group.path, "rayStartParams", "labels"),
                "rayStartParams.labels", "use the group's own labels",
            )  # fmt: skip
        policy = group.pod.get("restartPolicy")
        if service.autoscaler_v2 and policy not in (None, "Never"):
            yield _no(
                service.line(*group.pod_path, "restartPolicy"),
                f"restartPolicy {policy} with autoscaler v2", "restartPolicy: Never, or none",
            )  # fmt: skip
        if service.autoscaling and group.spec.get("suspend") is True:
            yield _no(
                service.line(*group.path, "suspend"),
                "a suspended group with the autoscaler", "minReplicas and maxReplicas 0",
            )  # fmt: skip
    yield from _refused_environment(service)


def _refused_environment(service: Service) -> Iterator[Finding]:
    head = service.head
    found, _ = service.environment(head)
    tolerant = "gcsFaultToleranceOptions" in service.cluster
    instead = "use gcsFaultToleranceOptions"
    for name in ("RAY_REDIS_ADDRESS", "REDIS_USERNAME", *(["REDIS_PASSWORD"] if tolerant else [])):
        if name in found:
            yield _no(service.environment_line(head, name), f"{name} on the head", instead)
    version_2 = "RAY_enable_autoscaler_v2"
    if version_2 in found and at(service.cluster, "autoscalerOptions", "version"):
        yield _no(
            service.environment_line(head, version_2),
            f"{version_2} beside autoscalerOptions.version", "keep the latter",
        )  # fmt: skip
    if at(service.cluster, "authOptions", "mode") == "token":
        version = str(service.cluster.get("rayVersion", ""))
        numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
        if numbers < [2, 52]:
            yield _no(
                service.line(*service.cluster_path, "rayVersion"),
                f"token authentication with rayVersion {version or '(none)'}", "2.52.0 or later",
            )  # fmt: skip


def _no(line: int, what: str, mend: str) -> Finding:
    return Finding("refused", ERROR, line, f"the operator refuses {what}", mend)


@rule("serve-config")
def _serve_config(service: Service) -> Iterator[Finding]:
    line = service.line("spec", "serveConfigV2")
    text = service.spec.get("serveConfigV2")
    if not text:
        yield Finding(
            "serve-config", ERROR, line, "there is no serveConfigV2: nothing is served",
            "applications: with at least one",
        )  # fmt: skip
        return
    try:
        parsed = yaml.safe_load(str(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        first = getattr(text, "first", line)
        where = first + mark.line if mark is not None else line
        problem = getattr(error, "problem", None) or "not YAML"
        yield Finding(
            "serve-config", ERROR, where, f"serveConfigV2 is not YAML: {problem}",
            "it is a text to Kubernetes, which does not look inside",
        )  # fmt: skip
        return
    applications = parsed.get("applications") if isinstance(parsed, dict) else None
    if not applications:
        yield Finding(
            "serve-config", ERROR, line, "serveConfigV2 has no applications",
            "applications: with at least one",
        )  # fmt: skip
        return
    for key in ("name", "route_prefix"):
        seen: set[str] = set()
        for place, application in enumerate(applications):
            given = str(at(application, key) or ("default" if key == "name" else "/"))
            if given in seen:
                yield Finding(
                    "serve-config", ERROR, service.serve_line("applications", place, key),
                    f"two applications have the {key} {given}: Ray Serve refuses both",
                    f"another {key}",
                )  # fmt: skip
            seen.add(given)
    for place, application in enumerate(service.serve.get("applications") or []):
        if at(application, "import_path") == "serve_app:build":
            yield from _our_settings(service, place, at(application, "args") or {})


def _our_settings(service: Service, place: int, args: Mapping[str, Any]) -> Iterator[Finding]:
    path = ("applications", place, "args")
    try:
        settings = Settings.parse(args)
    except ConfigError as error:
        key = str(error.fields[0]).split(".")
        yield Finding(
            "serve-config", ERROR, service.serve_line(*path, *key), str(error), "as it says",
        )  # fmt: skip
        return
    if not settings.api_keys.configured and not settings.allow_unauthenticated_network:
        yield Finding(
            "serve-config", ERROR, service.serve_line(*path, "api_keys"),
            "no API keys: it refuses to start where others can reach it",
            "api_keys: {file: ...}, from a Secret",
        )  # fmt: skip
