"""How a replica can fail to answer a request, or to complete its answer."""

from dataclasses import dataclass

import msgspec

FAILURES = ("connection", "died", "malformed", "restarting", "silent")


@dataclass(frozen=True)
class WholeResponse:
    """A response that is not streamed."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def message(self) -> str:
        """The message of an error in JSON, or else the beginning of the body."""
        try:
            return str(msgspec.json.decode(self.body)["error"]["message"])
        except (ValueError, RecursionError, KeyError, TypeError):
            return self.body[:200].decode("utf-8", "replace")


class Busy(Exception):
    """A replica is full. Its answer is kept for the case that all replicas are full."""

    def __init__(self, refusal: WholeResponse) -> None:
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
        """Whether this request may have killed the replica.

        A silent replica is silent for all its requests, so none of them is suspected.
        """
        return self.kind in ("died", "malformed")

    @property
    def worked(self) -> bool:
        """Whether the replica may have worked on the request before it failed."""
        return self.kind not in ("connection", "restarting")
