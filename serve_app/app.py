"""The Ray Serve application: `build` decides, `Replica` serves.

A request reaches a replica's own HTTP server, from HAProxy (or, in classic mode, through Serve's
proxy), and goes through one stack, outermost first:

    KeyGate         who is asking                     keys.py
    LimitGate       is it small enough to look at     limits.py
    AdmissionGate   is there room, and for how long   admission.py
    vLLM's app      the answer                        engine.py
"""

import asyncio
import os
import time
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from serve_app import autoscaler, forkserver
from serve_app.admission import Admission, AdmissionGate
from serve_app.errors import ConfigError
from serve_app.keys import KeyGate, KeyRing
from serve_app.limits import LimitGate
from serve_app.pacing import Pacer
from serve_app.plan import Plan, decide
from serve_app.progress import READY, reported, say, stage
from serve_app.settings import Settings
from serve_app.signals import Signals
from serve_app.supervisor import Reaper, Supervisor


def build(args: dict[str, Any]) -> Application:
    """The application that serve_config.yaml describes; Ray Serve calls this with its `args`."""
    with reported("the configuration"):
        settings = Settings.parse(args)
        plan = decide(settings)
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        say(
            "warning: classic mode: every token passes through Ray Serve's Python proxy, which "
            "keeps about half of the engine's throughput; start with `make serve`, or set "
            "RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_THROUGHPUT_OPTIMIZED=1 before Ray starts"
        )
    # mypy does not follow what a class decorator returns.
    options = plan.deployment_options(settings)
    return Replica.options(**options).bind(settings, plan)  # type: ignore[attr-defined]


@serve.deployment(name="engine")
@serve.ingress()
class Replica:
    """One engine, the gates in front of it, and the supervisor beside it."""

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self._settings = settings
        self._began_s = time.monotonic()
        self._pacer = Pacer(settings.stream_gap_ms / 1000)
        self._signals = Signals(settings.replicas.percentile)
        self._reaper = Reaper()
        os.environ.update(plan.environment)
        forkserver.start()
        with reported("the replica"):
            self._ring = KeyRing(settings.api_keys)
            self._check_exposure()
            with stage(f"fetching {plan.model}"):
                arguments = plan.engine_arguments(settings)
            with stage("loading the engine"), self._reaper.following():
                # Imported here: `build` runs on a head node that may hold no engine.
                from serve_app.engine import Engine

                self._engine = Engine.start(arguments, self._pacer, self._signals)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve once the constructor is done; ready when this returns."""
        with reported("the replica"), stage("warming up"):
            answer = await self._engine.app()
            await self._engine.warm_up()
        limits = self._settings.limits
        self._admission = Admission(
            limits.max_running_requests or self._engine.max_running_requests,
            limits.max_queued_requests,
            limits.retry_after_s,
        )
        self._supervisor = Supervisor(
            self._engine, self._settings.hang_timeout_s, lambda: self._admission.running
        )
        self._watch = asyncio.create_task(self._supervisor.watch())
        admitted = AdmissionGate(
            answer,
            self._admission,
            limits,
            healthy=lambda: self._supervisor.healthy,
            signals=self._signals,
        )
        say(f"{READY}: {time.monotonic() - self._began_s:.1f} s after the replica began")
        return KeyGate(LimitGate(admitted, limits), self._ring)

    async def check_health(self) -> None:
        """Called by Ray Serve every `health_check_period_s`."""
        if not self._supervisor.healthy:
            raise RuntimeError(self._supervisor.failure or "the engine died")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve once a second, where replicas follow the load."""
        queue = self._admission
        load = self._signals.load(
            max_running=queue.max_running,
            in_engine=queue.running,
            queued=queue.queued,
            queued_bytes=queue.queued_bytes,
            unread_tokens=self._engine.unread_tokens,
        )
        return autoscaler.report(load)

    def __del__(self) -> None:
        """Called by Ray Serve once the requests in flight are done."""
        if (watch := getattr(self, "_watch", None)) is not None:
            watch.cancel()
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.stop()
        if (reaper := getattr(self, "_reaper", None)) is not None:
            reaper.dismiss()

    def _check_exposure(self) -> None:
        """Without keys, only this machine may ask, unless the settings say otherwise."""
        if self._ring.required and not len(self._ring):
            say("warning: api_keys is configured and holds no key: every request is refused")
        if self._ring.required or self._settings.allow_unauthenticated_network:
            return
        host = http_host()
        if host not in ("127.0.0.1", "localhost", "::1"):
            raise ConfigError(
                "http_options.host",
                host,
                "listens beyond this machine and no api_keys are configured; set api_keys, or "
                "host 127.0.0.1, or allow_unauthenticated_network: true",
            )


def http_host() -> str:
    """The address that Ray Serve's HTTP server listens on."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    return str(ray.get(controller.get_http_config.remote()).host)
