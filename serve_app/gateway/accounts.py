"""What the replicas' engines did for the requests of this gateway, for the ledger of tenants.

Each replica reports every request that is over (replica/accounts.py), a moment after its answer.
Reports of all attempts are added up: a prompt is charged once, and what was generated or took a
GPU's time in each. A replica that is killed reports nothing: of its attempt the tokens are known
that came through here.
"""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import Coroutine, Iterable

import aiohttp
import msgspec

from serve_app.gates.work import Work
from serve_app.gateway.fleet import Fleet, Upstream
from serve_app.replica.accounts import HEADER, PATH, Account
from serve_app.replica.backend import TOKEN_HEADER

# How long reports may come after the end of an answer.
_LATE_S = 5.0
_RETRY_S = 1.0


class Attempts:
    """The attempts at one request, with the report of each.

    Args:
        work: to be filled in.
    """

    def __init__(self, accounts: "Accounts", work: Work) -> None:
        self._accounts, self._work = accounts, work
        # By the number of each attempt: its report.
        self._reports: dict[int, Account | None] = {}
        self._awaited: set[int] = set()
        self._news = asyncio.Event()

    def begin(self, replica: Upstream) -> tuple[str, str]:
        """The header of another attempt, which this replica will report."""
        number = self._accounts.number(self, replica)
        self._reports[number] = None
        self._awaited.add(number)
        return HEADER, f"{self._accounts.name} {number}"

    def give_up(self) -> None:
        """A replica failed: its report is taken if it comes, and not waited for."""
        self._awaited.clear()

    def report(self, account: Account) -> None:
        self._reports[account.number] = account
        self._awaited.discard(account.number)
        self._news.set()

    def end(self, seen_tokens: int) -> None:
        """The request is over: its work is complete once `work.reported` is done.

        Args:
            seen_tokens: of the answer, that came through here.
        """
        self._work.reported = self._accounts.settle(self._settled(seen_tokens))

    async def _settled(self, seen_tokens: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LATE_S):
                while self._awaited:
                    self._news.clear()
                    await self._news.wait()
        self._accounts.forget(self._reports)
        self._add_up(
            [report for report in self._reports.values() if report is not None], seen_tokens
        )

    def _add_up(self, reports: list[Account], seen_tokens: int) -> None:
        known, work = [report for report in reports if report.known], self._work
        work.gpu_s = sum(report.gpu_s for report in reports)
        if not known:
            return
        work.known = True
        # An attempt that goes on reads the same prompt again, and finds more of it cached.
        work.prompt_tokens = max(each.prompt_tokens for each in known)
        work.cached_tokens = known[0].cached_tokens
        work.output_tokens = max(seen_tokens, sum(each.output_tokens for each in known))


class Accounts:
    """The reports of the replicas of one model.

    Args:
        session: that asks the replicas.

    Attributes:
        name: of this gateway.
    """

    def __init__(self, session: aiohttp.ClientSession, replicas: Fleet) -> None:
        self._session, self._replicas = session, replicas
        self.name = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._open: dict[int, Attempts] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._settling: set[asyncio.Task[None]] = set()

    def number(self, attempts: Attempts, replica: Upstream) -> int:
        """The number of another attempt, by which this replica reports it."""
        reader = self._readers.get(replica.name)
        if reader is None or reader.done():
            self._readers[replica.name] = asyncio.create_task(self._read(replica))
        number = next(self._numbers)
        self._open[number] = attempts
        return number

    def forget(self, numbers: Iterable[int]) -> None:
        """Reports with these numbers that come later are dropped."""
        for number in numbers:
            del self._open[number]

    def settle(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        """Run what ends a request; `end` waits for it."""
        task = asyncio.create_task(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def end(self) -> None:
        """Settle open accounts and stop reading."""
        if self._settling:
            await asyncio.wait(self._settling)
            await asyncio.sleep(0)  # For who is called back by them.
        for reader in self._readers.values():
            reader.cancel()

    async def _read(self, replica: Upstream) -> None:
        """Until the replica ends its response, or is gone."""
        url = f"http://{replica.address}{PATH}"
        headers = {TOKEN_HEADER: replica.token, HEADER: self.name}
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, msgspec.MsgspecError):
                async with self._session.get(url, headers=headers) as response:
                    response.raise_for_status()
                    async for line in response.content:
                        self._report(msgspec.json.decode(line, type=Account))
            if replica not in self._replicas:
                self._readers.pop(replica.name, None)
                return
            await asyncio.sleep(_RETRY_S)

    def _report(self, account: Account) -> None:
        if (attempts := self._open.get(account.number)) is not None:
            attempts.report(account)
