"""The gateway: one address for every model, and answers that outlive the replica that began them.

A Ray Serve deployment of its own that needs no GPU. A request goes through

    Meter       what the client sees of it          meter.py
    KeyGate     who is asking                       keys.py
    LimitGate   is it small enough to look at       limits.py
    Models      which model is meant                here
    Relay       to a replica, and on to another     relay.py

Nothing here outlives a request but estimates: any gateway replica can take any request.
"""

import asyncio
import logging
import random
import time
from typing import Any

import msgspec
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import ConfigError, NotFound, Unavailable
from serve_app.gates.keys import KeyGate, KeyRing, check_exposure
from serve_app.gates.limits import LimitGate
from serve_app.gateway import routing
from serve_app.gateway.fleet import Found, Replicas, listen
from serve_app.gateway.relay import Ask, Relay
from serve_app.observe.observation import Observation
from serve_app.progress import reported, say
from serve_app.settings import Settings

logger = logging.getLogger("serve_app")

# A gateway that replaces another one would keep requests waiting until it knows the replicas. At a
# first start there are none so soon, and nobody waits.
_LEARN_S = 5.0


class Gateway:
    """One replica of the gateway.

    Args:
        engines: by the name of the model, the deployment of its engines.
    """

    def __init__(self, settings: Settings, engines: dict[str, DeploymentHandle]) -> None:
        self._settings = settings
        self._engines = engines
        self._relays: dict[str, Relay] = {}
        self._began_s = time.monotonic()
        with reported("the gateway"):
            self._ring = KeyRing(settings.api_keys)
            check_exposure(self._ring, settings.allow_unauthenticated_network)
            self._observation = Observation(settings.observe, "gateway")

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve once the constructor is done; ready when this returns."""
        for name, handle in self._engines.items():
            self._relays[name] = self._relay(name, handle)
        await asyncio.gather(*(each.replicas.some(_LEARN_S) for each in self._relays.values()))
        say(f"gateway: {time.monotonic() - self._began_s:.1f} s")
        models = Models(self._relays, self._settings)
        self._limited = LimitGate(models, self._settings.limits)
        gated = KeyGate(self._limited, self._ring)
        return self._observation.gate(gated, next(iter(self._relays)), self._settings.replicas)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray Serve with the deployment's `user_config`: limits, while requests run."""
        try:
            self._limited.limits = self._settings.limits_with(user_config)
        except ConfigError as error:
            say(f"the gateway: {error}; its limits stay as they are")

    def _relay(self, name: str, handle: DeploymentHandle) -> Relay:
        replicas = Replicas()
        router = routing.make(self._settings.gateway.routing, random.Random())

        def told(found: Found) -> None:
            for gone in replicas.update(found):
                router.forget(gone)

        listen(handle.deployment_name, told)
        wake = Waker(handle)
        wake()  # A handle learns of its replicas once it is used.
        timeout_s = self._settings.limits.request_timeout_s
        return Relay(replicas, router, self._settings.gateway, timeout_s, name, wake)

    async def __del__(self) -> None:
        """Called by Ray Serve once the requests in flight are done."""
        for relay in getattr(self, "_relays", {}).values():
            await relay.close()
        if (observation := getattr(self, "_observation", None)) is not None:
            observation.close()


class Waker:
    """Makes Ray Serve start a replica where there is none: by a call that waits for one."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._call: asyncio.Future[None] | None = None

    def __call__(self) -> None:
        if self._call is None or self._call.done():
            self._call = asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        try:
            await self._handle.wake.remote()
        except Exception as error:
            # The next request that finds no replica calls again.
            logger.warning("no replica was woken: %s", error)


class Models:
    """ASGI application: passes each request to the relay of the model that it names."""

    def __init__(self, relays: dict[str, Relay], settings: Settings) -> None:
        self._relays = relays
        self._session_header = settings.gateway.session_header.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        path, relays = scope["path"], self._relays
        if path in ("/health", "/ping"):
            await self._health(scope, receive, send)
            return
        ask = Ask.of(scope, await _body(receive), self._session_header)
        if path == "/v1/models" and len(relays) > 1:
            await self._list(ask, send)
        elif len(relays) == 1:
            # The engine knows its other names: adapters.
            await next(iter(relays.values()))(ask, send)
        elif ask.model in relays:
            scope.setdefault("state", {})["model"] = ask.model
            await relays[ask.model](ask, send)
        else:
            names = ", ".join(relays)
            error = NotFound(f"There is no model {ask.model!r}. There are: {names}.", param="model")
            await error(scope, receive, send)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        without = [name for name, relay in self._relays.items() if not relay.replicas.ready()]
        if without:
            error = Unavailable(f"No replica of {', '.join(without)}.", retry_after_s=1.0)
            await error(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    async def _list(self, ask: Ask, send: Send) -> None:
        """What each model's engine lists, in one list."""
        models: list[Any] = []
        for relay in self._relays.values():
            bodies: list[bytes] = []

            async def keep(message: Message, bodies: list[bytes] = bodies) -> None:
                bodies.append(message.get("body", b""))

            await relay(ask.again(), keep)
            listed = msgspec.json.decode(b"".join(bodies))
            models += listed.get("data", [])
        body = msgspec.json.encode({"object": "list", "data": models})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


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
