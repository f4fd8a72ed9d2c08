"""The gate of tenants: what a request's tenant may use, and what it used.

Behind KeyGate, which knows who asks, and LimitGate, which has read what is asked. A request that
makes the engine work is reserved in the book (book.py), and settled with what the engine did.
"""

import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import BadRequest, ModelNotFound, RequestError, Unavailable
from serve_app.gates.keys import OPEN_PATHS, Keys
from serve_app.gates.keys import tenant as tenant_name
from serve_app.gates.reading import Reading
from serve_app.gates.routes import OTHER, Route
from serve_app.gates.work import Work
from serve_app.observe import metrics, output
from serve_app.observe.meter import LANE_HEADER
from serve_app.settings import Settings
from serve_app.tenants import page
from serve_app.tenants.book import Book, Reservation
from serve_app.tenants.database import DatabaseError
from serve_app.tenants.journal import OPEN, REFUSED
from serve_app.tenants.ledger import Row
from serve_app.tenants.registry import Registry
from serve_app.tenants.tenant import Tenant

_MODELS_PATH = "/v1/models"
# vLLM reads a request's priority from this header before it looks at the body.
_PRIORITY_HEADER = b"x-vllm-priority"


class TenantGate:
    """ASGI middleware: holds a request to what its tenant may ask for and use.

    Args:
        model: what a request asks for that names none.
        dollars_per_gpu_s: what a second of a GPU costs.
    """

    def __init__(
        self,
        app: ASGIApp,
        registry: Registry,
        model: str,
        book: Book,
        dollars_per_gpu_s: float = 0.0,
    ) -> None:
        self.app = app
        self._registry = registry
        self._model = model
        self._book = book
        self._dollars_per_gpu_s = dollars_per_gpu_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        tenant = self._registry.tenant(tenant_name.get())
        state = scope.setdefault("state", {})
        state["share"] = tenant.share
        path = scope["path"].rstrip("/")
        route: Route = state.get("route", OTHER)
        try:
            if scope["method"] == "POST":
                self._check(tenant, state["reading"], scope["headers"])
                if route.generates:
                    await self._accounted(tenant, scope, receive, send)
                    return
            elif path.startswith(f"{_MODELS_PATH}/"):
                _check_model(tenant, path.removeprefix(f"{_MODELS_PATH}/"))
        except RequestError as error:
            await error(scope, receive, send)
            return
        if path in (page.PATH, page.USAGE_PATH):
            await self._page(tenant, scope, receive, send)
            return
        if path == _MODELS_PATH and tenant.models:
            send = _only(tenant, send)
        await self.app(scope, receive, send)

    async def _page(self, tenant: Tenant, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            used = await page.usage(tenant, self._book)
        except DatabaseError:
            error = Unavailable("What you have used is not known now.", retry_after_s=1.0)
            await error(scope, receive, send)
            return
        await page.send_page(scope["path"].rstrip("/"), used, send)

    async def _accounted(self, tenant: Tenant, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request whose work is counted.

        Raises:
            RequestError: a limit of the tenant is reached.
        """
        asked: Reading = scope["state"]["reading"]
        expected = asked.prompt_tokens_expected, asked.output_tokens_expected
        reservation = await self._book.reserve(tenant, sum(expected))
        opened = self._opened(tenant, scope, asked, reservation, expected)
        self._book.journal.begin(opened)
        done = scope["state"]["work"] = Work()
        answer = _Answer(send, reservation.headers, done)
        try:
            await self.app(scope, receive, answer.send)
        finally:
            ended_s = time.time()

            def settle(_: object = None) -> None:
                row = self._closed(opened, scope, done, answer, ended_s)
                self._book.settle(reservation, row)

            if done.reported is None:
                settle()
            else:
                self._book.release(reservation)
                done.reported.add_done_callback(settle)

    def _opened(
        self,
        tenant: Tenant,
        scope: Scope,
        asked: Reading,
        reservation: Reservation,
        expected: tuple[int, int],
    ) -> Row:
        """The row of a request that begins, with the charge that applies if its usage stays
        unknown.
        """
        request_id = next((v for name, v in scope["headers"] if name == b"x-request-id"), b"")
        now_s = time.time()
        return Row(
            id=secrets.token_hex(16),
            request_id=_plain(request_id.decode("latin-1")),
            tenant=tenant.name,
            model=self._model,
            adapter=_plain(asked.model) if asked.model and asked.model != self._model else "",
            lane="python",
            route=scope["state"]["route"].path,
            outcome=OPEN,
            status=0,
            prompt_tokens=expected[0],
            cached_tokens=0,
            output_tokens=expected[1],
            estimated=True,
            began_s=now_s,
            first_s=None,
            ended_s=now_s,
            gpu_s=0.0,
            dollars=0.0,
            windows=reservation.windows,
        )

    def _closed(
        self, opened: Row, scope: Scope, done: Work, answer: "_Answer", ended_s: float
    ) -> Row:
        """The row of a request that is over."""
        answer.tell(done)
        outcome = answer.outcome
        if outcome == "error" and not done.has_counts and answer.lane == "python":
            outcome = REFUSED  # It never reached the engine, or the engine would not have it.
        changes: dict[str, Any] = {
            "model": str(scope["state"].get("model", opened.model)),
            "lane": answer.lane,
            "outcome": outcome,
            "status": answer.status,
            "first_s": answer.first_s,
            "ended_s": ended_s,
            "gpu_s": done.gpu_s,
            "dollars": done.gpu_s * self._dollars_per_gpu_s,
        }
        if done.has_counts:
            changes |= {
                "prompt_tokens": done.prompt_tokens,
                "cached_tokens": done.cached_tokens,
                "output_tokens": done.output_tokens,
                "estimated": done.estimated,
            }
        if changes["model"] == opened.adapter:
            changes["adapter"] = ""
        row = msgspec.structs.replace(opened, **changes)
        if outcome != REFUSED:
            labels = row.model, metrics.tenant_label(row.tenant)
            metrics.series(metrics.tenant_cached_tokens, *labels).inc(row.cached_tokens)
            metrics.series(metrics.tenant_gpu_seconds, *labels).inc(row.gpu_s)
        return row

    def _check(
        self, tenant: Tenant, asked: Reading, headers: Iterable[tuple[bytes, bytes]]
    ) -> None:
        """Whether a request stays within what the tenant may ask for.

        Raises:
            BadRequest, ModelNotFound: it does not.
        """
        by_header = any(
            name == _PRIORITY_HEADER and value.strip() != b"0" for name, value in headers
        )
        if asked.priority or by_header:
            param = "priority" if asked.priority else _PRIORITY_HEADER.decode()
            raise BadRequest(
                f"The priority of a request is its tenant's: leave {param!r} out.", param=param
            )
        _check_model(tenant, asked.model or self._model)


class _Answer:
    """What becomes of one answer, with the headers of its tenant's limits."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], done: Work) -> None:
        self._send, self._headers, self._done = send, headers, done
        self.status = 0
        self.lane = "python"
        self.first_s: float | None = None
        self._over = self._failed = False
        self._usage = b""

    def tell(self, done: Work) -> None:
        """Add the token counts of the answer, for an engine in another process."""
        if not done.has_counts and (usage := output.usage(self._usage)) is not None:
            done.prompt_tokens, done.cached_tokens, done.output_tokens = usage
            done.has_counts = True

    @property
    def outcome(self) -> str:
        if self.status >= 400 or self._failed:
            return "error"
        return "ok" if self._over else "left"

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.lane = dict(message["headers"]).get(LANE_HEADER, b"python").decode()
            message = {**message, "headers": [*message["headers"], *self._headers]}
        elif message["type"] == "http.response.body":
            self._over = not message.get("more_body", False)
            self._failed = self._failed or message.get("code") is not None
            body = message.get("body", b"")
            if self.first_s is None and body:
                self.first_s = time.time()
            if not self._done.has_counts and b'"usage"' in body:
                self._usage = body
        if (timeline := message.get("timeline")) is not None:
            self.lane, self.status = "fast", timeline.status
            self._over, self._failed = not timeline.left, timeline.broken
            if timeline.first_s is not None:
                self.first_s = time.time() - (time.monotonic() - timeline.first_s)
        await self._send(message)


def _plain(text: str) -> str:
    """What a client wrote, as far as a row of the ledger holds it: no database takes all of it."""
    return text[:256].replace("\0", "\ufffd").encode(errors="replace").decode()


def gated(app: ASGIApp, keys: Keys, model: str, book: Book | None, settings: Settings) -> ASGIApp:
    """The application behind the gate of tenants, or as it is where there are none."""
    if book is None or not isinstance(keys, Registry):
        return app
    dollars_per_gpu_s = (settings.observe.price_per_gpu_hour or 0.0) / 3600
    return TenantGate(app, keys, model, book, dollars_per_gpu_s)


def book_of(settings: Settings) -> Book | None:
    """The book of this process; None: there are no tenants."""
    source = settings.tenants
    return Book(source.address, Path(source.journal_folder)) if source.configured else None


def _check_model(tenant: Tenant, model: str) -> None:
    if not tenant.may_use(model):
        raise ModelNotFound(
            f"There is no model {model!r} that you may use. There are: {', '.join(tenant.models)}.",
            param="model",
        )


def _only(tenant: Tenant, send: Send) -> Send:
    """Passes a list of models on without those that the tenant may not use."""
    start: Message = {}
    body = b""

    async def filtered(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start":
            start = message
            return
        body += message.get("body", b"")
        if message.get("more_body", False):
            return
        if start["status"] == 200:
            body = _listed(tenant, body)
        headers = [each for each in start["headers"] if each[0] != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({**start, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return filtered


def _listed(tenant: Tenant, body: bytes) -> bytes:
    listing: dict[str, Any] = msgspec.json.decode(body)
    listing["data"] = [card for card in listing["data"] if tenant.may_use(card["id"])]
    return msgspec.json.encode(listing)
