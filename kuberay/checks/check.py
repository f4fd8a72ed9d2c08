"""One line of preflight."""

from dataclasses import dataclass

from kuberay.errors import AwsError, PermissionMissing

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Check:
    """One line. `mend` is empty where the status is ok."""

    name: str
    status: str
    found: str
    mend: str = ""


def unchecked(name: str, error: AwsError) -> Check:
    """The line of a check that AWS did not answer: a missing permission stops nobody."""
    again = "grant it" if isinstance(error, PermissionMissing) else "run it again"
    return Check(name, WARN, f"not checked: {error}", f"{again}, or check by hand")
