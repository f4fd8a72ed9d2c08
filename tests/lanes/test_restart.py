"""A real vllm-rs that dies or hangs is started anew beside its engine, which goes on; and a real
engine sleeps and wakes (without a GPU vLLM's engine keeps its memory, and pauses all the same).

The engine is that of test_contract.py.
"""

import asyncio
import signal
import threading
from typing import Any

import httpx
import pytest

from serve_app.gates.admission import Admission
from serve_app.replica.keeper import Keeper
from serve_app.replica.sleep import Gpu, Sleeper, State
from serve_app.replica.startup import Startup
from tests.lanes.conftest import Lanes
from tests.server import wait

LONG = {"model": "tiny", "prompt": "x", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
SHORT = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "temperature": 0}


def text(client: httpx.Client) -> Any:
    answer = client.post("/v1/completions", json=SHORT)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_it_is_restarted_and_the_engine_keeps_running(lanes: Lanes, number: signal.Signals) -> None:
    # Sooner than an engine on fast cores has made the whole answer.
    hang_timeout_s = 1.0 if number == signal.SIGSTOP else 3.0
    keeper = Keeper(lambda: lanes.engine.fast, hang_timeout_s, lanes.engine.restart_frontend)
    watch = lanes.run(_start(keeper))
    process = lanes.engine.fast.manager._proc
    expected, outcome = text(lanes.fast), []

    def ask_long() -> None:
        headers = {"x-request-id": f"cut-{number}"}
        try:
            outcome.append(lanes.fast.post("/v1/completions", json=LONG, headers=headers))
        except httpx.HTTPError as error:
            outcome.append(error)

    asking = threading.Thread(target=ask_long)
    asking.start()
    assert wait(lambda: lanes.running == 1)
    process.send_signal(number)
    # The full lane answers meanwhile, from the same engine.
    assert text(lanes.full) == expected
    asking.join(60)
    assert isinstance(outcome[0], httpx.HTTPError)
    assert wait(lambda: lanes.engine.fast.manager._proc is not process)
    assert wait(lambda: keeper.failure is None)
    assert text(lanes.fast) == expected
    # Nobody reads what the engine would still make for the one that is gone.
    assert wait(lambda: lanes.running == 0)
    (cut,) = [each for each in lanes.ended if f"cut-{number}" in each.request_id]
    assert cut.reason == "error"
    assert cut.generated_tokens < 1900
    lanes.loop.call_soon_threadsafe(watch.cancel)


async def _start(keeper: Keeper) -> "asyncio.Task[None]":
    return asyncio.create_task(keeper.watch())


def test_a_client_that_leaves_ends_the_work(lanes: Lanes) -> None:
    with lanes.fast.stream(
        "POST",
        "/v1/completions",
        json={**LONG, "stream": True},
        headers={"x-request-id": "leaves-1"},
    ) as answer:
        next(answer.iter_lines())
    assert wait(lambda: any("leaves-1" in each.request_id for each in lanes.ended))
    (left,) = [each for each in lanes.ended if "leaves-1" in each.request_id]
    assert (left.reason, left.generated_tokens < 1900) == ("abort", True)
    assert wait(lambda: lanes.running == 0)


def test_a_request_that_takes_too_long_ends_with_an_error_event(lanes: Lanes) -> None:
    with lanes.fast.stream(
        "POST",
        "/v1/completions",
        json={**LONG, "stream": True},
        headers={"x-request-id": "late-1"},
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        lanes.run(lanes.engine.abort("late-1"))
        rest = [line for line in lines if line]
    assert any('"error"' in line for line in rest[-2:]), rest[-2:]
    assert wait(lambda: any("late-1" in each.request_id for each in lanes.ended))
    (late,) = [each for each in lanes.ended if "late-1" in each.request_id]
    assert late.generated_tokens < 1900


def test_an_engine_that_sleeps_is_awake_for_the_requests_of_both_lanes(lanes: Lanes) -> None:
    admission, engine = Admission(64, 64, 1.0), lanes.engine
    startup = Startup(dedicated=False)

    async def begin() -> Sleeper:
        sleeper = Sleeper(engine, lambda: engine.wake(startup), admission, 0.2, Gpu())
        sleeper.start()
        return sleeper

    async def ask(client: httpx.Client) -> Any:
        async with admission.slot(1, 60.0):
            assert not await engine._llm.is_sleeping()
            return await asyncio.to_thread(text, client)

    expected = text(lanes.full)
    sleeper = lanes.run(begin())
    for client in (lanes.fast, lanes.full, lanes.fast):
        assert wait(lambda: sleeper.state is State.ASLEEP)
        assert lanes.run(engine._llm.is_sleeping())
        assert lanes.run(ask(client)) == expected
    assert {span.phase for span in startup.segments()} >= {"weights", "KV cache"}
    # The other tests find it awake.
    assert wait(lambda: sleeper.state is State.ASLEEP)
    lanes.run(engine.wake(startup))
    lanes.loop.call_soon_threadsafe(sleeper.stop)
    assert wait(lambda: not admission.closed)
    assert text(lanes.fast) == expected
