"""Why a replica gave no answer, or not all of it: what the relay decides by."""

from dataclasses import dataclass

import msgspec

FAILURES = ("connection", "died", "malformed", "restarting", "silent")


@dataclass(frozen=True)
class Whole:
    """A response that came in one piece."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def message(self) -> str:
        """Of an error in JSON; otherwise the beginning of the body."""
        try:
            return str(msgspec.json.decode(self.body)["error"]["message"])
        except (msgspec.DecodeError, KeyError, TypeError):
            return self.body[:200].decode("utf-8", "replace")


class Busy(Exception):
    """A replica is full. Its answer is kept for the case that all replicas are full."""

    def __init__(self, refusal: Whole) -> None:
        super().__init__(f"status {refusal.status}")
        self.refusal = refusal


class ReplicaFailed(Exception):
    """A replica did not answer to the end.

    Attributes:
        kind: one of FAILURES. "connection": it refuses connections; "restarting": its engine
            restarts; "silent": it did not answer in time.
    """

    def __init__(self, why: str, kind: str = "died") -> None:
        super().__init__(why)
        self.kind = kind

    @property
    def died(self) -> bool:
        """Whether it may have been this request that ended it. All requests of a silent replica
        fall silent, so that says nothing of one of them."""
        return self.kind in ("died", "malformed")
