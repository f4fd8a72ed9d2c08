"""The errors that these commands raise on purpose, each a sentence for the person at the console.

EksError
├── AwsError               AWS refused, or does not answer
│   ├── PermissionMissing  names the action and the resource
│   └── InUse              something else must go first
├── ToolError              eksctl, kubectl or helm is absent, or failed
└── Refused                what was asked would touch what is not this cluster's
"""


class EksError(Exception):
    """Base of the tree; `str(error)` is the whole message."""


class AwsError(EksError):
    """AWS refused, or does not answer. `code` is AWS's own word for it."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code

    @property
    def absent(self) -> bool:
        """Whether it says that the thing is not there: for a removal that is success."""
        return "NotFound" in self.code or self.code.startswith("NoSuch")


class PermissionMissing(AwsError):
    """These credentials may not do it.

    Attributes:
        action: as a policy spells it, such as `ec2:DescribeVolumes`.
        resource: an ARN, or `*` where AWS names none.
    """

    def __init__(self, action: str, resource: str = "*", code: str = "AccessDenied") -> None:
        super().__init__(f"missing permission: {action} on {resource}", code)
        self.action, self.resource = action, resource


class InUse(AwsError):
    """It cannot go yet: something that depends on it is still there."""


class ToolError(EksError):
    """A command is absent, or failed."""


class Refused(EksError):
    """What was asked would touch what does not carry the cluster's tag."""
