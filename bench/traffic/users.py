"""A closed loop of users who send the same prompts repeatedly, and keep the transcripts.

All users share one event loop. Each has its own connection, which it keeps between its requests as
the clients of a service do, or opens for each request.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench import records
from bench.progress import Line, Progress
from bench.traffic.client import Client
from bench.traffic.request import Request
from bench.traffic.response import Response
from bench.traffic.target import Target
from bench.traffic.transcript import Transcript, transcribe

# A user whose request failed asks again only then: a server that refuses all would otherwise use
# up the requests of a run in a second.
_AFTER_FAILURE_S = 0.5
# Longer than any user is idle: a connection that the server does not close is used again.
_KEPT_ALIVE_S = 3600.0


class Users:
    """A closed loop: each user asks the next request when its last was answered.

    Args:
        count: requests at least.
        think_s: what each waits between an answer and its next request.
        most_think_s: if above `think_s`, the wait is drawn from between the two, each order of
            magnitude as often.
        keep_alive: whether each keeps its connection between its requests.
        whole: share of the requests that are not streamed.
        most_s: no request is sent after that time; None: no limit.
        clock: seconds since the start of the load.
        more: whether to continue after `count` requests.
        path: where records go as they come.
    """

    def __init__(
        self,
        *,
        target: Target,
        requests: Sequence[Request],
        users: int,
        count: int,
        whole: float,
        think_s: float = 0.0,
        most_think_s: float = 0.0,
        keep_alive: bool = True,
        most_s: float | None,
        seed: int,
        clock: Callable[[], float],
        more: Callable[[], bool],
        path: Path,
    ) -> None:
        self._target, self._requests, self._users = target, requests, users
        self._count, self._whole, self._most_s = count, whole, most_s
        self._think_s, self._most_think_s = think_s, most_think_s
        self._keep_alive = keep_alive
        self._clock, self._more, self._path = clock, more, path
        self._rng = random.Random(f"{seed}/order")
        self._order: list[int] = []
        self._sent = self._running = self._failed = self._tokens = 0
        self._line = Line(label="disturbed ")
        self.transcripts: list[Transcript] = []

    async def run(self) -> None:
        with contextlib.ExitStack() as open_clients:
            open_clients.callback(self._line.close)
            async with asyncio.TaskGroup() as group:
                for user in range(self._users):
                    client_of = client(self._target, self._clock, self._keep_alive)
                    open_clients.callback(client_of.close)
                    group.create_task(self._use(client_of, user))

    async def _use(self, session: Client, user: int) -> None:
        while not self._over():
            index = self._sent
            self._sent += 1
            record = Transcript(
                index=index,
                planned_s=self._clock(),
                user=user,
                prompt=self._next(),
                whole=is_unstreamed(index, self._whole),
            )
            self._running += 1
            await ask(session, self._requests[record.prompt], record)
            self._running -= 1
            self._take(record)
            await asyncio.sleep(max(self._idle_s(), _AFTER_FAILURE_S if record.error else 0.0))

    def _idle_s(self) -> float:
        if self._most_think_s <= self._think_s:
            return self._think_s
        least = max(self._think_s, 1e-3)
        return least * math.exp(self._rng.random() * math.log(self._most_think_s / least))

    def _over(self) -> bool:
        if self._most_s is not None and self._clock() > self._most_s:
            return True
        return self._sent >= self._count and not self._more()

    def _next(self) -> int:
        """All prompts once in a random order, and again in another."""
        if not self._order:
            self._order = list(range(len(self._requests)))
            self._rng.shuffle(self._order)
        return self._order.pop()

    def _take(self, record: Transcript) -> None:
        self.transcripts.append(record)
        records.append(self._path, [record])
        self._failed += not record.ok
        self._tokens += record.output_tokens or 0
        self._line(
            Progress(
                at_s=self._clock(),
                planned=self._count,
                sent=self._sent,
                running=self._running,
                done=len(self.transcripts),
                failed=self._failed,
                tokens=self._tokens,
            )
        )


def is_unstreamed(index: int, share: float) -> bool:
    """Whether this request is not streamed; such requests are spread evenly."""
    return int((index + 1) * share) > int(index * share)


def client(target: Target, clock: Callable[[], float], keep_alive: bool = True) -> Client:
    """A client that asks greedily and for the ids of tokens."""
    extra = {"temperature": 0, "return_token_ids": True, **target.extra}
    options = {"fresh_connections": not keep_alive, "kept_alive_s": _KEPT_ALIVE_S}
    return Client(msgspec.structs.replace(target, extra=extra, **options), clock)


async def ask(session: Client, request: Request, record: Transcript) -> None:
    """Send a request and fill in its record. Raises nothing but cancellation."""
    if record.whole:
        request = msgspec.structs.replace(request, extra={**request.extra, "stream": False})
    answer = Response(record, keep_text=True)
    await session.exchange(request, answer)
    transcribe(record, answer)
