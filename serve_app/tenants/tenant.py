"""A tenant: its keys, its share of the fleet and its quota. Data only.

Tenants are written in a YAML or JSON file, or kept in a database (store.py) as the same JSON.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from serve_app.errors import ConfigError, nearest
from serve_app.tenants.fair import Share

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
# A database, and a float, count no further.
Count = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
# The C parser reads 10,000 tenants in a second, the Python one in twenty.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):  # type: ignore[misc]
    """Refuses a key that stands twice in one mapping, of which YAML's parser takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, count in names.items() if count > 1]:
            raise yaml.MarkedYAMLError(
                problem=f"{twice[0]!r} stands twice in one mapping", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


class Priority(StrEnum):
    """The classes of the queue, the one that is served first before the others."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """What a tenant may use; None: as much as there is. A minute, day or month is one of UTC."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_day: Count | None = None
    tokens_per_month: Count | None = None
    running_requests: Count | None = None


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """An API key, of which only the digest is stored.

    Attributes:
        sha256: the digest, in hexadecimal.
        expires: from when on it is refused; None: never.
    """

    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None

    def valid(self, now: datetime) -> bool:
        return self.expires is None or now < self.expires


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Who shares the fleet.

    Attributes:
        weight: its share of the work, relative to the weights of others in its class.
        priority: its class in the queue.
        models: the models and adapters that it may name; empty: all.
        disabled: its keys are refused.
    """

    name: Name
    weight: Annotated[float, msgspec.Meta(ge=0.001, le=1000)] = 1.0
    priority: Priority = Priority.NORMAL
    models: tuple[str, ...] = ()
    quota: Quota = Quota()
    disabled: bool = False
    keys: tuple[Key, ...] = ()

    @property
    def share(self) -> Share:
        """What the queue asks of it."""
        return _share(self.name, self.weight, self.priority)

    def may_use(self, model: str) -> bool:
        return not self.models or model in self.models

    @classmethod
    def default(cls, name: str) -> "Tenant":
        """A tenant of which only the name is known: a key of `api_keys`, or nobody's."""
        return cls(name)


@lru_cache(4096)
def _share(name: str, weight: float, priority: Priority) -> Share:
    return Share(name, weight, list(Priority).index(priority))


class _File(msgspec.Struct, forbid_unknown_fields=True):
    tenants: tuple[Tenant, ...]


def digest(key: bytes) -> str:
    """The digest of a key, to be stored. A generated key is 256 random bits and needs no salt."""
    return hashlib.sha256(key).hexdigest()


def read_file(path: Path) -> dict[str, Tenant]:
    """The tenants of a file, by name.

    Raises:
        ConfigError: it cannot be read, or says something impossible.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except Exception as error:  # Of any type: ValueError for the 30th of February.
        raise ConfigError("tenants.file", str(path), " ".join(str(error).split())) from None
    try:
        # An empty file is no list without tenants: somebody is writing it.
        parsed = msgspec.convert(content, _File)
    except msgspec.ValidationError as error:
        raise _sentence(path, str(error)) from None
    return by_name(parsed.tenants)


def by_name(tenants: Iterable[Tenant]) -> dict[str, Tenant]:
    """The tenants by name.

    Raises:
        ConfigError: two have one name or one key.
    """
    named: dict[str, Tenant] = {}
    owners: dict[str, str] = {}
    for tenant in tenants:
        if tenant.name in named:
            raise ConfigError("tenants", tenant.name, "there are two tenants of this name")
        named[tenant.name] = tenant
        for key in tenant.keys:
            if (owner := owners.setdefault(key.sha256, tenant.name)) != tenant.name:
                raise ConfigError("tenants", tenant.name, f"has a key that {owner} has as well")
    return named


def parse(changes: dict[str, Any]) -> Tenant:
    """A tenant of plain values.

    Raises:
        ConfigError: one of them is impossible.
    """
    try:
        return msgspec.convert(changes, Tenant, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError("tenant", changes.get("name"), str(error)) from None


def now() -> datetime:
    return datetime.now(UTC)


def _sentence(path: Path, problem: str) -> ConfigError:
    near = None
    if "unknown field" in problem:
        fields = [*Tenant.__struct_fields__, *Quota.__struct_fields__, *Key.__struct_fields__]
        near = nearest(problem.split("`")[1], fields)
    return ConfigError("tenants.file", str(path), problem, near)
