"""The queue in front of the engine, under any order of what can happen in one turn of the loop.

A loop with a clock of its own runs the real `Admission`; what is inside and who waits is counted by
the test. Several things happen in one turn, before any task of the queue runs: a slot is released
as a waiter leaves, as another's time is over, as the bounds change.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import TooManyRequests, Unavailable
from serve_app.gates.admission import Admission
from serve_app.gates.work import BatchClock, Work
from serve_app.tenants.fair import EVERYBODY, Share
from tests.examples import examples

SHARES = (
    Share("normal"),
    Share("heavy", weight=3.0),
    Share("high", rank=0),
    Share("low", rank=2),
)


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
    share: Share = EVERYBODY
    done: Work = field(default_factory=Work)


class World:
    def __init__(self, loop: ManualLoop, bound: int, queue: int, prompt_tokens: int = 0) -> None:
        self.loop, self.prompt_tokens = loop, prompt_tokens
        self.admission = Admission(bound, queue, 1.0)
        self.clients: list[Client] = []
        self.entered: list[int] = []
        self.highest_bound = bound
        self.bounds = {bound}
        self.admitted = 0  # When it was closed.

    def inside(self) -> list[Client]:
        return [client for client in self.clients if client.state == "inside"]

    def waiting(self) -> list[Client]:
        return [client for client in self.clients if client.state == "waiting"]

    async def _ask(self, client: Client, timeout_s: float) -> None:
        client.state = "waiting"
        try:
            async with self.admission.slot(
                client.sequences,
                timeout_s,
                10,
                client.share,
                100.0,
                client.done,
                self.prompt_tokens,
            ) as client.room:
                client.state = "inside"
                # Of the bound when it was let in: that may have changed since, in the same turn.
                assert client.room in {min(client.sequences, bound) for bound in self.bounds}
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

    def arrive(self, sequences: int, timeout_s: float, share: Share = EVERYBODY) -> None:
        client = Client(sequences, len(self.clients), share=share)
        client.done.has_counts, client.done.output_tokens = sequences % 2 == 0, 7 * sequences
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

    def read(self, sequences: int) -> None:
        """The engine makes first tokens; it may also make more than were counted."""
        self.admission.read(sequences)

    def resize(self, bound: int) -> None:
        self.highest_bound = max(self.highest_bound, bound)
        self.bounds.add(bound)
        self.admission.change(bound, self.admission.max_queued, 1.0)

    def close(self) -> None:
        if not self.admission.closed:
            self.admission.close()
            self.admitted = self.admission.admitted

    def open(self) -> None:
        self.admission.open()

    def pass_time(self, seconds: float) -> None:
        self.loop.now_s += seconds

    def check(self) -> None:
        admission, inside = self.admission, self.inside()
        assert admission.running == sum(client.room for client in inside)
        assert admission.running >= 0
        # Smaller bounds end nobody; a request larger than the bound runs alone.
        assert admission.running <= self.highest_bound
        assert admission.queued == len(self.waiting())
        assert admission.queued_bytes == 10 * len(self.waiting())
        # Those that are let in in one turn go on in any order.
        for head in self.heads():
            mine = [n for n in self.entered if self.clients[n].share == head.share]
            assert max(mine, default=-1) < head.number, "not in order of arrival"
        if admission.closed:
            assert admission.admitted == self.admitted
        elif waiting := self.waiting():
            assert admission.running
            # The part of a batch that may be kept for others is nothing of a batch this small.
            least = min(min(each.sequences, admission.max_running) for each in self.heads())
            most = max(min(each.sequences, admission.max_running) for each in waiting)
            room = most if len(self.heads()) > 1 else least
            held = self.prompt_tokens and admission.running >= admission.max_running // 2
            full = admission.running + room > admission.max_running
            assert full or held, "one waits beside free room"

    def heads(self) -> list[Client]:
        """The first that waits of each tenant."""
        found: dict[Share, Client] = {}
        for client in self.waiting():
            found.setdefault(client.share, client)
        return list(found.values())


happenings: st.SearchStrategy[tuple[str, tuple[Any, ...]]] = st.one_of(
    st.tuples(
        st.just("arrive"),
        st.tuples(st.integers(1, 6), st.sampled_from([0.0, 1.0, 2.0, 1000.0])),
    ),
    st.tuples(st.just("release"), st.tuples(st.integers(0, 9))),
    st.tuples(st.just("leave"), st.tuples(st.integers(0, 9))),
    st.tuples(st.just("read"), st.tuples(st.integers(1, 9))),
    st.tuples(st.just("resize"), st.tuples(st.integers(1, 6))),
    st.tuples(st.sampled_from(["close", "open"]), st.just(())),
    st.tuples(st.just("pass_time"), st.tuples(st.sampled_from([0.5, 1.0]))),
)


Happening = tuple[str, tuple[Any, ...]]


def _one_resize(happening: list[Happening]) -> list[Happening]:
    """Without a second change of the bounds in one turn, so that it is known which one counted."""
    resizes = [place for place, (name, _) in enumerate(happening) if name == "resize"]
    return [each for place, each in enumerate(happening) if place not in resizes[1:]]


@examples(250)
@given(
    bound=st.integers(1, 4),
    queue=st.integers(0, 6),
    rounds=st.lists(st.lists(happenings, min_size=1, max_size=5), max_size=25),
)
def test_the_counter_is_what_is_inside(
    bound: int, queue: int, rounds: list[list[tuple[str, tuple[Any, ...]]]]
) -> None:
    _play(bound, queue, rounds)


def _play(
    bound: int,
    queue: int,
    rounds: list[list[tuple[str, tuple[Any, ...]]]],
    prompt_tokens: int = 0,
) -> None:
    loop = ManualLoop()
    world = World(loop, bound, queue, prompt_tokens)
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
        world.open()
        loop.turns(40)
        loop.now_s += 2000.0
        loop.turns(40)
        for client in world.clients:
            client.release.set()
        loop.turns(200)
        assert world.admission.running == 0
        assert world.admission.queued == 0
        # Nothing is left in an account: what was charged in advance was given back or settled.
        assert not world.admission._queue._accounts
        # "new": it left before it had begun to ask.
        assert {client.state for client in world.clients} <= {"gone", "refused", "late", "new"}
    finally:
        loop.close()


of_tenants: st.SearchStrategy[tuple[str, tuple[Any, ...]]] = st.one_of(
    st.tuples(
        st.just("arrive"),
        st.tuples(st.integers(1, 6), st.sampled_from([0.0, 1.0, 1000.0]), st.sampled_from(SHARES)),
    ),
    happenings.filter(lambda each: each[0] != "arrive"),
)


@examples(100)
@given(
    bound=st.integers(1, 4),
    queue=st.integers(0, 6),
    rounds=st.lists(st.lists(of_tenants, min_size=1, max_size=5), max_size=25),
    prompt_tokens=st.sampled_from([0, 1500, 5000]),
)
def test_the_counter_is_what_is_inside_with_tenants(
    bound: int, queue: int, rounds: list[list[tuple[str, tuple[Any, ...]]]], prompt_tokens: int
) -> None:
    _play(bound, queue, rounds, prompt_tokens)


async def test_room_that_is_kept_for_others_is_theirs_at_once() -> None:
    admission = Admission(32, 4, 1.0)
    flood, good = Share("flood"), Share("good")
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(admission.slot(1, 1, share=good))
        for _ in range(29):
            await stack.enter_async_context(admission.slot(1, 1, share=flood, expected_work=10.0))
        with pytest.raises(Unavailable):  # Two places are kept.
            await stack.enter_async_context(
                admission.slot(1, 0.01, share=flood, expected_work=10.0)
            )
        late = asyncio.create_task(_hold(admission, flood))
        await asyncio.sleep(0)
        for _ in range(2):  # Also where others wait.
            await stack.enter_async_context(admission.slot(1, 0.01, share=good))
        assert admission.running == 32
        late.cancel()
    assert admission.running == 0


async def test_a_prompt_above_the_share_waits_until_the_engine_has_read_the_others() -> None:
    admission = Admission(32, 4, 1.0, max_unread_tokens=2048)
    flood, good = Share("flood"), Share("good")

    def asked(share: Share, prompt_tokens: int) -> contextlib.AbstractAsyncContextManager[int]:
        return admission.slot(1, 10, 0, share, 10.0, None, prompt_tokens)

    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(asked(good, 100))
        for _ in range(16):
            await stack.enter_async_context(asked(flood, 100))
        late = asyncio.create_task(stack.enter_async_context(asked(flood, 1000)))
        await asyncio.sleep(0)
        assert admission.queued == 1
        await stack.enter_async_context(asked(good, 5000))  # Its own share: at once.
        admission.read(17)
        await asyncio.sleep(0)
        assert admission.queued == 1  # The 5,000 tokens are still to be read.
        admission.read(1)
        assert admission.queued == 0
        await late
    assert admission.running == 0


async def _hold(admission: Admission, share: Share) -> None:
    async with admission.slot(1, 1, share=share):
        await asyncio.sleep(0)


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0, 10)), min_size=1, max_size=30))
def test_gpu_seconds_are_those_in_which_anything_ran(changes: list[tuple[int, float]]) -> None:
    """All requests together get the busy time of all GPUs, and no more."""
    now_s = [0.0]
    clock = BatchClock(gpus=2, now_s=lambda: now_s[0])
    inside: list[tuple[int, float]] = []
    given_s = busy_s = 0.0
    for number, (sequences, passed_s) in enumerate(changes):
        running = sum(each for each, _ in inside)
        if number % 3 == 2 and inside:
            ended, began_s = inside.pop(0)
            given_s += ended * (clock.advance(running) - began_s)
        else:
            inside.append((sequences, clock.advance(running)))
        now_s[0] += passed_s
        busy_s += passed_s if inside else 0.0
    running = sum(each for each, _ in inside)
    ends_s = clock.advance(running)
    given_s += sum(each * (ends_s - began_s) for each, began_s in inside)
    assert given_s == pytest.approx(2 * busy_s)


@examples(100)
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
