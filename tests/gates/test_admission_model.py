"""The queue in front of the engine, under any order of what can happen in one turn of the loop.

A loop with a clock of its own runs the real `Admission`; what is inside and who waits is counted by
the test. Several things happen in one turn, before any task of the queue runs: a slot is released
as a waiter leaves, as another's time is over, as the bounds change.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import TooManyRequests, Unavailable
from serve_app.gates.admission import Admission


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes when it is told to."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s

    def turns(self, count: int = 12) -> None:
        async def settle() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.run_until_complete(settle())


@dataclass(eq=False)
class Client:
    """A request: it arrives, is inside until it is released, or leaves."""

    sequences: int
    number: int
    release: asyncio.Event = field(default_factory=asyncio.Event)
    state: str = "new"
    room: int = 0
    task: asyncio.Task[None] | None = None


class World:
    def __init__(self, loop: ManualLoop, bound: int, queue: int) -> None:
        self.loop = loop
        self.admission = Admission(bound, queue, 1.0)
        self.clients: list[Client] = []
        self.entered: list[int] = []
        self.checked = 0  # Of those that entered.
        self.highest_bound = bound

    def inside(self) -> list[Client]:
        return [client for client in self.clients if client.state == "inside"]

    def waiting(self) -> list[Client]:
        return [client for client in self.clients if client.state == "waiting"]

    async def _ask(self, client: Client, timeout_s: float) -> None:
        client.state = "waiting"
        try:
            async with self.admission.slot(client.sequences, timeout_s):
                client.state = "inside"
                client.room = min(client.sequences, self.admission.max_running)
                self.entered.append(client.number)
                await client.release.wait()
        except TooManyRequests:
            client.state = "refused"
        except Unavailable:
            client.state = "late"
        finally:
            if client.state in ("waiting", "inside"):
                client.state = "gone"

    # What can happen.

    def arrive(self, sequences: int, timeout_s: float) -> None:
        client = Client(sequences, len(self.clients))
        self.clients.append(client)
        client.task = self.loop.create_task(self._ask(client, timeout_s))

    def release(self, which: int) -> None:
        if inside := self.inside():
            inside[which % len(inside)].release.set()

    def leave(self, which: int) -> None:
        there = [c for c in self.clients if c.state in ("new", "waiting", "inside")]
        if there:
            task = there[which % len(there)].task
            assert task is not None
            task.cancel()

    def resize(self, bound: int) -> None:
        self.highest_bound = max(self.highest_bound, bound)
        self.admission.change(bound, self.admission.max_queued, 1.0)

    def pass_time(self, seconds: float) -> None:
        self.loop.now_s += seconds

    def check(self) -> None:
        admission, inside = self.admission, self.inside()
        assert admission.running == sum(client.room for client in inside)
        assert admission.running >= 0
        # Smaller bounds end nobody; a request larger than the bound runs alone.
        assert admission.running <= self.highest_bound
        assert admission.queued == len(self.waiting())
        # Room is given in order; who was given it at once may note that in any order.
        self.entered[self.checked :] = sorted(self.entered[self.checked :])
        self.checked = len(self.entered)
        assert self.entered == sorted(self.entered), "not in order of arrival"
        if waiting := self.waiting():
            room = min(waiting[0].sequences, admission.max_running)
            assert admission.running
            assert admission.running + room > admission.max_running, "one waits beside free room"


happenings: st.SearchStrategy[tuple[str, tuple[Any, ...]]] = st.one_of(
    st.tuples(
        st.just("arrive"),
        st.tuples(st.integers(1, 6), st.sampled_from([0.0, 1.0, 2.0, 1000.0])),
    ),
    st.tuples(st.just("release"), st.tuples(st.integers(0, 9))),
    st.tuples(st.just("leave"), st.tuples(st.integers(0, 9))),
    st.tuples(st.just("resize"), st.tuples(st.integers(1, 6))),
    st.tuples(st.just("pass_time"), st.tuples(st.sampled_from([0.5, 1.0]))),
)


Happening = tuple[str, tuple[Any, ...]]


def _one_resize(happening: list[Happening]) -> list[Happening]:
    """Without a second change of the bounds in one turn, so that it is known which one counted."""
    resizes = [place for place, (name, _) in enumerate(happening) if name == "resize"]
    return [each for place, each in enumerate(happening) if place not in resizes[1:]]


@settings(deadline=None, max_examples=250)
@given(
    bound=st.integers(1, 4),
    queue=st.integers(0, 6),
    rounds=st.lists(st.lists(happenings, min_size=1, max_size=5), max_size=25),
)
def test_the_counter_is_what_is_inside(
    bound: int, queue: int, rounds: list[list[tuple[str, tuple[Any, ...]]]]
) -> None:
    loop = ManualLoop()
    world = World(loop, bound, queue)
    try:
        for happening in rounds:
            # All of them in one turn of the loop.
            for name, arguments in _one_resize(happening):
                step: Callable[..., None] = getattr(world, name)
                step(*arguments)
            loop.turns()
            world.check()
        for client in world.clients:
            client.release.set()
        loop.turns(40)
        loop.now_s += 2000.0
        loop.turns(40)
        for client in world.clients:
            client.release.set()
        loop.turns(200)
        assert world.admission.running == 0
        assert world.admission.queued == 0
        # "new": it left before it had begun to ask.
        assert {client.state for client in world.clients} <= {"gone", "refused", "late", "new"}
    finally:
        loop.close()


@settings(deadline=None, max_examples=100)
@given(which=st.sampled_from(["leave", "time"]), first=st.booleans(), waiters=st.integers(1, 3))
def test_a_waiter_that_goes_as_a_slot_is_released(which: str, first: bool, waiters: int) -> None:
    """The race that once left the counter at -1 with nobody inside."""
    loop = ManualLoop()
    world = World(loop, bound=1, queue=10)
    try:
        world.arrive(1, 1000.0)
        loop.turns()
        for _ in range(waiters):
            world.arrive(1, 1.0)
        loop.turns()
        steps = [
            lambda: world.release(0),
            lambda: world.leave(1) if which == "leave" else world.pass_time(1.0),
        ]
        for step in steps if first else reversed(steps):
            step()
        loop.turns()
        world.check()
    finally:
        for client in world.clients:
            assert client.task is not None
            client.task.cancel()
        loop.turns()
        loop.close()
