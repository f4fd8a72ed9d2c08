"""Carries out a plan of disturbances (disturb.py) on one cluster (victims.py).

One disturbance at a time. Before it hits a process it checks that enough processes of that kind are
ready. It records how long it waited for them, its victim, and any error. Stopped processes continue
at the latest when the run ends.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import psutil

from bench.errors import LoadError
from bench.faults.disturb import Disturbance, Due, planned
from bench.faults.gaps import Span
from bench.faults.victims import Cluster, Replica, family, title
from bench.traffic.alarm import sleep_until

_LOOK_S = 0.25  # How often it is looked whether enough are ready.


class Done(msgspec.Struct, kw_only=True):
    """What was done, or why it was not. Times are seconds since the start of the load.

    Attributes:
        kind, number: of the disturbance, and its place among them.
        planned_s: when it was to be.
        at_s, until_s: when it was; the same but for what lasts: a stopped process, a command.
        waited_s: of its lateness, how long it was waited for others to be ready.
        what: to whom.
        error: why it was not done, or how the command failed.
    """

    kind: str
    number: int
    planned_s: float
    at_s: float
    until_s: float
    waited_s: float
    what: str
    error: str = ""

    @property
    def span(self) -> Span:
        return Span(self.at_s, self.until_s)


class Victim(msgspec.Struct, frozen=True):
    """Who is to be disturbed, what to call it, and the replica that will not outlive it."""

    process: Any
    what: str
    replica: Any = None


@dataclass
class Disturber:
    """Carries out a plan on one cluster. `run` is to be cancelled when the load is over.

    Args:
        clock: seconds since the start of the load.
        log: where the output of commands goes.
    """

    disturbances: Sequence[Disturbance]
    cluster: Cluster | None
    seed: int
    clock: Callable[[], float]
    log: Path
    done: list[Done] = field(default_factory=list)
    _stopped: list[psutil.Process] = field(default_factory=list, init=False)
    _remaining: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._remaining = sum(disturbance.count or 0 for disturbance in self.disturbances)

    def check(self) -> None:
        """Whether each disturbance that needs a victim has one now.

        Raises:
            LoadError: there is not.
        """
        for disturbance in self.disturbances:
            if disturbance.kind == "command":
                continue
            if disturbance.kind == "kill-raylet":
                self._check_nodes(disturbance)
            elif not self._victims_of(disturbance):
                title = f"ray::ServeReplica:{disturbance.deployment}"
                problem = f"no process of the cluster is titled {title}"
                raise LoadError.of("deployment", disturbance.deployment, problem)
            if self.cluster is not None:  # From when on they are ready is known from now on.
                self.cluster.ready(
                    self._counted_of(disturbance), disturbance.up, disturbance.settle_s
                )

    async def run(self) -> None:
        """Do what is planned, each at its time; returns only if all of it has a count."""
        try:
            for due in planned(self.disturbances, self.seed):
                await sleep_until(time.perf_counter() + due.at_s - self.clock())
                await self._do(due)
                self._remaining -= self.disturbances[due.number].count is not None
        finally:
            self._resume()

    @property
    def counted(self) -> bool:
        """Whether nothing that has a count is left to be done."""
        return not self._remaining

    async def _do(self, due: Due) -> None:
        """Note it before it is done, as its streams may be over before it is."""
        disturbance = self.disturbances[due.number]
        if self.done:
            after_s = self.done[-1].until_s + disturbance.apart_s
            await sleep_until(time.perf_counter() + after_s - self.clock())
        looked_s = self.clock()
        victim, why = await self._await_victim(disturbance, due)
        at_s = self.clock()
        done = Done(
            kind=disturbance.kind,
            number=due.number,
            planned_s=due.at_s,
            at_s=at_s,
            until_s=at_s,
            waited_s=at_s - looked_s,
            what=victim.what if victim else disturbance.command,
            error=why,
        )
        self.done.append(done)
        if why:
            return
        try:
            if victim is None:
                done.error = await self._command(disturbance)
            else:
                await self._strike(disturbance, victim)
        except psutil.NoSuchProcess:
            done.error = "it ended by itself before"
        finally:
            if victim is None or disturbance.for_s:
                done.until_s = self.clock()

    async def _await_victim(self, disturbance: Disturbance, due: Due) -> tuple[Victim | None, str]:
        """A victim, or why there is none; neither for a command that may run."""
        until_s = self.clock() + disturbance.wait_s
        rng = random.Random(f"{self.seed}/victim/{due.number}/{due.turn}")
        while True:
            # Looking through all processes takes milliseconds in which no stream could be read.
            try:
                victim, why = await asyncio.to_thread(self._choose, disturbance, rng, due.turn)
            except psutil.NoSuchProcess:  # It ended while it was looked at: look again.
                victim, why = None, "no replica was up for long enough"
            if not why or self.clock() >= until_s:
                return victim, why
            await asyncio.sleep(_LOOK_S)

    def _choose(
        self, disturbance: Disturbance, rng: random.Random, turn: int
    ) -> tuple[Victim | None, str]:
        if self.cluster is None:
            return None, ""
        ready = self.cluster.ready(
            self._counted_of(disturbance), disturbance.up, disturbance.settle_s
        )
        if len(ready) < disturbance.min_up:
            return (
                None,
                f"{len(ready)} of {disturbance.deployment} ready, and {disturbance.min_up} needed",
            )
        if disturbance.kind == "command":
            return None, ""
        if disturbance.kind == "kill-raylet":
            return self._node(disturbance, turn, ready)
        ready = [replica for replica in ready if self.cluster.rested(replica, disturbance.rest_s)]
        among: list[tuple[psutil.Process, str, psutil.Process | None]]
        if disturbance.kind == "restart-controller":
            among = [(r.process, r.title, None) for r in self._victims_of(disturbance)]
        elif disturbance.kind in ("kill-engine", "stop-engine"):
            among = [
                (p, f"{title(p)} of {r.title}", r.process)
                for r in ready
                for p in r.part(disturbance.part)
            ]
        else:
            among = [(replica.process, replica.title, replica.process) for replica in ready]
        if not among:
            return None, f"there is nothing to {disturbance.kind}"
        process, name, replica = rng.choice(among)
        return Victim(process, f"{name}, process {process.pid}", replica), ""

    def _node(
        self, disturbance: Disturbance, turn: int, ready: Sequence[Replica]
    ) -> tuple[Victim | None, str]:
        """The next of the named nodes that is there, if enough replicas are on others."""
        assert self.cluster
        raylets = [raylet for raylet in self.cluster.raylets() if not raylet.head]
        named = (
            disturbance.nodes[turn % len(disturbance.nodes) :]
            + disturbance.nodes[: turn % len(disturbance.nodes)]
        )
        for raylet in (raylet for node in named for raylet in raylets if raylet.is_(node)):
            here = family(raylet.process)
            elsewhere = [replica for replica in ready if replica.process not in here]
            if len(elsewhere) < disturbance.min_up - 1:
                return None, f"{len(elsewhere)} of {disturbance.deployment} ready on other nodes"
            name = raylet.name or raylet.node_id[:8]
            return Victim(raylet.process, f"node {name}, process {raylet.process.pid}"), ""
        return None, f"none of the nodes {', '.join(disturbance.nodes)} is there"

    def _victims_of(self, disturbance: Disturbance) -> list[Replica]:
        """The replicas that may be disturbed, ready or not."""
        if self.cluster is None:
            return []
        if disturbance.kind == "restart-controller":
            return self.cluster.controllers()
        return self._counted_of(disturbance)

    def _counted_of(self, disturbance: Disturbance) -> list[Replica]:
        """Whose number `min_up` is about."""
        return self.cluster.replicas(disturbance.deployment) if self.cluster else []

    def _check_nodes(self, disturbance: Disturbance) -> None:
        raylets = self.cluster.raylets() if self.cluster else []
        for node in disturbance.nodes:
            mine = [raylet for raylet in raylets if raylet.is_(node)]
            if not mine:
                listed = [each.name or each.node_id[:8] for each in raylets if not each.head]
                raise LoadError.of("nodes", node, "no such node on this machine", listed)
            if mine[0].head:
                raise LoadError.of("nodes", node, "is the head: without it there is no cluster")

    async def _strike(self, disturbance: Disturbance, victim: Victim) -> None:
        process = victim.process
        if self.cluster and victim.replica and disturbance.for_s is None:
            self.cluster.strike(victim.replica)
        if disturbance.kind != "stop-engine":
            process.send_signal(signal.SIGKILL)
            return
        process.send_signal(signal.SIGSTOP)
        self._stopped.append(process)
        if disturbance.for_s is not None:
            await asyncio.sleep(disturbance.for_s)
            self._resume()

    def _resume(self) -> None:
        """Resume all processes that are still stopped."""
        while self._stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._stopped.pop().send_signal(signal.SIGCONT)

    async def _command(self, disturbance: Disturbance) -> str:
        """Run a command to its end; how it failed, or nothing."""
        with self._logging() as log:
            process = await asyncio.create_subprocess_shell(
                disturbance.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        try:
            async with asyncio.timeout(disturbance.wait_s):
                status = await process.wait()
        except TimeoutError:
            return f"not over after {disturbance.wait_s:g} s"
        finally:
            if process.returncode is None:
                # The shell and what it runs: the process group is its own.
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return f"exit status {status}" if status else ""

    def _logging(self) -> BinaryIO:
        return open(self.log, "ab")
