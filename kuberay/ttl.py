"""How long a cluster may live, kept where the cluster is: in its tags.

`up --ttl-hours 8` tags the cluster with the moment at which its hours end, and with what is then
to be done: `report` (the default) or `down`. Tags need no machine of ours to stay on, and whoever
finds the cluster finds them. `status` reports an outlived cluster and ends with status 1; `down
--if-expired` from a timer takes it down, where it is so tagged.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from kuberay.aws import Account, tags
from kuberay.errors import AwsError, EksError
from kuberay.owned import EXPIRES, ON_EXPIRY, Owner

ACTIONS = ("report", "down")
_MOST_HOURS = 87600  # Ten years.


@dataclass(frozen=True)
class Ttl:
    """When a cluster's hours end, and what then. `expires` of None: never."""

    expires: datetime | None = None
    action: str = "report"

    @classmethod
    def starting(cls, now: datetime, hours: float, action: str) -> "Ttl":
        return cls((now + timedelta(hours=hours)).replace(microsecond=0), action)

    @classmethod
    def of(cls, carried: Mapping[str, str]) -> "Ttl":
        """What a cluster's tags say.

        Raises:
            EksError: they say no moment. A guard that guesses is none.
        """
        text = carried.get(EXPIRES)
        if not text:
            return cls()
        try:
            expires = datetime.fromisoformat(text)
        except ValueError as error:
            raise EksError(f"the tag {EXPIRES} = {text!r} is not a time") from error
        aware = expires if expires.tzinfo else expires.replace(tzinfo=UTC)
        return cls(aware, carried.get(ON_EXPIRY, "report"))

    @property
    def tags(self) -> dict[str, str]:
        if self.expires is None:
            return {}
        return {EXPIRES: self.expires.isoformat(), ON_EXPIRY: self.action}

    def hours_left(self, now: datetime) -> float | None:
        """Negative once the hours are over."""
        return None if self.expires is None else (self.expires - now).total_seconds() / 3600

    def expired(self, now: datetime) -> bool:
        left = self.hours_left(now)
        return left is not None and left <= 0

    def describe(self, now: datetime) -> str:
        left = self.hours_left(now)
        if left is None:
            return "no end is set (up --ttl-hours sets one)"
        if left > 0:
            return f"{left:.1f} hours left, until {self.expires}; then: {self.action}"
        return f"OUTLIVED by {-left:.1f} hours (since {self.expires}); to be done: {self.action}"


def read(account: Account, owner: Owner) -> Ttl:
    """The cluster's own; where it is gone already, that of the stacks that made it.

    A teardown that was interrupted leaves stacks without a cluster, and they bill.
    """
    try:
        cluster = account.call("eks", "describe_cluster", name=owner.name)["cluster"]
    except AwsError as error:
        if not error.absent:
            raise
    else:
        return Ttl.of(tags(cluster, "tags"))
    for stack in account.pages("cloudformation", "describe_stacks", "Stacks"):
        carried = tags(stack)
        if owner.owns(carried) and EXPIRES in carried:
            return Ttl.of(carried)
    return Ttl()


def write(account: Account, owner: Owner, ttl: Ttl) -> None:
    """Give a cluster this end; without one, take away the end that it has."""
    cluster = account.call("eks", "describe_cluster", name=owner.name)["cluster"]
    if ttl.tags:
        account.call("eks", "tag_resource", resourceArn=cluster["arn"], tags=ttl.tags)
    for key in ({EXPIRES, ON_EXPIRY} & tags(cluster, "tags").keys()) - ttl.tags.keys():
        account.call("eks", "untag_resource", resourceArn=cluster["arn"], tagKeys=[key])


def hours(text: str) -> float:
    """`--ttl-hours` as a number.

    Raises:
        ArgumentTypeError: it is not a number of hours between 0 and ten years.
    """
    try:
        count = float(text)
    except ValueError:
        count = math.nan
    if not 0 <= count <= _MOST_HOURS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of hours from 0 to {_MOST_HOURS}"
        )
    return count
