"""The engine of a replica, without a model."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.replica.startup import Startup


def moving() -> Any:
    """An engine that sleeps and wakes when its event `over` is set."""
    from serve_app.replica.engine import Engine

    class Moving(Engine):
        cpu_s = 0.0  # type: ignore[assignment]

        def __init__(self) -> None:
            self.over = asyncio.Event()
            self.asked: list[object] = []
            self.last_sign_s = 0.0
            self._llm = SimpleNamespace(sleep=self._move, wake_up=self._move)

        async def _move(self, what: object = None, level: int = 0) -> None:
            self.asked.append(what or level)
            await self.over.wait()

    return Moving()


@pytest.mark.parametrize("works", [True, False])
async def test_an_engine_that_moves_its_memory_lives_as_long_as_it_works(
    works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor takes one without a sign for dead, and large weights take their time."""
    monkeypatch.setattr("serve_app.replica.engine._MOVE_CHECK_S", 0.01)
    engine = moving()
    asleep = asyncio.create_task(engine.sleep())
    signs = set()
    for _ in range(5):
        engine.cpu_s += works
        await asyncio.sleep(0.05)
        signs.add(engine.last_sign_s)
    assert (len(signs) > 1) == works
    engine.over.set()
    await asleep
    assert engine.last_sign_s > 0
    await engine.wake(Startup(dedicated=False))
    # An engine schedules again once both are back.
    assert engine.asked == [1, ["weights"], ["kv_cache"]]
