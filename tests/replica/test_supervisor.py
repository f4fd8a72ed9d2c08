"""Dead and hung engines are noticed, and no guarded process outlives its replica."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from serve_app.replica import supervisor
from serve_app.replica.sharing import SharedGpu
from serve_app.replica.supervisor import Reaper, Supervisor


class FakeEngine:
    def __init__(self) -> None:
        self.dead = False
        self.last_sign_s = 0.0
        self.cpu_s = 0.0
        self.answers = True
        self.killed = False
        self.probes = 0

    async def probe(self) -> None:
        self.probes += 1
        while not self.answers:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        self.last_sign_s += 1

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(supervisor, "_CHECK_S", 0.01)
    return FakeEngine()


async def watched(engine: FakeEngine, in_flight: list[int], hang_s: float = 0.05) -> Supervisor:
    left: list[int] = []
    watch = Supervisor(engine, hang_s, lambda: in_flight[0], left.append)
    await asyncio.wait_for(watch.watch(), 60)
    assert left == [1]
    return watch


async def test_a_dead_engine_ends_the_replica(engine: FakeEngine) -> None:
    asyncio.get_running_loop().call_later(0.05, setattr, engine, "dead", True)
    watch = await watched(engine, [0])
    assert watch.failure == "the engine died"
    assert not watch.healthy


async def test_a_hung_engine_is_killed_after_its_requests_got_errors(engine: FakeEngine) -> None:
    engine.answers = False
    in_flight = [3]
    asyncio.get_running_loop().call_later(0.2, in_flight.__setitem__, 0, 0)
    began_s = time.monotonic()
    watch = await watched(engine, in_flight)
    assert "silent" in str(watch.failure)
    assert engine.killed
    assert time.monotonic() - began_s >= 0.2


async def test_an_engine_in_a_long_step_is_not_hung(engine: FakeEngine) -> None:
    engine.answers = False
    watch = Supervisor(engine, 0.05, lambda: 0, lambda status: None)
    task = asyncio.create_task(watch.watch())
    for _ in range(30):  # Outputs come, the probe waits its turn.
        engine.last_sign_s += 1
        await asyncio.sleep(0.01)
    assert watch.healthy
    engine.answers = True
    await asyncio.sleep(0.05)
    assert watch.healthy
    task.cancel()


async def test_an_engine_that_writes_is_not_asked_until_it_stops(engine: FakeEngine) -> None:
    watch = Supervisor(engine, 0.05, lambda: 1, lambda status: None)
    task = asyncio.create_task(watch.watch())
    writing = True

    async def write() -> None:
        while writing:
            engine.last_sign_s += 1
            await asyncio.sleep(0)

    writer = asyncio.create_task(write())
    await asyncio.sleep(0.2)
    assert not engine.probes
    engine.answers = writing = False
    await writer
    await asyncio.wait_for(task, 60)
    assert "silent" in str(watch.failure)


async def test_how_long_an_engine_is_silent_is_known_until_it_answers(engine: FakeEngine) -> None:
    engine.answers = False
    watch = Supervisor(engine, 60.0, lambda: 1, lambda status: None)
    task = asyncio.create_task(watch.watch())
    async with asyncio.timeout(10):
        while watch.silent_s < 0.05:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        engine.answers = True
        while watch.silent_s:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert watch.healthy
    task.cancel()


async def test_an_engine_in_a_long_step_is_silent_and_not_stalled(engine: FakeEngine) -> None:
    """It works, so whoever waits for it goes on waiting; until it has been silent for too long."""
    engine.answers = False
    watch = Supervisor(engine, 0.3, lambda: 1, lambda status: None)
    task = asyncio.create_task(watch.watch())
    stalled = []
    async with asyncio.timeout(10):
        while not task.done():
            engine.cpu_s += 0.01
            stalled.append(watch.stalled_s)
            await asyncio.sleep(0.001)
    assert not any(stalled)
    assert "silent" in str(watch.failure)


async def test_an_engine_that_is_stopped_is_stalled_until_it_works_again(
    engine: FakeEngine,
) -> None:
    engine.answers = False
    watch = Supervisor(engine, 60.0, lambda: 1, lambda status: None)
    task = asyncio.create_task(watch.watch())
    async with asyncio.timeout(10):
        while watch.stalled_s < 0.05:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert watch.stalled_s == watch.silent_s
        engine.last_sign_s += 1
        while watch.stalled_s:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    task.cancel()


async def test_a_probe_that_fails_is_a_failure(engine: FakeEngine) -> None:
    async def broken() -> None:
        raise RuntimeError("worker gone")

    engine.probe = broken  # type: ignore[method-assign]
    assert "RuntimeError" in str((await watched(engine, [0])).failure)


class Restarts:
    """What starts a fake engine anew, and how often it did."""

    def __init__(self, engine: FakeEngine, error: Exception | None = None) -> None:
        self.engine, self.error, self.count = engine, error, 0
        self.watch: Supervisor | None = None

    async def __call__(self) -> None:
        assert self.watch
        assert self.watch.restarting
        assert not self.watch.healthy
        self.count += 1
        await asyncio.sleep(0.01)
        if self.error is not None:
            raise self.error
        self.engine.dead, self.engine.answers = False, True


def restartable(restarts: Restarts, left: list[int], within_s: float = 60.0) -> Supervisor:
    made = Supervisor(restarts.engine, 0.05, lambda: 0, left.append, restarts, within_s)
    restarts.watch = made
    return made


async def test_a_dead_engine_is_restarted_once(engine: FakeEngine) -> None:
    restarts, left = Restarts(engine), list[int]()
    watch = restartable(restarts, left)
    task = asyncio.create_task(watch.watch())
    engine.dead = True
    while restarts.count < 1 or not watch.healthy:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert engine.killed
    assert (watch.failure, watch.restarting, left) == (None, False, [])
    # Again, and so soon: another start would not mend it.
    engine.dead = True
    await asyncio.wait_for(task, 60)
    assert (restarts.count, left) == (1, [1])
    assert not watch.healthy
    assert not watch.restarting


async def test_an_engine_that_lasted_is_restarted_again(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_LASTING_S", 0.0)
    restarts, left = Restarts(engine), list[int]()
    task = asyncio.create_task(restartable(restarts, left).watch())
    while restarts.count < 3:
        engine.dead = True
        await asyncio.sleep(0.001)
    assert not left
    task.cancel()


@pytest.mark.parametrize("hangs", [False, True])
async def test_an_engine_that_does_not_restart_ends_the_replica(
    engine: FakeEngine, hangs: bool
) -> None:
    restarts, left = Restarts(engine, RuntimeError("no memory")), list[int]()
    engine.dead = True
    await asyncio.wait_for(restartable(restarts, left, 0.0 if hangs else 60.0).watch(), 60)
    assert (restarts.count, left) == (1, [1])


_REPLICA = """
import subprocess, sys, time
from serve_app.replica.supervisor import Reaper
reaper = Reaper()
with reaper.following():
    # As an engine is: not a child of the replica, but of one of its children.
    parent = subprocess.Popen(
        ["sh", "-c", "sleep 300 & echo $!; wait"], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    time.sleep(0.5)
print(child, reaper.pid, flush=True)
{then}
"""


def replica(then: str) -> tuple[subprocess.Popen[str], int, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", _REPLICA.format(then=then)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child, reaper = map(int, process.stdout.readline().split())
    return process, child, reaper


def gone(pid: int, within_s: float = 60.0) -> bool:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_killed_replica_leaves_no_process() -> None:
    process, child, reaper = replica("time.sleep(300)")
    assert psutil.pid_exists(child)
    process.kill()
    process.wait()
    assert gone(child)
    assert gone(reaper)


def test_a_replica_that_kills_its_children_before_it_ends_leaves_no_process() -> None:
    """As Ray's worker does when its raylet failed."""
    then = "import os, psutil\nfor each in psutil.Process().children(): each.kill()\nos._exit(1)"
    process, child, reaper = replica(then)
    process.wait(60)
    assert gone(child)
    assert gone(reaper)


def test_a_dismissed_reaper_kills_nothing() -> None:
    process, child, reaper = replica("reaper.dismiss()")
    process.wait(60)
    assert gone(reaper)
    assert psutil.pid_exists(child)
    os.kill(child, 9)


@pytest.mark.parametrize("another", [False, True])
def test_a_reaper_spares_a_process_that_has_the_pid_of_one_it_guarded(
    another: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reaper = Reaper()
    # A name that /proc shows with what separates its fields.
    sleeper = subprocess.Popen(["bash", "-c", "exec -a ') 1 (' sleep 300"])
    if another:
        monkeypatch.setattr(supervisor, "start_ticks", lambda pid: "1")
    reaper.guard([sleeper.pid])
    assert reaper._process.stdin is not None
    reaper._process.stdin.close()  # As when the replica is gone.
    assert gone(reaper.pid)
    if another:
        assert sleeper.poll() is None
        sleeper.kill()
    assert sleeper.wait(60) == -9


def test_what_a_reaper_keeps_is_kept_until_what_it_kills_has_ended(tmp_path: Path) -> None:
    """A GPU that a killed replica shared is another model's once the engine's memory is free."""
    gpu = SharedGpu("0", tmp_path)
    gpu.wait()
    reaper = Reaper(gpu.descriptors)
    engines = [subprocess.Popen(["sleep", "300"]) for _ in range(20)]
    reaper.guard([engine.pid for engine in engines])
    other = SharedGpu("0", tmp_path)
    gpu.close()  # As when the replica is gone.
    assert not other.take()
    assert reaper._process.stdin is not None
    reaper._process.stdin.close()
    other.wait()
    # Nobody has asked yet how they ended.
    assert all(psutil.Process(each.pid).status() == psutil.STATUS_ZOMBIE for each in engines)
    assert [engine.wait(60) for engine in engines] == [-9] * 20
    other.close()


def test_a_reaper_without_anything_to_guard_just_ends() -> None:
    reaper = Reaper()
    reaper.dismiss()
    assert gone(reaper.pid)
