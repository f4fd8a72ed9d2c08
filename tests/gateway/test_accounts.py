"""The ledger of a gateway: what replicas report of its requests, in either lane."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_app.continuation import Method
from serve_app.gates.admission import Admission, AdmissionGate
from serve_app.gates.keys import KeyGate
from serve_app.gates.limits import LimitGate
from serve_app.gates.work import Work
from serve_app.gateway import accounts as gateway_accounts
from serve_app.gateway import routing
from serve_app.gateway.fleet import Fleet, Upstream
from serve_app.gateway.models import Models
from serve_app.gateway.relay import Relay
from serve_app.lanes.door import Door, Ends, Grant
from serve_app.replica.accounts import Account, Accounts
from serve_app.replica.backend import FAST_LANE, Backend, Server, exchange
from serve_app.replica.reports import Ended
from serve_app.scaling.signals import Signals
from serve_app.settings import ApiKeys, Gateway, Limits, Observe, Settings, Tenants
from serve_app.tenants.gate import book_of, gated
from serve_app.tenants.ledger import COLUMNS
from serve_app.tenants.registry import Registry
from serve_app.tenants.tenant import digest
from tests.services.engine import FAST_TOKEN, EngineServer, Fault

PROMPT, CACHED, LENGTH = 7, 2, 6


class Engine:
    """A replica of a gateway, with gates and all but vLLM: its answers have `length` tokens.

    Args:
        fails_after: tokens after which its engine dies, once.
    """

    def __init__(self, name: str, fails_after: int | None = None, pause_s: float = 0.0) -> None:
        self.name, self.fails_after, self._pause_s = name, fails_after, pause_s
        self.works: list[Work] = []
        self.asked = asyncio.Event()
        self.server = Server("127.0.0.1")
        self.admission = Admission(8, 8, 1.0, gpus=2)
        self.server.start(self._gate(self._answer))
        self.metadata: dict[str, Any] = {"address": self.server.address}
        self.metadata["token"] = self.server.token

    def _gate(self, answer: Callable[[Scope, Receive, Send], Any]) -> AdmissionGate:
        return AdmissionGate(answer, self.admission, Limits(), lambda: True, Signals())

    async def open_door(self, rust: EngineServer, ends: Ends) -> Door:
        """Give it a fast lane, whose front end is `rust`."""
        host, port = rust.address.split(":")

        class Frontend:
            token = FAST_TOKEN

        Frontend.host, Frontend.port = host, int(port)  # type: ignore[attr-defined]

        async def abort(request_id: str) -> None:
            pass

        grant = Grant(lambda: Frontend, ends, "m", abort, lambda: 60.0)  # type: ignore[arg-type,return-value]
        token = self.server.token
        gates = Backend(self._gate(grant), token, accounts=self.server.accounts)
        door = Door(gates, token, lambda request: None, lambda: 1.0)
        await door.start("127.0.0.1")
        served = {"models": ["m"], "max_model_len": 1000, "vocabulary": 1000}
        self.metadata[FAST_LANE] = {"door": door.address, **served}
        return door

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        done: Work = scope["state"]["work"]
        self.works.append(done)
        current = exchange.get()
        assert current is not None
        asked = json.loads((await receive())["body"])
        self.asked.set()
        done.has_counts, done.prompt_tokens, done.cached_tokens = True, PROMPT, CACHED
        kind = b"text/event-stream" if asked.get("stream") else b"application/json"
        start = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": [(b"content-type", kind)]})
        if not asked.get("stream"):
            done.output_tokens = LENGTH
            await send({"type": "http.response.body", "body": b"{}"})
            return
        known = current.progress.groups if current.progress else []
        for token in range(LENGTH):
            if token == self.fails_after:
                self.fails_after, current.broken = None, True
            done.output_tokens += token >= len(known)
            current.marks.how(Method.RESUME)
            current.marks.group([token])
            ends = token == LENGTH - 1
            if ends:
                current.marks.end("length", None)
            choice = {"text": f"{token} ", "finish_reason": "length" if ends else None}
            event = b"data: " + json.dumps({"id": "a", "choices": [choice]}).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.sleep(self._pause_s)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class Front:
    """A gateway with its gate of tenants."""

    def __init__(self, folder: Path, *engines: tuple[str, dict[str, Any]]) -> None:
        quota = "{running_requests: 1, tokens_per_day: 100000}"
        key = f"keys: [{{sha256: {digest(b'sk-ann')}}}]"
        (folder / "t.yaml").write_text(f"tenants: [{{name: ann, quota: {quota}, {key}}}]")
        settings = Settings(
            tenants=Tenants(file=str(folder / "t.yaml")), observe=Observe(price_per_gpu_hour=3.6)
        )
        keys, book = Registry(settings.tenants, ApiKeys()), book_of(settings)
        assert book is not None
        self.book = book
        given = {"routing": "least_outstanding", "replica_timeout_s": 0.5, "stall_timeout_s": 5.0}
        gateway = Gateway(**given)  # type: ignore[arg-type]
        self.replicas = Fleet()
        self.replicas.update(list(engines))
        router = routing.make(gateway.routing, random.Random(1))
        self.relay = Relay(self.replicas, router, gateway, Limits(), "m")
        models = Models({"m": self.relay}, settings)
        self.app = KeyGate(LimitGate(gated(models, keys, "m", book, settings), Limits()), keys)

    async def ask(self, leave_after: int | None = None, **body: Any) -> int:
        """Ask, and leave after so many events; the status."""
        content = json.dumps({"model": "m", "prompt": "p", "max_tokens": 99, **body}).encode()
        scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "state": {}}
        scope["headers"] = [(b"authorization", b"Bearer sk-ann"), (b"x-account", b"a thief")]
        scope["headers"] += [(b"content-type", b"application/json")]
        statuses, events, leaves = [], 0, asyncio.Event()
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if sent:
                await leaves.wait()
                return {"type": "http.disconnect"}
            sent = True
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal events
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            events += message.get("body", b"").count(b"data: ")
            if leave_after is not None and events >= leave_after:
                leaves.set()

        await self.app(scope, receive, send)
        return int(statuses[0])

    async def rows(self) -> list[dict[str, Any]]:
        """The ledger, once all is settled."""
        await self.relay.close()
        await self.book.close()
        found = self.book._ledger.rows(0, time.time() + 1)
        return [dict(zip(COLUMNS, row, strict=True)) for row in found]


@contextlib.asynccontextmanager
async def replicas(*engines: Engine) -> AsyncIterator[list[tuple[str, dict[str, Any]]]]:
    yield [(each.name, each.metadata) for each in engines]
    await asyncio.gather(*(each.server.drain(2.0) for each in engines))


def tokens(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["prompt_tokens"], row["cached_tokens"], row["output_tokens"]


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_and_gpu_seconds_are_the_engines(tmp_path: Path, stream: bool) -> None:
    async with replicas(Engine("a", pause_s=0.01)) as found:
        front = Front(tmp_path, *found)
        # No usage is asked for; and a request that runs no more makes room at once.
        assert [await front.ask(stream=stream) for _ in range(2)] == [200, 200]
        rows = await front.rows()
    assert [tokens(row) for row in rows] == [(PROMPT, CACHED, LENGTH)] * 2
    assert all(row["gpu_s"] > 0 and not row["estimated"] for row in rows)
    assert rows[0]["dollars"] == pytest.approx(rows[0]["gpu_s"] * 3.6 / 3600)
    assert {row["lane"] for row in rows} == {"python"}


async def test_an_answer_that_its_client_left_is_charged_as_far_as_it_came(tmp_path: Path) -> None:
    async with replicas(Engine("a", pause_s=0.05)) as found:
        front = Front(tmp_path, *found)
        await front.ask(stream=True, leave_after=2)
        (row,) = await front.rows()
    assert (row["outcome"], row["estimated"]) == ("left", 0)
    assert row["prompt_tokens"] == PROMPT
    assert 2 <= row["output_tokens"] <= LENGTH
    assert row["gpu_s"] > 0


async def test_an_answer_that_continues_elsewhere_is_charged_once(tmp_path: Path) -> None:
    """The first engine dies and its replica reports; the second one goes on."""
    async with replicas(Engine("a", fails_after=3), Engine("b")) as found:
        front = Front(tmp_path, *found)
        front.replicas.ready()[1].outstanding = 10**6  # It is asked second.
        assert await front.ask(stream=True) == 200
        (row,) = await front.rows()
    prompt, cached, output = tokens(row)
    assert (prompt, cached, row["outcome"]) == (PROMPT, CACHED, "ok")
    # A token that the first engine made and nobody got is made again.
    assert LENGTH <= output <= LENGTH + 1
    assert not row["estimated"]


@pytest.mark.parametrize("seed", range(2))
async def test_the_ledger_is_what_the_engines_counted(tmp_path: Path, seed: int) -> None:
    """Over engines that die within answers, and clients that leave."""
    rng = random.Random(seed)
    engines = [Engine("a", pause_s=0.002), Engine("b", pause_s=0.002)]
    async with replicas(*engines) as found:
        front = Front(tmp_path, *found)
        for _ in range(20):
            dies, lives = rng.sample(engines, 2)
            dies.fails_after, lives.fails_after = rng.choice([None, 1, 3, 5]), None
            leave_after = rng.choice([None, None, 2])
            assert await front.ask(stream=True, leave_after=leave_after) == 200
            for replica in front.replicas.ready():
                replica.outstanding = rng.randrange(10)
        rows = await front.rows()
    works = [work for engine in engines for work in engine.works]
    assert len(rows) == 20
    assert len(works) > 20  # Some answers came from two engines.
    assert sum(row["prompt_tokens"] for row in rows) == 20 * PROMPT
    assert sum(row["output_tokens"] for row in rows) == sum(work.output_tokens for work in works)
    assert sum(row["gpu_s"] for row in rows) == pytest.approx(sum(work.gpu_s for work in works))
    assert not any(row["estimated"] for row in rows)


async def test_a_killed_replica_reports_nothing(tmp_path: Path) -> None:
    """What came of its answer is charged, with what the next replica made."""
    killed = await EngineServer("a", length=LENGTH, faults=[Fault(cut_after=4)]).start()
    async with replicas(Engine("b", pause_s=0.01)) as found:
        front = Front(tmp_path, killed.replica, *found)
        first, second = front.replicas.ready()
        first.outstanding = 10**6  # It is asked second.
        assert await front.ask(stream=True) == 200
        first.outstanding, second.outstanding = 0, 10**6
        assert await front.ask(stream=True) == 200
        rows = await front.rows()
    await killed.stop()
    assert [tokens(row) for row in rows] == [(PROMPT, CACHED, LENGTH)] * 2
    assert [(row["outcome"], row["estimated"]) for row in rows] == [("ok", 0), ("ok", 1)]


# GPU seconds in a second of an attempt.
GPU_S_PER_S = {"a": 0.5, "b": 2.0}


class Truth:
    """Replicas whose attempts take known GPU seconds, on a clock of their own."""

    def __init__(self) -> None:
        self.now_s, self.gpu_s = 0.0, 0.0
        self.began_s: dict[str, float] = {}
        self.replica: dict[str, str] = {}

    def begins(self, number: str, replica: str) -> None:
        self.began_s[number], self.replica[number] = self.now_s, replica

    def took_gpu_s(self, number: str) -> float:
        """Of an attempt that ends now."""
        gpu_s = GPU_S_PER_S[self.replica[number]] * (self.now_s - self.began_s[number])
        self.gpu_s += gpu_s
        return gpu_s


@pytest.mark.parametrize("seed", range(40))
async def test_gpu_seconds_are_counted_once_over_kills(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports that come, come late, or never, as their replica was killed: the sum is the truth."""
    for name in ("_LATE_S", "_FAILED_S"):
        monkeypatch.setattr(gateway_accounts, name, 0.01)
    rng, truth = random.Random(seed), Truth()

    async def read(replica: Any) -> None:
        pass

    accounts = gateway_accounts.Accounts(None, Fleet(), lambda: truth.now_s)  # type: ignore[arg-type]
    monkeypatch.setattr(accounts, "_read", read)

    def begin(attempts: gateway_accounts.Attempts, name: str) -> str:
        replica = cast(Upstream, SimpleNamespace(name=name))
        number = attempts.begin(replica)[1].split()[1]
        truth.begins(number, name)
        return number

    def report(number: str, gpu_s: float) -> None:
        accounts._report(Account(int(number), PROMPT, CACHED, 1, gpu_s, True))

    works: list[Work] = []
    for place in range(12):
        work = Work()
        works.append(work)
        attempts = gateway_accounts.Attempts(accounts, work)
        # The first two teach what an attempt takes at either replica.
        deaths = rng.randrange(3) if place >= 2 else 0
        late: list[tuple[str, float]] = []
        for _ in range(deaths):
            number = begin(attempts, rng.choice("ab"))
            reached = rng.random() < 0.8
            truth.now_s += rng.uniform(0.1, 3.0)
            if reached:
                late.append((number, truth.took_gpu_s(number)))
            attempts.give_up(lost=reached)
        number = begin(attempts, "ab"[place] if place < 2 else rng.choice("ab"))
        truth.now_s += rng.uniform(0.1, 3.0)
        last = number, truth.took_gpu_s(number)
        answered = place < 2 or rng.random() < 0.8
        if not answered:
            attempts.give_up(lost=True)
        elif rng.random() < 0.5:
            report(*last)
            answered = False
        attempts.end(1)
        assert work.reported is not None
        await asyncio.sleep(0)
        for each in [*late, *([last] if answered else [])]:
            if each is last or rng.random() < 0.3:
                report(*each)
        await work.reported
        for each in (*late, last):
            report(*each)  # Nobody waits for it any more.
    assert sum(work.gpu_s for work in works) == pytest.approx(truth.gpu_s)
    assert any(work.estimated for work in works)
    assert not accounts._open
    await accounts.end()


@pytest.mark.parametrize("stream", [False, True])
async def test_the_fast_lane_reports_as_well(tmp_path: Path, stream: bool) -> None:
    rust, ends, engine = await EngineServer("rust", length=LENGTH).start(), Ends(), Engine("a")
    door = await engine.open_door(rust, ends)
    told: set[str] = set()

    async def engine_core() -> None:
        """Reports a request once it is expected, as the scheduler does when it ends."""
        while True:
            for request_id in set(ends._expected) - told:
                told.add(request_id)
                counts = PROMPT, LENGTH, 0.0, 0.1, 0.2, "length", CACHED
                ends.tell(Ended(f"cmpl-{request_id}-00000000", *counts))
            await asyncio.sleep(0.01)

    core = asyncio.create_task(engine_core())
    async with replicas(engine) as found:
        front = Front(tmp_path, *found)
        assert await front.ask(stream=stream) == 200
        (row,) = await front.rows()
    core.cancel()
    door.close()
    await rust.stop()
    assert tokens(row) == (PROMPT, CACHED, LENGTH)
    assert row["gpu_s"] > 0
    assert (row["lane"], row["outcome"], row["estimated"]) == ("fast", "ok", 0)


async def test_a_replica_that_leaves_reports_its_last_request(tmp_path: Path) -> None:
    """Its readers do not keep it, and it does not leave them before that."""
    engine = Engine("a", pause_s=0.1)
    front = Front(tmp_path, (engine.name, engine.metadata))
    asking = asyncio.create_task(front.ask(stream=True))
    await engine.asked.wait()
    front.replicas.update([])  # Ray Serve names it no more.
    await engine.server.drain(60.0)
    assert engine.server._server is not None
    assert not engine.server._server.force_exit
    assert await asking == 200
    (row,) = await front.rows()
    assert (tokens(row), row["outcome"]) == ((PROMPT, CACHED, LENGTH), "ok")


async def test_who_has_no_token_reads_no_accounts() -> None:
    engine = Engine("a")
    url, headers = f"http://{engine.server.address}/accounts", {"x-account": "g"}
    async with httpx.AsyncClient() as client:
        assert (await client.get(url, headers=headers)).status_code == 404
    await engine.server.drain(1.0)


async def test_accounts_of_gateways_that_are_gone_take_no_memory() -> None:
    accounts = Accounts()
    for number in range(1000):
        for gateway in ("steady", f"g{number}"):
            with accounts.account(f"{gateway} {number}".encode()):
                pass
    assert len(accounts._of) <= 64
    assert len(accounts._of["steady"].waiting) == 1000
    for number in range(20_000):
        with accounts.account(f"steady {number}".encode()):
            pass
    assert len(accounts._of["steady"].waiting) == 10_000
