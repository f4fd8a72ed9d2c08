"""The door behind a real HAProxy, with real gates, before a small Rust front end of the tests.

Ports 8650 to 8652.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.gates.admission import Admission, AdmissionGate
from serve_app.gates.keys import KeyGate, KeyRing
from serve_app.gates.limits import LimitGate
from serve_app.lanes import capability, door
from serve_app.lanes.door import Door, Ends, Grant, Locator, Request, parse
from serve_app.launch import launcher
from serve_app.launch.haproxy_rules import BODY_TIMEOUT_VARIABLE, KEYS_VARIABLE, SECRET_VARIABLE
from serve_app.replica.reports import Ended
from serve_app.scaling.signals import Signals
from serve_app.settings import ApiKeys, Limits, Settings, Tenants
from serve_app.tenants.gate import book_of, gated
from serve_app.tenants.registry import keys_of
from serve_app.tenants.tenant import digest
from tests.launch.test_haproxy_reload import Proxy, Upstream

PORT = 8650
SECRET, TOKEN = "sesame", "a-token-of-this-replica"
KEY = {"authorization": "Bearer sk-ann"}
TENANTS = f"""
tenants:
  - name: ann
    quota: {{requests_per_minute: 7, tokens_per_minute: 1000}}
    keys: [{{sha256: {digest(b"sk-ann")}}}]
"""
ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 4}


class RustFrontend:
    """Answers as vllm-rs does, in so many events; the engine's reports come from here as well.

    Attributes:
        heads: of the requests that came.
        gap_s: between two events.
        status: of every answer.
        running: requests under way.
    """

    host = "127.0.0.1"
    token = TOKEN

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self.heads: list[str] = []
        self.gap_s, self.status, self.running = 0.0, 200, 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, self.host, 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = next(x for x in head.lower().split("\r\n") if "content-length" in x)
                body = json.loads(await reader.readexactly(int(length.split(":")[1])))
                self.heads.append(head)
                await self._answer(head, body, reader, writer)
        writer.close()

    async def _answer(
        self, head: str, body: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.status != 200:
            writer.write(b"HTTP/1.1 %d No\r\ncontent-length: 2\r\n\r\n{}" % self.status)
            return
        request_id = next(
            line.split(": ")[1] for line in head.split("\r\n") if line.startswith("x-request-id")
        )
        arrived_s = time.monotonic()
        made, reason, first_s = 0, "length", None
        self.running += 1
        try:
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
            for _ in range(body["max_tokens"]):
                if self.gap_s:
                    with contextlib.suppress(TimeoutError):
                        if not await asyncio.wait_for(reader.read(1), self.gap_s):
                            reason = "abort"
                            raise ConnectionResetError
                made += 1
                first_s = first_s or time.monotonic()
                writer.write(b"9\r\ndata: x\n\n\r\n")
                await writer.drain()
        except ConnectionError:
            reason = "abort"
            raise
        finally:
            self.running -= 1
            name = f"cmpl-{request_id}-0123abcd"
            ended = Ended(name, 1, made, arrived_s, first_s, time.monotonic(), reason)
            self._ends.tell(ended)
        writer.write(b"0\r\n\r\n")


class Replica:
    """One replica: its own server (the full lane), its door, its Rust front end."""

    def __init__(self, folder: Path, name: str = "llm_engine_0", **limits: Any) -> None:
        self.name = name
        keys = folder / "keys"
        keys.write_text("ann sk-ann\n")
        self.limits = Limits(**{"max_queued_requests": 2, "queue_timeout_s": 5.0, **limits})
        self.admission = Admission(2, self.limits.max_queued_requests, 1.0)
        self.ends = Ends()
        self.frontend = RustFrontend(self.ends)
        self.aborted: list[str] = []
        self.full: list[str] = []
        self.timelines: list[Any] = []
        grant = Grant(lambda: self.frontend, self.ends, "tiny", self._abort, lambda: 60.0)
        signals = Signals()
        self.gate = AdmissionGate(
            grant, self.admission, self.limits, lambda: True, signals, cancellable=True
        )
        gated = KeyGate(LimitGate(self.gate, self.limits), KeyRing(ApiKeys(file=str(keys))))
        served = capability.Served(frozenset({"tiny"}), 2048, 1000)

        def obstacle(request: Request) -> str | None:
            headers = dict(request.headers)
            return capability.obstacle(request.path, headers, request.body, served, self.limits)

        self.door = Door(self._seen(gated), SECRET, obstacle, lambda: self.limits.queue_timeout_s)

    async def _abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def _seen(self, app: ASGIApp) -> ASGIApp:
        async def seen(scope: Scope, receive: Receive, send: Send) -> None:
            async def noted(message: Any) -> None:
                if "timeline" in message:
                    self.timelines.append(message["timeline"])
                await send(message)

            await app(scope, receive, noted)

        return seen

    async def start(self) -> None:
        await self.frontend.start()
        await self.door.start("127.0.0.1")

        async def full(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] != "/-/healthz":
                self.full.append(scope["path"])
            await JSONResponse({"lane": "full"})(scope, receive, send)

        config = uvicorn.Config(
            Locator(full, self.door), port=0, log_level="critical", lifespan="off"
        )
        self.server = uvicorn.Server(config)
        self.server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._task = asyncio.create_task(self.server.serve())
        await until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.door.close()
        self.server.should_exit = True
        await self._task

    @property
    def config(self) -> Any:
        upstream = Upstream(self.name)
        upstream.port = self.port
        return upstream

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        await until(lambda: not (self.admission.running or self.door.tasks or len(self.ends)))


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    replica = Replica(tmp_path)
    await replica.start()
    yield replica
    await replica.stop()


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve starts HAProxy through our wrapper, with the secret of the doors."""
    result = launcher.haproxy()
    if not result:
        pytest.skip("ray[serve] brings no HAProxy for this platform")
    for name, value in {**result, SECRET_VARIABLE: SECRET, KEYS_VARIABLE: "1"}.items():
        monkeypatch.setenv(name, value)
    from ray.serve._private import haproxy as serve_haproxy

    monkeypatch.setattr(
        serve_haproxy,
        "RAY_SERVE_HAPROXY_BINARY_PATH",
        result["RAY_SERVE_HAPROXY_BINARY_PATH"],
        False,
    )


@pytest.fixture
async def haproxy(replica: Replica, tmp_path: Path, wrapped: None) -> AsyncIterator[Proxy]:
    running = Proxy(tmp_path, None, PORT)
    running.know(replica.config)
    await running.api.start()
    try:
        yield running
    finally:
        await running.api.stop()


@pytest.fixture
def proxy(haproxy: Proxy) -> str:
    return haproxy.url


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that happens in this process or in HAProxy."""
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def ask(url: str, body: Any = None, **kwargs: Any) -> tuple[int, dict[str, str], bytes]:
    headers = {**KEY, **kwargs.pop("headers", {})}
    path = kwargs.pop("path", "/v1/completions")
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + path, json=body or ASK, headers=headers) as answer,
    ):
        return answer.status, {k.lower(): v for k, v in answer.headers.items()}, await answer.read()


async def test_a_request_is_let_in_and_answered_by_the_rust_front_end(
    replica: Replica, proxy: str
) -> None:
    status, headers, body = await ask(proxy, headers={"x-request-id": "mine-1"})
    assert status == 200
    assert headers["x-serve-lane"] == "fast"
    assert headers["x-request-id"] == "mine-1"
    assert body == b"data: x\n\n" * 4
    (head,) = replica.frontend.heads
    assert f"authorization: Bearer {TOKEN}" in head
    assert "sk-ann" not in head
    await replica.settled()
    (timeline,) = replica.timelines
    assert (timeline.status, timeline.generated_tokens, timeline.left) == (200, 4, False)


async def test_the_answer_of_the_rust_front_end_has_the_headers_of_the_gates(
    replica: Replica, proxy: str, tmp_path: Path
) -> None:
    """As the gate of tenants gives them; a gate's content type is not the answer's."""
    (tmp_path / "tenants.yaml").write_text(TENANTS)
    settings = Settings(tenants=Tenants(file=str(tmp_path / "tenants.yaml")))
    keys, book = keys_of(settings), book_of(settings)
    assert book is not None
    limited = LimitGate(gated(replica.gate, keys, "tiny", book, settings), replica.limits)
    replica.door.app = KeyGate(limited, keys)
    for remaining in (b"6", b"5"):
        status, headers, body = await ask(proxy)
        assert (status, headers["x-serve-lane"]) == (200, "fast")
        assert headers["content-type"] == "text/event-stream"
        assert headers["x-ratelimit-limit-requests"] == "7"
        assert headers["x-ratelimit-remaining-requests"].encode() == remaining
        assert headers["x-ratelimit-limit-tokens"] == "1000"
        assert headers["x-ratelimit-reset-tokens"].endswith("s")
        assert body == b"data: x\n\n" * 4
    replica.frontend.status = 400  # What it refuses has them too.
    _, headers, _ = await ask(proxy)
    assert headers["x-ratelimit-limit-requests"] == "7"
    await replica.settled()
    await book.close()


async def test_a_request_that_wakes_an_application_is_answered_in_the_fast_lane(
    replica: Replica, tmp_path: Path, wrapped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits in HAProxy, which asks Ray Serve's own proxy for a replica, and then the door."""
    monkeypatch.setenv("SERVE_APP_SCALES_TO_ZERO", "1")
    fallback = await Upstream("proxy").start()
    running = Proxy(tmp_path, fallback, PORT)
    running.know()
    await running.api.start()
    try:
        asking = asyncio.create_task(ask(running.url))
        await until(lambda: fallback.paths == ["/health"])
        running.know(replica.config)
        await running.api.reload()
        status, headers, body = await asking
        assert (status, headers["x-serve-lane"]) == (200, "fast")
        assert body == b"data: x\n\n" * 4
        await replica.settled()
    finally:
        await running.api.stop()
        fallback.stop()


async def test_below_a_prefix_both_lanes_answer(
    replica: Replica, tmp_path: Path, wrapped: None
) -> None:
    """`route_prefix`: the door, the Rust front end and our gates know nothing of it."""
    running = Proxy(tmp_path, None, PORT, prefix="/team/a")
    running.know(replica.config)
    await running.api.start()
    try:
        status, headers, body = await ask(running.url)
        assert (status, headers["x-serve-lane"]) == (200, "fast")
        assert body == b"data: x\n\n" * 4
        assert replica.frontend.heads[0].startswith("POST /v1/completions HTTP/1.1\r\n")
        _, headers, _ = await ask(running.url, {**ASK, "n": 2})
        assert headers["x-serve-lane"] == "python"
        assert replica.full == ["/team/a/v1/completions"]  # As Ray Serve's own server gets it.
    finally:
        await running.api.stop()
    await replica.settled()


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({**ASK, "n": 2}, "/v1/completions"),
        ({**ASK, "prompt": ["a", "b"]}, "/v1/completions"),
        ({**ASK, "unknown": 1}, "/v1/completions"),
        ({**ASK, "prompt": "x" * 40_000}, "/v1/completions"),
        ({"model": "tiny", "input": "x"}, "/v1/responses"),
    ],
)
async def test_what_it_does_not_answer_alike_takes_the_full_lane(
    replica: Replica, proxy: str, body: Any, path: str
) -> None:
    status, headers, _ = await ask(proxy, body, path=path)
    assert (status, headers["x-serve-lane"]) == (200, "python")
    assert replica.full == [path]
    assert not replica.frontend.heads


async def test_a_body_that_comes_slowly_is_408(
    replica: Replica, tmp_path: Path, wrapped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HAProxy waits for it as long as limits.body_timeout_s says, which the launcher passes on."""
    monkeypatch.delenv(KEYS_VARIABLE)
    settings = Settings.parse({"limits": {"body_timeout_s": 1.0}})
    for name, value in launcher.haproxy_settings(settings).items():
        monkeypatch.setenv(name, value)
    running = Proxy(tmp_path, None, PORT)
    running.know(replica.config)
    await running.api.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-ann\r\n"
            b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        )
        async with asyncio.timeout(15):  # The default is 20 s.
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408")
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "timeout"
        assert not replica.full
        writer.close()
    finally:
        await running.api.stop()


@pytest.mark.parametrize(
    ("key", "keys_required", "full"),
    [
        ("", True, True),
        ("", False, False),
        ("authorization: Bearer wrong", True, True),
        ("x-api-key: wrong", True, True),
        ("authorization: Bearer wrong", False, False),
        ("authorization: Bearer sk-ann", True, False),
    ],
)
async def test_a_request_without_an_accepted_key_does_not_wait_for_its_body(
    replica: Replica,
    tmp_path: Path,
    wrapped: None,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    keys_required: bool,
    full: bool,
) -> None:
    """The gate of the full lane refuses it by its headers."""
    if not keys_required:
        monkeypatch.delenv(KEYS_VARIABLE)
    monkeypatch.setenv(BODY_TIMEOUT_VARIABLE, "2")
    running = Proxy(tmp_path, None, PORT)
    running.api.cfg.nbthread = 1  # Each thread learns for itself which keys are accepted.
    running.know(replica.config)
    await running.api.start()
    try:
        # The door accepts one key, and refuses the other with 401.
        assert (await ask(running.url))[0] == 200
        assert (await ask(running.url, headers={"authorization": "Bearer wrong"}))[0] == 401
        replica.full.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        head = "\r\n".join(["POST /v1/completions HTTP/1.1", "host: x", *filter(None, [key])])
        writer.write(f"{head}\r\ncontent-length: 100\r\n\r\n{{".encode())
        first = await reader.readline()
        assert first.startswith(b"HTTP/1.1 200" if full else b"HTTP/1.1 408")
        assert bool(replica.full) is full
        writer.close()
    finally:
        await running.api.stop()


async def test_a_body_that_comes_a_moment_later_takes_the_fast_lane(
    replica: Replica, proxy: str
) -> None:
    """Clients send it in a packet of its own."""
    body = json.dumps(ASK).encode()
    for _ in range(2):  # With a key that is not known yet, and one that is.
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-ann\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"x-serve-lane: fast" in head
        writer.close()
    assert not replica.full


@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key"])
async def test_a_key_in_either_header_may_take_the_fast_lane(
    replica: Replica, proxy: str, header: str
) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(proxy + "/v1/completions", json=ASK, headers={header: "unknown"}) as answer,
    ):
        assert answer.status == 401
    assert not replica.full


async def test_an_unknown_key_is_refused_at_the_door(replica: Replica, proxy: str) -> None:
    status, headers, body = await ask(proxy, headers={"authorization": "Bearer other"})
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert not replica.frontend.heads


async def test_a_full_queue_refuses_and_a_waiting_request_is_answered(
    replica: Replica, proxy: str
) -> None:
    replica.frontend.gap_s = 0.5
    answers = [asyncio.create_task(ask(proxy)) for _ in range(4)]  # Two run, two wait.
    await until(lambda: replica.admission.queued == 2)
    status, headers, body = await ask(proxy)
    assert (status, headers["retry-after"]) == (429, "1")
    assert json.loads(body)["error"]["type"] == "rate_limit_error"
    assert [(await each)[0] for each in answers] == [200] * 4
    await replica.settled()


async def test_requests_that_wait_while_haproxy_is_reloaded_get_one_place_each(
    replica: Replica, haproxy: Proxy
) -> None:
    """Their worker is replaced meanwhile. Its successor must not ask for a second place."""
    replica.frontend.gap_s = 0.5
    answers = [asyncio.create_task(ask(haproxy.url)) for _ in range(4)]  # Two run, two wait.
    await until(lambda: replica.admission.queued == 2)
    await haproxy.api.reload()
    for answer in answers:
        status, headers, body = await answer
        assert (status, headers["x-serve-lane"]) == (200, "fast")
        assert body == b"data: x\n\n" * 4
    await replica.settled()
    assert len(replica.frontend.heads) == len(replica.timelines) == 4


async def test_no_room_in_time_is_a_503(replica: Replica, proxy: str) -> None:
    replica.gate.limits = replica.limits.model_copy(update={"queue_timeout_s": 0.2})
    replica.frontend.gap_s = 0.2
    waiting = [asyncio.create_task(ask(proxy, {**ASK, "max_tokens": 600})) for _ in range(2)]
    await until(lambda: replica.admission.running == 2)
    status, headers, _ = await ask(proxy)
    assert (status, headers["retry-after"]) == (503, "1")
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await replica.settled()


@pytest.mark.parametrize("waits", [False, True])
async def test_a_client_that_leaves_gives_its_place_back(
    replica: Replica, proxy: str, waits: bool
) -> None:
    replica.frontend.gap_s = 0.2
    waiting = []
    if waits:
        waiting = [asyncio.create_task(ask(proxy, {**ASK, "max_tokens": 600})) for _ in range(2)]
        await until(lambda: replica.admission.running == 2)
    leaves = asyncio.create_task(ask(proxy, {**ASK, "max_tokens": 50}))
    await until(lambda: bool(replica.admission.queued if waits else replica.frontend.running))
    leaves.cancel()
    await until(lambda: replica.admission.queued == 0 and replica.admission.running == len(waiting))
    assert replica.admission.running == len(waiting)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await replica.settled()
    assert replica.frontend.running == 0


async def test_a_long_answer_keeps_its_place_to_its_end(replica: Replica, proxy: str) -> None:
    """Longer than HAProxy waits for an answer of the door, with nothing said on that connection."""
    replica.frontend.gap_s = 0.5
    answer = asyncio.create_task(ask(proxy, {**ASK, "max_tokens": 14}))
    await asyncio.sleep(6.5)
    assert not answer.done()
    assert replica.admission.running == 1
    assert (await answer)[0] == 200
    await replica.settled()
    (timeline,) = replica.timelines
    assert (timeline.generated_tokens, timeline.broken, timeline.left) == (14, False, False)


async def test_what_the_rust_front_end_refuses_is_counted_so(replica: Replica, proxy: str) -> None:
    replica.frontend.status = 400
    status, headers, _ = await ask(proxy)
    assert (status, headers["x-serve-lane"]) == (400, "fast")
    await replica.settled()
    assert [each.status for each in replica.timelines] == [400]


async def test_a_door_that_is_gone_leaves_the_full_lane(replica: Replica, proxy: str) -> None:
    assert (await ask(proxy))[1]["x-serve-lane"] == "fast"
    replica.door.close()
    status, headers, _ = await ask(proxy)
    assert (status, headers["x-serve-lane"]) == (200, "python")


async def test_a_door_that_hangs_is_a_503(replica: Replica, proxy: str) -> None:
    assert (await ask(proxy))[0] == 200

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("broken")

    replica.door.app = silent
    status, headers, body = await ask(proxy)
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(body)["error"]["code"] == "unavailable"
    assert len(replica.frontend.heads) == 1


async def test_no_place_is_lost_whatever_clients_do(replica: Replica, haproxy: Proxy) -> None:
    """Random starts, ends and departures, some of them in the queue, while HAProxy is reloaded."""
    chance = random.Random(7)
    replica.frontend.gap_s = 0.002

    async def client() -> None:
        for _ in range(12):
            body = {**ASK, "max_tokens": chance.randint(1, 8)}
            request = asyncio.create_task(ask(haproxy.url, body))
            if chance.random() < 0.5:
                await asyncio.sleep(chance.random() * 0.03)
                request.cancel()
            with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
                await request
            assert replica.admission.running <= 2

    async def reload() -> None:
        for _ in range(3):
            await asyncio.sleep(chance.random())
            await haproxy.api.reload()

    await asyncio.gather(reload(), *(client() for _ in range(8)))
    await replica.settled()
    assert replica.frontend.running == 0


async def test_only_haproxy_learns_where_the_door_is(replica: Replica, proxy: str) -> None:
    base = f"http://127.0.0.1:{replica.port}/-/door"
    async with aiohttp.ClientSession() as session:
        async with session.get(base, headers={"x-door": "guess"}) as answer:
            assert await answer.json() == {"lane": "full"}
        async with session.get(base, headers={"x-door": SECRET}) as answer:
            assert await answer.text() == replica.door.address
    reader, writer = await asyncio.open_connection(*replica.door.address.split(":"))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nx-door: guess\r\ncontent-length: 2\r\n\r\n{}")
    assert await reader.read() == b""
    writer.close()


def test_a_request_is_parsed_once_it_is_complete() -> None:
    data = b"POST /v1/completions?x=1 HTTP/1.1\r\nX-Door: s\r\nContent-Length: 2\r\n\r\n{}"
    assert all(parse(data[:end]) is None for end in range(len(data)))
    request = parse(data)
    assert request is not None
    assert (request.method, request.path, request.body) == ("POST", "/v1/completions", b"{}")
    with pytest.raises(ValueError, match="unpack"):
        parse(b"nonsense\r\n\r\n")


async def test_a_dead_engine_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports no end; the supervisor starts another once nobody is in flight."""
    monkeypatch.setattr(door, "_REPORT_S", 3600.0)
    ends = Ends()
    frontend = RustFrontend(ends)
    frontend.port = 1

    async def abort(_: str) -> None:
        return

    grant = Grant(lambda: frontend, ends, "tiny", abort, lambda: 60.0, alive=lambda: False)
    incoming = iter([{"type": "http.request", "body": b"{}"}, {"status": 200}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(incoming)

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(grant({"type": "http", "headers": []}, receive, send), 30)
    assert sent[-1]["timeline"].broken
    assert len(ends) == 0
