"""The road through the gateway, against small real engines that fail as told."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from prometheus_client.registry import REGISTRY
from starlette.types import Message, Receive, Scope, Send

from serve_app.continuation import Progress, Stream
from serve_app.gateway import routing
from serve_app.gateway.fleet import Fleet as Upstreams
from serve_app.gateway.fleet import Upstream
from serve_app.gateway.relay import Relay
from serve_app.gateway.request import Request
from serve_app.lanes import capability
from serve_app.pacing import Pacer, watch
from serve_app.replica.backend import Server, exchange
from serve_app.settings import Gateway, Limits
from tests.lanes.test_door import until
from tests.services.engine import EngineServer, Fault

WHOLE = "".join(f"{token} " for token in range(10))


def unplaced() -> float | None:
    return REGISTRY.get_sample_value("serve_app_requests_unplaced", {"model": "m"})


class Client:
    """What one client sees."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.over = False
        self.news = asyncio.Event()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert not self.status, "a second response"
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            assert not self.over
            self.body += message.get("body", b"")
            self.over = not message.get("more_body", False)
        self.news.set()

    @property
    def events(self) -> list[Any]:
        lines = [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n") if event]
        return [line if line == b"[DONE]" else json.loads(line) for line in lines]

    @property
    def text(self) -> str:
        choices = [event.get("choices", [{}])[0] for event in self.events if event != b"[DONE]"]
        return "".join(choice.get("text", "") for choice in choices)

    @property
    def error(self) -> str:
        result = self.events[-1] if self.status == 200 else json.loads(self.body)
        return str(result["error"]["code"])


class CountingClient(Client):
    """Counts the pieces in which a body comes."""

    pieces = 0

    async def send(self, message: Message) -> None:
        self.pieces += bool(message.get("body"))
        await super().send(message)


class SlowClient(Client):
    """One that takes the first piece of an answer only when it may; as uvicorn does, what has not
    been taken by then is lost with who sends it."""

    def __init__(self) -> None:
        super().__init__()
        self.may_take = asyncio.Event()

    async def send(self, message: Message) -> None:
        self.news.set()
        if message["type"] == "http.response.body":
            await self.may_take.wait()
        await super().send(message)


class Fleet:
    """A relay before engines."""

    def __init__(self, engines: list[EngineServer], **settings: Any) -> None:
        self.engines = engines
        self.replicas = Upstreams()
        self.replicas.update([engine.replica for engine in engines])
        self.woken = 0
        given = {"stall_timeout_s": 0.6, "replica_timeout_s": 0.5, "routing": "least_outstanding"}
        self.settings = Gateway(**{**given, **settings})
        router = routing.make(self.settings.routing, random.Random(1))
        limits = Limits(request_timeout_s=20.0)
        self.pacer = Pacer(1.0)
        self.relay = Relay(
            self.replicas, router, self.settings, limits, "m", self._wake, pacer=self.pacer
        )

    def _wake(self) -> None:
        self.woken += 1

    async def ask(self, client: Client | None = None, **body: Any) -> Client:
        client = client or Client()
        content = json.dumps({"model": "m", "prompt": "p", "stream": True, **body}).encode()
        scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        scope["headers"] = [(b"content-type", b"application/json"), (b"x-request-id", b"r1")]
        await self.relay(Request.of(scope, content, "x-session-id"), client.send)
        return client


@contextlib.asynccontextmanager
async def fleet(*engines: EngineServer, **settings: Any) -> AsyncIterator[Fleet]:
    for engine in engines:
        await engine.start()
    result = Fleet(list(engines), **settings)
    yield result
    await result.relay.close()
    for engine in engines:
        await engine.stop()


@pytest.mark.parametrize("method", ["resume", "repeat"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("cut", range(11))
async def test_a_stream_continues_from_every_cut(method: str, half: bool, cut: int) -> None:
    bad = EngineServer("a", method=method, faults=[Fault(cut_after=cut, half=half)])
    good = EngineServer("b", method=method)
    async with fleet(bad, good) as there:
        bad_first = await _first_to(there, bad)
    assert bad_first.text == WHOLE
    assert bad_first.events.count(b"[DONE]") == 1
    # One answer: one id, one time.
    assert {(e["id"], e["created"]) for e in bad_first.events[:-1]} == {
        (e["id"], e["created"]) for e in bad_first.events[:1]
    }
    (progress, body), *_ = good.requests
    assert json.loads(body)["prompt"] == "p"
    if cut == 0:
        assert progress is None
    else:
        assert progress == Progress(
            groups=[[token] for token in range(min(cut, 10))],
            finish="length" if cut == 10 else None,
            repeat=method == "repeat",
        )


async def _first_to(there: Fleet, engine: EngineServer, **body: Any) -> Client:
    """Ask so that `engine` is asked first."""
    for replica in there.replicas.ready():
        replica.outstanding += 10**6 * (replica.name != engine.name)
    return await there.ask(**body)


async def test_each_replica_may_fail_a_stream_that_continues() -> None:
    engines = [EngineServer(name, length=40) for name in "abc"]
    engines[0].faults = [Fault(cut_after=9)]
    engines[1].faults = [Fault(cut_after=20)]
    engines[2].faults = [Fault(cut_after=32)]
    async with fleet(*engines, max_attempts=9, replica_timeout_s=5.0) as there:
        client = await there.ask()
    assert client.text == "".join(f"{token} " for token in range(40))
    assert sum(len(engine.requests) for engine in engines) == 4


async def test_a_request_that_is_not_streamed_is_asked_again_whole() -> None:
    bad, good = EngineServer("a", faults=[Fault(cut_after=0)]), EngineServer("b")
    async with fleet(bad, good) as there:
        client = await _first_to(there, bad, stream=False)
    assert client.status == 200
    assert json.loads(client.body)["text"] == WHOLE


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_fails_before_its_answer_began_is_no_answer(stream: bool) -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        current = exchange.get()
        assert current
        current.broken = True  # As _ContinuingLLM does where vLLM says that its engine is dead.
        await send({"type": "http.response.start", "status": 500, "headers": []})

    real, good = Server("127.0.0.1"), EngineServer("b")
    real.start(fails)
    try:
        async with fleet(good, replica_timeout_s=5.0) as there:
            both = [("a", {"address": real.address, "token": real.token}), good.replica]
            there.replicas.update(both)
            client = await _first_to(there, EngineServer("a"), stream=stream)
            assert client.status == 200
            whole = client.text if stream else json.loads(client.body)["text"]
            assert whole == WHOLE
            assert [replica.name for replica in there.replicas.ready()] == ["b"]
    finally:
        await real.drain(1.0)


async def test_two_deaths_refuse_a_request() -> None:
    engines = [EngineServer(name, faults=[Fault(cut_after=0)] * 3) for name in "abc"]
    async with fleet(*engines) as there:
        client = await there.ask()
    assert (client.status, client.error) == (500, "replicas_died")
    assert sum(len(engine.requests) for engine in engines) == 2


async def test_a_poisoned_stream_ends_with_an_error_event() -> None:
    engines = [EngineServer(name, faults=[Fault(cut_after=4)] * 3) for name in "ab"]
    async with fleet(*engines) as there:
        client = await there.ask()
    assert client.status == 200
    assert client.error == "replicas_died"
    assert client.text == "0 1 2 3 "


async def test_a_replica_that_continues_with_an_error_is_reported() -> None:
    """Its error is not one of the events that the client has already."""
    bad = EngineServer("a", faults=[Fault(cut_after=5)])
    async with fleet(bad, EngineServer("b", faults=[Fault(error_after=0)])) as there:
        client = await _first_to(there, bad)
    assert client.text == "0 1 2 3 4 "
    assert client.events[-2]["error"]["message"] == "told to"
    assert client.events[-1] == b"[DONE]"


@pytest.mark.parametrize("status", [200, 400, 404, 422, 500])
async def test_a_refusal_of_a_stream_that_has_begun_is_an_error_event(status: int) -> None:
    bad = EngineServer("a", faults=[Fault(cut_after=4)])
    async with fleet(bad, EngineServer("b", faults=[Fault(status=status)])) as there:
        client = await _first_to(there, bad)
    assert client.text == "0 1 2 3 "
    assert client.error == "cannot_continue"
    assert "told to" in client.events[-1]["error"]["message"]


@pytest.mark.parametrize("orderly", [False, True])
async def test_half_of_a_first_event_is_dropped_with_its_marks(orderly: bool) -> None:
    bad = EngineServer("a", faults=[Fault(cut_after=1, half=True, orderly=orderly)])
    bad.faults[0].instead[0] = b": how resume\n: t 0\ndata: {"  # type: ignore[union-attr]
    async with fleet(bad, EngineServer("b")) as there:
        client = await _first_to(there, bad)
    assert client.text == WHOLE
    assert {event["id"] for event in client.events[:-1]} == {"b-0"}
    assert b": how" not in client.body


async def test_a_response_that_ends_without_its_last_event_continues_elsewhere() -> None:
    bad = EngineServer("a", faults=[Fault(cut_after=4, orderly=True)])
    async with fleet(bad, EngineServer("b")) as there:
        client = await _first_to(there, bad)
    assert client.text == WHOLE
    assert client.events.count(b"[DONE]") == 1


async def test_marks_that_cannot_be_read_cost_a_healthy_stream_nothing() -> None:
    odd = b': how resume\n: t 4\n: l [[[[4, "?"]], 1]]\n'
    event = b'data: {"id": "a-0", "created": 97, "choices": [{"text": "4 "}]}\n\n'
    engine = EngineServer("a", faults=[Fault(instead={4: odd + event})])
    async with fleet(engine) as there:
        assert (await there.ask()).text == WHOLE
        engine.faults = [Fault(instead={4: odd + event}, cut_after=7)]
        assert (await there.ask()).error == "cannot_continue"


async def test_a_mistake_of_the_gateway_is_an_error_and_not_a_broken_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with fleet(EngineServer("a")) as there:
        monkeypatch.setattr(there.replicas, "answered", None)
        monkeypatch.setattr(Stream, "finish", None)
        client = await there.ask()
    assert client.over


async def test_what_cannot_continue_exactly_ends_with_an_error_event() -> None:
    bad, good = EngineServer("a", method="never", faults=[Fault(cut_after=3)]), EngineServer("b")
    async with fleet(bad, good) as there:
        client = await _first_to(there, bad)
    assert client.error == "cannot_continue"
    assert client.text == "0 1 2 "
    assert not good.requests


async def test_before_its_first_event_anything_starts_again() -> None:
    bad = EngineServer("a", method="never", faults=[Fault(cut_after=0)])
    async with fleet(bad, EngineServer("b", method="never")) as there:
        assert (await _first_to(there, bad)).text == WHOLE


@pytest.mark.parametrize("after", [0, 4])
async def test_a_silent_replica_is_left(after: int) -> None:
    bad, good = EngineServer("a", faults=[Fault(stall_after=after)]), EngineServer("b")
    async with fleet(bad, good) as there:
        bad.deaf = False
        ask = asyncio.create_task(_first_to(there, bad))
        while not bad.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        bad.deaf = True  # As SIGSTOP does: connections are taken, nothing is answered.
        client = await ask
    assert client.text == WHOLE
    assert bad.left == 1, "the connection to it was kept"


@pytest.mark.parametrize("stream", [True, False])
async def test_what_waits_for_an_engine_that_is_silent_is_asked_elsewhere(stream: bool) -> None:
    stopped = EngineServer("a", faults=[Fault(stall_after=0)])
    async with fleet(stopped, EngineServer("b")) as there:
        ask = asyncio.create_task(_first_to(there, stopped, stream=stream))
        while not stopped.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stopped.stalled_s = 5.0  # As its supervisor says, where the engine was sent SIGSTOP.
        client = await ask
    assert len(stopped.requests) == 1
    assert WHOLE in (client.text if stream else client.body.decode())


async def test_a_replica_says_for_how_long_its_engine_was_silent() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("a ping is none of the engine's business")

    server = Server("127.0.0.1")
    stalled_s = [0.0]
    server.start(never, stalled_s=lambda: stalled_s[0])
    try:
        async with fleet(EngineServer("b")) as there:
            replica = Upstream("a", server.address, server.token)
            assert await there.relay._visits.alive(replica)
            stalled_s[0] = 11.0
            assert not await there.relay._visits.alive(replica)
            # A stranger is told nothing.
            assert await there.relay._visits.alive(Upstream("a", server.address, "guessed"))
    finally:
        await server.drain(1.0)


async def test_nothing_is_lost_that_a_slow_client_has_not_taken() -> None:
    """A replica is given up while what came from it waits for the client to take it."""
    bad, good = EngineServer("a", faults=[Fault(stall_after=4)]), EngineServer("b")
    client = SlowClient()
    async with fleet(bad, good) as there:
        ask = asyncio.create_task(_first_to(there, bad, client=client))
        await client.news.wait()
        bad.deaf = True
        await asyncio.sleep(2.0)  # Its pings fail in that time.
        client.may_take.set()
        await ask
    assert client.text == WHOLE


@pytest.mark.parametrize("fast", [False, True])
async def test_a_gateway_that_is_behind_passes_tokens_on_together(fast: bool) -> None:
    pieces = []
    for gap_s in (0.0, 0.5):
        client = CountingClient()
        async with fleet(EngineServer("a", fast=fast, pause_s=0.02)) as there:
            there.pacer.gap_s = gap_s
            await there.ask(client)
        assert client.text == WHOLE
        pieces.append(client.pieces)
    assert pieces[1] < pieces[0]


async def test_what_a_replica_sent_before_it_failed_is_neither_lost_nor_doubled() -> None:
    """It fails while its last tokens wait to be passed on with more."""
    bad, good = EngineServer("a", faults=[Fault(cut_after=6)], pause_s=0.02), EngineServer("b")
    async with fleet(bad, good) as there:
        there.pacer.gap_s = 0.2
        client = await _first_to(there, bad)
    assert client.text == WHOLE
    assert client.events.count(b"[DONE]") == 1


def _busy(seconds: float) -> None:
    """Hold up the event loop."""
    time.sleep(seconds)


async def test_the_lag_of_the_loop_sets_the_gap() -> None:
    pacer = Pacer(0.05)
    watching = asyncio.create_task(watch(pacer))
    for _ in range(40):
        await asyncio.sleep(0.001)
        _busy(0.02)
    assert pacer.gap_s > 0.0
    watching.cancel()


@pytest.mark.parametrize("after", [0, 4])
async def test_a_silent_stream_of_an_engine_at_work_is_no_failure(after: int) -> None:
    """Its sequence was preempted, or a step takes long: pings say that the engine works."""
    slow = EngineServer("a", faults=[Fault(stall_after=after, stall_s=2.0)])
    other = EngineServer("b")
    async with fleet(slow, other, stall_timeout_s=0.3) as there:
        client = await _first_to(there, slow)
    assert client.text == WHOLE
    assert not other.requests


async def test_replicas_that_fall_silent_harm_no_request() -> None:
    engines = [EngineServer(name, faults=[Fault(stall_after=4)]) for name in "abc"]
    good = EngineServer("d")
    async with fleet(*engines, good, max_deaths=2, replica_timeout_s=9.0) as there:
        ask = asyncio.create_task(_first_to(there, engines[0]))
        while not ask.done():
            for engine in engines:
                engine.stalled_s = 9.0 if engine.requests else 0.0
            await asyncio.sleep(0.02)
    assert (await ask).text == WHOLE


async def test_a_slow_first_token_is_no_stall() -> None:
    slow = EngineServer("a", pause_s=0.0)
    slow.faults = [Fault(stall_after=0)]
    async with fleet(slow) as there:
        ask = asyncio.create_task(there.ask())
        _, waiting = await asyncio.wait({ask}, timeout=2.0)
        assert waiting, "given up, though the replica answers pings"
        ask.cancel()


async def test_a_replica_that_is_full_is_passed_by() -> None:
    full, good = EngineServer("a", faults=[Fault(status=429)]), EngineServer("b")
    async with fleet(full, good) as there:
        assert (await _first_to(there, full)).text == WHOLE
        assert there.replicas.ready() == list(there.replicas.ready()), "avoided, though only full"


async def test_where_all_are_full_the_client_gets_their_refusal() -> None:
    engines = [EngineServer(name, faults=[Fault(status=429)]) for name in "ab"]
    async with fleet(*engines) as there:
        client = await there.ask()
    assert client.status == 429
    assert client.headers[b"retry-after"] == b"7"
    assert b"told to" in client.body


async def test_the_half_of_an_answer_waits_for_room_where_all_are_full() -> None:
    """Its client has a status and some tokens: a refusal would be written into its stream."""
    bad = EngineServer("a", faults=[Fault(cut_after=4), *[Fault(status=429)] * 3])
    full = EngineServer("b", faults=[Fault(status=503), Fault(status=429)])
    async with fleet(bad, full, replica_timeout_s=20.0) as there:
        client = await _first_to(there, bad)
    assert client.text == WHOLE
    assert client.events.count(b"[DONE]") == 1
    assert len(full.requests) >= 2


async def test_who_is_full_is_not_asked_again_and_again_while_another_is_avoided() -> None:
    bad = EngineServer("a", faults=[Fault(cut_after=0)])
    full = EngineServer("b", faults=[Fault(status=429)] * 99)
    async with fleet(bad, full) as there:
        client = await _first_to(there, bad)
    assert client.status == 429
    assert len(full.requests) == 1


async def test_the_half_of_an_answer_that_finds_no_room_ends_with_an_error_event() -> None:
    bad = EngineServer("a", faults=[Fault(cut_after=4), *[Fault(status=429)] * 99])
    full = EngineServer("b", faults=[Fault(status=429)] * 99)
    async with fleet(bad, full, replica_timeout_s=0.3) as there:
        client = await _first_to(there, bad)
    assert client.text == "0 1 2 3 "
    assert client.error == "unavailable"


async def test_an_engine_that_restarts_has_not_died_of_the_request() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("there is no engine")

    ready = [False]
    absent = Server("127.0.0.1")
    absent.start(never, lambda: ready[0])
    try:
        async with fleet(EngineServer("b"), max_deaths=1, replica_timeout_s=5.0) as there:
            both = [("a", {"address": absent.address, "token": absent.token})]
            there.replicas.update([*both, there.engines[0].replica])
            client = await _first_to(there, EngineServer("a"))
            assert client.text == WHOLE
            assert [replica.name for replica in there.replicas.ready()] == ["b"]
    finally:
        await absent.drain(1.0)


async def test_without_a_replica_503_in_time_and_service_resumes() -> None:
    async with fleet() as there:
        client = await there.ask()
        assert (client.status, client.error) == (503, "unavailable")
        assert b"retry-after" in client.headers
        assert there.woken == 1
        waiting = asyncio.create_task(there.ask())
        await asyncio.sleep(0.1)
        assert unplaced() == 1
        engine = await EngineServer("a").start()
        there.replicas.update([engine.replica])
        assert (await waiting).text == WHOLE
        assert unplaced() == 0
        await engine.stop()


async def test_a_replica_that_is_gone_is_avoided_and_tried_again() -> None:
    gone, good = EngineServer("a"), EngineServer("b")
    async with fleet(gone, good) as there:
        await gone.stop()
        for _ in range(3):
            assert (await there.ask()).text == WHOLE
        assert [replica.name for replica in there.replicas.ready()] == ["b"]
        there.replicas.clock = lambda: asyncio.get_running_loop().time() + 3600
        assert {replica.name for replica in there.replicas.ready()} == {"a", "b"}


async def test_a_request_waits_for_an_engine_that_restarts() -> None:
    engine = EngineServer("a", restarting=True)
    async with fleet(engine) as there:
        [replica] = there.replicas.ready()
        asking = asyncio.create_task(there.ask())
        await until(lambda: replica.restarting)
        assert not there.replicas.ready()
        now_s = there.replicas.clock()
        there.replicas.clock = lambda: now_s  # Time is no help.
        engine.restarting = False
        assert (await asking).text == WHOLE
        assert there.replicas.ready() == [replica]
    assert len(engine.requests) == 1


async def test_a_replica_that_ends_instead_of_its_restart_is_avoided_as_any_other() -> None:
    engine, other = EngineServer("a", restarting=True), EngineServer("b")
    async with fleet(engine, other) as there:
        assert (await _first_to(there, engine)).text == WHOLE
        replica = next(r for r in there.replicas._all.values() if r.name == "a")
        await engine.stop()
        await until(lambda: not replica.restarting)
        assert (await _first_to(there, engine)).text == WHOLE
        assert [each.name for each in there.replicas.ready()] == ["b"]


async def test_a_replica_that_left_is_not_asked_for_its_engine() -> None:
    engine = EngineServer("a", restarting=True)
    async with fleet(engine) as there:
        [replica] = there.replicas.ready()
        asking = asyncio.create_task(there.ask())
        await until(lambda: replica.restarting)
        there.replicas.update([])
        await until(lambda: not replica.restarting)
        successor = await EngineServer("b").start()
        there.replicas.update([successor.replica])
        assert (await asking).text == WHOLE
        await successor.stop()


async def ask_and_leave(there: Fleet) -> None:
    """A client that leaves after the first event of its answer."""
    client = Client()
    ask = asyncio.create_task(there.ask(client))
    await client.news.wait()
    ask.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await ask


async def test_a_client_that_leaves_stops_the_engine() -> None:
    engine = EngineServer("a", length=1000, pause_s=0.01)
    async with fleet(engine) as there:
        await ask_and_leave(there)
        async with asyncio.timeout(5):
            while not engine.left:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not there.replicas.ready()[0].running
        assert not there.replicas.ready()[0].outstanding


async def test_headers_reach_the_engine_and_its_secrets_stay() -> None:
    engine = EngineServer("a")
    async with fleet(engine) as there:
        scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        # A client cannot pretend to be a gateway.
        scope["headers"] = [(b"x-continue", b"5"), (b"x-engine-token", b"no"), (b"host", b"h")]
        client = Client()
        await there.relay(Request.of(scope, b'{"stream": true}', "x-session-id"), client.send)
    assert client.text == WHOLE
    assert engine.requests == [(None, b'{"stream": true}')]


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        ("/v1/responses", {"input": "x", "max_output_tokens": 10**12}, 4096),
        ("/v1/chat/completions", {"messages": [], "max_tokens": "1000000"}, 4096),
        ("/v1/chat/completions", {"messages": [], "max_tokens": "100", "n": "3"}, 300),
        ("/v1/completions", {"prompt": ["x", "y"]}, 512),
        ("/tokenize", {"prompt": "x", "max_tokens": 10**12}, 0),
    ],
)
def test_what_a_request_is_taken_to_cost(path: str, body: dict[str, Any], tokens: int) -> None:
    scope = {"headers": [], "method": "POST", "path": path, "query_string": b""}
    ask = Request.of(scope, json.dumps(body).encode(), "x-session-id")
    assert tokens <= ask.tokens <= tokens + 20


def test_progress_survives_its_journey() -> None:
    progress = Progress(groups=[[1], [2, 3]], finish="stop", stop="x", repeat=True)
    assert msgspec.json.decode(msgspec.json.encode(progress), type=Progress) == progress


# The fast lane.


@pytest.mark.parametrize("method", ["resume", "repeat"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("cut", range(13))
async def test_a_fast_stream_continues_in_the_full_lane(method: str, half: bool, cut: int) -> None:
    bad = EngineServer("a", fast=True, faults=[Fault(cut_after=cut, half=half)])
    good = EngineServer("b", fast=True, method=method)
    async with fleet(bad, good) as there:
        client = await _first_to(there, bad)
        assert bad.places == bad.left_places == 1
    assert client.text == WHOLE
    assert client.headers[b"x-serve-lane"] == (b"fast" if cut else b"python")
    assert client.events.count(b"[DONE]") == 1
    assert b"token_ids" not in client.body
    said = client.events[:-1]
    assert [each["choices"][0]["finish_reason"] for each in said if each["choices"]].count(
        "length"
    ) == 1
    assert len({(each["id"], each["created"]) for each in said}) == 1
    assert not bad.requests
    assert not good.fast_asked
    ((progress, body),) = good.requests
    assert "return_token_ids" not in json.loads(body)
    if cut < 3:  # The first event is of the prompt's ids, and is not the client's.
        assert progress is None or progress.groups == [[0]]
    else:
        tokens = [[token] for token in range(min(cut - 1, 10))]
        assert progress == Progress(tokens, finish="length" if cut == 12 else None, repeat=None)


async def test_a_request_takes_the_fast_lane_of_the_replica_that_was_chosen() -> None:
    engine = EngineServer("a", fast=True)
    async with fleet(engine) as there:
        client = await there.ask(max_tokens=4)
    assert client.text == WHOLE
    assert client.headers[b"x-serve-lane"] == b"fast"
    assert not engine.requests
    (sent,) = engine.fast_asked
    assert json.loads(sent) == {
        "return_token_ids": True,
        **{"model": "m", "prompt": "p", "stream": True, "max_tokens": 4},
    }
    assert engine.places == engine.left_places == 1


@pytest.mark.parametrize("asked", [True, False])
async def test_token_ids_are_the_clients_if_it_asked_for_them(asked: bool) -> None:
    engine = EngineServer("a", fast=True)
    async with fleet(engine) as there:
        client = await there.ask(return_token_ids=asked)
    assert client.headers[b"x-serve-lane"] == b"fast"
    choices = [each["choices"][0] for each in client.events[:-1]]
    ids = [token for choice in choices for token in choice.get("token_ids") or []]
    assert ids == (list(range(10)) if asked else [])
    assert client.text == WHOLE


async def test_an_answer_in_one_piece_passes_through_as_it_is() -> None:
    engine = EngineServer("a", fast=True)
    async with fleet(engine) as there:
        client = await there.ask(stream=False)
    assert json.loads(client.body)["text"] == WHOLE
    assert client.headers[b"x-serve-lane"] == b"fast"
    assert json.loads(engine.fast_asked[0]) == {"model": "m", "prompt": "p", "stream": False}
    assert engine.left_places == 1


@pytest.mark.parametrize(
    "more", [{"n": 2}, {"unknown": 1}, {"model": "other"}, {"max_tokens": 5000}, {"prompt": ["a"]}]
)
async def test_what_the_table_does_not_have_takes_the_full_lane(more: dict[str, Any]) -> None:
    engine = EngineServer("a", fast=True)
    async with fleet(engine) as there:
        client = await there.ask(**more)
    assert client.text == WHOLE
    assert client.headers[b"x-serve-lane"] == b"python"
    assert not engine.places
    assert not engine.fast_asked


async def test_a_stream_of_more_than_text_takes_the_full_lane(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the table lets in: its events could not be continued by their text."""
    monkeypatch.setattr(capability, "obstacle", lambda *_: None)
    engine = EngineServer("a", fast=True)
    async with fleet(engine) as there:
        for more in ({"logprobs": 2}, {"tools": []}, {"echo": True}):
            assert (await there.ask(**more)).headers[b"x-serve-lane"] == b"python"
        client = await there.ask(stream=False, logprobs=2)
    assert client.headers[b"x-serve-lane"] == b"fast"


@pytest.mark.parametrize("more", [{"logprobs": None}, {"echo": False}, {"logprobs": None, "n": 1}])
async def test_a_field_that_asks_for_nothing_stays_in_the_fast_lane(more: dict[str, Any]) -> None:
    """vLLM's own load generators send `"logprobs": null` with each request."""
    async with fleet(EngineServer("a", fast=True)) as there:
        client = await there.ask(**more)
    assert client.headers[b"x-serve-lane"] == b"fast"


@pytest.mark.parametrize("stream", [True, False])
async def test_what_the_fast_lane_refuses_the_full_lane_answers(stream: bool) -> None:
    engine = EngineServer("a", fast=True, fast_status=400)
    async with fleet(engine) as there:
        client = await there.ask(stream=stream)
    assert client.headers[b"x-serve-lane"] == b"python"
    assert WHOLE in (client.text if stream else client.body.decode())
    assert engine.left_places == 1


async def test_the_door_may_send_a_request_to_the_full_lane() -> None:
    engine = EngineServer("a", fast=True, door=[b"full\n", b"refuse 413 0 2\n{}"])
    async with fleet(engine) as there:
        for _ in range(2):
            assert (await there.ask()).headers[b"x-serve-lane"] == b"python"
        assert (await there.ask()).headers[b"x-serve-lane"] == b"fast"


REFUSED = b"refuse 429 16 12\nretry-after: 7\r\n" + b'{"error":{}}'
ABSENT_ENGINE = b"refuse 502 25 0\nx-engine-failed: absent\r\n"


@pytest.mark.parametrize("answer", [REFUSED, ABSENT_ENGINE, b""])
async def test_what_the_door_refuses_is_asked_elsewhere(answer: bytes) -> None:
    first, second = EngineServer("a", fast=True, door=[answer]), EngineServer("b", fast=True)
    async with fleet(first, second) as there:
        client = await _first_to(there, first)
        avoided = len(there.replicas.ready()) == 1
    assert client.text == WHOLE
    assert not first.requests
    assert avoided == (answer != REFUSED), "a replica that is only full is not avoided"


async def test_a_refusal_of_every_door_is_the_answer() -> None:
    engines = [EngineServer(name, fast=True, door=[REFUSED]) for name in "ab"]
    async with fleet(*engines) as there:
        client = await there.ask()
    assert client.status == 429
    assert client.headers[b"retry-after"] == b"7"


async def test_an_error_of_the_fast_lane_is_not_the_clients() -> None:
    bad, good = EngineServer("a", fast=True, faults=[Fault(error_after=5)]), EngineServer("b")
    async with fleet(bad, good) as there:
        client = await _first_to(there, bad)
    assert client.text == WHOLE
    assert b"told to" not in client.body


@pytest.mark.parametrize("after", [0, 5])
async def test_a_front_end_that_hangs_is_left(after: int) -> None:
    """Its replica answers, and its engine works."""
    bad = EngineServer("a", fast=True, faults=[Fault(stall_after=after)], fast_deaf=True)
    async with fleet(bad, EngineServer("b")) as there:
        client = await _first_to(there, bad)
    assert client.text == WHOLE
    assert bad.left_places == 1


async def test_a_client_that_leaves_gives_back_its_place() -> None:
    engine = EngineServer("a", length=900, pause_s=0.01, fast=True)
    async with fleet(engine) as there:
        await ask_and_leave(there)
        async with asyncio.timeout(5):
            while not (engine.left and engine.left_places):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_the_client_s_key_stays_with_the_gateway() -> None:
    """The Rust front end is asked with the replica's token alone."""
    engine = EngineServer("a", fast=True)
    async with fleet(engine) as there:
        scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
        scope["headers"] = [
            (b"content-type", b"application/json"),
            (b"authorization", b"Bearer sk-ann"),
            (b"x-api-key", b"sk-ann"),
        ]
        client = Client()
        body = b'{"model":"m","prompt":"p","stream":true}'
        await there.relay(Request.of(scope, body, "x-session-id"), client.send)
    assert client.headers[b"x-serve-lane"] == b"fast"
    assert client.text == WHOLE
