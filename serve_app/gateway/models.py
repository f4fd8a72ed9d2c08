"""The model of a request, and the list of models.

A request goes to the model that its body names: by the model's name, or by the name of one of its
LoRA adapters. A request without a model goes to the first model. A model that is scaled to zero is
listed and counts as healthy, because it takes requests; only a request to it starts a replica.
"""

import asyncio
import time
from collections.abc import Coroutine, Mapping
from typing import Any
from urllib.parse import unquote

import msgspec
from starlette.types import Message, Receive, Scope, Send

from serve_app.errors import NotFound, Unavailable
from serve_app.gateway.relay import Relay
from serve_app.gateway.request import Request
from serve_app.settings import Settings

_LIST_PATH = "/v1/models"
# A model whose replica does not list it within this is listed as it was last.
_LIST_S = 2.0


class Models:
    """ASGI application: passes each request to the relay of the model that it names.

    Args:
        relays: by the name of the model, the main one first.
        adapters: by the name of a LoRA adapter, the name of its model.
    """

    def __init__(
        self,
        relays: Mapping[str, Relay],
        settings: Settings,
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        self._relays = relays
        self._models = {name: name for name in relays} | dict(adapters or {})
        self._session_header = settings.gateway.session_header.lower()
        began_s = int(time.time())
        # What each engine listed last; before that, what can be said without it.
        self._listed = {
            model: [_card(name, began_s) for name, of in self._models.items() if of == model]
            for model in relays
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"].rstrip("/")
        if path in ("/health", "/ping"):
            await self._health(scope, receive, send)
            return
        main = next(iter(self._relays))
        request = Request.of(scope, await _body(receive), self._session_header, main)
        if scope["method"] == "GET" and path == _LIST_PATH:
            await _reply(send, {"object": "list", "data": await self._cards(request)})
        elif scope["method"] == "GET" and path.startswith(f"{_LIST_PATH}/"):
            await self._model_card(scope, receive, send, request)
        else:
            await self._forward(scope, receive, send, request)

    async def _forward(self, scope: Scope, receive: Receive, send: Send, request: Request) -> None:
        model = self._model_of(request)
        if model is None:
            names = ", ".join(self._relays)
            error = NotFound(
                f"There is no model {request.model!r}. There are: {names}.", param="model"
            )
            await error(scope, receive, send)
            return
        if len(self._relays) > 1:
            scope.setdefault("state", {})["model"] = model
        await _until_disconnect(self._relays[model](request, send), receive)

    def _model_of(self, request: Request) -> str | None:
        """The name of the model that serves a request; None: there is none of that name."""
        if not request.model:
            return next(iter(self._relays))
        if len(self._relays) == 1:
            # Its engine may know other names, and says best what it does not know.
            return next(iter(self._relays))
        return self._models.get(request.model)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 if a request can be taken for any model."""
        if any(relay.takes_requests for relay in self._relays.values()):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        error = Unavailable(f"No replica of {', '.join(self._relays)}.", retry_after_s=1.0)
        await error(scope, receive, send)

    async def _model_card(
        self, scope: Scope, receive: Receive, send: Send, request: Request
    ) -> None:
        name = unquote(scope["path"].rstrip("/")[len(_LIST_PATH) + 1 :])
        cards = await self._cards(request)
        if (card := next((card for card in cards if card["id"] == name), None)) is not None:
            await _reply(send, card)
            return
        await NotFound(f"There is no model {name!r}.", param="model")(scope, receive, send)

    async def _cards(self, request: Request) -> list[dict[str, Any]]:
        """The list for `/v1/models`. It starts no model."""
        await asyncio.gather(
            *(self._relist(model, request) for model in self._relays if self._up(model))
        )
        return [card for cards in self._listed.values() for card in cards]

    def _up(self, model: str) -> bool:
        return bool(self._relays[model].replicas.ready())

    async def _relist(self, model: str, request: Request) -> None:
        """Keep what the engine of a model lists now, with its adapters."""
        status, body = 0, b""

        async def collect(message: Message) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")

        try:
            async with asyncio.timeout(_LIST_S):
                await self._relays[model](request.listing(_LIST_PATH), collect)
        except TimeoutError:
            return
        if status == 200:
            self._listed[model] = msgspec.json.decode(body)["data"]


def adapters_of(engine: Mapping[str, Any]) -> list[str]:
    """The names of the LoRA adapters that a model's engine arguments load.

    As vLLM reads `lora_modules`: 'name=path', or an object, or a list of these, or JSON of either.
    """
    given = engine.get("lora_modules") or []
    names = []
    for each in given if isinstance(given, list) else [given]:
        module = each
        if isinstance(each, str):
            if not each.lstrip().startswith(("{", "[")):
                names.append(each.partition("=")[0])
                continue
            module = msgspec.json.decode(each)
        for module_of in module if isinstance(module, list) else [module]:
            names.append(str(module_of["name"]))
    return names


def _card(name: str, created: int) -> dict[str, Any]:
    """A model as OpenAI's API describes it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "vllm"}


async def _reply(send: Send, content: object) -> None:
    body = msgspec.json.encode(content)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _until_disconnect(answer: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `answer` to its end, or until the client leaves.

    Ray Serve cancels a request whose client left, but not where the client's proxy turned that off
    (`x-request-disconnect-disabled`); then only the request's channel says it.
    """

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":  # noqa: ASYNC110
            await asyncio.sleep(0)  # A channel that never waits must not stop the loop.

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()
    finally:
        leaving.cancel()
        answering.cancel()
        await asyncio.wait({answering, leaving})


async def _live(receive: Receive, send: Send) -> None:
    """ASGI's lifespan: there is nothing to start or to stop here."""
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})


async def _body(receive: Receive) -> bytes:
    """The whole body; LimitGate has bounded it."""
    chunks, more = [], True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(chunks)
