"""The CloudFormation stacks that eksctl made for one cluster."""

import time
from typing import Any

from kuberay.aws import Account, tags
from kuberay.console import say
from kuberay.errors import EksError, Refused
from kuberay.owned import CLUSTER, Owner

_POLL_S = 10.0
# A control plane takes 15 minutes, the deletion of a network with its NAT gateway about as long.
_PATIENCE_S = 2400.0


class Stacks:
    """Stacks by name. Each question asks CloudFormation anew."""

    def __init__(self, account: Account, owner: Owner) -> None:
        self._account, self._owner = account, owner

    def named(self, *names: str, prefix: str = "") -> list[str]:
        """Which stacks of these names, or of this prefix, exist."""
        return sorted(
            name for name in self._all() if name in names or (prefix and name.startswith(prefix))
        )

    def settled(self, name: str) -> str:
        """The status of a stack once no operation runs on it; empty when there is none.

        Raises:
            EksError: the operation did not end in 40 minutes.
        """
        deadline_s = time.monotonic() + _PATIENCE_S
        shown = ""
        while True:
            stack = self._all().get(name)
            status = "" if stack is None else str(stack["StackStatus"])
            if not status.endswith("_IN_PROGRESS"):
                return status
            if status != shown:
                say(f"    stack {name} is {status}: waiting")
                shown = status
            if time.monotonic() > deadline_s:
                raise EksError(f"the stack {name} is still {status} after {_PATIENCE_S:.0f} s")
            time.sleep(_POLL_S)

    def remove(self, name: str) -> None:
        """Delete a stack that an interrupted run left, and wait until it is gone.

        Raises:
            Refused: the stack does not carry the cluster's tag.
            EksError: it could not be deleted.
        """
        stack = self._all().get(name)
        if stack is None:
            return
        if not self._owner.marks(tags(stack)):
            raise Refused(f"the stack {name} does not carry the tag {CLUSTER}={self._owner.name}")
        say(f"    stack {name} ({stack['StackStatus']}) was left half made: deleting it")
        self._account.call("cloudformation", "delete_stack", StackName=name)
        if status := self.settled(name):
            raise EksError(f"the stack {name} could not be deleted: it is {status}")

    def ours(self, name: str) -> bool:
        """Whether a stack exists and carries the cluster's tag."""
        stack = self._all().get(name)
        return stack is not None and self._owner.marks(tags(stack))

    def _all(self) -> dict[str, Any]:
        # Stacks that are gone are not in this list.
        pages = self._account.pages("cloudformation", "describe_stacks", "Stacks")
        return {stack["StackName"]: stack for stack in pages}
