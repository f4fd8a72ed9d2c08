"""Environment variables that Ray Serve reads at import, in every process."""

from collections.abc import Iterator

from kuberay.lines import at
from kuberay.rayservice import Service
from kuberay.rules.finding import ERROR, WARNING, Finding, rule

# Variables that choose who takes requests: where head and workers differ, none may be answered.
_SWITCHES = (
    "RAY_SERVE_ENABLE_HA_PROXY",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS",
)


@rule("one-sided-variable")
def _one_sided(service: Service) -> Iterator[Finding]:
    """Variables that Ray Serve reads at import, in every process: head and workers must agree."""
    environments = [(group, *service.environment(group)) for group in service.groups]
    names = sorted(
        {name for _, variables, _ in environments for name in variables if _read_at_import(name)}
    )
    for name in names:
        severity = ERROR if name in _SWITCHES else WARNING
        having = [group for group, variables, _ in environments if name in variables]
        lacking = [
            group for group, variables, whole in environments if name not in variables and whole
        ]
        for group in lacking:
            yield Finding(
                "one-sided-variable", severity, service.environment_line(having[0], name),
                f"{name} is set on {having[0].name} and not on {group.name}: Ray Serve reads it at "
                "import in every process, and the two sides then disagree about who serves",
                f"the same in the env of {group.name}",
            )  # fmt: skip
        values = {variables[name] for _, variables, _ in environments if variables.get(name)}
        if len(values) > 1 and not lacking:
            yield Finding(
                "one-sided-variable", severity, service.environment_line(having[-1], name),
                f"{name} has different values: {', '.join(sorted(values))}",
                "one value in every group",
            )  # fmt: skip


def _read_at_import(name: str) -> bool:
    return name.startswith("RAY_SERVE_")


@rule("haproxy-alone")
def _haproxy_alone(service: Service) -> Iterator[Finding]:
    pair = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
    for group in service.groups:
        variables, whole = service.environment(group)
        on = [name for name in pair if variables.get(name) == "1"]
        if len(on) == 1 and whole:
            (other,) = set(pair) - set(on)
            effect = (
                "requests still hop through Ray's Python objects"
                if on[0] == pair[0]
                else "the port moves to the head alone"
            )
            yield Finding(
                "haproxy-alone", WARNING, service.environment_line(group, on[0]),
                f"{on[0]} without {other} on {group.name}: {effect}",
                f"set {other} to 1 as well",
            )  # fmt: skip


@rule("late-variable")
def _late_variable(service: Service) -> Iterator[Finding]:
    for place, application in enumerate(service.serve.get("applications") or []):
        path = ("applications", place, "runtime_env", "env_vars")
        for name in at(application, "runtime_env", "env_vars") or {}:
            if _read_at_import(str(name)):
                yield Finding(
                    "late-variable", WARNING, service.serve_line(*path, str(name)),
                    f"{name} in runtime_env comes too late: HAProxy and the controller are "
                    "started without it",
                    "set it in the env of head and workers",
                )  # fmt: skip
