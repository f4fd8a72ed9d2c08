"""The requests that are at a replica now, and how the requests of a failed replica are noticed.

A stream may be silent although nothing is wrong: its sequence was preempted, or a step of the
engine takes long. So the gateway pings replicas instead, and two things count as a failure: a
replica that does not answer, and a replica whose engine has work and neither responds nor uses a
core (`Supervisor.stalled_s`). An engine that uses a core and never responds is killed by its
supervisor after `hang_timeout_s`.

A replica that restarts its engine is pinged until the engine is ready, so that the next request
does not wait longer than that.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import aiohttp

from serve_app.gateway.fleet import Fleet, Upstream
from serve_app.replica.backend import ABSENT, FAILED_HEADER, STALLED_HEADER, TOKEN_HEADER

# How often a replica is asked whether its engine is ready again.
_RESTART_PING_S = 0.1


@dataclass(eq=False)
class Visit:
    """A request at a replica.

    Attributes:
        limit: its time there; has expired once the visit was given up.
        frontend: host:port of vllm-rs, where it is there.
        sending: the client is being sent what has come: broken off now, that would be lost.
    """

    replica: Upstream
    limit: asyncio.Timeout
    frontend: str | None = None
    sending: bool = False

    @property
    def watched(self) -> "_Watched":
        return self.replica, self.frontend


# What is pinged: a replica, and its vllm-rs for those that are there.
_Watched = tuple[Upstream, str | None]


class Visits:
    """All requests at the replicas of one model. Watches them until it is closed.

    Args:
        stall_timeout_s: how long a replica may be silent, or its engine stalled.
        replicas: those of the model.
    """

    def __init__(
        self, session: aiohttp.ClientSession, stall_timeout_s: float, replicas: Fleet
    ) -> None:
        self._session = session
        self._stall_timeout_s = stall_timeout_s
        self._replicas = replicas
        self._all: set[Visit] = set()
        self._restarts: set[asyncio.Task[None]] = set()
        self._watch = asyncio.create_task(self._fail_stalled_visits())

    def close(self) -> None:
        for task in (self._watch, *self._restarts):
            task.cancel()

    @contextlib.contextmanager
    def visit(self, replica: Upstream) -> Iterator[Visit]:
        made = Visit(replica, asyncio.timeout(None))
        self._all.add(made)
        try:
            yield made
        finally:
            self._all.discard(made)

    async def _fail_stalled_visits(self) -> None:
        pings: dict[_Watched, asyncio.Task[bool]] = {}
        while True:
            await asyncio.sleep(min(1.0, self._stall_timeout_s / 4))
            for watched in {visit.watched for visit in self._all} - pings.keys():
                pings[watched] = asyncio.create_task(self.alive(*watched))
            lost = {w for w, ping in pings.items() if ping.done() and not ping.result()}
            pings = {watched: ping for watched, ping in pings.items() if not ping.done()}
            for visit in self._all:
                if visit.watched in lost and not visit.sending:
                    visit.limit.reschedule(0)

    async def alive(self, replica: Upstream, frontend: str | None = None) -> bool:
        """Whether a replica, and its vllm-rs where that is named, answers a ping, and its engine
        has not been stalled for too long."""
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                if frontend is not None:
                    async with self._session.get(f"http://{frontend}/health"):
                        pass
                stalled_s = float((await self._ping(replica)).get(STALLED_HEADER, 0))
                return stalled_s <= self._stall_timeout_s
        except TimeoutError:
            return False
        except (aiohttp.ClientError, OSError, ValueError):
            return True  # Refused or cut: its requests notice that themselves.

    def await_restart(self, replica: Upstream) -> None:
        """Send no request to a replica until its engine has restarted."""
        if not replica.restarting:
            replica.restarting = True
            task = asyncio.create_task(self._ping_until_restarted(replica))
            self._restarts.add(task)
            task.add_done_callback(self._restarts.discard)

    async def _ping_until_restarted(self, replica: Upstream) -> None:
        restarting = True
        while restarting and replica in self._replicas:
            await asyncio.sleep(_RESTART_PING_S)
            restarting = await self._restarting(replica)
        self._replicas.restarted(replica)

    async def _restarting(self, replica: Upstream) -> bool:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                return (await self._ping(replica)).get(FAILED_HEADER) == ABSENT
        except TimeoutError:
            return True
        except (aiohttp.ClientError, OSError):
            return False  # It has gone, which the next request notices.

    async def _ping(self, replica: Upstream) -> Mapping[str, str]:
        """The headers with which a replica answers a ping."""
        url, headers = f"http://{replica.address}/ping", {TOKEN_HEADER: replica.token}
        async with self._session.get(url, headers=headers) as response:
            return response.headers
