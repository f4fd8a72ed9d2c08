"""A replica whose engine sleeps, as its clients see it: the real gates, and a stand-in for vLLM."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.observe import metrics
from serve_app.planning.placement import place
from serve_app.planning.plan import Plan
from serve_app.replica import sleep
from serve_app.replica.deployment import ReplicaBase
from serve_app.replica.sharing import SharedGpu
from serve_app.replica.sleep import State
from serve_app.replica.startup import Startup
from serve_app.scaling.signals import Signals
from serve_app.settings import Settings

ASK = {"model": "asleep", "prompt": "x"}


class Engine:
    """What a replica needs of vLLM, which sleeps on GPUs only."""

    max_running_requests, fast, cpu_s = 4, None, 0.0

    def __init__(self) -> None:
        self.bounds = SimpleNamespace(change=lambda limits: None)
        self.awake, self.dead, self.failing = True, False, False
        self.loads: list[Mapping[str, Any]] = []
        self.last_sign_s = 0.0

    async def app(self) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if self.dead:
                await JSONResponse({}, 500)(scope, receive, send)
                return
            generates = scope["method"] == "POST"
            assert self.awake or not generates, "a request reached an engine that sleeps"
            await JSONResponse({"text": "y"})(scope, receive, send)

        return answer

    async def warm_up(self) -> tuple[float, float]:
        return 0.0, 0.0

    async def probe(self) -> None:
        self.last_sign_s = time.monotonic()

    async def sleep(self) -> None:
        self.awake = False
        await asyncio.sleep(0.05)

    async def wake(self, startup: Startup) -> None:
        with startup.phase("weights"):
            await asyncio.sleep(0.05)
        if self.failing:
            raise RuntimeError("out of memory")
        self.awake = True

    async def ended(self) -> None: ...

    async def restart(self, startup: Startup, load: Mapping[str, Any]) -> None:
        self.awake, self.dead, self.failing = True, False, False
        self.loads.append(load)

    def kill(self) -> None:
        self.dead = True


class Replica(ReplicaBase):
    """A replica with its engine already there."""

    _continuing = True

    def __init__(self, args: Mapping[str, Any]) -> None:
        self._settings = Settings.parse({"sleep": {"after_s": 0.1}, **args})
        self._plan = Plan("tiny", "asleep", place(1, 1, 1), cpu_threads=None)
        self._limited, self._admitted, self._model = [], [], "asleep"
        self._startup, self._signals = Startup(dedicated=False), Signals()
        self.starts: list[str] = []
        self._observation = SimpleNamespace(started=self._note)  # type: ignore[assignment]
        self._reaper = SimpleNamespace(following=_nothing, dismiss=lambda: None)  # type: ignore[assignment]
        self._engine = Engine()  # type: ignore[assignment]
        self._loaded_s = 0.0

    def _note(self, model: str, kind: str, segments: Any) -> dict[str, float]:
        self.starts.append(kind)
        return {span.phase: 0.0 for span in segments}

    async def asleep(self) -> None:
        assert self._sleeper is not None
        while self._sleeper.state is not State.ASLEEP:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def end(self) -> None:
        for watch in self._watches:
            watch.cancel()
        if self._sleeper is not None:
            self._sleeper.stop()


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def client(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica")


def gauge() -> float:
    (family,) = metrics.asleep.collect()
    return next(each.value for each in family.samples if each.labels["model"] == "asleep")


async def test_a_request_of_either_lane_wakes_the_engine_and_is_answered() -> None:
    replica = Replica({})
    full = client(await replica._stack())
    fast = client(replica._gates(await replica._engine.app()))
    for lane in (full, fast, full):
        await replica.asleep()
        assert gauge() == 1
        # What runs nothing is answered, and wakes nobody.
        assert (await full.get("/v1/models")).status_code == 200
        assert replica._sleeper is not None
        assert replica._sleeper.state is State.ASLEEP
        answer = await lane.post("/v1/completions", json=ASK)
        assert (answer.status_code, answer.json()) == (200, {"text": "y"})
    assert replica.starts == ["start", *["wake"] * 3]
    replica.end()


async def test_a_request_that_meets_a_failing_wake_is_refused_and_the_next_one_answered() -> None:
    replica = Replica({})
    app = client(await replica._stack())
    await replica.asleep()
    replica._engine.failing = True  # type: ignore[attr-defined]
    answer = await app.post("/v1/completions", json=ASK)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert replica._engine.dead
    while replica._engine.dead:  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # The supervisor starts it anew.
    assert (await app.post("/v1/completions", json=ASK)).status_code == 200
    await replica.asleep()
    assert (await app.post("/v1/completions", json=ASK)).status_code == 200
    replica.end()


async def test_replicas_on_one_gpu_start_and_answer_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sleep, "_FIRST_SLEEP_S", 0.0)
    monkeypatch.setattr(sleep, "_FIRST_WAKE_S", 0.1)
    replicas = [Replica({"sleep": {"models_per_gpu": 2}}) for _ in range(2)]
    engines = [cast(Engine, replica._engine) for replica in replicas]
    for engine in engines:
        engine.awake = False
    clients = []
    for replica, engine in zip(replicas, engines, strict=True):
        # The second start waits until the first engine has given way.
        replica._gpu = SharedGpu("0", tmp_path)
        await asyncio.to_thread(replica._gpu.wait)
        assert not any(other.awake for other in engines if other is not engine)
        engine.awake = True
        clients.append(client(await replica._stack()))
    for turn in (0, 1, 1, 0, 1):
        answer = await clients[turn].post("/v1/completions", json=ASK)
        assert (answer.status_code, answer.json()) == (200, {"text": "y"})
        assert [engine.awake for engine in engines] == [turn == 0, turn == 1]
    for replica in replicas:
        replica.end()


async def test_each_restart_asks_anew_how_the_weights_are_loaded() -> None:
    """A daemon may have died since, or may be there again."""
    replica = Replica({"sleep": {}})
    await replica._stack()
    mapped = {"load_format": "ipc_cache"}
    answers: list[Mapping[str, Any]] = [mapped, {}, mapped]
    replica._weights = SimpleNamespace(load_arguments=lambda: answers[len(engine.loads)])  # type: ignore[assignment]
    engine: Any = replica._engine
    for _ in answers:
        await replica._restart()
    assert engine.loads == answers
    replica._weights = None
    await replica._restart()
    assert engine.loads[-1] == {}
    assert replica.starts[-4:] == ["restart"] * 4
    replica.end()


async def test_without_the_setting_nothing_sleeps() -> None:
    replica = Replica({"sleep": {}})
    app = client(await replica._stack())
    await asyncio.sleep(0.5)
    assert replica._sleeper is None
    assert (await app.post("/v1/completions", json=ASK)).status_code == 200
    replica.end()


@pytest.mark.parametrize("queue", [0, 4])
async def test_a_crowd_before_a_sleeping_engine_has_the_bounds_of_the_queue(queue: int) -> None:
    replica = Replica({"limits": {"max_queued_requests": queue}})
    app = client(await replica._stack())
    await replica.asleep()
    crowd = (app.post("/v1/completions", json=ASK) for _ in range(12))
    statuses = [each.status_code for each in await asyncio.gather(*crowd)]
    assert statuses.count(200) == Engine.max_running_requests + queue
    assert statuses.count(429) == 12 - Engine.max_running_requests - queue
    replica.end()
