"""Puts an idle engine to sleep, and wakes it for the next request.

An engine that sleeps (level 1 of vLLM's sleep mode) has given the GPU's memory back: its weights
are in the machine's memory, its KV cache is gone. The queue in front of the engine is closed from
before it falls asleep until it is awake (gates/admission.py). Requests of both lanes pass through
that queue, so none runs in an engine that sleeps, and none reaches its vllm-rs, which takes a grant
that is given behind the queue. Requests that come meanwhile wait, within the usual bounds.

    awake ── it is due: the queue closes ──> falling asleep ──> asleep
      ^                                                           │
      └── the queue opens ── waking <── a request waits, and the GPU is free

What fails on the way ends the engine: its requests fail, and the supervisor replaces it.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from serve_app.gates.admission import Admission
from serve_app.progress import say

logger = logging.getLogger("serve_app")

# Begins the line that says so.
ASLEEP = "asleep:"

# How often an engine that is awake is looked at, and a GPU that another model holds.
_LOOK_S = 0.25
_POLL_S = 0.02
# What falling asleep and waking take, until they were measured.
_FIRST_SLEEP_S, _FIRST_WAKE_S = 2.0, 1.0
# A model that is never idle keeps the GPU from another one for so many times what the switch takes:
# at most a sixth of the time goes to switching.
_TURN = 5.0


class State(StrEnum):
    AWAKE = "awake"
    FALLING_ASLEEP = "falling asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


@dataclass(frozen=True)
class Use:
    """How an engine that is awake is used.

    Attributes:
        idle_s: how long no request has been there; 0 while one is.
        awake_s: how long it has been awake.
        wanted: whether another model waits for the GPU.
    """

    idle_s: float
    awake_s: float
    wanted: bool = False


def due(use: Use, after_s: float, switch_s: float) -> bool:
    """Whether the engine is to fall asleep now, by what that costs.

    While it falls asleep and wakes, `switch_s` in all, the GPU answers nobody. Where no other model
    wants the memory, holding it costs nothing before `after_s`. Where one waits, each idle second
    is a second of that model: the engine gives way once as much was lost as the switch takes, so
    that never more than twice the least possible is lost. A model that is never idle gives way
    after a turn that is long beside the switch.
    """
    if not use.wanted:
        return use.idle_s >= after_s
    return use.idle_s >= min(after_s, switch_s) or use.awake_s >= _TURN * switch_s


class Engine(Protocol):
    """What is put to sleep."""

    async def sleep(self) -> None: ...
    def kill(self) -> None: ...


class Gpu:
    """A GPU that no other model wants. One that is shared is replica/sharing.py's."""

    @property
    def wanted(self) -> bool:
        """Whether another model waits for it."""
        return False

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Of files that hold it for as long as any process has them open."""
        return ()

    def wait(self) -> None:
        """Block until it is taken."""

    def take(self) -> bool:
        """Take it, or stand in line for it; returns whether this replica holds it."""
        return True

    def leave_line(self) -> None:
        """Wait for it no longer."""

    def give_back(self) -> None:
        """Let the next one take it."""


class Sleeper:
    """Lets one engine sleep, from the event loop of its replica.

    Args:
        wake: wakes the engine, and returns once it is awake.
        after_s: how long nobody asks before it falls asleep.
        gpu: of the engine; this replica holds it while it is awake.

    Attributes:
        state: of the engine.
    """

    def __init__(
        self,
        engine: Engine,
        wake: Callable[[], Awaitable[None]],
        admission: Admission,
        after_s: float,
        gpu: Gpu,
    ) -> None:
        self._engine, self._wake_engine, self._admission = engine, wake, admission
        self._after_s, self._gpu = after_s, gpu
        self._sleep_s, self._wake_s = _FIRST_SLEEP_S, _FIRST_WAKE_S
        self._task: asyncio.Task[None] | None = None
        self.state = State.AWAKE

    def start(self) -> None:
        """Begin with an engine that is awake."""
        self.state = State.AWAKE
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Leave the engine as it is, and let requests in."""
        if self._task is not None:
            self._task.cancel()

    @contextlib.asynccontextmanager
    async def replacing(self) -> AsyncIterator[None]:
        """Hold the GPU while the engine is restarted; it is awake afterwards."""
        self.stop()
        while not self._gpu.take():  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        yield
        self.start()

    async def _watch(self) -> None:
        """Run until it is stopped, or the engine fails."""
        try:
            while True:
                await self._until_due()
                await self._fall_asleep()
                await self._until_wanted()
                await self._wake()
        except Exception as error:
            # Half asleep it is of no use; its memory may be another model's.
            logger.exception("the engine failed as it was %s: %s", self.state, error)
            self._engine.kill()
        finally:
            # Requests that wait hear of a failed engine now, and not after their time in the queue.
            self._admission.open()

    async def _until_due(self) -> None:
        clock, admission = asyncio.get_running_loop().time, self._admission
        woke_s = used_s = clock()
        admitted = admission.admitted
        while True:
            now_s = clock()
            if admission.running or admission.queued or admission.admitted > admitted:
                used_s, admitted = now_s, admission.admitted
            use = Use(now_s - used_s, now_s - woke_s, self._gpu.wanted)
            if due(use, self._after_s, self._sleep_s + self._wake_s):
                return
            await asyncio.sleep(_LOOK_S)

    async def _fall_asleep(self) -> None:
        self.state = State.FALLING_ASLEEP
        self._admission.close()
        await self._admission.until(lambda: not self._admission.running)
        began_s = asyncio.get_running_loop().time()
        await self._engine.sleep()
        self._sleep_s = asyncio.get_running_loop().time() - began_s
        self.state = State.ASLEEP
        self._gpu.give_back()
        say(f"{ASLEEP} it took {self._sleep_s:.1f} s; the next request wakes the engine")

    async def _until_wanted(self) -> None:
        """Return once a request waits and this replica holds the GPU."""
        admission = self._admission
        while True:
            await admission.until(lambda: bool(admission.queued))
            while admission.queued:
                if self._gpu.take():
                    return
                await asyncio.sleep(_POLL_S)
            self._gpu.leave_line()

    async def _wake(self) -> None:
        self.state = State.WAKING
        began_s = asyncio.get_running_loop().time()
        await self._wake_engine()
        self._wake_s = asyncio.get_running_loop().time() - began_s
        self.state = State.AWAKE
        self._admission.open()
