"""What the outermost gate counts, logs and traces of answers of every kind."""

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from prometheus_client.registry import REGISTRY
from ray.serve._private.http_util import RequestIdMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import TooManyRequests, Unauthorized
from serve_app.gates.keys import tenant
from serve_app.observe import metrics
from serve_app.observe.logs import Log
from serve_app.observe.meter import Meter
from serve_app.observe.timeline import Timeline
from serve_app.settings import Replicas

GOAL = Replicas(min=1, max=1, ttft_s=0.5, itl_s=0.1)
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
SECRET = "sk-planted-key"
PROMPT = "planted prompt text"


class Watched:
    """An application behind a meter, and what came of one request."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.written = io.StringIO()
        self.sent: list[Message] = []
        self.began = asyncio.Event()
        self.before = self._all()

    async def ask(self, app: ASGIApp, path: str = "/v1/completions", **headers: str) -> None:
        log = Log(self.written.write, replica="r")
        meter = Meter(app, self.model, GOAL, log)
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        await meter(self.scope, self._receive, self._send)

    async def _receive(self) -> Message:
        return {"type": "http.request", "body": json.dumps({"prompt": PROMPT}).encode()}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.began.set()

    def _all(self) -> dict[tuple[str, tuple[str, ...]], float]:
        return {
            (sample.name, tuple(v for k, v in sample.labels.items() if k != "model")): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.labels.get("model") == self.model
        }

    def counted(self, name: str, *labels: str) -> float:
        """How much a sample has grown by."""
        key = (name, labels)
        return self._all().get(key, 0.0) - self.before.get(key, 0.0)

    @property
    def line(self) -> dict[str, Any]:
        (line,) = self.written.getvalue().splitlines()
        body: dict[str, Any] = json.loads(line)
        age_s = (datetime.now(UTC) - datetime.fromisoformat(body["time"])).total_seconds()
        assert 0 <= age_s < 60
        return body


@pytest.fixture
def watched(request: pytest.FixtureRequest) -> Watched:
    # Metrics are of a process: a model of its own keeps the tests apart.
    return Watched(request.node.name)


def streams(
    *pauses_s: float, end: Callable[[Send], Awaitable[None]] | None = None
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        for pause_s in pauses_s:
            await asyncio.sleep(pause_s)
            event = {"type": "http.response.body", "body": b"data: x\n\n", "more_body": True}
            await send(event)
        await (end(send) if end else send({"type": "http.response.body", "body": b""}))

    return app


async def test_a_stream_is_measured_as_its_client_sees_it(watched: Watched) -> None:
    await watched.ask(streams(0.06, 0.02, 0.02))
    assert watched.counted("serve_app_requests_total", "/v1/completions", "200", "anonymous") == 1
    assert watched.counted("serve_app_time_to_first_token_seconds_count") == 1
    assert watched.counted("serve_app_time_to_first_token_seconds_sum") >= 0.06
    assert watched.counted("serve_app_inter_token_seconds_count") == 2
    assert watched.counted("serve_app_inter_token_seconds_sum") >= 0.04
    assert watched.counted("serve_app_request_duration_seconds_count") == 1
    assert watched.counted("serve_app_slo_requests_total", "yes") == 1
    assert watched.counted("serve_app_requests_under_way") == 0
    assert (watched.line["status"], watched.line["events"]) == (200, 3)
    assert watched.line["duration_s"] >= watched.line["first_s"] >= 0.06


def fast(streams: bool, timeline: Callable[[float], Timeline]) -> ASGIApp:
    """An answer of the fast lane, with the engine's account of it, made of the time it began."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = EVENTS if streams else [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = b"" if streams else b'{"usage": {"completion_tokens": 11}}'
        account = timeline(time.monotonic())
        await send({"type": "http.response.body", "body": body, "timeline": account})

    return app


async def test_a_stream_of_the_fast_lane_is_measured_by_the_engines_account(
    watched: Watched,
) -> None:
    await watched.ask(fast(True, lambda s: Timeline(200, s + 0.2, s + 0.7, 4, 11)))
    assert watched.counted("serve_app_time_to_first_token_seconds_count") == 1
    assert watched.counted("serve_app_time_to_first_token_seconds_sum") == pytest.approx(
        0.2, abs=0.1
    )
    assert watched.counted("serve_app_inter_token_seconds_count") == 10
    assert watched.counted("serve_app_inter_token_seconds_sum") == pytest.approx(0.5)
    assert watched.counted("serve_app_slo_requests_total", "yes") == 1
    assert (watched.line["status"], watched.line["events"]) == (200, 11)
    assert watched.line["lane"] == "fast"


async def test_an_answer_in_one_piece_of_the_fast_lane_has_no_first_token(watched: Watched) -> None:
    await watched.ask(fast(False, lambda s: Timeline(200, s + 0.2, s + 0.7, 4, 11)))
    assert watched.counted("serve_app_time_to_first_token_seconds_count") == 0
    assert watched.counted("serve_app_inter_token_seconds_count") == 0
    assert watched.counted("serve_app_slo_requests_total", "yes") == 1
    assert watched.line["status"] == 200


@pytest.mark.parametrize(
    ("account", "status"),
    [
        (Timeline(200, left=True), metrics.CLIENT_LEFT),
        (Timeline(200, broken=True), 500),
        (Timeline(400), 400),
    ],
)
async def test_what_went_wrong_in_the_fast_lane_is_not_a_success(
    watched: Watched, account: Timeline, status: int
) -> None:
    await watched.ask(fast(True, lambda _: account))
    assert watched.line["status"] == status


async def test_a_late_first_token_misses_the_objective(watched: Watched) -> None:
    await watched.ask(streams(0.55, 0.0))
    assert watched.counted("serve_app_slo_requests_total", "no") == 1
    assert watched.counted("serve_app_slo_requests_total", "yes") == 0


async def test_slow_tokens_miss_the_objective_as_a_mean(watched: Watched) -> None:
    await watched.ask(streams(0.0, 0.0, 0.15, 0.0))  # 50 ms on average.
    assert watched.counted("serve_app_slo_requests_total", "yes") == 1
    await watched.ask(streams(0.0, 0.15, 0.15))
    assert watched.counted("serve_app_slo_requests_total", "no") == 1


async def test_errors_of_ours_are_counted_by_their_code(watched: Watched) -> None:
    await watched.ask(TooManyRequests("full"))
    await watched.ask(Unauthorized("no"), path="/v1/models")
    assert watched.counted("serve_app_requests_total", "/v1/completions", "429", "anonymous") == 1
    assert watched.counted("serve_app_requests_total", "/v1/models", "401", "anonymous") == 1
    assert watched.counted("serve_app_rejections_total", "queue_full") == 1
    assert watched.counted("serve_app_rejections_total", "invalid_api_key") == 1
    # A full queue is ours to answer for, a wrong key is not.
    assert watched.counted("serve_app_slo_requests_total", "no") == 1
    assert watched.counted("serve_app_slo_requests_total", "yes") == 0


async def test_a_stream_that_ends_with_an_error_did_not_succeed(watched: Watched) -> None:
    async def end(send: Send) -> None:
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "code": "timeout"})

    await watched.ask(streams(0.0, end=end))
    assert watched.counted("serve_app_requests_total", "/v1/completions", "500", "anonymous") == 1
    assert watched.counted("serve_app_rejections_total", "timeout") == 1
    assert (watched.line["level"], watched.line["reason"]) == ("error", "timeout")


def events(*bodies: bytes, status: int = 200, kind: bytes = b"text/event-stream") -> ASGIApp:
    """An answer of these pieces, the later ones a little later."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for place, body in enumerate(bodies):
            if place:
                await asyncio.sleep(0.03)
            more = place < len(bodies) - 1
            await send({"type": "http.response.body", "body": body, "more_body": more})

    return app


async def test_every_failure_has_its_reason(watched: Watched) -> None:
    async def raises(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("x")

    body = b'{"error": {"message": "x", "type": "InternalServerError", "code": 500}}'
    cases: list[tuple[ASGIApp, str]] = [
        (events(body, status=500, kind=b"application/json"), "InternalServerError"),
        (events(b"Internal Server Error", status=500, kind=b"text/plain"), "error"),
        (events(b"", status=502, kind=b"text/plain"), "error"),
        (TooManyRequests("full"), "queue_full"),
        (raises, "KeyError"),
    ]
    for app, reason in cases:
        each = Watched(watched.model)
        try:
            await each.ask(app)
        except KeyError:
            assert app is raises
        assert each.line["reason"] == reason
        assert each.line["status"] >= 429


CREATED = (
    b'event: response.created\ndata: {"type": "response.created", "response": {"error": null}}'
)
DELTA = (
    b'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", "delta": "x"}'
)


@pytest.mark.parametrize(
    ("before", "first"),
    [
        (CREATED, DELTA),
        (b'data: {"type": "response.in_progress"}', DELTA),
        (b": keep-alive", b'data: {"choices": [{"text": "x"}]}'),
        (
            b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}',
            b'data: {"choices": [{"delta": {"content": "x"}}]}',
        ),
        (
            b'data: {"choices": [{"delta": {"role": "assistant"}}]}',
            b'data: {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}',
        ),
        (
            b'event: message_start\ndata: {"type": "message_start"}',
            b'event: content_block_delta\ndata: {"type": "content_block_delta"}',
        ),
        (b'data: {"choices": []}', b'data: {"choices": [{"token_ids": [5]}]}'),
    ],
)
async def test_the_first_token_is_the_first_output_and_not_the_first_event(
    watched: Watched, before: bytes, first: bytes
) -> None:
    await watched.ask(events(before + b"\n\n", first + b"\n\n", first + b"\n\n"))
    assert watched.line["first_s"] >= 0.03
    assert watched.line["events"] == 2
    assert watched.counted("serve_app_inter_token_seconds_count") == 1


@pytest.mark.parametrize(
    ("path", "usage", "remaining"),
    [
        ("/v1/chat/completions", {"completion_tokens": 10}, "yes"),
        ("/v1/messages", {"output_tokens": 10}, "yes"),
        ("/v1/chat/completions", {"completion_tokens": 1}, "no"),
        ("/v1/chat/completions", None, None),
        ("/tokenize", {"completion_tokens": 10}, None),
        ("/v1/models", None, None),
    ],
)
async def test_an_answer_in_one_piece_is_held_to_the_time_of_a_stream(
    watched: Watched, path: str, usage: dict[str, int] | None, remaining: str | None
) -> None:
    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.55)  # GOAL: 0.5 s, and 0.1 s for each token more.
        body = json.dumps({"usage": usage}).encode()
        await events(body, kind=b"application/json")(scope, receive, send)

    await watched.ask(late, path=path)
    for answer in ("yes", "no"):
        assert watched.counted("serve_app_slo_requests_total", answer) == (answer == remaining)


async def test_what_generates_nothing_misses_no_objective(watched: Watched) -> None:
    await watched.ask(TooManyRequests("full"), path="/v1/models")
    await watched.ask(TooManyRequests("full"), path="/nowhere")
    assert watched.counted("serve_app_slo_requests_total", "no") == 0


async def test_an_application_that_raises_is_counted(watched: Watched) -> None:
    async def end(send: Send) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        await watched.ask(streams(0.0, end=end))
    assert watched.counted("serve_app_requests_total", "/v1/completions", "500", "anonymous") == 1
    assert watched.counted("serve_app_requests_under_way") == 0


async def test_a_client_that_leaves_is_told_apart(watched: Watched) -> None:
    asking = asyncio.create_task(watched.ask(streams(0.0, 30.0)))
    await watched.began.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert watched.counted("serve_app_requests_total", "/v1/completions", "499", "anonymous") == 1
    assert watched.counted("serve_app_slo_requests_total", "no") == 0


async def test_labels_are_bounded(watched: Watched) -> None:
    for at in range(5):
        await watched.ask(Unauthorized("no"), path=f"/secret/{at}")
    assert watched.counted("serve_app_requests_total", "other", "401", "anonymous") == 5


async def test_health_is_not_counted(watched: Watched) -> None:
    await watched.ask(streams(), path="/health")
    assert watched._all() == watched.before
    assert not watched.written.getvalue()


async def test_who_asked_is_a_name(watched: Watched) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tenant.set("team-a")
        await streams(0.0)(scope, receive, send)

    await asyncio.create_task(watched.ask(app), context=copy_context())
    assert watched.counted("serve_app_requests_total", "/v1/completions", "200", "team-a") == 1
    assert watched.line["tenant"] == "team-a"


async def test_a_request_keeps_its_id_or_gets_one(watched: Watched) -> None:
    await watched.ask(streams(0.0), **{"x-request-id": "id-7"})
    assert watched.line["request_id"] == "id-7"
    other = Watched(watched.model)
    await other.ask(streams(0.0))
    given = dict(other.scope["headers"])[b"x-request-id"].decode()
    assert other.line["request_id"] == given
    assert len(given) == 32


@pytest.mark.parametrize(
    "sent",
    [["my id, with spaces"], ["first", "second"], ['"quoted" \\ {id}'], ["größe"], ["x" * 400], []],
)
async def test_the_id_in_the_log_is_the_one_in_the_answer(
    watched: Watched, sent: list[str]
) -> None:
    """Ray Serve's own middleware puts it into the answer."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(value for name, value in scope["headers"] if name == b"x-request-id")
        await PlainTextResponse("x")(scope, receive, send)

    log = Log(watched.written.write, replica="r")
    stack = RequestIdMiddleware(Meter(app, watched.model, Replicas(), log))
    transport = httpx.ASGITransport(stack)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        headers = [(b"x-request-id", each.encode("latin-1")) for each in sent]
        answer = await client.get("/v1/models", headers=headers)
    raw = dict(answer.headers.raw)[b"x-request-id"]
    assert watched.line["request_id"] == raw.decode("latin-1")
    assert seen == [raw], "whoever comes later sees another id"


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (b'data: {"error": {"type": "BadRequestError", "code": 400}}', "BadRequestError"),
        (b'event: error\ndata: {"type": "error", "error": {"type": "api_error"}}', "api_error"),
    ],
)
async def test_a_stream_that_ends_in_an_error_has_its_reason(
    watched: Watched, event: bytes, code: str
) -> None:
    async def end(send: Send) -> None:
        await send({"type": "http.response.body", "body": event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    await watched.ask(streams(0.0, end=end))
    assert (watched.line["status"], watched.line["reason"]) == (500, code)


async def test_prompts_and_keys_are_in_no_log(watched: Watched) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await send({"type": "http.response.body", "body": b"data: " + body + b"\n\n"})

    await watched.ask(app, authorization=f"Bearer {SECRET}", **{"x-api-key": SECRET})
    assert PROMPT in str(watched.sent)
    assert PROMPT not in watched.written.getvalue()
    assert SECRET not in watched.written.getvalue()


def test_every_metric_has_a_unit_or_counts() -> None:
    """prometheus-client's conventions: base units at the end of the name."""
    ours = [f for f in REGISTRY.collect() if f.name.startswith("serve_app_")]
    assert len(ours) > 15
    for family in ours:
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        assert family.documentation.endswith(".") or family.name == "serve_app_build_info"
    assert not any(name.endswith(("_s", "_ms")) for name in metrics.SCALING)
