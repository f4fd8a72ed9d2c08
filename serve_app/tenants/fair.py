"""Whose turn it is: a queue that shares work between tenants by weight, within classes.

A virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each
tenant has a counter of the work done for it, divided by its weight, and the tenant with the lowest
counter is served next. Its requests are served in their order.

Work is counted when a request begins, as it is expected to be, and corrected when it ends. A
request that is turned away or leaves the queue costs nothing.

A tenant that asks for less than its share may save up as much as one batch is work, so that a burst
of it does not wait. A tenant that was served more than others who ask now leaves them room: a part
of the batch, so that they need not wait until something ends; and its prompts go to the engine a
few at a time, because the engine reads them in order of arrival and the next request waits for all
that are not read yet.

Tenants of a higher class go first. A class that waits is passed over at most `MOST_PASSED` times in
a row by higher ones, whatever they ask for.

Pure: no clock, no I/O. gates/admission.py holds one for each replica.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# How often a class may be passed over in a row.
MOST_PASSED = 8
# How much more work an output token is than one of a prompt.
OUTPUT_WEIGHT = 2.0
# The part of a batch that is kept for tenants below their share.
_KEPT_PART = 16
# By default: `max_unread_tokens` of a FairQueue.
UNREAD_TOKENS = 3072
# Until half of the batch is filled it adds prompts in any case, so that the engine is not idle.
_BUSY_PART = 2
# Accounts of idle tenants that are kept before the useless ones are looked for.
_IDLE_ACCOUNTS = 64

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Share:
    """Of whom a request is, as far as the queue asks.

    Attributes:
        rank: of its class; the lowest is served first.
    """

    name: str = ""
    weight: float = 1.0
    rank: int = 1


# Of all requests, where there are no tenants: served in order of arrival.
EVERYBODY = Share()


def work_of(prompt_tokens: float, output_tokens: float) -> float:
    """The work of a request, in tokens of a prompt that is not cached."""
    return prompt_tokens + OUTPUT_WEIGHT * output_tokens


@dataclass(eq=False, slots=True)
class Entry(Generic[Item]):
    """A request that waits or runs.

    Attributes:
        sequences: of the batch that it takes.
        work: that it is expected to be.
        prompt_tokens: that it is expected to have.
        order: of arrival.
    """

    share: Share
    sequences: int
    work: float
    prompt_tokens: int
    item: Item
    order: int


@dataclass(eq=False, slots=True)
class _Account(Generic[Item]):
    """The state of one tenant.

    Attributes:
        share: as its latest request said: it may change while others wait.
        counter: the work done for it, divided by its weight.
        running, sequences: its requests that are served, and their sequences.
    """

    share: Share
    counter: float
    waiting: deque[Entry[Item]] = field(default_factory=deque)
    running: int = 0
    sequences: int = 0


class FairQueue(Generic[Item]):
    """The requests that wait, and an account of each tenant that has any or had some lately.

    Args:
        max_unread_tokens: a tenant above its share adds no prompt that would leave the engine more
            prompt tokens to read than this. Fewer shorten the wait of other tenants, and cost
            throughput.
    """

    def __init__(self, max_unread_tokens: int = UNREAD_TOKENS) -> None:
        self._max_unread_tokens = max_unread_tokens
        self._accounts: dict[str, _Account[Item]] = {}
        # The accounts with requests that wait, by the rank of their class and by name.
        self._active: dict[int, dict[str, _Account[Item]]] = {}
        # By rank: how often in a row it was passed over as it waited.
        self._passed: dict[int, int] = {}
        self._length = self._running = self._order = 0
        self._running_work = 0.0
        # Sequences that run and have no token yet, by request, in the order in which they began.
        self._unread: dict[Entry[Item], int] = {}
        self._unread_tokens = 0

    def __len__(self) -> int:
        return self._length

    def push(
        self, share: Share, sequences: int, work: float, item: Item, prompt_tokens: int = 0
    ) -> Entry[Item]:
        """A request comes and waits."""
        entry = self._entry(share, sequences, work, item, prompt_tokens)
        account = self._joined(share)
        account.waiting.append(entry)
        self._active.setdefault(share.rank, {})[share.name] = account
        self._length += 1
        return entry

    def first(self) -> Entry[Item] | None:
        """The request whose turn it is; it stays in the queue."""
        if not self._length:
            return None
        return _least(self._active[self._next_rank()].values())

    def first_below_share(self) -> Entry[Item] | None:
        """Whose turn it is of the tenants that were served less than others."""
        for rank in sorted(self._active):
            if below := [each for each in self._active[rank].values() if not self._is_above(each)]:
                return _least(below)
        return None

    def fits(
        self, share: Share, sequences: int, prompt_tokens: int, running: int, batch: int
    ) -> bool:
        """Whether a request of this tenant may begin now.

        Args:
            running: sequences in the batch.
            batch: how many it takes.
        """
        wanted = running + sequences
        if wanted > batch or not self.is_above(share):
            return wanted <= batch
        if wanted > batch - batch // _KEPT_PART:
            return False
        unread_tokens = self._unread_tokens + prompt_tokens
        may_add = not self._unread or unread_tokens <= self._max_unread_tokens
        return may_add or running < batch // _BUSY_PART

    def is_above(self, share: Share) -> bool:
        """Whether a tenant was served more than others that ask now."""
        account = self._accounts.get(share.name)
        return account is not None and self._is_above(account)

    def begin(self, entry: Entry[Item], sequences: int) -> None:
        """A request with this many sequences leaves the queue to be served."""
        entry.sequences = sequences
        self._pass_over(self._accounts[entry.share.name].share.rank)
        self._unqueue(entry)
        self._charge(entry)

    def begin_at_once(
        self, share: Share, sequences: int, work: float, item: Item, prompt_tokens: int = 0
    ) -> Entry[Item]:
        """A request is served that did not have to wait."""
        entry = self._entry(share, sequences, work, item, prompt_tokens)
        self._joined(share)
        self._charge(entry)
        return entry

    def read(self, sequences: int) -> None:
        """The engine produced the first tokens of this many sequences, the oldest first.

        Which ones is not known; the engine reads prompts in their order.
        """
        while sequences > 0 and self._unread:
            entry, left = next(iter(self._unread.items()))
            if left > sequences:
                self._unread[entry] = left - sequences
                return
            sequences -= left
            self._was_read(entry)

    def leave(self, entry: Entry[Item]) -> None:
        """A request leaves the queue, and costs nothing."""
        self._unqueue(entry)
        self._clear_if_idle()

    def _unqueue(self, entry: Entry[Item]) -> None:
        account = self._accounts[entry.share.name]
        account.waiting.remove(entry)
        self._length -= 1
        if not account.waiting:
            self._deactivate(account)

    def end(self, entry: Entry[Item], work: float) -> None:
        """A request that was served is over, and was this much work."""
        account = self._accounts[entry.share.name]
        account.counter += (work - entry.work) / entry.share.weight
        self._was_read(entry)
        account.running -= 1
        account.sequences -= entry.sequences
        self._running -= 1
        self._running_work -= entry.work
        self._clear_if_idle()

    def victim(self, share: Share) -> Entry[Item] | None:
        """The request to turn away for one of `share` where the queue is full.

        The youngest of the tenant that has the most in the queue for its weight, of the lowest
        class. None: that is the tenant of the new request itself.
        """
        own = self._accounts.get(share.name)
        longest = (share.rank, ((len(own.waiting) if own else 0) + 1) / share.weight)
        youngest = None
        for rank, tenants in self._active.items():
            for name, each in tenants.items():
                size = (rank, len(each.waiting) / each.share.weight)
                if name != share.name and size > longest:
                    longest, youngest = size, each.waiting[-1]
        return youngest

    def _clear_if_idle(self) -> None:
        """Reset all counters when no request waits or runs: nothing remains to compare."""
        if not self._running and not self._length:
            self._accounts.clear()
            self._running_work = 0.0

    def _was_read(self, entry: Entry[Item]) -> None:
        if self._unread.pop(entry, None) is not None:
            self._unread_tokens -= entry.prompt_tokens

    def _entry(
        self, share: Share, sequences: int, work: float, item: Item, prompt_tokens: int
    ) -> Entry[Item]:
        self._order += 1
        return Entry(share, sequences, work, prompt_tokens, item, self._order)

    def _is_above(self, account: _Account[Item]) -> bool:
        """Whether a tenant was served more than others that ask now, of its class or above."""
        rank = account.share.rank
        others = [
            each.counter
            for each in self._accounts.values()
            if each is not account and each.share.rank <= rank and (each.running or each.waiting)
        ]
        return bool(others) and account.counter > sum(others) / len(others)

    def _joined(self, share: Share) -> _Account[Item]:
        """The account of a tenant that asks; one that had nothing waiting saved nothing up."""
        account = self._accounts.get(share.name)
        if account is not None and account.waiting:
            if account.share != share:
                self._deactivate(account)
                account.share = share
                self._active.setdefault(share.rank, {})[share.name] = account
            return account
        # The least that a tenant begins with: it may have saved up as much as one batch is work.
        least = self._floor() - self._running_work / share.weight
        if account is None:
            self._forget_idle(least)
            account = self._accounts[share.name] = _Account(share, least)
        account.share, account.counter = share, max(account.counter, least)
        return account

    def _deactivate(self, account: _Account[Item]) -> None:
        rank = account.share.rank
        del self._active[rank][account.share.name]
        if not self._active[rank]:
            del self._active[rank]
            self._passed.pop(rank, None)

    def _floor(self) -> float:
        """The counter of the tenant that was served least, of those that wait, or else run."""
        waiting = [
            tenant.counter for tenants in self._active.values() for tenant in tenants.values()
        ]
        if waiting:
            return min(waiting)
        running = (account.counter for account in self._accounts.values() if account.running)
        return min(running, default=0.0)

    def _forget_idle(self, least: float) -> None:
        """Drop the accounts of tenants that would begin with `least` if they came back."""
        if len(self._accounts) < _IDLE_ACCOUNTS + 2 * (self._length + self._running):
            return
        self._accounts = {
            name: each
            for name, each in self._accounts.items()
            if each.waiting or each.running or each.counter > least
        }

    def _next_rank(self) -> int:
        late = [rank for rank in self._active if self._passed.get(rank, 0) >= MOST_PASSED]
        return max(late, key=lambda rank: self._passed[rank]) if late else min(self._active)

    def _pass_over(self, served: int) -> None:
        for rank in self._active:
            if rank > served:
                self._passed[rank] = self._passed.get(rank, 0) + 1
        self._passed.pop(served, None)

    def _charge(self, entry: Entry[Item]) -> None:
        account = self._accounts[entry.share.name]
        account.counter += entry.work / entry.share.weight
        account.running += 1
        account.sequences += entry.sequences
        self._running += 1
        self._running_work += entry.work
        self._unread[entry] = entry.sequences
        self._unread_tokens += entry.prompt_tokens


def _least(accounts: Iterable[_Account[Item]]) -> Entry[Item]:
    """The next request of the tenant that was served least; of several, the one that came first."""
    return min(accounts, key=lambda each: (each.counter, each.waiting[0].order)).waiting[0]
