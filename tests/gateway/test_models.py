"""Several models behind one gateway: which one a request is for, and which there are."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from serve_app.gates import keys
from serve_app.gates.limits import LimitGate
from serve_app.gates.routes import ROUTES
from serve_app.gateway.models import Models, adapters_of
from serve_app.gateway.relay import Relay
from serve_app.gateway.request import Request
from serve_app.observe.logs import Log
from serve_app.observe.meter import Meter
from serve_app.settings import Limits, Settings
from tests.gateway.test_relay import Fleet, fleet
from tests.services.engine import EngineServer

SETTINGS = Settings.parse({"gateway": {"enabled": True}})


@contextlib.asynccontextmanager
async def gateway(**engines: EngineServer | None) -> AsyncIterator["Gateway"]:
    """A gateway for models of these names; those without an engine are scaled to zero."""
    async with contextlib.AsyncExitStack() as stack:
        fleets = {}
        for name, engine in engines.items():
            there = [engine] if engine is not None else []
            fleets[name] = await stack.enter_async_context(fleet(*there, replica_timeout_s=0.3))
            fleets[name].relay.may_sleep = engine is None
            if engine is None:
                fleets[name].relay.limits = Limits(request_timeout_s=0.5)
        relays = {name: each.relay for name, each in fleets.items()}
        app = Models(relays, SETTINGS, {"an-adapter": list(engines)[-1]})
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(LimitGate(app, Limits())), base_url="http://test"
        )
        yield Gateway(await stack.enter_async_context(client), fleets, relays)


class Gateway:
    def __init__(
        self, client: httpx.AsyncClient, fleets: dict[str, Fleet], relays: dict[str, Relay]
    ) -> None:
        self.get, self.post = client.get, client.post
        self.fleets, self.relays = fleets, relays


def listing(name: str, *adapters: str) -> EngineServer:
    """An engine that lists itself and its adapters, whatever it is asked."""
    cards = [{"id": each, "object": "model"} for each in (name, *adapters)]
    return EngineServer(name, whole=json.dumps({"object": "list", "data": cards}).encode())


POSTED = [route.path for route in ROUTES if route.generates or "token" in route.path]


@pytest.mark.parametrize("path", POSTED)
async def test_every_route_with_a_model_in_its_body_finds_it(path: str) -> None:
    first, second = EngineServer("first"), EngineServer("second")
    async with gateway(m1=first, m2=second) as there:
        for name, engine in (("m1", first), ("m2", second), ("an-adapter", second)):
            engine.requests.clear()
            answer = await there.post(path, json={"model": name, "prompt": "x"})
            assert answer.status_code == 200, answer.text
            assert len(engine.requests) == 1
        answer = await there.post(path, json={"model": "m3", "prompt": "x"})
        assert answer.status_code == 404
        assert "m1, m2" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"model": None}, {"model": ""}])
async def test_a_request_without_a_model_goes_to_the_first(body: dict[str, Any]) -> None:
    first, second = EngineServer("first"), EngineServer("second")
    async with gateway(m1=first, m2=second) as there:
        assert (await there.post("/v1/completions", json=body)).status_code == 200
        assert (await there.get("/version")).status_code == 200
    assert len(first.requests) == 2
    assert not second.requests


async def test_sleeping_models_are_listed_and_healthy_and_stay_asleep() -> None:
    async with gateway(awake=listing("awake", "its-adapter"), asleep=None) as there:
        for path in ("/v1/models", "/v1/models/"):
            body = (await there.get(path)).json()
            names = [card["id"] for card in body["data"]]
            assert names == ["awake", "its-adapter", "asleep", "an-adapter"]
        first = await there.get("/v1/models/asleep")
        assert (first.json()["id"], first.json()["object"]) == ("asleep", "model")
        assert (await there.get("/v1/models/its-adapter")).json()["id"] == "its-adapter"
        missing = await there.get("/v1/models/other")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        assert (await there.get("/health")).status_code == 200
        assert not there.fleets["asleep"].woken
        # Only a request for it wakes it.
        assert (await there.post("/v1/completions", json={"model": "asleep"})).status_code >= 500
        assert there.fleets["asleep"].woken == 1


async def test_a_model_is_listed_as_it_was_last_while_it_sleeps_or_fails() -> None:
    engine = listing("m", "its-adapter")
    async with gateway(m=engine) as there:
        before = (await there.get("/v1/models")).json()
        there.fleets["m"].replicas.update([])
        assert (await there.get("/v1/models")).json() == before
        there.fleets["m"].replicas.update([engine.replica])
        engine.whole = b"not JSON"
        engine.status = 500
        assert (await there.get("/v1/models")).json() == before


async def test_a_model_of_a_name_with_slashes_is_found() -> None:
    name = "Qwen/Qwen2.5-7B Instruct"
    async with gateway(m=listing(name)) as there:
        for path in (name.replace(" ", "%20"), quote(name, safe="")):
            assert (await there.get(f"/v1/models/{path}")).json()["id"] == name


async def test_health_is_true_of_every_mixture_of_models() -> None:
    async with gateway(a=EngineServer("a"), b=EngineServer("b")) as there:
        relays = list(there.relays.values())
        assert (await there.get("/health")).status_code == 200
        there.fleets["a"].replicas.update([])
        assert (await there.get("/ping")).status_code == 200, "b can take requests"
        there.fleets["b"].replicas.update([])
        down = await there.get("/health")
        assert down.status_code == 503
        assert down.headers["retry-after"] == "1"
        relays[0].may_sleep = True
        assert (await there.get("/health")).status_code == 200, "a request wakes a"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []),
        (["one=path/1", "two=path/2"], ["one", "two"]),
        ("one=path", ["one"]),
        (['{"name": "one", "path": "p"}'], ["one"]),
        ([{"name": "one", "path": "p", "base_model_name": "m"}], ["one"]),
        ('[{"name": "one", "path": "p"}, {"name": "two", "path": "p"}]', ["one", "two"]),
    ],
)
def test_adapters_are_known_by_every_way_to_write_them(given: Any, names: list[str]) -> None:
    assert adapters_of({"lora_modules": given}) == names


# --- what routing goes by -------------------------------------------------------------------

LONG = "You are helpful. " * 200


def prefix(path: str, body: dict[str, Any]) -> tuple[int, ...]:
    scope = {"method": "POST", "path": path, "headers": [], "query_string": b""}
    return Request.of(scope, json.dumps(body).encode(), "x-session-id").keys


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text * 300}]


TOOL = {"type": "function", "function": {"name": "f", "description": LONG}}
SHARED = [
    ("/v1/messages", lambda text: {"system": LONG, "messages": messages(text)}),
    ("/v1/messages", lambda text: {"tools": [{"name": LONG}], "messages": messages(text)}),
    ("/v1/responses", lambda text: {"instructions": LONG, "input": text * 600}),
    ("/v1/responses", lambda text: {"tools": [TOOL], "input": messages(text)}),
    ("/v1/chat/completions", lambda text: {"tools": [TOOL], "messages": messages(text)}),
    (
        "/v1/chat/completions",
        lambda text: {"messages": [{"role": "system", "content": LONG}, *messages(text)]},
    ),
    ("/v1/completions", lambda text: {"prompt": LONG + text * 300}),
]


@pytest.mark.parametrize(("path", "body"), SHARED)
def test_prompts_that_begin_alike_share_keys_on_each_api(path: str, body: Any) -> None:
    first, other = prefix(path, body("a b ")), prefix(path, body("c d "))
    shared = [key for key, same in zip(first, other, strict=False) if key == same]
    assert len(shared) * 512 >= 0.8 * len(LONG)
    assert first[-1] != other[-1]


@given(st.sampled_from(SHARED), st.text(min_size=1), st.text(min_size=1))
def test_prompts_of_two_adapters_share_nothing(shared: Any, first: str, other: str) -> None:
    path, body = shared
    keys_of = [prefix(path, {"model": name, **body("a b ")}) for name in (first, other)]
    assert bool(set(keys_of[0]) & set(keys_of[1])) == (first == other)


@pytest.mark.parametrize(("path", "body"), SHARED)
def test_a_request_without_a_model_shares_keys_with_those_of_the_first(
    path: str, body: Any
) -> None:
    scope = {"method": "POST", "path": path, "headers": [], "query_string": b""}
    asked = body("a b ")
    unnamed = Request.of(scope, json.dumps(asked).encode(), "x-session-id", main="m")
    assert unnamed.keys == prefix(path, {"model": "m", **asked})
    assert unnamed.model is None


@pytest.fixture(autouse=True)
def named_tenant() -> Iterator[None]:
    token = keys.tenant.set("Größe 学校")
    yield
    keys.tenant.reset(token)


async def test_a_tenant_of_any_script_reaches_the_engine() -> None:
    engine = EngineServer("a")
    async with gateway(m=engine) as there:
        await there.post("/v1/completions", json={"model": "m"})
    assert engine.tenants == ["Größe 学校"]


async def test_a_client_that_left_is_noticed_by_its_channel_alone() -> None:
    engine = EngineServer("m", length=1000, pause_s=0.02)
    async with gateway(m=engine) as there:
        app = LimitGate(Models(there.relays, SETTINGS), Limits())
        began = asyncio.Event()
        messages = [{"type": "http.request", "body": b'{"stream": true, "prompt": "x"}'}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await began.wait()
            return {"type": "http.disconnect"}

        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)
            if len(sent) > 3:
                began.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        log = io.StringIO()
        meter = Meter(app, "m", SETTINGS.replicas, Log(log.write))
        await asyncio.wait_for(meter(scope, receive, send), 30)
        assert len(sent) < 100
        assert json.loads(log.getvalue())["status"] == 499
        while not engine.left:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
