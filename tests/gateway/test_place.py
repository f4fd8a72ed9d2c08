"""A request's place in the engine: the gateway's side against a replica's real door and gates."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from prometheus_client.registry import REGISTRY

from serve_app.gates.limits import LimitGate
from serve_app.gateway.failures import ReplicaFailed, WholeResponse
from serve_app.gateway.place import Place, hold
from serve_app.lanes.door import Door
from serve_app.replica.backend import FAILED_HEADER, TENANT_HEADER, TOKEN_HEADER, Backend
from serve_app.replica.reports import Ended
from tests.lanes.test_door import SECRET, Replica, until

BODY = b'{"model":"tiny","prompt":"hello","max_tokens":4,"stream":true}'


class Fast(Replica):
    """A replica of a gateway: its door asks for the replica's token, and not for a key."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, queue_timeout_s=0.3)
        self.healthy = True
        gates = self._seen(LimitGate(self.gate, self.limits))
        app = Backend(gates, SECRET, lambda: self.healthy)
        self.door = Door(app, SECRET, lambda _: None, lambda: 0.3)

    def ask(
        self, request_id: str = "r1", **more: str
    ) -> AbstractAsyncContextManager[Place | WholeResponse | None]:
        headers = {"content-type": "application/json", TOKEN_HEADER: SECRET, **more}
        headers["x-request-id"] = request_id
        return hold(self.door.address, SECRET, "/v1/completions", [*headers.items()], BODY)

    def ended(self, request_id: str) -> None:
        self.ends.tell(Ended(f"cmpl-{request_id}-0123abcd", 5, 7, 1.0, 2.0, 3.0, "length"))


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Fast]:
    replica = Fast(tmp_path)
    await replica.start()
    yield replica
    await replica.stop()


def tokens(who: str) -> float:
    labels = {"model": "tiny", "tenant": who}
    return REGISTRY.get_sample_value("serve_app_generated_tokens_total", labels) or 0.0


async def test_a_place_is_held_until_it_is_left(replica: Fast) -> None:
    before = tokens("bob")
    async with replica.ask(**{TENANT_HEADER: "bob"}) as place:
        assert isinstance(place, Place)
        assert place.address == f"{replica.frontend.host}:{replica.frontend.port}"
        assert place.token == replica.frontend.token
        assert replica.admission.running == 1
        replica.ended("r1")
        assert replica.admission.running == 1, "HAProxy or the gateway is not done with it"
    await replica.settled()
    assert tokens("bob") - before == 7


async def test_a_place_of_a_gateway_that_dies_is_given_back(replica: Fast) -> None:
    asked = replica.ask()
    await asked.__aenter__()
    task = asyncio.ensure_future(asyncio.sleep(0))
    await task
    assert replica.admission.running == 1
    with contextlib.suppress(RuntimeError):
        await asked.__aexit__(RuntimeError, RuntimeError("it dies"), None)
    replica.ended("r1")
    await replica.settled()


async def test_an_answer_other_than_200_is_reported_at_the_door(replica: Fast) -> None:
    async with replica.ask() as place:
        assert isinstance(place, Place)
        place.answered(400)
    await replica.settled()  # It does not wait for the engine, which had no such request.
    assert [timeline.status for timeline in replica.timelines] == [400]


async def test_both_lanes_share_one_queue(replica: Fast) -> None:
    """Two run and two wait; the fifth is refused at once, the others when their time is over."""
    async with contextlib.AsyncExitStack() as held:
        for number in range(2):
            assert isinstance(await held.enter_async_context(replica.ask(f"r{number}")), Place)

        async def refused() -> WholeResponse | Place | None:
            async with replica.ask("r9") as answer:
                return answer

        waiting = [asyncio.ensure_future(refused()) for _ in range(2)]
        await until(lambda: replica.admission.queued == 2)
        full = await refused()
        assert isinstance(full, WholeResponse)
        assert (full.status, dict(full.headers)[b"retry-after"]) == (429, b"1")
        assert full.message
        for late in await asyncio.gather(*waiting):
            assert isinstance(late, WholeResponse)
            assert late.status == 503
        for number in range(2):
            replica.ended(f"r{number}")
    await replica.settled()


async def test_an_engine_that_restarts_is_reported_at_the_door(replica: Fast) -> None:
    replica.healthy = False
    async with replica.ask() as answer:
        assert isinstance(answer, WholeResponse)
        assert (answer.status, dict(answer.headers)[FAILED_HEADER.encode()]) == (502, b"absent")
    await replica.settled()


async def test_a_door_that_is_gone_or_does_not_know_who_asks(replica: Fast) -> None:
    with pytest.raises(ReplicaFailed, match="closed the connection"):
        async with hold(replica.door.address, "guessed", "/v1/completions", [], BODY):
            pass
    replica.door.close()
    with pytest.raises(ReplicaFailed, match="takes no connection") as failure:
        async with replica.ask():
            pass
    assert failure.value.kind == "connection"
