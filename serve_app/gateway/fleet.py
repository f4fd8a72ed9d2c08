"""The replicas of one model, as a gateway sees them: their addresses, their load, recent failures.

Ray Serve reports which replicas run, through the router of a deployment handle (`ReplicaWatch`),
with the address and the token of each. When a replica dies, that report comes seconds late. So a
gateway trusts its own requests first: it avoids a replica that failed, for a time that doubles with
each failure, and then tries it again. A replica that restarts its engine is avoided until it
reports that the engine is ready (visit.py).
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serve_app.lanes.capability import Served
from serve_app.replica.backend import FAST_LANE

# How long a failed replica is avoided, the first time and at most.
_AVOID_S, _MOST_AVOID_S = 1.0, 15.0


@dataclass(frozen=True)
class FastLane:
    """The fast lane of a replica.

    Attributes:
        door: host:port of the server that lets requests in.
    """

    door: str
    served: Served

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "FastLane | None":
        """None: the replica has none."""
        if (given := metadata.get(FAST_LANE)) is None:
            return None
        served = Served(frozenset(given["models"]), given["max_model_len"], given["vocabulary"])
        return cls(given["door"], served)


@dataclass(eq=False)
class Upstream:
    """One replica of a model, which requests can be forwarded to.

    Attributes:
        address: host:port of its HTTP server.
        fast: its fast lane; None: it has the full lane only.
        outstanding: tokens that were sent to it and are not answered, prompts included.
        running: requests that it works on for this gateway.
        failures: in a row.
        avoid_until_s: monotonic.
        restarting: its engine is restarting.
    """

    name: str
    address: str
    token: str
    fast: FastLane | None = None
    outstanding: int = 0
    running: int = 0
    failures: int = 0
    avoid_until_s: float = 0.0
    restarting: bool = False


@dataclass
class Fleet:
    """All replicas of one model. For one event loop.

    Args:
        clock: monotonic seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _all: dict[str, Upstream] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def update(self, replicas: "RunningReplicas") -> list[str]:
        """Replace all replicas by those that Ray Serve reports; returns the names that are gone.

        A replica that was known before keeps its load and its failures.
        """
        before = self._all
        self._all = {
            name: before.get(name)
            or Upstream(name, metadata["address"], metadata["token"], FastLane.of(metadata))
            for name, metadata in replicas
            if "address" in metadata
        }
        self._changed.set()
        return [name for name in before if name not in self._all]

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, replica: Upstream) -> bool:
        return self._all.get(replica.name) is replica

    def ready(self, without: Iterable[str] = ()) -> list[Upstream]:
        """The replicas that can be asked now; those in `without` only if there is no other."""
        usable = self._usable()
        return [r for r in usable if r.name not in without] or usable

    def has_others(self, tried: Iterable[str]) -> bool:
        """Whether a replica that is not in `tried` can be asked now."""
        return any(r.name not in tried for r in self._usable())

    def _usable(self) -> list[Upstream]:
        now_s = self.clock()
        return [r for r in self._all.values() if not r.restarting and r.avoid_until_s <= now_s]

    async def wait_until_ready(
        self, timeout_s: float, without: Iterable[str] = ()
    ) -> list[Upstream]:
        """As `ready`, once there is one; empty if there is none within `timeout_s`."""
        deadline_s = self.clock() + timeout_s
        while not (ready := self.ready(without)) and (left_s := deadline_s - self.clock()) > 0:
            self._changed.clear()
            # No event says that a replica has been avoided for long enough.
            try:
                await asyncio.wait_for(self._changed.wait(), min(left_s, 0.1))
            except TimeoutError:
                continue
        return ready

    def failed(self, replica: Upstream) -> None:
        """Avoid it for a while, longer with each failure in a row."""
        replica.failures += 1
        avoid_s = min(_AVOID_S * 2 ** (replica.failures - 1), _MOST_AVOID_S)
        replica.avoid_until_s = self.clock() + avoid_s

    def answered(self, replica: Upstream) -> None:
        replica.failures = 0

    def restarted(self, replica: Upstream) -> None:
        """Its engine is ready again."""
        replica.restarting = False
        self._changed.set()


# (name, metadata) of every replica that runs.
RunningReplicas = list[tuple[str, Mapping[str, Any]]]
Listener = Callable[[RunningReplicas], None]
# By deployment: what in this process is called with its replicas.
_listeners: dict[str, Listener] = {}


def listen(deployment: str, listener: Listener) -> None:
    """Call `listener` in the current event loop whenever replicas of a deployment come or go."""
    loop = asyncio.get_running_loop()

    def notify(replicas: RunningReplicas) -> None:
        loop.call_soon_threadsafe(listener, replicas)

    _listeners[deployment] = notify


class ReplicaWatch(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """A request router of Ray Serve that only observes which replicas a deployment has.

    Ray Serve keeps it up to date in every process that holds a handle of the deployment. Requests
    do not go through the handle, except the one that starts a replica when there is none.
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
