"""A server that bench starts, with the loads of a trial: `trial.Engine`, behind HTTP.

    with Served("ours", model, arguments, folder, port=8890) as server:
        answer = server.load("synthetic:input=200,output=64", "poisson:rate=5", count=100, seed=0)

The systems are those of `bench.engine.systems`; this application may have several replicas.
Requests are sent from this process at their planned times, whatever came of the others; `crowded`
sends a closed load from several, for servers that one Python cannot keep busy.
"""

import asyncio
import contextlib
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import psutil

from bench import measure
from bench.engine import systems, trial
from bench.engine.orders import LoadOutcome
from bench.engine.systems import System
from bench.engine.trial import EngineError
from bench.errors import BenchError
from bench.measure import Slo
from bench.records import Record
from bench.traffic import schedule, workload
from bench.traffic.client import Client
from bench.traffic.crowd import Crowd
from bench.traffic.request import Request
from bench.traffic.schedule import Closed, Open
from bench.traffic.target import Target

_LAG_S = 0.05


class Served:
    """The server. Use it as a context manager.

    Args:
        arguments: vLLM's, tensor_parallel_size among them.
        replicas: of this application.
        environment: more of it, such as CUDA_VISIBLE_DEVICES.

    Raises:
        BenchError: there is no such system, or it cannot have replicas.
        EngineError: it does not start.
    """

    def __init__(
        self,
        system: str,
        model: str,
        arguments: Mapping[str, Any],
        folder: Path,
        port: int = 8890,
        start_s: float = trial.START_S,
        replicas: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if system not in systems.NAMES:
            raise BenchError.of("system", system, "no such system", systems.NAMES)
        if replicas > 1 and not systems.is_ours(system):
            raise BenchError.of("replicas", replicas, f"{system} has one")
        changes = {"replicas": {"min": replicas, "max": replicas}} if replicas > 1 else None
        folder.mkdir(parents=True, exist_ok=True)
        self._running = systems.running(
            system, arguments, model, port, folder, environment, changes
        )
        self._port, self._start_s = port, start_s
        self._stack = contextlib.ExitStack()
        self.load_s = 0.0
        self._loads = 0

    @property
    def port(self) -> int:
        return self._port

    def processes(self) -> list[psutil.Process]:
        """All processes of the server that run now."""
        return self._system.family()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._system = stack.enter_context(self._running)
            self.load_s = self._wait(self._system)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def load(
        self,
        what: str,
        when: str,
        *,
        count: int,
        seed: int,
        slo: Slo | None = None,
        limit_s: float = 120.0,
    ) -> LoadOutcome:
        """As `trial.Engine.load`; `users=N` keeps N requests under way.

        A server's prefix cache cannot be emptied from here, and loads of one seed have the same
        prompts, so those of each load begin with its number.
        """
        self._loads += 1
        made = workload.parse(what, seed).take(count)
        requests = [_begun(request, self._loads) for request in made]
        return asyncio.run(_load(self._port, requests, when, seed, limit_s))

    def _wait(self, system: System) -> float:
        """Wait until it answers a request, as a route may exist before its replica does.

        Returns how long its start took, in seconds.
        """
        url = f"http://127.0.0.1:{self._port}/v1/models"
        request = urllib.request.Request(url, headers=systems.key_header())
        while (took_s := time.perf_counter() - system.started_s) < self._start_s:
            if system.process.poll() is not None:
                log = system.log.read_text(errors="replace")
                raise trial.failure(log, system.process.returncode)
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=5).close()
                return took_s
            time.sleep(0.2)
        raise EngineError(f"the server was not ready after {self._start_s:.0f} s")


def _begun(request: Request, number: int) -> Request:
    """The same with a prompt that no other load has; a chat from a file stays as it is there."""
    if not isinstance(request.prompt, str):
        return request
    return msgspec.structs.replace(request, prompt=f"{number} {request.prompt}")


async def _load(
    port: int, requests: Sequence[Request], when: str, seed: int, limit_s: float
) -> LoadOutcome:
    load, count = schedule.parse(when), len(requests)
    if isinstance(load, Closed):
        return await _closed(port, requests, load.users, limit_s)
    assert isinstance(load, Open)
    times_s = load.times_s(count, None, seed)
    records, start_s = _records(requests), time.perf_counter()

    async def at(index: int) -> None:
        records[index].planned_s = start_s + times_s[index]
        await asyncio.sleep(records[index].planned_s - time.perf_counter())
        records[index] = await client.ask(requests[index], records[index])

    with contextlib.closing(_client(port, limit_s)) as client:
        await asyncio.gather(*(at(index) for index in range(count)))
    return LoadOutcome(records=records, elapsed_s=time.perf_counter() - start_s)


async def _closed(
    port: int, requests: Sequence[Request], users: int, limit_s: float
) -> LoadOutcome:
    records, indexes = _records(requests), iter(range(len(requests)))
    start_s = time.perf_counter()

    async def user() -> None:
        for index in indexes:
            records[index].planned_s = time.perf_counter()
            records[index] = await client.ask(requests[index], records[index])

    with contextlib.closing(_client(port, limit_s)) as client:
        await asyncio.gather(*(user() for _ in range(users)))
    return LoadOutcome(records=records, elapsed_s=time.perf_counter() - start_s)


def _client(port: int, limit_s: float) -> Client:
    target = Target(
        url=f"http://127.0.0.1:{port}",
        model=systems.NAME,
        headers=systems.key_header(),
        timeout_s=limit_s,
        extra={"temperature": 0, "ignore_eos": True},
    )
    return Client(target, time.perf_counter)


def _records(requests: Sequence[Request]) -> list[Record]:
    return [
        Record(
            index=index,
            planned_s=0.0,
            kind=request.kind,
            asked_input_tokens=request.input_tokens,
            asked_output_tokens=request.output_tokens,
        )
        for index, request in enumerate(requests)
    ]


def crowded(
    crowd: Crowd,
    server: Served,
    what: str,
    users: int,
    count: int,
    seed: int,
    limit_s: float = 300.0,
) -> LoadOutcome:
    """A closed load from a crowd: `count` requests, `users` under way at a time."""
    shares = crowd.shares(users)
    answers = crowd.each(
        _share,
        [
            (server.port, what, share, count, seed, limit_s, place, len(shares))
            for place, share in enumerate(shares)
        ],
    )
    records = [record for answer in answers for record in answer.records]
    ends_s = [record.end_s for record in records if record.end_s is not None]
    start_s = min(record.planned_s for record in records)
    return LoadOutcome(records=records, elapsed_s=max(ends_s, default=start_s) - start_s)


def _share(
    port: int, what: str, users: int, count: int, seed: int, limit_s: float, place: int, shares: int
) -> LoadOutcome:
    """One process's part: of the same requests, every `shares`-th."""
    made = workload.parse(what, seed)
    requests = [made.request(index) for index in range(place, count, shares)]
    return asyncio.run(_closed(port, requests, users, limit_s))


def lag(records: list[Record]) -> str:
    """A doubt, where this process sent too late; else empty."""
    late_s = sorted(value for record in records if (value := measure.lag_s(record)) is not None)
    worst_s = late_s[int(0.99 * (len(late_s) - 1))] if late_s else 0.0
    return f"late: requests were sent up to {worst_s * 1e3:.0f} ms" if worst_s > _LAG_S else ""
