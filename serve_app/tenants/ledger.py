"""The ledger: one row for each request, and what quotas count, in the database.

A process hands over what happened since the last time in one transaction (`exchange`): rows of
requests that are over, what it holds of each limit, and how much more it wants. A row counts once,
by its id, however often it is handed over: after a failure nobody knows whether a transaction was
done. What a row used is added to `used` in the transaction that adds the row, so that the two never
disagree.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from serve_app.tenants.database import Database, Transaction

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS request (
        id TEXT PRIMARY KEY, request_id TEXT NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL,
        adapter TEXT NOT NULL, lane TEXT NOT NULL, route TEXT NOT NULL, outcome TEXT NOT NULL,
        status BIGINT NOT NULL, prompt_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL, estimated BIGINT NOT NULL, began_s DOUBLE PRECISION NOT NULL,
        first_s DOUBLE PRECISION, ended_s DOUBLE PRECISION NOT NULL,
        gpu_s DOUBLE PRECISION NOT NULL, dollars DOUBLE PRECISION NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS request_by_time ON request (ended_s)",
    """CREATE TABLE IF NOT EXISTS used (
        tenant TEXT, kind TEXT, start BIGINT, amount DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (tenant, kind, start))""",
    """CREATE TABLE IF NOT EXISTS lease (
        process TEXT, tenant TEXT, kind TEXT, start BIGINT, amount DOUBLE PRECISION NOT NULL,
        until_s DOUBLE PRECISION NOT NULL, PRIMARY KEY (process, tenant, kind, start))""",
)


_LONGEST_WINDOW_S = 32 * 86_400


class Row(msgspec.Struct, frozen=True, gc=False):
    """A request that is over.

    Attributes:
        id: its own; a client may use one request id for several requests.
        outcome: ok, left (the client did), error, or lost: its process was killed.
        estimated: whether its tokens are what was reserved, or some of its GPU seconds are an
            estimate, because nobody knows better.
        began_s, first_s, ended_s: Unix time.
        gpu_s: seconds of GPUs.
        windows: by kind of limit, the start of the window in which it counts.
    """

    id: str
    request_id: str
    tenant: str
    model: str
    adapter: str
    lane: str
    route: str
    outcome: str
    status: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    estimated: bool
    began_s: float
    first_s: float | None
    ended_s: float
    gpu_s: float
    dollars: float
    windows: dict[str, int] = {}

    def amount(self, kind: str) -> int:
        """What it uses of a limit of this kind."""
        return self.tokens if kind.startswith("tokens") else int(kind.startswith("requests"))

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


COLUMNS = tuple(name for name in Row.__struct_fields__ if name != "windows")


class Total(msgspec.Struct, frozen=True):
    """Sums over rows.

    Attributes:
        started: rows with a first output, and their times to it in `first_s`.
    """

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    gpu_s: float = 0.0
    dollars: float = 0.0
    started: int = 0
    first_s: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def ttft_s(self) -> float | None:
        """The mean time to the first output."""
        return self.first_s / self.started if self.started else None

    def __add__(self, other: "Total") -> "Total":
        names = self.__struct_fields__
        return Total(*(getattr(self, name) + getattr(other, name) for name in names))


class Claim(msgspec.Struct, frozen=True):
    """What a process holds of a limit, and how much more it wants."""

    tenant: str
    kind: str
    start: int
    limit: int
    held: float
    wanted: float


class Grant(msgspec.Struct, frozen=True):
    """The amount that a claim was granted, and the amount left for others."""

    amount: float
    left: float


class Ledger:
    """The tables of requests, usage and leases."""

    def __init__(self, database: Database, process: str, lease_s: float = 10.0) -> None:
        self.database = database
        self._process, self._lease_s = process, lease_s

    def prepare(self) -> None:
        with self.database.transaction() as transaction:
            for statement in _SCHEMA:
                transaction.do(statement)

    def exchange(self, rows: Sequence[Row], claims: Sequence[Claim], now_s: float) -> list[Grant]:
        """Write rows, and grant claims as far as the quota allows.

        Raises:
            DatabaseError: nobody knows whether it was done. Do it again, with the same rows.
        """
        with self.database.transaction() as transaction:
            self._add(transaction, rows)
            transaction.do(
                "DELETE FROM lease WHERE process = ? OR until_s < ?", [self._process, now_s]
            )
            return [self._lend(transaction, claim, now_s) for claim in claims]

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows that another process left."""
        with self.database.transaction() as transaction:
            self._add(transaction, rows)

    def leave(self) -> None:
        """Give every lease back."""
        with self.database.transaction() as transaction:
            transaction.do("DELETE FROM lease WHERE process = ?", [self._process])

    def _add(self, transaction: Transaction, rows: Sequence[Row]) -> None:
        places = ", ".join("?" * len(COLUMNS))
        names = ", ".join(COLUMNS)
        used: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        for row in rows:
            values = [getattr(row, name) for name in COLUMNS]
            values[COLUMNS.index("estimated")] = int(row.estimated)
            added = transaction.do(
                f"INSERT INTO request ({names}) VALUES ({places}) ON CONFLICT DO NOTHING", values
            )
            if added:
                for kind, start in row.windows.items():
                    used[row.tenant, kind, start] += row.amount(kind)
        for (tenant, kind, start), amount in used.items():
            transaction.do(
                "INSERT INTO used VALUES (?, ?, ?, ?) ON CONFLICT (tenant, kind, start)"
                " DO UPDATE SET amount = used.amount + excluded.amount",
                [tenant, kind, start, amount],
            )

    def _lend(self, transaction: Transaction, claim: Claim, now_s: float) -> Grant:
        key = [claim.tenant, claim.kind, claim.start]
        where = "WHERE tenant = ? AND kind = ? AND start = ?"
        used = transaction.ask(f"SELECT amount FROM used {where}", key)
        lent = transaction.ask(f"SELECT COALESCE(SUM(amount), 0) FROM lease {where}", key)
        left = claim.limit - (used[0][0] if used else 0) - lent[0][0] - claim.held
        amount = max(0.0, min(claim.wanted, left))
        if claim.held + amount > 0:
            transaction.do(
                "INSERT INTO lease VALUES (?, ?, ?, ?, ?, ?)",
                [self._process, *key, claim.held + amount, now_s + self._lease_s],
            )
        return Grant(amount, left - amount)

    # What is read.

    def rows(
        self, from_s: float, to_s: float, tenant: str | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """The rows of requests that ended in a time, in the order of COLUMNS."""
        of = "" if tenant is None else " AND tenant = ?"
        values = [from_s, to_s, *([] if tenant is None else [tenant])]
        with self.database.transaction(writes=False) as transaction:
            yield from transaction.ask(
                f"SELECT {', '.join(COLUMNS)} FROM request WHERE ended_s >= ? AND ended_s < ?{of}"
                " ORDER BY ended_s, id",
                values,
            )

    def totals(
        self, from_s: float, to_s: float, tenant: str | None = None
    ) -> dict[tuple[str, str], Total]:
        """Sums by tenant and model, of requests that ended in a time."""
        of = "" if tenant is None else " AND tenant = ?"
        values = [from_s, to_s, *([] if tenant is None else [tenant])]
        with self.database.transaction(writes=False) as transaction:
            rows = transaction.ask(
                "SELECT tenant, model, COUNT(*), SUM(CASE outcome WHEN 'error' THEN 1 ELSE 0 END),"
                " SUM(prompt_tokens), SUM(cached_tokens), SUM(output_tokens), SUM(gpu_s),"
                " SUM(dollars), COUNT(first_s), COALESCE(SUM(first_s - began_s), 0) FROM request"
                f" WHERE ended_s >= ? AND ended_s < ?{of} GROUP BY tenant, model",
                values,
            )
        return {(row[0], row[1]): _total(row[2:]) for row in rows}

    def used(self, tenant: str, starts: Mapping[str, int]) -> dict[str, float]:
        """What a tenant has used in these windows."""
        with self.database.transaction(writes=False) as transaction:
            amounts = {}
            for kind, start in starts.items():
                rows = transaction.ask(
                    "SELECT amount FROM used WHERE tenant = ? AND kind = ? AND start = ?",
                    [tenant, kind, start],
                )
                amounts[kind] = float(rows[0][0]) if rows else 0.0
        return amounts

    def forget(self, before_s: float) -> int:
        """Delete the rows of requests that ended before a time. Returns how many there were."""
        with self.database.transaction() as transaction:
            # A window that is not over yet may have begun a month ago.
            transaction.do("DELETE FROM used WHERE start < ?", [int(before_s) - _LONGEST_WINDOW_S])
            return transaction.do("DELETE FROM request WHERE ended_s < ?", [before_s])


def _total(sums: tuple[Any, ...]) -> Total:
    # PostgreSQL's sums of whole numbers are decimals.
    requests, errors, prompt, cached, output = (int(each) for each in sums[:5])
    gpu_s, dollars, started, first_s = sums[5:]
    return Total(
        requests, errors, prompt, cached, output, gpu_s, dollars, int(started), float(first_s)
    )
