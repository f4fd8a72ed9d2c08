"""What a RayService's schema lets pass and somebody suffers from, one rule a function.

Each says what the operator (1.7) or Ray does with what is written, on which line, and the mend.
"""

from kuberay.rayservice import Service
from kuberay.rules import (
    doors,
    drain,
    operator,
    ours,
    pods,
    ports,
    reach,
    scaling,
    serve,
    upgrades,
    variables,
)
from kuberay.rules.finding import ERROR, RULES, WARNING, Finding
from kuberay.rules.upgrades import edits

__all__ = ["ERROR", "RULES", "WARNING", "Finding", "edits", "findings"]
_ = (doors, drain, operator, ours, pods, ports, reach, scaling, serve, upgrades, variables)


def findings(service: Service, ignored: frozenset[str] = frozenset()) -> list[Finding]:
    """Everything that the rules find, in the order of the lines."""
    collected: list[Finding] = []
    unread = []
    for name, rule in RULES.items():
        if name in ignored:
            continue
        try:
            collected += list(rule(service))
        except (AttributeError, KeyError, TypeError, ValueError):
            unread.append(name)
    if unread:
        # A text where a mapping belongs, and the like: what the schema itself refuses.
        collected.append(Finding(
            "shape", ERROR, service.line("spec"),
            f"not what the schema asks for; not judged: {', '.join(unread)}",
            "kubectl apply --dry-run=server says which part",
        ))  # fmt: skip
    return sorted(collected, key=lambda each: (each.line, each.rule))
