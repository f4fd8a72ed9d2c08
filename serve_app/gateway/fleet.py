"""The replicas of one model, as a gateway sees them: which there are, how busy, which just failed.

Ray Serve reports which replicas run, through the router of a deployment handle (`ReplicaWatch`),
with the address and the token of each. When one dies, that report comes seconds late. So a gateway
believes its own requests first: it avoids a replica that failed for a time that doubles with each
failure, and then tries it again.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

# How long a replica that failed is left alone, the first time and at most.
_AVOID_S, _MOST_AVOID_S = 1.0, 15.0


@dataclass(eq=False)
class Upstream:
    """One replica of a model, which requests can be forwarded to.

    Attributes:
        address: host:port of its HTTP server.
        outstanding: tokens that were sent to it and are not answered, prompts included.
        running: requests that it works on for this gateway.
        failures: in a row.
        avoid_until_s: monotonic.
    """

    name: str
    address: str
    token: str
    outstanding: int = 0
    running: int = 0
    failures: int = 0
    avoid_until_s: float = 0.0


@dataclass
class Fleet:
    """All replicas of one model. For one event loop.

    Args:
        clock: monotonic seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _all: dict[str, Upstream] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def update(self, found: "Found") -> list[str]:
        """Take over what Ray Serve says: (name, metadata); returns the names that are gone."""
        before = self._all
        self._all = {
            name: before.get(name) or Upstream(name, metadata["address"], metadata["token"])
            for name, metadata in found
            if "address" in metadata
        }
        self._changed.set()
        return [name for name in before if name not in self._all]

    def __len__(self) -> int:
        return len(self._all)

    def ready(self, without: Iterable[str] = ()) -> list[Upstream]:
        """Those that may be asked now; those in `without` only if there is no other."""
        usable = self._usable()
        return [r for r in usable if r.name not in without] or usable

    def others(self, tried: Iterable[str]) -> bool:
        """Whether any may be asked now that is not in `tried`."""
        return any(r.name not in tried for r in self._usable())

    def _usable(self) -> list[Upstream]:
        now_s = self.clock()
        return [r for r in self._all.values() if r.avoid_until_s <= now_s]

    async def some(self, timeout_s: float, without: Iterable[str] = ()) -> list[Upstream]:
        """The same, waiting for one; empty after `timeout_s`."""
        deadline_s = self.clock() + timeout_s
        while not (found := self.ready(without)) and (left_s := deadline_s - self.clock()) > 0:
            self._changed.clear()
            # No event says that a replica has been avoided for long enough.
            try:
                await asyncio.wait_for(self._changed.wait(), min(left_s, 0.1))
            except TimeoutError:
                continue
        return found

    def failed(self, replica: Upstream) -> None:
        replica.failures += 1
        avoid_s = min(_AVOID_S * 2 ** (replica.failures - 1), _MOST_AVOID_S)
        replica.avoid_until_s = self.clock() + avoid_s

    def answered(self, replica: Upstream) -> None:
        replica.failures = 0


# (name, metadata) of every replica that runs.
Found = list[tuple[str, Mapping[str, Any]]]
Listener = Callable[[Found], None]
# By deployment: who wants to hear of its replicas, in this process.
_listeners: dict[str, Listener] = {}


def listen(deployment: str, listener: Listener) -> None:
    """Call `listener` in the current event loop whenever replicas of a deployment come or go."""
    loop = asyncio.get_running_loop()

    def told(found: Found) -> None:
        loop.call_soon_threadsafe(listener, found)

    _listeners[deployment] = told


class ReplicaWatch(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """The request router of the engines' deployment, for what it is told and not for its routing.

    Serve keeps it up to date in every process that holds a handle. The only call that goes through
    it is the one that wakes an application that is scaled to zero.
    """

    def initialize_state(self, deployment: str) -> None:
        self._deployment = deployment

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        return [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        # Serve ships this class by value, with globals of its own: the module is imported anew.
        from serve_app.gateway import fleet as here

        if (listener := here._listeners.get(self._deployment)) is not None:
            listener([(str(r.replica_id.unique_id), r.replica_metadata) for r in replicas])
