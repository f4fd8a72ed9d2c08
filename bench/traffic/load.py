"""The senders of a load: Ray actors, spread over the nodes of a cluster, which share one plan.

Each actor (`sender.py`) has a part of the plan. All actors start at the same time: the driver
measures the difference of each actor's clock from its own, and sends each actor the start time on
its own clock. From then on all times are seconds since the start.

Records are streamed to the driver a few times a second. If an actor dies, the requests that it had
not delivered are recorded as lost, and the other actors continue.

Importing Ray takes a second. Every command of bench imports this module, and most send nothing, so
only the functions that need Ray import it.
"""

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from bench.errors import LoadError
from bench.progress import Progress
from bench.records import Record
from bench.traffic.client import Client
from bench.traffic.schedule import Plan
from bench.traffic.sender import BATCH_S, Batch, Sender, Share, decoder
from bench.traffic.target import Target

LOST = "lost: load actor died"
_ROUND_TRIPS = 20
_READY_S = 120.0
_STOP_S = 10.0
_CPU = 0.01
# The lag that is shown is of so many requests.
_RECENT = 1000


class Happening(msgspec.Struct):
    """Something that a reader of the results should know: when (seconds), and what."""

    at_s: float
    what: str


class Outcome(msgspec.Struct, kw_only=True):
    """What came of a run.

    Attributes:
        records: of every request that was sent, and of those that were lost; by index.
        start_s: the start of the run, `time.perf_counter()` of the driver.
        duration_s: when the last actor was done.
        actors: where each actor ran.
        lost_actors: for each that died: which, when and why.
        cpu: for each actor, CPU time over time; 1 is one core.
        cpu_peak: the same over the busiest second.
        clock_offset_s: for each actor, its clock minus the driver's.
        clock_error_s: by how much that may be wrong.
        interrupted: whether the run was stopped before its end.
        events: the lost actors and the interruption, with their times.
    """

    records: list[Record] = []
    start_s: float = 0.0
    duration_s: float = 0.0
    actors: dict[int, str] = {}
    lost_actors: list[str] = []
    cpu: dict[int, float] = {}
    cpu_peak: dict[int, float] = {}
    clock_offset_s: dict[int, float] = {}
    clock_error_s: dict[int, float] = {}
    interrupted: bool = False
    events: list[Happening] = []


def deal(plan: Plan, actors: int, repeat: int = 0) -> list[Share]:
    """Share a plan among actors, round and round; fewer actors where it is too small for all.

    In a closed loop users are dealt first, and each request goes to where a user would take it,
    so that an actor with more users has as many more requests.
    """
    users = plan.closed.users if plan.closed else len(plan.planned)
    actors = max(1, min(actors, users, len(plan.planned)))
    shares = []
    for actor in range(actors):
        mine = [item for item in plan.planned if item.unit % users % actors == actor]
        share = Share(actor=actor, repeat=repeat, planned=mine, duration_s=plan.duration_s)
        if plan.closed:
            share.users = list(range(actor, users, actors))
            share.think_s = plan.closed.think_s
        shares.append(share)
    return shares


def connect(address: str | None = None) -> None:
    """Join the Ray cluster at `address` (or of RAY_ADDRESS), or start a small one here.

    The nodes of a cluster need this package and what it depends on.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # See `sender`; for a cluster started here.
    if address or os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(
            num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=2**28
        )


async def run(
    plan: Plan,
    target: Target,
    actors: int,
    on_batch: Callable[[list[Record], Progress], None],
    *,
    repeat: int = 0,
    start_delay_s: float = 0.5,
    on_start: Callable[[float, dict[int, str]], None] | None = None,
) -> Outcome:
    """Send a plan from Ray actors; Ray must be initialised (`connect`).

    Args:
        plan: what to send and when.
        target: whom to ask.
        actors: how many; fewer are started where the plan is too small for all.
        on_batch: called with records as they come, a few times a second, in this loop. What it
            raises ends the run.
        repeat: which repetition this is, for the records.
        start_delay_s: from the order to start to the start, so that it reaches all in time.
        on_start: called before the start with its instant, `time.perf_counter()` of this process,
            and with where each actor runs.

    Returns:
        The outcome. Cancelled (Ctrl-C under `asyncio.run`), it breaks off what is under way,
        collects what came and returns with `interrupted`: the cancellation is used up.

    Raises:
        LoadError: the actors do not start.
        TargetError: the target's URL is not one.
    """
    Client(target, time.perf_counter)  # What is wrong with it is better said here than there.
    crew = _Crew(deal(plan, actors, repeat), plan, on_batch)
    try:
        await crew.hire(target)
        start_s = time.perf_counter() + start_delay_s
        if on_start:
            on_start(start_s, crew.where())
        await crew.work(start_s)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task
        task.uncancel()
        await crew.interrupt()
    finally:
        crew.dismiss()
    return crew.outcome()


class _Member:
    """The driver's side of an actor."""

    def __init__(self, share: Share, handle: Any) -> None:
        self.share, self.handle = share, handle
        self.where = ""
        self.offset_s = self.error_s = 0.0
        self.running = self.sent = 0
        self.open: set[int] = set()  # Begun, and not over.
        self.over: set[int] = set()
        self.cpu = [(0.0, 0.0)]  # (time, CPU time used until then)

    def take(self, batch: Batch) -> None:
        self.running = batch.running
        self.sent += len(batch.started)
        self.open.update(batch.started)
        done = {record.index for record in batch.records}
        self.open -= done
        self.over |= done
        if batch.at_s > 0:
            self.cpu.append((batch.at_s, batch.cpu_s))

    def lost(self, at_s: float) -> list[Record]:
        """Records of what it owed when it died.

        In a closed loop with a duration nobody knows what it would still have taken: only what
        was under way is lost.
        """
        timed = self.share.users is not None and self.share.duration_s is not None
        return [
            Record(
                index=item.index,
                planned_s=at_s if item.at_s is None else item.at_s,
                repeat=self.share.repeat,
                kind=item.request.kind,
                actor=self.share.actor,
                end_s=at_s,
                error=LOST,
                asked_input_tokens=item.request.input_tokens,
                asked_output_tokens=item.request.output_tokens,
            )
            for item in self.share.planned
            if item.index in self.open or not (timed or item.index in self.over)
        ]

    def utilisation(self) -> tuple[float, float]:
        """CPU time over time: of the whole, and of the busiest second."""
        at_s, used_s = self.cpu[-1]
        mean = used_s / at_s if at_s > 0 else 0.0
        spans = zip(self.cpu, self.cpu[round(1 / BATCH_S) :], strict=False)
        return mean, max([mean, *((b[1] - a[1]) / (b[0] - a[0]) for a, b in spans)])


class _Crew:
    """All actors of a run, and what has come from them."""

    def __init__(
        self, shares: list[Share], plan: Plan, on_batch: Callable[[list[Record], Progress], None]
    ) -> None:
        self._shares, self._on_batch = shares, on_batch
        self._members: list[_Member] = []
        self._collecting: set[asyncio.Task[None]] = set()
        self._lags_s: deque[float] = deque(maxlen=_RECENT)
        self._outcome = Outcome()
        endless = plan.closed is not None and plan.duration_s is not None
        times_s = [item.at_s for item in plan.planned if item.at_s is not None]
        end_s = max(times_s, default=None) if plan.closed is None else plan.duration_s
        self._progress = Progress(planned=None if endless else len(plan.planned), end_s=end_s)

    async def hire(self, target: Target) -> None:
        """Start the actors, wait until all answer, and compare clocks."""
        import ray

        # Ray spreads only what asks for something, and what asks for more than is free never
        # starts: a hundredth of a core, or nothing where the cluster is full.
        free = ray.available_resources().get("CPU", 0.0) >= _CPU * len(self._shares)
        remote = ray.remote(Sender).options(
            num_cpus=_CPU if free else 0,
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_concurrency=100,
        )
        self._members = [_Member(share, remote.remote(share, target)) for share in self._shares]
        try:
            async with asyncio.timeout(_READY_S):
                for member in self._members:
                    member.where = await member.handle.where.remote()
                    await _compare_clocks(member)
        except TimeoutError:
            problem = f"not all of them run after {_READY_S:g} s"
            raise LoadError.of("actors", len(self._members), problem) from None
        except ray.exceptions.RayError as error:
            raise LoadError.of(
                "actors", len(self._members), f"one does not start: {error}"
            ) from None

    async def work(self, start_s: float) -> None:
        """Let all send, and collect until the last is done."""
        self._outcome.start_s = start_s
        self._collecting = {asyncio.create_task(self._collect(member)) for member in self._members}
        await _first_failure(self._collecting)

    async def interrupt(self) -> None:
        """Tell all to stop, and take what they still hand over, for a while."""
        self._outcome.interrupted = True
        if not self._collecting:
            return
        self._outcome.events.append(Happening(self._now_s(), "the run was interrupted"))
        for member in self._members:
            member.handle.stop.remote()
        await asyncio.wait(self._collecting, timeout=_STOP_S)

    def dismiss(self) -> None:
        import ray

        for task in self._collecting:
            task.cancel()
        for member in self._members:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(member.handle)

    async def _collect(self, member: _Member) -> None:
        """Take an actor's batches until it is done or dead."""
        import ray

        start_s = self._outcome.start_s + member.offset_s
        batches = member.handle.send.options(num_returns="streaming").remote(start_s)
        try:
            async for reference in batches:
                batch = decoder.decode(await reference)
                member.take(batch)
                self._lags_s.extend(batch.lags_s)
                self._hand_over(batch.records)
        except ray.exceptions.RayActorError as error:
            self._lose(member, error)

    def _lose(self, member: _Member, error: Exception) -> None:
        at_s = max(0.0, self._now_s())
        why = str(error).strip().splitlines()
        records = member.lost(at_s)
        what = f"actor {member.share.actor} ({member.where}) died with {len(records)} requests"
        self._outcome.lost_actors.append(f"{what}: {why[0] if why else 'no reason is known'}")
        self._outcome.events.append(Happening(at_s, what))
        member.running = 0
        self._hand_over(records)

    def _hand_over(self, records: list[Record]) -> None:
        self._outcome.records.extend(records)
        progress = self._progress
        progress.at_s = self._now_s()
        progress.sent = sum(member.sent for member in self._members)
        progress.running = sum(member.running for member in self._members)
        progress.done += len(records)
        progress.failed += sum(not record.ok for record in records)
        progress.tokens += sum(record.output_tokens or 0 for record in records)
        if self._lags_s:
            lags_s = sorted(self._lags_s)
            progress.lag_p99_s = lags_s[int(0.99 * (len(lags_s) - 1))]
        self._on_batch(records, msgspec.structs.replace(progress))

    def _now_s(self) -> float:
        return time.perf_counter() - self._outcome.start_s

    def where(self) -> dict[int, str]:
        return {member.share.actor: member.where for member in self._members}

    def outcome(self) -> Outcome:
        outcome = self._outcome
        outcome.duration_s = self._now_s() if outcome.start_s else 0.0
        outcome.records.sort(key=lambda record: record.index)
        outcome.actors = self.where()
        for member in self._members:
            actor = member.share.actor
            outcome.cpu[actor], outcome.cpu_peak[actor] = member.utilisation()
            outcome.clock_offset_s[actor] = member.offset_s
            outcome.clock_error_s[actor] = member.error_s
        return outcome


async def _compare_clocks(member: _Member) -> None:
    """Cristian's algorithm: the shortest round trip tells most, and errs by half of it at most."""
    shortest_s = float("inf")
    for _ in range(_ROUND_TRIPS):
        sent_s = time.perf_counter()
        theirs_s = await member.handle.clock.remote()
        back_s = time.perf_counter()
        if back_s - sent_s < shortest_s:
            shortest_s = back_s - sent_s
            member.offset_s = theirs_s - (sent_s + back_s) / 2
            member.error_s = shortest_s / 2


async def _first_failure(tasks: "set[asyncio.Task[None]]") -> None:
    """Wait for all, but for no other once one has failed."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()
