"""Requests that are cut when a pod goes."""

import re
from collections.abc import Iterator

from kuberay.lines import at
from kuberay.rayservice import DEFAULT_SHUTDOWN_S, Group, Service
from kuberay.rules.finding import WARNING, Finding, rule
from kuberay.rules.ours import ours
from serve_app.planning.plan import Plan


@rule("drain-over-grace")
def _drain_over_grace(service: Service) -> Iterator[Finding]:
    longest_s, line, what = 0.0, 0, ""
    for path, deployment in service.deployments():
        given = deployment.get("graceful_shutdown_timeout_s", DEFAULT_SHUTDOWN_S)
        if float(given) > longest_s:
            longest_s = float(given)
            line = service.serve_line(*path, "graceful_shutdown_timeout_s")
            what = f"graceful_shutdown_timeout_s of {deployment.get('name', '?')}"
    for place, settings in ours(service):
        if Plan.shutdown_s(settings) > longest_s:
            longest_s = Plan.shutdown_s(settings)
            line = service.serve_line("applications", place, "args", "limits", "request_timeout_s")
            what = "what a replica that leaves may take (limits.request_timeout_s + 10 s)"
    for group in service.workers:
        stop_s = _hook_s(group)
        if longest_s >= group.grace_s:
            yield Finding(
                "drain-over-grace", WARNING, line,
                f"{what} is {longest_s:g} s, and a pod of {group.name} is killed after "
                f"{group.grace_s:g} s: its requests are cut",
                f"terminationGracePeriodSeconds above {longest_s:g}, or a shorter drain",
            )  # fmt: skip
        if stop_s is not None and stop_s >= group.grace_s:
            yield Finding(
                "drain-over-grace", WARNING,
                service.line(*group.container_path, "lifecycle", "preStop"),
                f"the preStop hook of {group.name} may take {stop_s:g} s of a grace period of "
                f"{group.grace_s:g} s, which it is part of",
                f"terminationGracePeriodSeconds above {stop_s:g}",
            )  # fmt: skip


@rule("no-drain")
def _no_drain(service: Service) -> Iterator[Finding]:
    for group in service.workers:
        path = (*group.container_path, "lifecycle", "preStop")
        hook = at(group.container, "lifecycle", "preStop")
        command = " ".join(str(word) for word in at(hook, "exec", "command") or [])
        if hook is None:
            yield Finding(
                "no-drain", WARNING, service.line(*group.container_path),
                f"workers of {group.name} have no preStop hook: Ray ends its processes at the "
                "first signal, whatever the grace period, and cuts the requests they have",
                "a hook that drains the node and waits (kuberay/base/pod/drain.py)",
            )  # fmt: skip
        elif re.search(r"\bray stop\b", command):
            yield Finding(
                "no-drain", WARNING, service.line(*path),
                f"`ray stop` as the preStop hook of {group.name} cuts the requests that its "
                "replicas have",
                "a hook that drains the node and waits (kuberay/base/pod/drain.py)",
            )  # fmt: skip


def _hook_s(group: Group) -> float | None:
    """How long a hook says it takes: a sleep, or the seconds of drain.py."""
    words = [
        str(word) for word in at(group.container, "lifecycle", "preStop", "exec", "command") or []
    ]
    seconds = at(group.container, "lifecycle", "preStop", "sleep", "seconds")
    if seconds is not None:
        return float(seconds)
    match = re.search(r"(?:\bsleep|drain\.py)\s+(\d+(?:\.\d+)?)", " ".join(words))
    return float(match[1]) if match else None
