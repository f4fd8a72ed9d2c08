"""The gateway: one address for every model, and answers that survive a failed replica.

A separate Ray Serve deployment that needs no GPU. A request passes

    Meter       measures what the client sees       meter.py
    front       CORS, normalised requests           front.py
    KeyGate     checks the API key                  keys.py
    LimitGate   bounds a single request             limits.py
    Models      finds the model of the request      models.py
    Relay       forwards it, and continues it       relay.py

The gateway keeps only estimates from request to request, so any gateway replica can take any
request.
"""

import asyncio
import logging
import random
import time
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_app.errors import ConfigError
from serve_app.gates.front import front
from serve_app.gates.keys import KeyGate, check_exposure
from serve_app.gates.limits import LimitGate
from serve_app.gates.prefix import WithoutPrefix
from serve_app.gateway import routing
from serve_app.gateway.fleet import Fleet, RunningReplicas, listen
from serve_app.gateway.models import Models, adapters_of
from serve_app.gateway.relay import Relay
from serve_app.observe.observation import Observation
from serve_app.pacing import Pacer, watch
from serve_app.progress import reported, say
from serve_app.settings import Settings
from serve_app.tenants.gate import book_of, gated
from serve_app.tenants.registry import keys_of

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
            self._keys = keys_of(settings)
            self._book = book_of(settings)
            check_exposure(self._keys, settings.allow_unauthenticated_network)
            self._observation = Observation(settings.observe, "gateway")

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve once the constructor is done; ready when this returns."""
        adapters: dict[str, str] = {}
        self._pacer = Pacer(self._settings.stream_gap_ms / 1000)
        self._watch = asyncio.create_task(watch(self._pacer))
        # `build` made an engine of each model, in this order.
        described = zip(self._engines.items(), self._settings.of_each_model(), strict=True)
        for (name, handle), each in described:
            self._relays[name] = self._relay(name, handle, may_sleep=each.replicas.min == 0)
            adapters |= dict.fromkeys(adapters_of(each.engine), name)
        await asyncio.gather(
            *(relay.replicas.wait_until_ready(_LEARN_S) for relay in self._relays.values())
        )
        say(f"gateway: {time.monotonic() - self._began_s:.1f} s")
        main = next(iter(self._relays))
        models = Models(self._relays, self._settings, adapters)
        self._limited = LimitGate(
            gated(models, self._keys, main, self._book, self._settings), self._settings.limits
        )
        app = front(KeyGate(self._limited, self._keys), self._settings.engine)
        return WithoutPrefix(self._observation.gate(app, main, self._settings.replicas))

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray Serve with the deployment's `user_config`: limits, while requests run."""
        try:
            limits = self._settings.limits_with(user_config)
        except ConfigError as error:
            say(f"the gateway: {error}; its limits stay as they are")
            return
        self._limited.limits = limits
        for relay in self._relays.values():
            relay.limits = limits

    def _relay(self, name: str, handle: DeploymentHandle, may_sleep: bool) -> Relay:
        replicas = Fleet()
        router = routing.make(self._settings.gateway.routing, random.Random())

        def replace(discovered: RunningReplicas) -> None:
            for gone in replicas.update(discovered):
                router.forget(gone)

        listen(handle.deployment_name, replace)
        wake = Waker(handle)
        wake()  # A handle learns of its replicas once it is used.
        gateway, limits = self._settings.gateway, self._settings.limits
        return Relay(replicas, router, gateway, limits, name, wake, may_sleep, self._pacer)

    async def __del__(self) -> None:
        """Called by Ray Serve once the requests in flight are done."""
        if (watching := getattr(self, "_watch", None)) is not None:
            watching.cancel()
        for relay in getattr(self, "_relays", {}).values():
            await relay.close()
        if (book := getattr(self, "_book", None)) is not None:
            await book.close()
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
            logger.warning("no replica could be started from zero: %s", error)
