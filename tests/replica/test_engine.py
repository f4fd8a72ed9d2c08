"""The engine of a replica, without a model."""

import asyncio
from types import SimpleNamespace

import pytest

from serve_app.replica import engine as module
from serve_app.replica.engine import Engine
from serve_app.replica.startup import Startup


class Moving(Engine):
    """An engine that sleeps and wakes when it is told to."""

    cpu_s = 0.0  # type: ignore[assignment]

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.asked: list[object] = []
        self.last_sign_s = 0.0

        async def move(what: object = None, level: int = 0) -> None:
            self.asked.append(what or level)
            await self.over.wait()

        self._llm = SimpleNamespace(sleep=move, wake_up=move)


@pytest.mark.parametrize("works", [True, False])
async def test_an_engine_that_moves_its_memory_lives_as_long_as_it_works(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor takes one without a sign for dead, and large weights take their time."""
    monkeypatch.setattr(module, "_MOVE_CHECK_S", 0.01)
    engine = Moving()
    moving = asyncio.create_task(engine.sleep())
    signs = set()
    for _ in range(5):
        engine.cpu_s += works
        await asyncio.sleep(0.05)
        signs.add(engine.last_sign_s)
    assert (len(signs) > 1) == works
    engine.over.set()
    await moving
    assert engine.last_sign_s > 0
    await engine.wake(Startup(dedicated=False))
    # An engine schedules again once both are back.
    assert engine.asked == [1, ["weights"], ["kv_cache"]]
