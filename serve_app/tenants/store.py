"""Tenants in the database, for the commands that change them and the registry that reads them."""

from collections.abc import Callable

import msgspec

from serve_app.errors import ConfigError
from serve_app.tenants.database import Database, Transaction
from serve_app.tenants.tenant import Tenant, by_name

_SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BIGINT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS tenant (name TEXT PRIMARY KEY, data TEXT NOT NULL)",
)


class Store:
    """The table of tenants."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def prepare(self) -> None:
        """Create the tables that are not there.

        Raises:
            DatabaseError: the database cannot be asked.
            ConfigError: a later version of this program made them.
        """
        with self.database.transaction() as transaction:
            for statement in _SCHEMA:
                transaction.do(statement)
            transaction.do(
                "INSERT INTO meta VALUES ('schema', ?), ('tenants', 0) ON CONFLICT DO NOTHING",
                [_SCHEMA_VERSION],
            )
            version = _number(transaction, "schema")
        if version > _SCHEMA_VERSION:
            problem = f"its tables have version {version}, and this program knows {_SCHEMA_VERSION}"
            raise ConfigError("tenants.database", self.database.address, problem)

    def read(self, known_version: int = -1) -> tuple[int, dict[str, Tenant]] | None:
        """All tenants and their version; None: the version is still `known_version`.

        Raises:
            ConfigError: a tenant cannot be read, such as one of a later version of this program.
        """
        with self.database.transaction(writes=False) as transaction:
            version = _number(transaction, "tenants")
            if version == known_version:
                return None
            rows = transaction.ask("SELECT name, data FROM tenant ORDER BY name")
        return version, by_name(self._decoded(*row) for row in rows)

    def add(self, tenant: Tenant) -> None:
        """A new tenant.

        Raises:
            ConfigError: there is one of this name, or one with one of its keys.
        """

        def insert(tenants: dict[str, Tenant]) -> Tenant:
            if tenant.name in tenants:
                raise ConfigError("tenant", tenant.name, "there is a tenant of this name")
            return tenant

        self._change(insert)

    def change(self, name: str, change: Callable[[Tenant], Tenant]) -> Tenant:
        """Replace a tenant by what `change` makes of it.

        Raises:
            ConfigError: there is none of this name.
        """

        def replace(tenants: dict[str, Tenant]) -> Tenant:
            if name not in tenants:
                raise ConfigError("tenant", name, "there is no tenant of this name")
            return change(tenants[name])

        return self._change(replace)

    def _change(self, make: Callable[[dict[str, Tenant]], Tenant]) -> Tenant:
        with self.database.transaction() as transaction:
            rows = transaction.ask("SELECT name, data FROM tenant")
            tenants = {row[0]: self._decoded(*row) for row in rows}
            tenant = make(tenants)
            by_name((tenants | {tenant.name: tenant}).values())
            transaction.do(
                "INSERT INTO tenant VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET"
                " data = excluded.data",
                [tenant.name, msgspec.json.encode(tenant).decode()],
            )
            transaction.do("UPDATE meta SET value = value + 1 WHERE name = 'tenants'")
        return tenant

    def _decoded(self, name: str, data: str) -> Tenant:
        try:
            return _decoder.decode(data)
        except ValueError as error:
            problem = f"its tenant {name!r} cannot be read: {error}"
            raise ConfigError("tenants.database", self.database.address, problem) from None


def _number(transaction: Transaction, name: str) -> int:
    return int(transaction.ask("SELECT value FROM meta WHERE name = ?", [name])[0][0])


_decoder = msgspec.json.Decoder(Tenant)
