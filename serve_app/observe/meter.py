"""The outermost gate: measures each answer, counts it, and writes one log line.

It sees what the client sees: the first output of a stream after all waiting, every gap between two
events, and an answer that breaks off or ends with an error. It does not read the content of
requests.
"""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import events, sse
from serve_app.gates import routes
from serve_app.gates.keys import OPEN_PATHS, tenant
from serve_app.gates.reading import Reading
from serve_app.observe import metrics, output
from serve_app.observe.logs import Log
from serve_app.observe.metrics import series
from serve_app.observe.timeline import Timeline
from serve_app.observe.tracing import Tracer
from serve_app.settings import Replicas

ID_HEADER = b"x-request-id"
# Of an answer, where something behind this gate knows it better: fast or python.
LANE_HEADER = b"x-serve-lane"
# So much of an id that a client sent is in logs and traces.
_MOST_ID_CHARACTERS = 1024


class Meter:
    """ASGI middleware.

    Args:
        model: what a request counts for that names no other.
        goal: the objective (ttft_s, itl_s) that requests are held against.
        log: gets a line for each request.
        counted: whether requests are counted here. Not in a replica behind a gateway.
    """

    def __init__(
        self,
        app: ASGIApp,
        model: str,
        goal: Replicas,
        log: Log,
        tracer: Tracer | None = None,
        counted: bool = True,
    ) -> None:
        self.app = app
        self._model = model
        self._goal = goal
        self._log = log
        self._tracer = tracer
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        request_id = _identify(scope)
        answer = _Answer(send, self._counted and (lambda: metrics.gaps.of(self._model_of(scope))))
        under_way = series(metrics.under_way, self._model)
        with self._tracer.span(scope, request_id) if self._tracer else nullcontext() as span:
            under_way.inc(self._counted)
            try:
                await self.app(scope, answer.receiving(receive), answer.send)
            except asyncio.CancelledError:
                answer.left = True
                raise
            except Exception as error:
                answer.raised = type(error).__name__
                raise
            finally:
                under_way.dec(self._counted)
                answer.ended_s = time.monotonic()
                self._note(scope, request_id, answer)
                if span is not None:
                    span.set_attributes(_attributes(answer))

    def _model_of(self, scope: Scope) -> str:
        """The model of the request, which the gateway sets once it knows it."""
        return str(scope.get("state", {}).get("model", self._model))

    def _note(self, scope: Scope, request_id: str, answer: "_Answer") -> None:
        model = self._model_of(scope)
        status, who = answer.final_status, tenant.get()
        if self._counted:
            self._count(scope, model, status, who, answer)
        self._log.write(
            "error" if status >= 500 else "info",
            "request",
            request_id=request_id,
            tenant=who,
            model=model,
            method=scope["method"],
            path=routes.label(scope["path"]),
            status=status,
            reason=answer.reason,
            duration_s=round(answer.duration_s, 4),
            first_s=answer.first_s and round(answer.first_s, 4),
            events=answer.events,
            lane=answer.lane,
        )

    def _count(self, scope: Scope, model: str, status: int, who: str, answer: "_Answer") -> None:
        route = routes.find(scope["path"]) or routes.OTHER
        label = metrics.tenant_label(who)
        series(metrics.requests, model, route.path, str(status), label).inc()
        if answer.code:
            series(metrics.rejections, model, answer.code).inc()
        if answer.first_s is not None:
            series(metrics.first_tokens, model).observe(answer.first_s)
        if status < 400:
            series(metrics.durations, model).observe(answer.duration_s)
        if route.generates and (met := answer.meets_slo(self._goal, _sequences(scope))) is not None:
            series(metrics.objectives, model, "yes" if met else "no").inc()


class _Answer:
    """One answer under way.

    Attributes:
        status: what it began with; 0 before.
        code: of the error of ours that it is, or ended with.
        raised: name of the exception that ended it.
        first_s: until the first output of a stream: text, reasoning, a tool call.
        events: pieces of a stream, from its first output on.
        left: the client left before its end.
        lane: which of vLLM's front ends began it.
    """

    lane = "python"

    def __init__(self, send: Send, gaps: Callable[[], metrics.Counts] | Literal[False]) -> None:
        self._send = send
        self._gaps_of = gaps
        self._gaps: metrics.Counts | None = None
        self._began_s = self._last_s = self.ended_s = time.monotonic()
        self._streaming = False
        self._over = False
        self._failure: str | None = None
        # Of an answer in one piece.
        self._body = b""
        self.status = 0
        self.code: str | None = None
        self.raised: str | None = None
        self.first_s: float | None = None
        self.events = 0
        self.left = False

    def receiving(self, receive: Receive) -> Receive:
        """The request's channel, which also reports that the client has left."""

        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left = True
            return message

        return received

    async def send(self, message: Message) -> None:
        if (code := message.get("code")) is not None:
            self.code = code
        if (timeline := message.get("timeline")) is not None:
            self._follow(timeline, message["body"])
        elif message["type"] == "http.response.start":
            self.status, headers = message["status"], dict(message["headers"])
            self._streaming = sse.is_stream(message)
            self.lane = headers.get(LANE_HEADER, b"python").decode()
        else:
            self._over = not message.get("more_body", False)
            body = message.get("body", b"")
            if not self._streaming:
                self._body = body
            elif body and code is None:
                self._event(body)
        await self._send(message)

    def _follow(self, timeline: Timeline, body: bytes) -> None:
        """Take the engine's account of an answer that did not pass through this process."""
        self.status, self.left, self._body = timeline.status, timeline.left, body
        self.lane = "fast"
        self._over = not (timeline.left or timeline.broken)
        if not self._streaming or timeline.first_s is None or timeline.last_s is None:
            return
        self.events = timeline.generated_tokens
        self.first_s, self._last_s = timeline.first_s - self._began_s, timeline.last_s
        if self._gaps_of and (gaps := self.events - 1) > 0:
            gap_s = (timeline.last_s - timeline.first_s) / gaps
            self._gaps_of().add(gap_s, gaps)

    def _event(self, data: bytes) -> None:
        self._failure = self._failure or events.error_in(data)
        now_s = time.monotonic()
        if self.first_s is None:
            if self._failure is not None or not output.begins_output(data):
                return
            self.first_s = now_s - self._began_s
            self._gaps = self._gaps_of() if self._gaps_of else None
        elif self._gaps is not None:
            self._gaps.add(now_s - self._last_s)
        self._last_s = now_s
        self.events += 1

    @property
    def duration_s(self) -> float:
        return self.ended_s - self._began_s

    @property
    def final_status(self) -> int:
        """What it came to: a stream that broke off after its 200 did not succeed."""
        if self.left and not self._over:
            return metrics.CLIENT_LEFT
        broken = self.code or self._failure or self.raised or not self._over
        if self.status == 200 and broken:
            return 500
        return self.status or 500

    @property
    def reason(self) -> str | None:
        """Why it failed, in one word; None: it did not, or only the client knows."""
        if self.code is not None:
            return self.code
        if self._failure is not None:
            return self._failure
        if self.raised is not None:
            return self.raised
        if self.final_status < 500:
            return None
        if not self._over:
            return "broken_off"
        return output.failure_code(self._body) or "error"

    def meets_slo(self, goal: Replicas, sequences: int) -> bool | None:
        """Whether the request met the objective; None if it does not count."""
        status = self.final_status
        if status >= 500 or status == 429:
            return False
        if status >= 400:
            return None
        if not self._streaming:
            return self._met_unstreamed(goal, sequences)
        if self.first_s is None:
            return None
        gap_s = (self._last_s - self._began_s - self.first_s) / max(1, self.events - 1)
        return (goal.ttft_s is None or self.first_s <= goal.ttft_s) and (
            goal.itl_s is None or self.events < 2 or gap_s <= goal.itl_s
        )

    def _met_unstreamed(self, goal: Replicas, sequences: int) -> bool | None:
        """Whether a non-streamed answer took no longer than a stream may take in total."""
        tokens = output.output_tokens(self._body)
        if tokens is None or goal.ttft_s is None or goal.itl_s is None:
            return None
        each = tokens / max(1, sequences)
        return self.duration_s <= goal.ttft_s + goal.itl_s * max(0.0, each - 1)


def _sequences(scope: Scope) -> int:
    parsed: Reading | None = scope.get("state", {}).get("reading")
    return 1 if parsed is None else parsed.sequences


def _identify(scope: Scope) -> str:
    """The request's id: the first one that the client sent, which Ray Serve puts into the answer.

    Whoever comes after this sees one id. Ray Serve has given one to a request that had none.
    """
    given = [value for name, value in scope["headers"] if name == ID_HEADER]
    request_id = given[0] if given else os.urandom(16).hex().encode()
    if len(given) != 1:
        others = [(name, value) for name, value in scope["headers"] if name != ID_HEADER]
        scope["headers"] = [*others, (ID_HEADER, request_id)]
    return request_id.decode("latin-1")[:_MOST_ID_CHARACTERS]


def _attributes(answer: _Answer) -> dict[str, Any]:
    attributes: dict[str, Any] = {"http.response.status_code": answer.final_status}
    if answer.reason:
        attributes["error.type"] = answer.reason
    if answer.first_s is not None:
        attributes["gen_ai.latency.time_to_first_token"] = answer.first_s
    return attributes
