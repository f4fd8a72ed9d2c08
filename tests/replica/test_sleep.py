"""Engines that sleep, under any order of requests, failures and other models on the same GPU.

A loop whose time is made up runs the real queues, sleepers and locks. The engines are stand-ins:
vLLM sleeps on GPUs only.
"""

import asyncio
import contextlib
import itertools
import math
import multiprocessing
import os
import selectors
import signal
import tempfile
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import TooManyRequests, Unavailable
from serve_app.gates.admission import Admission
from serve_app.replica.sharing import SharedGpu
from serve_app.replica.sleep import Gpu, Sleeper, State, Use, due
from tests.examples import examples

AFTER_S, SLEEP_S, WAKE_S, START_S = 10.0, 2.0, 1.0, 30.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes at once where nothing is ready."""

    def __init__(self) -> None:
        loop, self.now_s = self, 0.0

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                assert timeout is not None, "everybody waits, and for nothing"
                loop.now_s += timeout
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now_s


class Dead(Exception):
    """What vLLM raises of an engine that has ended."""


@dataclass(eq=False)
class Engine:
    """A stand-in. It notes what must not happen.

    Attributes:
        resident: it has memory of the GPU.
        failing: whether its next change fails.
    """

    resident: bool = True
    awake: bool = True
    dead: bool = False
    failing: bool = False
    running: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    slept: int = 0

    async def sleep(self) -> None:
        assert not self.running, "it was put to sleep with a request"
        self.awake = False
        await self._change(SLEEP_S)
        self.resident = False
        self.slept += 1

    async def wake(self) -> None:
        self.resident = True
        await self._change(WAKE_S)
        self.awake = True

    async def _change(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)
        if self.dead or self.failing:
            self.failing = False
            raise Dead

    def kill(self) -> None:
        self.dead, self.resident, self.awake = True, False, False
        self.ended.set()

    def start(self) -> None:
        self.__init__()  # type: ignore[misc]

    async def answer(self, seconds: float) -> None:
        if self.dead:
            raise Dead
        assert self.awake, "a request reached an engine that sleeps"
        self.running += 1
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), seconds)
        finally:
            self.running -= 1
        if self.dead:
            raise Dead


class Model:
    """A replica: its queue, its engine, its sleeper, and a supervisor that starts it anew."""

    def __init__(self, gpu: Gpu, after_s: float = AFTER_S, queue: int = 100) -> None:
        self.gpu, self.engine = gpu, Engine(resident=False, awake=False)
        self.admission = Admission(4, queue, 1.0)
        self.sleeper = Sleeper(
            self.engine, lambda: self.engine.wake(), self.admission, after_s, gpu
        )
        self.restarts = 0

    async def live(self) -> None:
        """Start, and start anew whenever the engine has ended."""
        while True:
            async with self.sleeper.replacing():
                self.engine.resident = True
                await asyncio.sleep(START_S)
                self.engine.start()
            await self.engine.ended.wait()
            self.restarts += 1
            await asyncio.sleep(1.0)

    async def ask(self, seconds: float, timeout_s: float = 10_000.0) -> str:
        try:
            async with self.admission.slot(1, timeout_s):
                await self.engine.answer(seconds)
        except Dead:
            return "failed"
        except Unavailable:
            return "late"
        except TooManyRequests:
            return "refused"
        return "answered"


@dataclass
class World:
    """Models on one GPU."""

    models: Sequence[Model]
    requests: list[tuple["asyncio.Task[str]", bool]] = field(default_factory=list)
    harmed: set[Model] = field(default_factory=set)

    def ask(self, which: int, seconds: float) -> None:
        model = self.models[which % len(self.models)]
        self.requests.append((asyncio.create_task(model.ask(seconds)), False))

    def leave(self, which: int, seconds: float) -> None:
        if self.requests:
            place = which % len(self.requests)
            self.requests[place][0].cancel()
            self.requests[place] = self.requests[place][0], True

    def kill(self, which: int, seconds: float) -> None:
        model = self.models[which % len(self.models)]
        self.harmed.add(model)
        model.engine.kill()

    def fail(self, which: int, seconds: float) -> None:
        model = self.models[which % len(self.models)]
        self.harmed.add(model)
        model.engine.failing = True

    def check(self) -> None:
        assert sum(model.engine.resident for model in self.models) <= 1, "two are on the GPU"
        for model in self.models:
            if model.sleeper.state is State.ASLEEP:
                assert not model.admission.running
                assert model.admission.closed or model.engine.dead


def run(play: Coroutine[Any, Any, Any]) -> Any:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(play)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


numbers = itertools.count()
happenings = st.tuples(
    st.sampled_from(["ask", "ask", "ask", "ask", "leave", "kill", "fail"]),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.1, 1.0, 20.0]),
    # Until the next one: many meet an engine that falls asleep, or wakes.
    st.sampled_from([0.0, 0.01, 0.5, 1.0, 1.9, 9.9, 10.1, 11.0, 13.0, 40.0]),
)


@examples(40)
@given(count=st.integers(1, 3), script=st.lists(happenings, max_size=25))
def test_whatever_happens_everybody_is_answered_and_one_model_is_awake(
    folder: Path, count: int, script: list[tuple[str, int, float, float]]
) -> None:
    name = f"GPU-{next(numbers)}"
    shared = [SharedGpu(name, folder) if count > 1 else Gpu() for _ in range(count)]

    async def play() -> None:
        world = World([Model(gpu) for gpu in shared])
        lives = [asyncio.create_task(model.live()) for model in world.models]
        # Before a replica has started, nobody sends requests there.
        await asyncio.sleep(count * 2 * START_S)
        for what, which, seconds, pause_s in script:
            getattr(world, what)(which, seconds)
            world.check()
            await asyncio.sleep(pause_s)
            world.check()
        outcomes = await asyncio.gather(
            *(task for task, left in world.requests if not left), return_exceptions=True
        )
        assert set(outcomes) <= ({"answered", "failed"} if world.harmed else {"answered"})
        world.check()
        # Afterwards every model answers, whatever happened to it.
        for model in world.models:
            model.engine.failing = False
        await asyncio.sleep(200.0)
        for model in world.models:
            assert await model.ask(0.1) == "answered"
            world.check()
        for live in lives:
            live.cancel()

    run(play())
    for gpu in shared:
        if isinstance(gpu, SharedGpu):
            gpu.close()


def test_an_idle_engine_sleeps_and_a_request_wakes_it() -> None:
    async def play() -> None:
        model = Model(Gpu())
        model.engine.start()
        model.sleeper.start()
        assert await model.ask(1.0) == "answered"
        await asyncio.sleep(AFTER_S - 1.0)
        assert model.sleeper.state is State.AWAKE
        await asyncio.sleep(1.0 + SLEEP_S + 1.0)
        assert model.sleeper.state is State.ASLEEP
        assert not model.engine.resident
        # As many as would run beside those that the queue has room for.
        answers = await asyncio.gather(*(model.ask(0.1) for _ in range(5)))
        assert answers == ["answered"] * 5
        assert model.engine.slept == 1

    run(play())


@pytest.mark.parametrize("queue", [0, 1])
def test_a_queue_without_room_still_wakes_the_engine(queue: int) -> None:
    async def play() -> None:
        model = Model(Gpu(), queue=queue)
        model.engine.start()
        model.sleeper.start()
        await asyncio.sleep(AFTER_S + SLEEP_S + 1.0)
        answers = await asyncio.gather(*(model.ask(0.1) for _ in range(6)))
        assert answers.count("answered") == 4 + queue
        assert answers.count("refused") == 2 - queue

    run(play())


def test_a_request_waits_for_a_shared_gpu_only_as_long_as_the_queue_allows(folder: Path) -> None:
    one, other = (SharedGpu("bounded", folder) for _ in range(2))

    async def play() -> None:
        first, second = Model(one, math.inf), Model(other, math.inf)
        lives = [asyncio.create_task(first.live()), asyncio.create_task(second.live())]
        await asyncio.sleep(2 * START_S + 10.0)  # Both have started, and the second is awake.
        assert (first.sleeper.state, second.sleeper.state) == (State.ASLEEP, State.AWAKE)
        long = asyncio.create_task(second.ask(500.0))
        await asyncio.sleep(1.0)
        assert await first.ask(0.1, timeout_s=30.0) == "late"
        assert await first.ask(0.1, timeout_s=1000.0) == "answered"
        assert long.done()
        for live in lives:
            live.cancel()

    run(play())
    one.close()
    other.close()


def test_two_models_that_are_never_idle_take_turns(folder: Path) -> None:
    one, other = (SharedGpu("turns", folder) for _ in range(2))

    async def play() -> None:
        models = [Model(one), Model(other)]
        lives = [asyncio.create_task(model.live()) for model in models]
        answered = [0, 0]

        async def crowd(which: int) -> None:
            while True:
                await models[which].ask(1.0)
                answered[which] += 1

        await asyncio.sleep(2 * START_S + 10.0)  # Both have started.
        clients = [asyncio.create_task(crowd(n % 2)) for n in range(8)]
        await asyncio.sleep(300.0)
        # Four at a time, each for a second: 1,200 without another model.
        assert sum(answered) > 1200 * 5 / 6 - 100
        assert min(answered) > 0.7 * max(answered)
        for task in [*lives, *clients]:
            task.cancel()

    run(play())
    one.close()
    other.close()


def test_a_replica_that_is_killed_holds_no_gpu(folder: Path) -> None:
    gpu = SharedGpu("killed", folder)
    held = multiprocessing.get_context("fork").Event()
    if (pid := os.fork()) == 0:
        SharedGpu("killed", folder).wait()
        held.set()
        signal.pause()
    assert held.wait(20)
    assert not gpu.take()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert gpu.take()
    gpu.close()


times_s = st.floats(0.0, 1000.0)


@given(idle_s=times_s, more_s=times_s, after_s=times_s, switch_s=times_s, wanted=st.booleans())
def test_what_is_due_stays_due_and_is_due_no_later_where_others_wait(
    idle_s: float, more_s: float, after_s: float, switch_s: float, wanted: bool
) -> None:
    use = Use(idle_s, idle_s + more_s)
    if due(use, after_s, switch_s):
        assert due(Use(idle_s + more_s, idle_s + more_s, wanted), after_s, switch_s)
        assert due(Use(use.idle_s, use.awake_s, wanted=True), after_s, switch_s)
    # No more is lost to idling for another model than the switch costs.
    assert due(Use(switch_s, switch_s, wanted=True), after_s, switch_s)


def test_an_engine_that_is_used_is_never_due_for_itself() -> None:
    assert not due(Use(0.0, 1e9), after_s=1.0, switch_s=1.0)
