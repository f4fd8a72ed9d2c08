"""What a rule finds, and the list of all rules.

An error is what the operator refuses, what never serves, a key that Ray Serve ignores though it
means something, and a dashboard that is open to others. A warning is a manifest that serves, with
a risk or without what it asks for. A rule that cannot see something (an image, a Secret) says
nothing about it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kuberay.rayservice import Service

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """One line of what is wrong. `rule` is a name to search for, and to ignore."""

    rule: str
    severity: str
    line: int
    found: str
    mend: str


Rule = Callable[[Service], Iterator[Finding]]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    """Keep a function as the rule of a name."""

    def keep(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return keep
