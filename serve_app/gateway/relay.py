"""Forwards a request to a replica, and to another one if that fails.

    1  read what routing needs from the request                          request.py
    2  choose a replica                                                  routing.py, fleet.py
    3  send the request there, in one of two lanes                       lanes.py
    4  forward the answer event by event                                 _forward
    5  the replica fails: continue with 2, from the tokens so far        continuation.py

Nothing else of a request is examined: the engine decides what it means. A stream that has begun
always ends with its last event or with an error event.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import aiohttp
from starlette.types import Send

from serve_app.continuation import EngineReportedDead, Malformed, Method, Stream
from serve_app.errors import (
    CannotContinue,
    GatewayTimeout,
    Poison,
    RequestError,
    Unavailable,
)
from serve_app.gateway.accounts import Accounts, Attempts
from serve_app.gateway.answer import Answer
from serve_app.gateway.failures import FAILURES, Busy, ReplicaFailed, WholeResponse
from serve_app.gateway.fleet import Fleet, Upstream
from serve_app.gateway.lanes import Lane, Lanes
from serve_app.gateway.request import HOP_HEADERS, Request
from serve_app.gateway.routing import Candidate, Router
from serve_app.gateway.visit import Visit, Visits
from serve_app.observe import metrics
from serve_app.observe.meter import LANE_HEADER
from serve_app.pacing import Pacer
from serve_app.settings import Gateway, Limits

logger = logging.getLogger("serve_app")

# How soon full replicas are asked again to continue an answer.
_RETRY_S = 0.2
# A second death counts against a request unless its answer went on by so many tokens in between.
_INNOCENT = 8


class Relay:
    """Passes requests to the replicas of one model.

    Args:
        limits: `request_timeout_s` bounds a whole request, its attempts and waits together.
        model: its name, for metrics.
        wake: called where there is no replica: asks for one.
        may_sleep: whether the model may have no replica (`min: 0`). Then a request waits as long
            as a start takes, for at most `request_timeout_s`.
        pacer: how long a stream waits for more to pass on at once.

    Attributes:
        limits: may change while requests run.
    """

    def __init__(
        self,
        replicas: Fleet,
        router: Router,
        settings: Gateway,
        limits: Limits,
        model: str,
        wake: Callable[[], None] = lambda: None,
        may_sleep: bool = False,
        pacer: Pacer | None = None,
    ) -> None:
        self.replicas = replicas
        self.limits = limits
        self.may_sleep = may_sleep
        self._router = router
        self._settings = settings
        self._wake = wake
        self._model = model
        self._pacer = pacer or Pacer(0.0)
        metrics.replicas_known.labels(model).set_function(lambda: len(replicas.ready()))
        # A count that begins above 0 has no rate: the first failure would not be seen.
        metrics.retries.labels(model)
        for kind in FAILURES:
            metrics.failed_attempts.labels(model, kind)
        for how in ("again", "handover", Method.RESUME, Method.REPEAT):
            metrics.continuations.labels(model, how)
        self._lanes = Lanes(lambda: self.limits)
        self._visits = Visits(self._lanes.full, settings.stall_timeout_s, self.replicas)
        self._accounts = Accounts(self._lanes.full, replicas)

    async def close(self) -> None:
        await self._accounts.end()
        self._visits.close()
        await self._lanes.close()

    @property
    def takes_requests(self) -> bool:
        """Whether a request can be answered now, or starts the replica that answers it."""
        return bool(self.replicas.ready()) or (self.may_sleep and not len(self.replicas))

    async def __call__(self, request: Request, send: Send) -> None:
        """Answer one request. Ray Serve cancels this when the client leaves."""
        answer, timeout_s = Answer(send), self.limits.request_timeout_s
        if request.work is not None:
            request.reports = Attempts(self._accounts, request.work)
        try:
            async with asyncio.timeout(timeout_s):
                await self._serve(request, answer)
        except TimeoutError:
            error = GatewayTimeout(f"The response was not complete within {timeout_s:g} s.")
            await answer.fail(error, request.path)
        except RequestError as error:
            await answer.fail(error, request.path)
        except Exception:
            # A bug of ours. Without an error event the stream would break off silently.
            logger.exception("the gateway failed", extra={"request_id": request.id})
            await answer.fail(RequestError("The gateway failed."), request.path)
        finally:
            if request.reports is not None:
                request.reports.end(len(answer.stream.progress.tokens))

    async def _serve(self, request: Request, answer: Answer) -> None:
        """Answer from one replica, or from one after the other."""
        busy_until_s: float | None = None
        while True:
            replica = await self._choose(request)
            sent_before = len(answer.stream.progress.groups)
            try:
                with _carrying(replica, request):
                    await self._forward(replica, request, answer)
                self.replicas.answered(replica)
                return
            except Busy as busy:
                # Full, not broken: others may have room. The last one speaks for all.
                request.tried.append(replica.name)
                metrics.retries.labels(self._model).inc()
                if self.replicas.has_others(request.tried):
                    continue
                if not answer.begun:
                    await answer.whole(busy.refusal)
                    return
                # Who has been sent the half of an answer is not sent away: there will be room.
                busy_until_s = busy_until_s or time.monotonic() + self._settings.replica_timeout_s
                if time.monotonic() > busy_until_s:
                    raise Unavailable("Every replica is full.", retry_after_s=1.0) from busy
                request.tried.clear()
                await asyncio.sleep(_RETRY_S)
            except ReplicaFailed as failure:
                request.tried.append(replica.name)
                if failure.kind == "restarting":
                    self._visits.await_restart(replica)
                else:
                    self.replicas.failed(replica)
                request.unreported(lost=failure.worked)
                self._router.forget(replica.name)
                progressed = len(answer.stream.progress.groups) - sent_before >= _INNOCENT
                metrics.failed_attempts.labels(self._model, failure.kind).inc()
                logger.warning(
                    "replica %s failed: %s", replica.name, failure, extra={"request_id": request.id}
                )
                self._require_another_attempt(failure, request, answer.stream, progressed)
                metrics.continuations.labels(self._model, _how(answer.stream)).inc()

    def _require_another_attempt(
        self, failure: "ReplicaFailed", request: Request, stream: Stream, progressed: bool
    ) -> None:
        """Whether another replica may be asked.

        Raises:
            RequestError: it has been too often, or the answer would not be exact.
        """
        request.attempts += 1
        if failure.died:
            request.deaths = 1 if progressed else request.deaths + 1
        if request.deaths >= self._settings.max_deaths:
            raise Poison(f"{request.deaths} replicas failed while they processed this request.")
        if request.attempts >= self._settings.max_attempts:
            raise Unavailable(
                f"{request.attempts} replicas failed this request.", retry_after_s=1.0
            )
        if not stream.continuable:
            raise CannotContinue(
                "The replica that generated this response failed, and no other replica can "
                "continue it exactly. Try again."
            )

    async def _choose(self, request: Request) -> Upstream:
        timeout_s = self._settings.replica_timeout_s
        if not len(self.replicas):
            self._wake()
            if self.may_sleep:
                timeout_s = self.limits.request_timeout_s
        with metrics.unplaced.labels(self._model).track_inprogress():
            ready = await self.replicas.wait_until_ready(timeout_s, request.tried)
        if not ready:
            raise Unavailable(
                f"No replica became available within {timeout_s:g} s.", retry_after_s=1.0
            )
        candidates = [
            Candidate(replica.name, replica.outstanding, replica.running) for replica in ready
        ]
        choice = self._router.choose(candidates, request.keys, request.session)
        return next(replica for replica in ready if replica.name == choice.name)

    async def _forward(self, replica: Upstream, request: Request, answer: Answer) -> None:
        """Send the request to one replica, and its answer to the client.

        Raises:
            Busy: the replica takes nothing now.
            ReplicaFailed: the answer did not come, or not to its end.
            CannotContinue: the replica refuses to continue the answer.
        """
        with self._visits.visit(replica) as visit:
            try:
                async with (
                    visit.limit,
                    self._lanes.ask(visit, request, answer) as (lane, response),
                ):
                    await _received(response, lane, answer, visit, self._pacer)
            except aiohttp.ClientConnectorError as error:
                raise ReplicaFailed(
                    f"it takes no connection: {error.os_error}", "connection"
                ) from error
            except (aiohttp.ClientError, ConnectionError) as error:
                if not answer.stream.ended:
                    raise ReplicaFailed(f"{type(error).__name__}: {error}") from error
                await answer.end()
            except EngineReportedDead as error:
                raise ReplicaFailed(f"its engine failed: {error}") from error
            except Malformed as error:
                raise ReplicaFailed(f"its stream is malformed: {error}", "malformed") from error
            except TimeoutError as error:
                if not visit.limit.expired():
                    raise
                raise ReplicaFailed("it fell silent", "silent") from error


async def _received(
    response: aiohttp.ClientResponse, lane: Lane, answer: Answer, visit: Visit, pacer: Pacer
) -> None:
    """Pass a replica's response on to the client.

    Raises:
        Busy, CannotContinue: it is none that the client can be sent.
        Malformed: it is a stream that an engine does not write.
    """
    headers = [*_forwarded_headers(response), (LANE_HEADER, lane.encode())]
    if response.content_type != "text/event-stream":
        whole = WholeResponse(response.status, headers, await response.read())
        if response.status in (429, 503):
            raise Busy(whole)
        if answer.begun:
            raise CannotContinue(
                "The replica that generated this response failed, and another one refused to "
                f"continue it: {whole.message}"
            )
        await answer.whole(whole)
        return
    await answer.begin(response.status, headers)
    async for data in response.content.iter_any():
        visit.sending = True
        await answer.data(data)
        visit.sending = False
        if pacer.gap_s:
            # What comes meanwhile is read in one piece. If the replica fails, it is generated anew.
            await asyncio.sleep(pacer.gap_s)
    answer.stream.finish()
    await answer.end()


def _how(stream: Stream) -> str:
    """How an answer continues, for metrics. For the fast lane only the next engine knows."""
    if not stream.sent:
        return "again"
    return str(stream.method) if stream.method else "handover"


@contextlib.contextmanager
def _carrying(replica: Upstream, request: Request) -> Iterator[None]:
    replica.outstanding += request.tokens
    replica.running += 1
    try:
        yield
    finally:
        replica.outstanding -= request.tokens
        replica.running -= 1


def _forwarded_headers(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    """A replica's headers, less those of its connection."""
    headers = ((name.lower(), value) for name, value in response.raw_headers)
    return [(name, value) for name, value in headers if name not in HOP_HEADERS]
