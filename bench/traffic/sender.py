"""One load actor: sends its part of a plan from its own event loop, and delivers records.

In an open loop every request is sent at its time, whatever happened to the earlier ones: the number
of running requests is unlimited. In a closed loop each user takes the next request of the actor's
part.

All other work is short, because it delays the reading of sockets: answers are decoded between
reads, a few at a time, and delivered a few times a second.
"""

import asyncio
import contextlib
import gc
import os
import resource
import sys
import time
from collections import deque
from collections.abc import AsyncIterator

import msgspec

from bench.records import Record
from bench.traffic.alarm import Alarm, sleep_until
from bench.traffic.client import Client
from bench.traffic.conversation import Script
from bench.traffic.response import Response
from bench.traffic.schedule import Planned
from bench.traffic.target import Target

BATCH_S = 0.25
# As long as decoding may keep the event loop from reading sockets.
_DECODE_S = 0.0005
# Ray hands batches over in another thread. By default that one may keep Python to itself for 5 ms.
_SWITCH_S = 0.0005


class Share(msgspec.Struct, kw_only=True):
    """What one actor is to send.

    Attributes:
        actor: its number, from 0.
        repeat: which repetition of the run this is.
        planned: its part of the plan, in the plan's order.
        users: the numbers of its users; None in an open loop.
        think_s, duration_s: of the plan.
    """

    actor: int
    repeat: int
    planned: list[Planned]
    users: list[int] | None = None
    think_s: float = 0.0
    duration_s: float | None = None


class Batch(msgspec.Struct, kw_only=True):
    """What an actor hands over: records that are complete, and its counts.

    Attributes:
        records: finished since the last batch.
        started: indexes of the requests that it began since the last batch.
        lags_s: how late those were.
        running: requests under way.
        at_s: when this was, seconds since the start.
        cpu_s: CPU time that the actor's process has used since the start.
    """

    records: list[Record]
    started: list[int]
    lags_s: list[float]
    running: int
    at_s: float
    cpu_s: float


encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Batch)


class Sender:
    """Sends one share. Runs as a Ray actor; it is an ordinary class, and needs only a loop."""

    def __init__(self, share: Share, target: Target) -> None:
        self._share, self._target = share, target
        self._script = Script(share.planned, chat=target.endpoint != "completions")
        self._start_s = 0.0
        self._work: asyncio.Task[None] | None = None
        self._stopped = False
        self._answers: asyncio.Queue[Response | None] = asyncio.Queue()  # None: no more will come.
        self._records: list[Record] = []
        self._started: list[int] = []
        self._lags_s: list[float] = []
        self._running = 0
        self._cpu_s = 0.0  # Of the process, at the start.
        _settle()

    async def where(self) -> str:
        """For people: node and process."""
        import ray  # Slow to import: load.py says more.

        node = ray.get_runtime_context().get_node_id()[:8] if ray.is_initialized() else "here"
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        return f"node {node}, process {os.getpid()}" + (f", niceness {nice}" if nice else "")

    async def clock(self) -> float:
        return time.perf_counter()

    async def send(self, start_s: float) -> AsyncIterator[bytes]:
        """Send the share, from `start_s` of this actor's clock on. Yields encoded batches."""
        self._start_s = start_s
        client = Client(self._target, lambda: time.perf_counter() - start_s)
        self._work = work = asyncio.create_task(self._run(client))
        if self._stopped:
            work.cancel()
        try:
            over = False
            while not over:
                await asyncio.wait({work}, timeout=BATCH_S)
                over = work.done()
                yield encoder.encode(self._batch())
            if not work.cancelled():
                work.result()
        finally:
            work.cancel()
            client.close()

    async def stop(self) -> None:
        """Send nothing more and break off what is under way; `send` then ends."""
        if self._work and not self._stopped:  # A second time would break off the decoding.
            self._work.cancel()
        self._stopped = True

    def _batch(self) -> Batch:
        batch = Batch(
            records=self._records,
            started=self._started,
            lags_s=self._lags_s,
            running=self._running,
            at_s=self._now_s(),
            cpu_s=time.process_time() - self._cpu_s if self._cpu_s else 0.0,
        )
        self._records, self._started, self._lags_s = [], [], []
        return batch

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s

    async def _run(self, client: Client) -> None:
        """The whole share. Stopped or not, everything that came back is decoded."""
        decoding = asyncio.create_task(self._decode())
        try:
            await sleep_until(self._start_s)
            self._cpu_s = time.process_time()
            await (self._open(client) if self._share.users is None else self._closed(client))
        finally:
            self._answers.put_nowait(None)
            await decoding

    async def _open(self, client: Client) -> None:
        """Each request at its time."""
        planned, finished = iter(self._script.first), asyncio.Event()
        following = next(planned, None)
        async with asyncio.TaskGroup() as group:

            def send_due() -> None:
                nonlocal following
                while following and (following.at_s or 0.0) <= self._now_s():
                    group.create_task(self._unit(client, following, following.at_s or 0.0, None))
                    following = next(planned, None)
                if following:
                    alarm.set(self._start_s + (following.at_s or 0.0))
                else:
                    finished.set()

            alarm = Alarm(asyncio.get_running_loop(), send_due)
            try:
                alarm.set(self._start_s)
                await finished.wait()
            finally:
                alarm.close()

    async def _closed(self, client: Client) -> None:
        """The users; each waits for an answer, thinks, and takes the next request or session."""
        share = self._share
        queue = deque(self._script.first)

        async def use(user: int) -> None:
            free_s = 0.0
            while queue and (share.duration_s is None or free_s < share.duration_s):
                ended_s = await self._unit(client, queue.popleft(), free_s, user)
                free_s = ended_s + share.think_s
                if share.think_s:
                    await sleep_until(self._start_s + free_s)

        async with asyncio.TaskGroup() as group:
            for user in share.users or []:
                group.create_task(use(user))

    async def _unit(
        self, client: Client, first: Planned, planned_s: float, user: int | None
    ) -> float:
        """Send a request, and then all of its session that waits for it. Returns the last end."""
        item, at_s = first, planned_s
        while True:
            await sleep_until(self._start_s + at_s)
            record = await self._send_one(client, item, at_s, user)
            ended_s = self._now_s() if record.end_s is None else record.end_s
            released = self._script.over(item, record) if self._script.is_followed(item) else []
            if not self._target.keep_text:
                record.text = ""
            if len(released) != 1:
                break
            item = released[0]
            at_s = _due_s(item, ended_s)
        if not released:
            return ended_s
        async with asyncio.TaskGroup() as group:  # Side by side: sub-agents.
            sides = [
                group.create_task(self._unit(client, side, _due_s(side, ended_s), user))
                for side in released
            ]
        return max(side.result() for side in sides)

    async def _send_one(
        self, client: Client, planned: Planned, planned_s: float, user: int | None
    ) -> Record:
        """Send one request and wait for the end of its response, which is decoded later.

        It is decoded at once where something waits for the answer.
        """
        share, followed = self._share, self._script.is_followed(planned)
        record = Record(
            index=planned.index,
            planned_s=planned_s,
            repeat=share.repeat,
            actor=share.actor,
            user=user,
            session=planned.session,
        )
        answer = Response(record, self._target.keep_text or followed)
        self._running += 1
        self._started.append(planned.index)
        self._lags_s.append(self._now_s() - planned_s)
        try:
            await client.exchange(self._script.request(planned), answer)
        finally:
            self._running -= 1
            if followed:
                self._records.append(answer.read())
            else:
                self._answers.put_nowait(answer)
        return record

    async def _decode(self) -> None:
        """Decode answers between reads, a little at a time: many streams end at once."""
        until_s = time.perf_counter() + _DECODE_S
        while answer := await self._answers.get():
            for _ in answer.slices():
                await asyncio.sleep(0)
            self._records.append(answer.record)
            if time.perf_counter() > until_s:
                await asyncio.sleep(0)
                until_s = time.perf_counter() + _DECODE_S


def _due_s(item: Planned, ended_s: float) -> float:
    """When something is sent that waited until `ended_s`: at its own time, or after its gap."""
    return ended_s + item.request.gap_s if item.at_s is None else max(item.at_s, ended_s)


def _settle() -> None:
    """Make the process fit for the measurement."""
    # Ray starts its workers with a niceness of 15: whatever else runs on the node would come
    # first, and its time slices would be measured as lag. Only root can change that from here.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    sys.setswitchinterval(_SWITCH_S)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    # What is here now stays: collecting garbage need not look at it again.
    gc.collect()
    gc.freeze()
