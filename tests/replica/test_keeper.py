"""vllm-rs is started anew where it died or hangs; the door is open only while it answers."""

import asyncio
import random
from collections.abc import Callable

import pytest

from serve_app.replica import keeper
from serve_app.replica.keeper import Keeper


class Frontend:
    """Dies and hangs when it is told to; each restart gives a process that answers.

    Attributes:
        answers: whether a probe returns.
        refuses: how many probes fail at once, though it lives.
        restarts: that it may still have.
    """

    def __init__(self, restarts: int = 5) -> None:
        self.alive, self.answers, self.refuses = True, True, 0
        self.restarts, self.kills, self.broken_restarts = restarts, 0, 0
        self.stopped = False

    @property
    def may_restart(self) -> bool:
        return self.restarts > 0

    async def probe(self) -> None:
        if self.refuses:
            self.refuses -= 1
            raise OSError("too many open files")
        while not self.answers:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    def kill(self) -> None:
        self.alive = False
        self.kills += 1

    def stop(self) -> None:
        self.stopped = True

    async def restart(self) -> None:
        assert not self.alive, "it was not ended first"
        self.restarts -= 1
        if self.broken_restarts:
            self.broken_restarts -= 1
            raise OSError("no such program")
        self.alive = self.answers = True


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_CHECK_S", 0.01)


def watched(frontend: Frontend) -> tuple[Keeper, "asyncio.Task[None]"]:
    watch = Keeper(lambda: frontend, 0.05, frontend.restart)
    return watch, asyncio.create_task(watch.watch())


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("how", ["alive", "answers"])
async def test_one_that_died_or_hangs_is_killed_and_restarted(how: str) -> None:
    frontend = Frontend()
    watch, task = watched(frontend)
    setattr(frontend, how, False)
    await until(lambda: frontend.restarts == 4)
    await until(lambda: watch.failure is None)
    assert frontend.alive
    assert frontend.kills == 1
    task.cancel()


async def test_a_probe_that_cannot_be_made_is_no_failure() -> None:
    frontend = Frontend()
    watch, task = watched(frontend)
    frontend.refuses = 2
    await until(lambda: not frontend.refuses)
    await asyncio.sleep(0.05)
    assert (watch.failure, frontend.kills) == (None, 0)
    task.cancel()


async def test_a_restart_that_fails_is_tried_again() -> None:
    frontend = Frontend()
    frontend.broken_restarts = 2
    watch, task = watched(frontend)
    frontend.alive = False
    await until(lambda: frontend.restarts == 2)
    await until(lambda: watch.failure is None)
    assert frontend.alive
    task.cancel()


async def test_the_door_stays_shut_once_it_may_not_be_started_again() -> None:
    frontend = Frontend(restarts=1)
    watch, task = watched(frontend)
    frontend.alive = False
    await until(lambda: frontend.alive)
    frontend.answers = False
    await asyncio.wait_for(task, 30)
    assert watch.failure is not None
    assert not frontend.alive
    assert frontend.stopped


async def test_it_rests_while_the_engine_is_replaced() -> None:
    frontend, gone = Frontend(), False
    frontend.alive = False
    watch = Keeper(lambda: None if gone else frontend, 0.05, frontend.restart)
    gone = True
    task = asyncio.create_task(watch.watch())
    await asyncio.sleep(0.05)
    assert (frontend.kills, frontend.restarts) == (0, 5)
    task.cancel()


async def test_whatever_happens_in_any_order_it_ends_up_answering() -> None:
    chance = random.Random(4)
    frontend = Frontend(restarts=1000)
    watch, task = watched(frontend)
    for _ in range(40):
        match chance.randrange(4):
            case 0:
                frontend.alive = False
            case 1:
                frontend.answers = False
            case 2:
                frontend.refuses = chance.randint(1, 3)
            case 3:
                frontend.broken_restarts = chance.randint(0, 2)
        await asyncio.sleep(chance.random() * 0.05)
    await until(lambda: frontend.alive and frontend.answers and watch.failure is None)
    task.cancel()
