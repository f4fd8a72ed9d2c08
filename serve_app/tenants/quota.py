"""What a tenant may still use: windows of time, and one process's part of each quota.

A quota is one number for the fleet, kept in the database (ledger.py). A process borrows some of it,
a *lease*, so that a request is decided without asking the database. Pure: no clock, no I/O.

    used     by requests that are over, in the database
    lease    of a process, in the database: what its requests under way are taken to use, and some
             more for the next ones
    left     limit - used - all leases

What a request will use is estimated when it begins and known when it ends. It counts in the windows
in which it began.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache

from serve_app.tenants.tenant import Quota

# The part of a quota that a process borrows beyond what its requests need. What it does not use is
# given back within a second, so that it is the most by which a quota is missed.
_BORROWED_PART = 1000


class Kind(StrEnum):
    """The limits of a Quota, by the names of its fields."""

    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    TOKENS_PER_DAY = "tokens_per_day"
    TOKENS_PER_MONTH = "tokens_per_month"
    RUNNING_REQUESTS = "running_requests"

    @property
    def is_budget(self) -> bool:
        """Whether it bounds what a tenant spends, not how fast."""
        return self in (Kind.TOKENS_PER_DAY, Kind.TOKENS_PER_MONTH)

    @property
    def counts_tokens(self) -> bool:
        return self.startswith("tokens")

    def window(self, now_s: float) -> tuple[int, int]:
        """Start and end of the window that a moment is in, as Unix time."""
        return _window(self, int(now_s))


@lru_cache(64)
def _window(kind: Kind, now_s: int) -> tuple[int, int]:
    if kind is Kind.RUNNING_REQUESTS:
        return 0, now_s + 2  # It is about now; there may be room in a second.
    now = datetime.fromtimestamp(now_s, UTC)
    if kind is Kind.TOKENS_PER_DAY:
        start = now.replace(hour=0, minute=0, second=0)
        end = start + timedelta(days=1)
    elif kind is Kind.TOKENS_PER_MONTH:
        start = now.replace(day=1, hour=0, minute=0, second=0)
        end = (start + timedelta(days=32)).replace(day=1)
    else:
        start = now.replace(second=0)
        end = start + timedelta(minutes=1)
    return int(start.timestamp()), int(end.timestamp())


@lru_cache(4096)
def limits_of(quota: Quota) -> dict[Kind, int]:
    """The limits that a quota sets."""
    limits = {kind: getattr(quota, kind.value) for kind in Kind}
    return {kind: limit for kind, limit in limits.items() if limit is not None}


@dataclass(slots=True)
class Allowance:
    """One process's part of one limit of one tenant, in one window.

    Attributes:
        lease: what this process may use, of which
        reserved: is for requests under way, and
        spent: was used by requests that are over and that the database has not counted yet.
        used: all that this process used, counted or not.
        wanted: how much more requests waited for since the last exchange with the database.
        left: of the limit for any process, as the database said last; `asked`: it has said so.
        touched: whether a request asked for it since the last exchange.
    """

    kind: Kind
    limit: int
    start: int
    lease: float = 0.0
    reserved: float = 0.0
    spent: float = 0.0
    used: float = 0.0
    wanted: float = 0.0
    left: float = 0.0
    asked: bool = False
    touched: bool = True
    counts_tokens: bool = field(init=False)

    def __post_init__(self) -> None:
        self.counts_tokens = self.kind.counts_tokens

    @property
    def free(self) -> float:
        return self.lease - self.reserved - self.spent

    @property
    def remaining(self) -> int:
        """The remaining quota that the tenant sees."""
        remaining = self.free + self.left if self.asked else self.limit - self.reserved - self.used
        return max(0, min(self.limit, int(remaining)))

    def need(self, tokens: float) -> float:
        """What a request takes; one that is larger than the limit takes all of it."""
        return min(tokens, self.limit) if self.counts_tokens else 1.0

    def reserve(self, amount: float) -> None:
        self.reserved += amount

    def settle(self, reserved: float, used: float) -> None:
        """A request has ended for which this amount was reserved."""
        self.reserved -= reserved
        if self.kind is not Kind.RUNNING_REQUESTS:
            self.spent += used
            self.used += used

    def is_low(self) -> bool:
        """Whether more is to be borrowed before it is needed."""
        return self.free < self.limit // (2 * _BORROWED_PART)

    def fits_alone(self, amount: float) -> bool:
        """Whether this process alone stays within the limit."""
        return self.reserved + self.used + amount <= self.limit

    # The exchange with the database.

    def give_back(self) -> float:
        """Reduce the lease to the reserved amount and a little more for the next request."""
        reserve = min(max(0.0, self.free), self.limit // _BORROWED_PART)
        self.lease = self.reserved + self.spent + reserve
        return self.reserved + reserve

    def wish(self) -> float:
        """How much more to borrow."""
        if not self.wanted and not self.is_low():
            return 0.0
        return self.wanted - min(0.0, self.free) + self.limit // _BORROWED_PART

    def counted(self, spent: float) -> None:
        """The database has counted this amount of what was spent."""
        self.spent -= spent
        self.lease -= spent

    def granted(self, amount: float, left: float) -> None:
        self.lease += amount
        self.left, self.asked = left, True
