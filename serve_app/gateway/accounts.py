"""The work of the replicas' engines for the requests of this gateway, for the ledger of tenants.

Each replica reports every completed request (replica/accounts.py), just after its answer. The
reports of all attempts are summed: a prompt is charged once, generated tokens and GPU time for each
attempt. A killed replica reports nothing. The tokens of its attempt are those that passed the
gateway, and its GPU seconds are estimated from its duration and from reported attempts of the same
time.
"""

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass

import aiohttp
import msgspec

from serve_app.gates.work import Work
from serve_app.gateway.fleet import Fleet, Upstream
from serve_app.replica.accounts import HEADER, PATH, Account
from serve_app.replica.backend import TOKEN_HEADER

# How long reports may come after the end of an answer.
_LATE_S = 5.0
# The same if the replica failed. Its engine may have died alone, and then it reports at once.
_FAILED_S = 0.25
_RETRY_S = 1.0
# The weight of earlier reports in `_Rate`, each time another one comes.
_KEPT = 0.99


@dataclass
class _Rate:
    """GPU seconds in a second of an attempt, by the reports of the last hundred or so attempts."""

    gpu_s: float = 0.0
    lasted_s: float = 0.0

    def add(self, gpu_s: float, lasted_s: float) -> None:
        self.gpu_s = _KEPT * self.gpu_s + gpu_s
        self.lasted_s = _KEPT * self.lasted_s + lasted_s

    def gpu_s_of(self, lasted_s: float) -> float:
        return lasted_s * self.gpu_s / self.lasted_s if self.lasted_s else 0.0


@dataclass
class _Attempt:
    """One attempt: at which replica, since when, and its report.

    Attributes:
        lasted_s: until the replica failed or reported.
    """

    replica: str
    began_s: float
    report: Account | None = None
    lasted_s: float = 0.0


class Attempts:
    """The attempts at one request, with the report of each.

    Args:
        work: to be filled in.
    """

    def __init__(self, accounts: "Accounts", work: Work) -> None:
        self._accounts, self._work = accounts, work
        self._attempts: dict[int, _Attempt] = {}  # By their numbers.
        self._awaited: set[int] = set()
        # Attempts that failed after their replicas may have worked on the request.
        self._lost: set[int] = set()
        self._news = asyncio.Event()

    def begin(self, replica: Upstream) -> tuple[str, str]:
        """The header of another attempt, which this replica will report."""
        number = self._accounts.number(self, replica)
        self._attempts[number] = _Attempt(replica.name, self._accounts.now_s())
        self._awaited.add(number)
        return HEADER, f"{self._accounts.name} {number}"

    def give_up(self, lost: bool = False) -> None:
        """Take the reports of the attempts so far if they come, and do not wait long for them.

        Args:
            lost: the replica failed as it answered.
        """
        if lost:
            for number in self._awaited:
                self._ended(self._attempts[number])
            self._lost |= self._awaited
        self._awaited.clear()

    def report(self, account: Account) -> None:
        attempt = self._attempts[account.number]
        attempt.report = account
        if account.number not in self._lost:
            self._ended(attempt)
        self._accounts.learn(attempt.replica, account.gpu_s, attempt.lasted_s)
        self._awaited.discard(account.number)
        self._lost.discard(account.number)
        self._news.set()

    def end(self, seen_tokens: int) -> None:
        """The request is over: its work is complete once `work.reported` is done.

        Args:
            seen_tokens: of the answer, that came through here.
        """
        self._work.reported = self._accounts.settle(self._settled(seen_tokens))

    async def _settled(self, seen_tokens: int) -> None:
        await self._wait_for(self._awaited, _LATE_S)
        await self._wait_for(self._lost, _FAILED_S)
        self._accounts.forget(self._attempts)
        self._add_up(seen_tokens)

    def _ended(self, attempt: _Attempt) -> None:
        attempt.lasted_s = self._accounts.now_s() - attempt.began_s

    async def _wait_for(self, numbers: set[int], timeout_s: float) -> None:
        """Wait until these attempts are reported."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while numbers:
                    self._news.clear()
                    await self._news.wait()

    def _add_up(self, seen_tokens: int) -> None:
        work, attempts = self._work, self._attempts.values()
        reports = [each.report for each in attempts if each.report is not None]
        lost = [self._attempts[number] for number in self._lost]
        work.gpu_s = sum(report.gpu_s for report in reports)
        work.gpu_s += sum(self._accounts.gpu_s_of(each.replica, each.lasted_s) for each in lost)
        work.estimated = bool(lost)
        reported = [report for report in reports if report.has_counts]
        if not reported:
            return
        work.has_counts = True
        # A continuing attempt reads the same prompt again, and more of it comes from the cache.
        work.prompt_tokens = max(each.prompt_tokens for each in reported)
        work.cached_tokens = reported[0].cached_tokens
        work.output_tokens = max(seen_tokens, sum(each.output_tokens for each in reported))


class Accounts:
    """The reports of the replicas of one model.

    Args:
        session: that asks the replicas.

    Attributes:
        name: of this gateway.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        replicas: Fleet,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session, self._replicas, self.now_s = session, replicas, now_s
        self.name = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._open: dict[int, Attempts] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._rate, self._rates = _Rate(), dict[str, _Rate]()

    def number(self, attempts: Attempts, replica: Upstream) -> int:
        """The number of another attempt, by which this replica reports it."""
        reader = self._readers.get(replica.name)
        if reader is None or reader.done():
            self._readers[replica.name] = asyncio.create_task(self._read(replica))
        number = next(self._numbers)
        self._open[number] = attempts
        return number

    def learn(self, replica: str, gpu_s: float, lasted_s: float) -> None:
        """An attempt at this replica took so long, and so many seconds of its GPUs."""
        for rate in (self._rate, self._rates.setdefault(replica, _Rate())):
            rate.add(gpu_s, lasted_s)

    def gpu_s_of(self, replica: str, lasted_s: float) -> float:
        """The GPU seconds of an attempt that was not reported, as those of others there were.

        Of a replica that has reported nothing: as at all replicas of the model.
        """
        return self._rates.get(replica, self._rate).gpu_s_of(lasted_s)

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
            with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
                async with self._session.get(url, headers=headers) as response:
                    response.raise_for_status()
                    async for line in response.content:
                        self._report(msgspec.json.decode(line, type=Account))
            if replica not in self._replicas:
                self._readers.pop(replica.name, None)
                self._rates.pop(replica.name, None)
                return
            await asyncio.sleep(_RETRY_S)

    def _report(self, account: Account) -> None:
        if (attempts := self._open.get(account.number)) is not None:
            attempts.report(account)
