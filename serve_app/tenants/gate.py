"""The gate of tenants: what the one who asks may use.

Behind KeyGate, which knows who asks, and LimitGate, which has read what is asked.
"""

from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import BadRequest, ModelNotFound, RequestError
from serve_app.gates.keys import OPEN_PATHS, Keys
from serve_app.gates.keys import tenant as tenant_name
from serve_app.gates.reading import Reading
from serve_app.tenants.registry import Registry
from serve_app.tenants.tenant import Tenant

_MODELS_PATH = "/v1/models"


class TenantGate:
    """ASGI middleware: holds a request to what its tenant may ask for.

    Args:
        model: what a request asks for that names none.
    """

    def __init__(self, app: ASGIApp, registry: Registry, model: str) -> None:
        self.app = app
        self._registry = registry
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        tenant = self._registry.tenant(tenant_name.get())
        scope.setdefault("state", {})["share"] = tenant.share
        path = scope["path"].rstrip("/")
        try:
            if scope["method"] == "POST":
                asked: Reading = scope["state"]["reading"]
                self._check(tenant, asked)
            elif path.startswith(f"{_MODELS_PATH}/"):
                _check_model(tenant, path.removeprefix(f"{_MODELS_PATH}/"))
        except RequestError as error:
            await error(scope, receive, send)
            return
        if path == _MODELS_PATH and tenant.models:
            send = _only(tenant, send)
        await self.app(scope, receive, send)

    def _check(self, tenant: Tenant, asked: Reading) -> None:
        """Whether a request stays within what the tenant may ask for.

        Raises:
            BadRequest, ModelNotFound: it does not.
        """
        if asked.priority:
            raise BadRequest(
                "The priority of a request is its tenant's: leave 'priority' out.", param="priority"
            )
        _check_model(tenant, asked.model or self._model)


def gated(app: ASGIApp, keys: Keys, model: str) -> ASGIApp:
    """The application behind the gate of tenants, or as it is where there are none."""
    return TenantGate(app, keys, model) if isinstance(keys, Registry) else app


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
