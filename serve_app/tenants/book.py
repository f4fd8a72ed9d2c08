"""What the tenants of this process use: reserved when a request begins, settled when it ends.

A request is decided from what this process has borrowed of each limit (quota.py), without waiting.
Where that is not enough it waits for the next exchange with the database (ledger.py), which happens
in a thread, for all requests of the process together.

While the database is away, limits of rates are held by each process alone, and budgets of a day or
a month are closed: nobody would know what is spent. Rows of the ledger wait in the journal.
"""

import asyncio
import contextlib
import heapq
import logging
import math
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from serve_app.errors import BudgetUnknown, BudgetUsedUp, RateLimited, RequestError
from serve_app.observe import metrics
from serve_app.tenants.database import Database, DatabaseError
from serve_app.tenants.journal import REFUSED, Journal, Rolled, legacies
from serve_app.tenants.ledger import Claim, Grant, Ledger, Row, Total
from serve_app.tenants.quota import Allowance, Kind, limits_of
from serve_app.tenants.tenant import Quota, Tenant

logger = logging.getLogger("serve_app")

# How often the database hears of this process at least, while there is anything to say.
_EVERY_S = 0.5
# For how long a limit that is used up is not asked for again.
_EMPTY_S = 0.25
_RETRY_S = 1.0
# Rows of one exchange.
_MOST_ROWS = 2000
# Budgets that have a metric.
_MOST_SHOWN = 20

Key = tuple[str, Kind]


@dataclass(slots=True)
class Reservation:
    """What was reserved for one request, of each limit of its tenant.

    Attributes:
        windows: by kind of limit, the start of the window in which it counts.
    """

    parts: list[tuple[Allowance, float]]
    windows: dict[str, int] = field(default_factory=dict)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's headers, of the limits of a minute."""
        return headers_of([part for part, _ in self.parts])


@dataclass(slots=True)
class _Account:
    """The allowances of a tenant, in the windows of a time.

    Attributes:
        from_s, until_s: when all of these windows are the current ones.
    """

    quota: Quota
    allowances: list[Allowance]
    windows: dict[str, int]
    from_s: float
    until_s: float


class Book:
    """The accounts of the tenants that asked this process lately. For one event loop.

    Args:
        folder: of the journals of this machine.
        now_s: Unix time.
    """

    def __init__(self, address: str, folder: Path, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._ledger = Ledger(Database(address), uuid.uuid4().hex)
        self._ledger.prepare()
        self._folder = folder
        self.journal = Journal(folder)
        self._allowances: dict[Key, Allowance] = {}
        # By tenant, those of the last request, so that the next one need not look for them.
        self._accounts: dict[str, _Account] = {}
        # Limits that are used up: until when they are not asked for again.
        self._empty: dict[Key, float] = {}
        self._rows: list[Row] = []
        self._away = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._wake: asyncio.Event | None = None
        self._exchanged: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def reserve(self, tenant: Tenant, tokens: float) -> Reservation:
        """Reserve what a request is expected to use.

        Raises:
            RateLimited, BudgetUsedUp: a limit of its tenant is reached.
            BudgetUnknown: the database is away, and the tenant has a budget.
        """
        self._run()
        asked: list[int] | None = None
        while True:
            now_s = self._now_s()
            account = self._account(tenant, now_s)
            parts = account.allowances
            needs = [(part, part.need(tokens)) for part in parts]
            short = [need for need in needs if not self._fits(*need)]
            if not short:
                return self._reserved(needs, account.windows)
            starts = [part.start for part in parts]
            if self._away or self._is_empty(tenant.name, short, now_s) or asked == starts:
                raise self._refusal(tenant.name, parts, short[0][0], now_s)
            asked = starts
            # All of them: an exchange gives back what is not reserved of the limits that fit now.
            await self._borrow(needs)

    def _reserved(
        self, needs: list[tuple[Allowance, float]], windows: dict[str, int]
    ) -> Reservation:
        for part, amount in needs:
            part.reserve(amount)
            if part.is_low() and self._wake is not None:
                self._wake.set()
        return Reservation(needs, windows)

    async def _borrow(self, needs: list[tuple[Allowance, float]]) -> None:
        """Wait for an exchange in which these amounts are asked for."""
        for part, amount in needs:
            part.wanted += amount
        try:
            await self._exchange()
        finally:
            for part, amount in needs:
                part.wanted = max(0.0, part.wanted - amount)

    def release(self, reservation: Reservation) -> None:
        """A request has ended; its usage is not known yet."""
        running = [each for each in reservation.parts if each[0].kind is Kind.RUNNING_REQUESTS]
        for part, amount in running:
            part.settle(amount, 0)
        reservation.parts = [each for each in reservation.parts if each not in running]

    def settle(self, reservation: Reservation, row: Row) -> None:
        """A request is over. One that was refused used nothing, and is in no ledger."""
        refused = row.outcome == REFUSED
        tokens, requests = (0, 0) if refused else (row.tokens, 1)
        for part, amount in reservation.parts:
            part.settle(amount, tokens if part.counts_tokens else requests)
        self.journal.end(row)
        if not refused:
            self._rows.append(row)
        self._run()

    async def allowances(self, tenant: Tenant) -> list[Allowance]:
        """This process's part of each limit of a tenant, as the database knows them now."""
        self._run()
        allowances = self._account(tenant, self._now_s()).allowances
        if allowances and not self._away:
            await self._exchange()
        return self._account(tenant, self._now_s()).allowances

    async def totals(self, tenant: str, from_s: float, to_s: float) -> dict[tuple[str, str], Total]:
        """What a tenant used, by its name and a model.

        Raises:
            DatabaseError: the database is away.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._ledger.totals, from_s, to_s, tenant
        )

    @property
    def away(self) -> bool:
        return self._away

    async def close(self) -> None:
        """Write the remaining rows, and return all leases."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        loop = asyncio.get_running_loop()
        with contextlib.suppress(DatabaseError):
            while self._rows:
                await self._exchange_once()
            await loop.run_in_executor(self._thread, self._ledger.leave)
            self.journal.close()
        self._thread.shutdown(wait=False)

    def _account(self, tenant: Tenant, now_s: float) -> _Account:
        account = self._accounts.get(tenant.name)
        if (
            account is None
            or account.quota is not tenant.quota
            or not account.from_s <= now_s < account.until_s
        ):
            account = self._new_account(tenant, now_s)
        for allowance in account.allowances:
            allowance.touched = True
        return account

    def _new_account(self, tenant: Tenant, now_s: float) -> _Account:
        limits = limits_of(tenant.quota)
        allowances = [
            self._allowance(tenant.name, kind, limit, now_s) for kind, limit in limits.items()
        ]
        spans = {kind: kind.window(now_s) for kind in limits if kind is not Kind.RUNNING_REQUESTS}
        account = _Account(
            tenant.quota,
            allowances,
            windows={kind.value: start for kind, (start, _) in spans.items()},
            from_s=max((start for start, _ in spans.values()), default=-math.inf),
            until_s=min((end for _, end in spans.values()), default=math.inf),
        )
        if allowances:  # They say when it is to be forgotten.
            self._accounts[tenant.name] = account
        return account

    def _allowance(self, tenant: str, kind: Kind, limit: int, now_s: float) -> Allowance:
        start, _ = kind.window(now_s)
        allowance = self._allowances.get((tenant, kind))
        if allowance is None or allowance.start != start:
            allowance = self._allowances[tenant, kind] = Allowance(kind, limit, start)
        allowance.limit = limit
        return allowance

    def _fits(self, part: Allowance, amount: float) -> bool:
        if part.free >= amount:
            return True
        return self._away and not part.kind.is_budget and part.fits_alone(amount)

    def _is_empty(self, tenant: str, short: list[tuple[Allowance, float]], now_s: float) -> bool:
        return any(
            0 <= self._empty.get((tenant, part.kind), 0.0) - now_s <= _EMPTY_S for part, _ in short
        )

    def _refusal(
        self, tenant: str, parts: list[Allowance], part: Allowance, now_s: float
    ) -> RequestError:
        _, end_s = part.kind.window(now_s)
        what = part.kind.value.replace("_", " ")
        error: RequestError
        if self._away and part.kind.is_budget:
            error = BudgetUnknown("What you have used is not known now.", retry_after_s=_RETRY_S)
        elif part.kind.is_budget:
            error = BudgetUsedUp(f"Your {part.limit} {what} are used up.")
        else:
            retry_s = 1.0 if part.kind is Kind.RUNNING_REQUESTS else end_s - now_s
            error = RateLimited(
                f"Your limit of {part.limit} {what} is reached.", retry_after_s=math.ceil(retry_s)
            )
        error.headers = headers_of(parts, now_s)
        if not self._away:
            self._forget_empty(now_s)
            self._empty[tenant, part.kind] = now_s + _EMPTY_S
        metrics.quota_refusals.labels(part.kind.value).inc()
        return error

    def _forget_empty(self, now_s: float) -> None:
        """Keep no more than are in force: tenants come and go."""
        if len(self._empty) > 2 * len(self._allowances) + 100:
            self._empty = {key: until for key, until in self._empty.items() if until > now_s}

    # The exchange with the database.

    def _run(self) -> None:
        if self._task is None or self._task.done():
            self._wake = asyncio.Event()
            self._exchanged = asyncio.get_running_loop().create_future()
            self._task = asyncio.get_running_loop().create_task(self._keep())

    async def _exchange(self) -> None:
        """Wait for an exchange that begins from now on."""
        assert self._wake is not None
        assert self._exchanged is not None
        self._wake.set()
        await asyncio.shield(self._exchanged)

    async def _keep(self) -> None:
        assert self._wake is not None
        inherited_s = -math.inf
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _EVERY_S)
            self._wake.clear()
            exchanged, self._exchanged = self._exchanged, asyncio.Future()
            try:
                if time.monotonic() - inherited_s > 10:
                    inherited_s = time.monotonic()
                    await self._inherit()
                await self._exchange_once()
                self._note_away(None)
            except Exception as error:  # Also of another type: budgets must not be open then.
                self._note_away(error)
            finally:
                if exchanged is not None and not exchanged.done():
                    exchanged.set_result(None)
            if self._away:
                await asyncio.sleep(_RETRY_S)

    async def _exchange_once(self) -> None:
        rolled = self.journal.roll()
        rows = self._rows[:_MOST_ROWS]
        if rolled is not None and len(rows) < len(self._rows):
            rows = list(self._rows)  # The full file may go once all of them are handed over.
        sent: dict[Key, float] = {}
        parts: list[tuple[str, Allowance]] = []
        claims = []
        now_s = self._now_s()
        for row in rows:
            for kind in row.windows:
                key = row.tenant, Kind(kind)
                part = self._allowances.get(key)
                if part is not None and part.start == row.windows[kind]:
                    sent[key] = sent.get(key, 0.0) + row.amount(kind)
        for key, part in list(self._allowances.items()):
            start, _ = part.kind.window(now_s)
            idle = not (part.touched or part.reserved or part.spent)
            if idle or (part.start != start and not part.reserved):
                del self._allowances[key]  # Its lease is given back by not being claimed.
                self._accounts.pop(key[0], None)
                continue
            touched, part.touched = part.touched, False
            held, wanted = part.give_back(), part.wish()
            held += part.spent - sent.get(key, 0.0)  # Of rows that are not handed over yet.
            if held or wanted or touched:  # Also to hear what is left.
                claims.append(Claim(key[0], part.kind.value, part.start, part.limit, held, wanted))
                parts.append((key[0], part))
        if not rows and not claims and not self._away:
            return
        loop = asyncio.get_running_loop()
        grants: list[Grant] = await loop.run_in_executor(
            self._thread, self._ledger.exchange, rows, claims, now_s
        )
        del self._rows[: len(rows)]
        for key, amount in sent.items():
            if (counted := self._allowances.get(key)) is not None:
                counted.counted(amount)
        for (_, part), grant in zip(parts, grants, strict=True):
            part.granted(grant.amount, grant.left)
        self._show()
        if rolled is not None:
            await loop.run_in_executor(self._thread, Rolled.remove, rolled)

    def _show(self) -> None:
        """The budgets that are nearest to their end, as metrics: no more than a few."""
        used = [
            (1 - part.remaining / part.limit, tenant, kind.value)
            for (tenant, kind), part in self._allowances.items()
            if kind.is_budget and part.asked
        ]
        metrics.quota_used.clear()
        for share, tenant, kind in heapq.nlargest(_MOST_SHOWN, used):
            metrics.quota_used.labels(tenant, kind).set(share)

    async def _inherit(self) -> None:
        """Write the rows of killed processes of this machine."""

        def inherit() -> None:
            for legacy in legacies(self._folder):
                rows = legacy.rows()
                self._ledger.add(rows)
                legacy.remove()
                lost = sum(row.outcome == "lost" for row in rows)
                logger.warning("a process ended with %d requests under way", lost)

        await asyncio.get_running_loop().run_in_executor(self._thread, inherit)

    def _note_away(self, error: Exception | None) -> None:
        away = error is not None
        metrics.ledger_away.set(away)
        if away and not self._away:
            logger.error(
                "the database of tenants is away: rates are held by each process alone, budgets "
                "are closed, and the ledger waits in %s: %s",
                self._folder,
                error,
            )
        elif self._away and not away:
            logger.warning("the database of tenants is back")
        self._away = away


def headers_of(parts: list[Allowance], now_s: float | None = None) -> list[tuple[bytes, bytes]]:
    """OpenAI's headers, which LiteLLM sends as well: of the limits of a minute."""
    now_s = time.time() if now_s is None else now_s
    headers = []
    for part in parts:
        if part.kind not in _HEADERS:
            continue
        limit, remaining, reset = _HEADERS[part.kind]
        _, end_s = part.kind.window(now_s)
        headers += [
            (limit, b"%d" % part.limit),
            (remaining, b"%d" % part.remaining),
            (reset, b"%ds" % max(0, math.ceil(end_s - now_s))),
        ]
    return headers


_HEADERS = {
    kind: tuple(
        f"x-ratelimit-{name}-{kind.partition('_')[0]}".encode()
        for name in ("limit", "remaining", "reset")
    )
    for kind in (Kind.REQUESTS_PER_MINUTE, Kind.TOKENS_PER_MINUTE)
}
