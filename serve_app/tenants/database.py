"""The database of tenants: SQLite in a file, or PostgreSQL where several nodes share it.

The two are asked the same statements, with `?` for parameters. A transaction that writes excludes
all others that do, in SQLite by its lock of the file and in PostgreSQL by an advisory lock, so that
what one reads in it stays true until it writes. Transactions are short: their callers collect what
they have to write.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError, ServeError

_SCHEMES = ("postgresql://", "postgres://")
# Any number that no other program of the same database uses for an advisory lock.
_LOCK = 7_230_025
_BUSY_S = 5.0
_CONNECT_S = 5

Row = tuple[Any, ...]


class DatabaseError(ServeError):
    """The database cannot be asked now."""


class Database:
    """One connection, opened when it is first needed and again after a failure. For one thread."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.shared = address.startswith(_SCHEMES)
        self._connection: Any = None
        self._file: int | None = None  # The inode of a SQLite file.

    @contextlib.contextmanager
    def transaction(self, writes: bool = True) -> Iterator["Transaction"]:
        """What is done in it is done as a whole or not at all.

        Args:
            writes: whether it excludes others; one that only reads need not.

        Raises:
            DatabaseError: it was not done; or the database was lost as it was confirmed.
        """
        with self._failing():
            transaction = Transaction(self._begin(writes), self.shared)
        try:
            with self._failing():
                yield transaction
                self._execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None

    def _begin(self, writes: bool) -> Any:
        if self._file is not None and os.stat(self.address).st_ino != self._file:
            self.close()  # It was replaced: what is written to the old file is lost.
        if self._connection is None:
            self._connection = self._connected()
        self._execute("BEGIN IMMEDIATE" if writes and not self.shared else "BEGIN")
        if writes and self.shared:
            self._execute(f"SELECT pg_advisory_xact_lock({_LOCK})")
        return self._connection

    def _connected(self) -> Any:
        if self.shared:
            return _psycopg().connect(self.address, autocommit=True, connect_timeout=_CONNECT_S)
        Path(self.address).parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            self.address, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        # Readers do not wait for writers, and a killed process loses nothing that it confirmed.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        self._file = os.stat(self.address).st_ino
        return connection

    def _execute(self, statement: str) -> None:
        self._connection.execute(statement)

    def _roll_back(self) -> None:
        try:
            if self._connection is not None:
                self._execute("ROLLBACK")
        except Exception:
            self.close()  # The next transaction connects again.

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        kinds: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
        if self.shared:
            kinds = (*kinds, _psycopg().Error)
        try:
            yield
        except kinds as error:
            raise DatabaseError(" ".join(str(error).split())) from error


class Transaction:
    """One transaction under way."""

    def __init__(self, connection: Any, shared: bool) -> None:
        self._connection, self._shared = connection, shared

    def ask(self, statement: str, values: Sequence[Any] = ()) -> list[Row]:
        """The rows that a statement returns."""
        return list(self._run(statement, values).fetchall())

    def do(self, statement: str, values: Sequence[Any] = ()) -> int:
        """How many rows a statement changed."""
        return int(self._run(statement, values).rowcount)

    def _run(self, statement: str, values: Sequence[Any]) -> Any:
        if self._shared:
            statement = statement.replace("?", "%s")
        return self._connection.execute(statement, tuple(values))


def _psycopg() -> Any:
    try:
        import psycopg
    except ImportError:
        raise ConfigError(
            "tenants.database",
            "postgresql://...",
            "needs psycopg: pip install 'qwen-ray-serve[tenants]'",
        ) from None
    return psycopg
