"""One kind of thing that a cluster can leave behind: how to find it, price it and remove it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from botocore import xform_name

from kuberay.aws import Account
from kuberay.search import Found, Search

Find = Callable[[Search], Iterator[Found]]


@dataclass(frozen=True)
class By:
    """A removal that is one call of AWS, and so also one command of its command line.

    Attributes:
        argument: takes the id; a list of it where the name ends in `[]`.
        more: arguments beside it.
    """

    service: str
    operation: str
    argument: str
    more: tuple[tuple[str, Any], ...] = ()

    def __call__(self, account: Account, name: str) -> None:
        key = self.argument.removesuffix("[]")
        value = name if key == self.argument else [name]
        account.call(self.service, self.operation, **{key: value}, **dict(self.more))

    def command(self, name: str, region: str) -> str:
        flags = [f"--{_flag(self.argument.removesuffix('[]'))} {name}"]
        for key, value in self.more:
            flags.append(f"--{_flag(key)}" if value is True else f"--{_flag(key)} {value}")
        where = "" if self.service == "iam" else f" --region {region}"
        return f"aws {self.service} {_flag(self.operation)}{where} {' '.join(flags)}"


def _flag(name: str) -> str:
    return str(xform_name(name, "-")).replace("_", "-")


@dataclass(frozen=True)
class Kind:
    """How to deal with one kind of thing.

    Attributes:
        remove: None where it is only ever reported.
        command: the shell command that removes it, with {id} and {region}; that of `remove` where
            it is empty.
        data: whether it holds what cannot be made again.
    """

    name: str
    find: Find
    remove: By | Callable[[Account, str], None] | None = None
    command: str = ""
    data: bool = False
