"""Who runs, who waits, who is turned away; and what a late or broken answer becomes."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve_app.errors import TooManyRequests, Unavailable
from serve_app.gates.admission import Admission, AdmissionGate
from serve_app.scaling.signals import Signals
from serve_app.settings import Limits


async def hold(admission: Admission, release: asyncio.Event, order: list[str], name: str) -> None:
    async with admission.slot(1, 10):
        order.append(name)
        await release.wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_requests_run_wait_in_order_and_are_turned_away() -> None:
    admission, release, order = Admission(1, 2, 1.0), asyncio.Event(), []
    tasks = []
    for name in "abc":
        tasks.append(asyncio.create_task(hold(admission, release, order, name)))
        await settle()
    assert (admission.running, admission.queued) == (1, 2)
    with pytest.raises(TooManyRequests) as refused:
        async with admission.slot(1, 10):
            pass
    assert refused.value.retry_after_s == 1.0
    release.set()
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "c"]
    assert (admission.running, admission.queued) == (0, 0)


async def test_a_wait_ends_in_503_and_frees_its_place() -> None:
    admission, release = Admission(1, 1, 1.0), asyncio.Event()
    running = asyncio.create_task(hold(admission, release, [], "a"))
    await settle()
    with pytest.raises(Unavailable):
        async with admission.slot(1, 0.01):
            pass
    assert (admission.running, admission.queued) == (1, 0)
    release.set()
    await running


async def test_a_waiting_client_that_leaves_frees_its_place() -> None:
    admission, release = Admission(1, 1, 1.0), asyncio.Event()
    running = asyncio.create_task(hold(admission, release, [], "a"))
    await settle()
    waiting = asyncio.create_task(hold(admission, release, [], "b"))
    await settle()
    waiting.cancel()
    await settle()
    assert admission.queued == 0
    release.set()
    await running
    assert admission.running == 0


async def test_one_that_leaves_as_its_turn_comes_gives_it_on() -> None:
    admission, first, rest = Admission(1, 2, 1.0), asyncio.Event(), asyncio.Event()
    order: list[str] = []
    running = asyncio.create_task(hold(admission, first, order, "a"))
    await settle()
    leaver = asyncio.create_task(hold(admission, rest, order, "b"))
    patient = asyncio.create_task(hold(admission, rest, order, "c"))
    await settle()
    first.set()
    await running  # Gives its room to b, which has not run yet and now leaves.
    leaver.cancel()
    await settle()
    assert order[0] == "a"
    assert order[-1] == "c"
    rest.set()
    await patient
    assert admission.running == 0


async def test_a_request_larger_than_the_engine_runs_alone() -> None:
    admission = Admission(4, 4, 1.0)
    async with admission.slot(9, 1):
        assert admission.running == 4
    assert admission.running == 0


def gate(app: Any, healthy: bool = True, **limits: Any) -> httpx.AsyncClient:
    bounds = Limits(**limits)
    routes = [Route(p, app, methods=["POST"]) for p in ("/v1/chat/completions", "/v1/messages")]
    admission = Admission(1, 0, bounds.retry_after_s)
    stack = AdmissionGate(Starlette(routes=routes), admission, bounds, lambda: healthy, Signals())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=stack), base_url="http://test")


async def test_a_late_answer_is_504() -> None:
    async def slow(request: Request) -> Response:
        await asyncio.sleep(10)
        return JSONResponse({})

    async with gate(slow, request_timeout_s=0.05) as http:
        response = await http.post("/v1/chat/completions")
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_late_stream_ends_with_an_error_event(path: str) -> None:
    async def endless(request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            yield "data: one\n\n"
            await asyncio.sleep(10)

        return StreamingResponse(events(), media_type="text/event-stream")

    async with gate(endless, request_timeout_s=0.5) as http:
        response = await http.post(path)
    assert response.status_code == 200
    first, last = response.text.strip().split("\n\n")
    assert first == "data: one"
    assert "timeout_error" in last
    assert last.startswith("event: error\n") == (path == "/v1/messages")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_stream_whose_generator_fails_ends_with_an_error_event(path: str) -> None:
    async def breaks(request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            yield "data: one\n\n"
            raise RuntimeError("a mistake in the application")

        return StreamingResponse(events(), media_type="text/event-stream")

    async with gate(breaks) as http:
        response = await http.post(path)
    first, last = response.text.strip().split("\n\n")
    assert first == "data: one"
    assert json.loads(last.partition("data: ")[2])["error"]["code"] == "internal_error"
    assert "mistake" not in last


async def test_a_stream_of_an_engine_that_another_replica_replaces_breaks_off() -> None:
    async def fails(request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            yield "data: one\n\n"
            raise ConnectionAbortedError("the gateway goes on elsewhere")

        return StreamingResponse(events(), media_type="text/event-stream")

    async with gate(fails) as http:
        with pytest.raises(ConnectionAbortedError):
            await http.post("/v1/chat/completions")


async def test_a_failed_engine_is_503_and_not_500() -> None:
    async def broken(request: Request) -> Response:
        return JSONResponse({"error": "EngineCore encountered an issue"}, status_code=500)

    health = [True]

    async def breaks(request: Request) -> Response:
        health[0] = False
        return await broken(request)

    bounds = Limits()
    app = Starlette(routes=[Route("/v1/chat/completions", breaks, methods=["POST"])])
    stack = AdmissionGate(app, Admission(1, 0, 1.0), bounds, lambda: health[0], Signals())
    transport = httpx.ASGITransport(app=stack)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        during = await http.post("/v1/chat/completions")
        after = await http.post("/v1/chat/completions")
    for response in (during, after):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"


async def test_an_honest_500_stays_one() -> None:
    async def broken(request: Request) -> Response:
        return JSONResponse({"error": "x"}, status_code=500)

    async with gate(broken) as http:
        assert (await http.post("/v1/chat/completions")).status_code == 500


def worker(ended: asyncio.Event) -> Any:
    """An application as vLLM's is: it works in a task, and ends that when its client leaves."""

    async def app(request: Request) -> Response:
        async def leave() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        work = asyncio.create_task(asyncio.sleep(10))
        work.add_done_callback(lambda _: ended.set())
        await request.body()
        leaving = asyncio.create_task(leave())
        _, pending = await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return JSONResponse(None)

    return app


async def test_a_late_answer_is_no_longer_worked_on() -> None:
    ended = asyncio.Event()
    async with gate(worker(ended), request_timeout_s=0.05) as http:
        response = await http.post("/v1/chat/completions")
    assert response.status_code == 504
    assert ended.is_set()


async def test_a_cancelled_request_is_no_longer_worked_on_and_then_leaves_its_room() -> None:
    ended = asyncio.Event()
    async with gate(worker(ended)) as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions"))
        await asyncio.sleep(0.05)
        # There is room for one, and no queue.
        assert (await http.post("/v1/chat/completions")).status_code == 429
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert ended.is_set()
        again = asyncio.create_task(http.post("/v1/chat/completions"))
        await asyncio.sleep(0.05)
        assert not again.done()
        again.cancel()


async def test_a_cancelled_stream_ends() -> None:
    ended = asyncio.Event()

    async def endless(request: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            try:
                while True:
                    yield "data: one\n\n"
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        return StreamingResponse(events(), media_type="text/event-stream")

    async with gate(endless, request_timeout_s=0.1) as http:
        response = await http.post("/v1/chat/completions")
    assert ended.is_set()
    assert "timeout_error" in response.text.strip().split("\n\n")[-1]
