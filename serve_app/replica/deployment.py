"""A replica: one engine, the gates in front of it, and the supervisor beside it.

`Replica` is what Ray Serve's own HTTP server asks (app.py). `GatewayReplica` is the same behind a
gateway (gateway.py), with a server of its own (backend.py).
"""

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from starlette.types import ASGIApp

from serve_app.caches import engine as caches
from serve_app.caches.cache import Cache
from serve_app.errors import ConfigError
from serve_app.gates.admission import Admission, AdmissionGate
from serve_app.gates.anthropic import WithoutThinking
from serve_app.gates.front import front
from serve_app.gates.keys import KeyGate, check_exposure, tenant
from serve_app.gates.limits import LimitGate
from serve_app.gates.prefix import WithoutPrefix, WithPrefix
from serve_app.gates.refusal import RefusalGate
from serve_app.lanes.door import Door, Locator
from serve_app.lanes.fastlane import FastLane
from serve_app.launch.haproxy_rules import SECRET_VARIABLE
from serve_app.observe import logs, metrics, tracing
from serve_app.observe.exposition import Exposition
from serve_app.observe.observation import Observation
from serve_app.pacing import Pacer
from serve_app.planning import kernels
from serve_app.planning.plan import Plan
from serve_app.progress import READY, reported, say, stage
from serve_app.replica import forkserver, weights
from serve_app.replica.backend import FAST_LANE, Backend, Server
from serve_app.replica.keeper import Keeper
from serve_app.replica.sharing import SharedGpu
from serve_app.replica.sleep import Gpu, Sleeper, State
from serve_app.replica.startup import Startup
from serve_app.replica.supervisor import Reaper, Supervisor
from serve_app.replica.worker import REFUSAL_VARIABLE
from serve_app.scaling import autoscaler
from serve_app.scaling.signals import Signals
from serve_app.scaling.starts import parts_of
from serve_app.settings import Limits, Settings
from serve_app.tenants.gate import book_of, gated
from serve_app.tenants.registry import keys_of

# That a restart may take beyond twice the time of the first start.
_LEAST_RESTART_S = 30.0


class ReplicaBase:
    """What both kinds of replicas share."""

    _continuing = False
    _fast_lane: FastLane | None = None
    _cache: Cache | None = None
    _sleeper: Sleeper | None = None
    _gpu: Gpu = Gpu()
    _weights: weights.KeptWeights | None = None
    _started_s: Mapping[str, float] = {}

    def _load(self, settings: Settings, plan: Plan) -> None:
        """Start the engine; blocks until its processes are ready."""
        self._settings, self._plan = settings, plan
        self._limited: list[LimitGate] = []
        self._admitted: list[AdmissionGate] = []
        self._model = plan.served_model_name
        self._startup = startup = Startup(dedicated=False)
        self._observation = Observation(settings.observe, "engine")
        self._observation.describe(self._model, plan.gpus)
        self._pacer = Pacer(settings.stream_gap_ms / 1000)
        goal = settings.replicas
        self._signals = Signals(goal.percentile, ttft_s=goal.ttft_s, itl_s=goal.itl_s)
        if settings.sleep.shared:
            self._gpu = SharedGpu(os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
        self._reaper = Reaper(self._gpu.descriptors)
        os.environ.update({**plan.environment, **tracing.ENVIRONMENT})
        if plan.cpu_threads is None:
            kernels.settle()
        forkserver.start()
        if refusal := os.environ.pop(REFUSAL_VARIABLE, None):
            say(f"this replica imports vLLM itself, its template could not be used: {refusal}")
        with reported("the replica"):
            with stage(f"fetching {plan.model}"), startup.phase("download"):
                arguments = plan.engine_arguments(settings)
            # Without a GPU nothing is compiled; an engine on several nodes compiles on each.
            if count := plan.placement.num_gpus:
                with startup.phase("caches"):
                    self._cache = caches.prepare(
                        arguments, count, settings.compiled, settings.keep_weights
                    )
            with stage("loading the engine"), logs.preserved():
                following = self._reaper.following()
                with following, startup.phase("imports"), forkserver.undisturbed():
                    # Imported here: `build` runs on a head node that may hold no engine.
                    from serve_app.replica.engine import Engine
                with startup.phase("turn"):
                    self._gpu.wait()  # A start needs the GPU's memory.
                began_s = time.monotonic()
                # Not guarded by the reaper: kept weights outlive this replica.
                with startup.phase("weights"):
                    self._weights = weights.of(settings, arguments, count)
                    load = self._load_arguments()
                with self._reaper.following():
                    self._engine = Engine.start(
                        arguments,
                        self._pacer,
                        self._signals,
                        startup=startup,
                        continuing=self._continuing,
                        fast_host=self._fast_host(),
                        load=load,
                    )
                self._loaded_s = time.monotonic() - began_s

    def _load_arguments(self) -> dict[str, Any]:
        """How the engine that starts next loads its weights, if not as its arguments say."""
        return {} if self._weights is None else self._weights.load_arguments()

    def _secret(self) -> str | None:
        """The secret of the fast lane's door; None if nothing can ask there."""
        raise NotImplementedError

    def _fast_host(self) -> str | None:
        """The address for a Rust front end; None: this replica has none."""
        settings = self._settings
        if settings.lane == "python" or (secret := self._secret()) is None:
            return None
        if not settings.replicas.fixed and not settings.replicas.follow_slo:
            say("no fast lane: Ray Serve's own autoscaling policy would not see its requests")
            return None
        self._fast_lane = FastLane(self._model, secret, self._signals)
        return str(ray.util.get_node_ip_address())

    async def _open_door(self, within: Callable[[ASGIApp], ASGIApp]) -> Door | None:
        """Let requests into the fast lane; None: this replica has none.

        Args:
            within: puts what is in front of the gates around them.
        """
        lane = self._fast_lane
        if lane is None or self._engine.fast is None:
            return None
        gates = self._gates(
            lane.grant(self._engine, lambda: self._settings.limits.request_timeout_s),
            cancellable=True,
        )
        host = str(ray.util.get_node_ip_address())
        return await lane.open(
            within(gates), host, lambda: gates.limits, lambda: self._keeper.failure
        )

    async def _stack(self) -> ASGIApp:
        """The engine's application behind its limits, once an answer was generated."""
        with reported("the replica"), stage("warming up"):
            with self._startup.phase("front ends"):
                answer = await self._answer()
            with self._startup.phase("warm-up"):
                self._settings.replicas.check(*await self._engine.warm_up())
        limits = self._settings.limits
        self._engine.bounds.change(limits)
        self._admission = Admission(
            self._max_sequences(limits),
            limits.max_queued_requests,
            limits.retry_after_s,
            self._plan.gpus,
            self._settings.tenants.max_unread_tokens,
        )
        self._signals.first_tokens = self._admission.read
        self._supervisor = Supervisor(
            self._engine,
            self._settings.hang_timeout_s,
            lambda: self._admission.running,
            # Without a gateway clients would be sent here meanwhile, to be refused.
            restart=self._restart if self._continuing else None,
            restart_within_s=_LEAST_RESTART_S + 2 * self._loaded_s,
        )
        engine = self._engine
        self._keeper = Keeper(
            lambda: None if engine.dead else engine.fast,
            self._settings.hang_timeout_s,
            restart=self._restart_frontend,
        )
        self._watches = [asyncio.create_task(self._supervisor.watch())]
        if engine.fast is not None:
            self._watches.append(asyncio.create_task(self._keeper.watch()))
        self._full_gates = self._gates(answer)
        if (sleep := self._settings.sleep).enabled:
            after_s = math.inf if sleep.after_s is None else sleep.after_s
            self._sleeper = Sleeper(engine, self._wake, self._admission, after_s, self._gpu)
            self._sleeper.start()
        self._tell()
        self._seal()
        took_s = self._observation.started(self._model, "start", self._startup.segments())
        self._started_s = parts_of(took_s)
        say(f"{READY}: {sum(took_s.values()):.1f} s after the replica began")
        return self._full_gates

    def _seal(self) -> None:
        """Let later starts rely on what this engine compiled and tuned."""
        if self._cache is not None:
            self._sealing = asyncio.create_task(asyncio.to_thread(self._cache.seal))

    def _gates(self, answer: ASGIApp, cancellable: bool = False) -> LimitGate:
        """What is in front of an answer, in either lane. Both share one queue.

        Args:
            cancellable: as in `AdmissionGate`.
        """
        limits = self._settings.limits
        admitted = AdmissionGate(
            answer,
            self._admission,
            limits,
            healthy=lambda: self._supervisor.healthy,
            signals=self._signals,
            waited=self._waited,
            cancellable=cancellable,
        )
        self._admitted.append(admitted)
        settings = self._settings
        by_tenant = settings.api_keys.configured or settings.tenants.configured
        limited = LimitGate(self._of_tenants(Exposition(admitted, by_tenant)), limits)
        self._limited.append(limited)
        return limited

    def _waited(self, wait_s: float) -> None:
        """Record how long a request waited before it was admitted."""
        metrics.series(metrics.waits, self._model).observe(wait_s)
        if self._settings.tenants.configured:
            labels = self._model, metrics.tenant_label(tenant.get())
            metrics.series(metrics.tenant_queue_seconds, *labels).inc(wait_s)
            metrics.series(metrics.tenant_queue_requests, *labels).inc()

    def _of_tenants(self, app: ASGIApp) -> ASGIApp:
        """The application behind the gate of tenants, where clients reach this replica."""
        return app

    async def _answer(self) -> ASGIApp:
        """vLLM's application, with clearer errors around it."""
        answer: ASGIApp = RefusalGate(WithPrefix(await self._engine.app()))
        return answer if self._thinks else WithoutThinking(answer)

    @property
    def _thinks(self) -> bool:
        """Whether answers have a part that is reasoning."""
        return bool(self._settings.engine.keys() & {"reasoning_parser", "reasoning_config"})

    async def _wake(self) -> None:
        """Wake the engine, and report how long that took."""
        startup = Startup(dedicated=False)
        await self._engine.wake(startup)
        self._observation.started(self._model, "wake", startup.segments())

    async def _restart(self) -> None:
        """Another engine, and its application in the place of the old one's."""
        if self._sleeper is None:
            await self._start_anew()
            return
        async with self._sleeper.replacing():
            await self._start_anew()

    async def _start_anew(self) -> None:
        startup = Startup(dedicated=False)
        await self._engine.ended()
        with startup.phase("weights"):
            load = await asyncio.to_thread(self._load_arguments)
        with self._reaper.following():
            await self._engine.restart(startup, load)
        with startup.phase("front ends"):
            answer = await self._answer()
        with startup.phase("warm-up"):
            await self._engine.warm_up()
        self._admitted[0].app = answer
        self._seal()
        took_s = self._observation.started(self._model, "restart", startup.segments())
        say(f"the engine was started anew: {sum(took_s.values()):.1f} s")
        metrics.engine_restarts.labels(self._model).inc()

    async def _restart_frontend(self) -> None:
        """Another vllm-rs; the engine and its other requests are not touched."""
        with self._reaper.following():
            await self._engine.restart_frontend()
        metrics.frontend_restarts.labels(self._model).inc()

    def _tell(self) -> None:
        """What metrics ask for when they are exported."""
        queue, supervisor = self._admission, self._supervisor
        metrics.queued.labels(self._model).set_function(lambda: queue.queued)
        metrics.queue_room.labels(self._model).set_function(lambda: queue.max_queued)
        metrics.running.labels(self._model).set_function(lambda: queue.running)
        metrics.room.labels(self._model).set_function(lambda: queue.max_running)
        metrics.healthy.labels(self._model).set_function(lambda: supervisor.healthy)
        metrics.restarting.labels(self._model).set_function(lambda: supervisor.restarting)
        metrics.engine_restarts.labels(self._model)
        sleeper = self._sleeper
        metrics.asleep.labels(self._model).set_function(
            lambda: sleeper is not None and sleeper.state is not State.AWAKE
        )
        engine, keeper = self._engine, self._keeper
        metrics.fast_lane.labels(self._model).set_function(
            lambda: engine.fast is not None and keeper.failure is None
        )
        metrics.frontend_restarts.labels(self._model)

    def _gate(self, app: ASGIApp, counted: bool) -> ASGIApp:
        return self._observation.gate(app, self._model, self._settings.replicas, counted)

    def _max_sequences(self, limits: Limits) -> int:
        return limits.max_running_requests or self._engine.max_running_requests

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Ray Serve with a deployment's `user_config`: limits, while requests run.

        The engine is not touched. What is not valid is said and changes nothing: an exception here
        would make Serve replace the replica.
        """
        try:
            limits = self._settings.limits_with(user_config)
        except ConfigError as error:
            say(f"the replica: {error}; its limits stay as they are")
            return
        for limited in self._limited:
            limited.limits = limits
        for admitted in self._admitted:
            admitted.limits = limits
        self._engine.bounds.change(limits)
        self._admission.change(
            self._max_sequences(limits), limits.max_queued_requests, limits.retry_after_s
        )

    async def check_health(self) -> None:
        """Called by Ray Serve every `health_check_period_s`."""
        if not (self._supervisor.healthy or self._supervisor.restarting):
            raise RuntimeError(self._supervisor.failure or "the engine died")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve once a second, where replicas follow the load."""
        queue, fast = self._admission, self._fast_lane
        unread_tokens = self._engine.unread_tokens + (fast.unread_tokens if fast else 0)
        load = self._signals.load(
            max_running=queue.max_running,
            in_engine=queue.running,
            queued=queue.queued,
            queued_bytes=queue.queued_bytes,
            unread_tokens=unread_tokens,
        )
        return autoscaler.report(load, self._started_s)

    async def _leave_fast_lane(self) -> None:
        """Admit no further request to the fast lane, and return when those admitted have ended."""
        if self._fast_lane is not None:
            await self._fast_lane.drain(self._plan.shutdown_s(self._settings))

    def _end(self) -> None:
        """Leave no process behind."""
        for watch in getattr(self, "_watches", []):
            watch.cancel()
        if self._sleeper is not None:
            self._sleeper.stop()
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.stop()
        if self._weights is not None:
            self._weights.close()
        if self._cache is not None:
            self._cache.seal()  # With what was compiled for requests.
        if (reaper := getattr(self, "_reaper", None)) is not None:
            reaper.dismiss()
        if self._fast_lane is not None:
            self._fast_lane.close()
        if (observation := getattr(self, "_observation", None)) is not None:
            observation.close()


class Replica(ReplicaBase):
    """A replica that clients reach through HAProxy, or Serve's proxy."""

    def __init__(self, settings: Settings, plan: Plan) -> None:
        with reported("the replica"):
            self._keys = keys_of(settings)
            self._book = book_of(settings)
            check_exposure(self._keys, settings.allow_unauthenticated_network)
        self._load(settings, plan)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve once the constructor is done; ready when this returns."""
        gated = KeyGate(await self._stack(), self._keys)
        app: ASGIApp = self._gate(front(gated, self._settings.engine), counted=True)
        app = WithoutPrefix(app)
        door = await self._open_door(
            lambda gates: self._gate(KeyGate(gates, self._keys), counted=True)
        )
        return app if door is None else Locator(app, door)

    def _of_tenants(self, app: ASGIApp) -> ASGIApp:
        return gated(app, self._keys, self._model, self._book, self._settings)

    def _secret(self) -> str | None:
        secret = os.environ.get(SECRET_VARIABLE)
        if not secret:
            say(
                f"no fast lane: {SECRET_VARIABLE} is not set in the environment of Ray, or HAProxy "
                "is off; Python answers every request"
            )
        return secret or None

    async def __del__(self) -> None:
        """Called by Ray Serve once the requests in flight are done.

        Serve does not know of the requests of the fast lane that are still here.
        """
        await self._leave_fast_lane()
        if (book := getattr(self, "_book", None)) is not None:
            await book.close()
        self._end()


class GatewayReplica(ReplicaBase):
    """A replica that only gateways reach."""

    _continuing = True

    async def __init__(self, settings: Settings, plan: Plan) -> None:  # type: ignore[misc]
        self._shutdown_s = plan.shutdown_s(settings)
        self._server = Server(ray.util.get_node_ip_address())
        self._load(settings, plan)
        # The gateway counts.
        app = self._gate(await self._stack(), counted=False)
        supervisor, server = self._supervisor, self._server
        self._door = await self._open_door(
            lambda gates: Backend(
                self._gate(gates, counted=False),
                server.token,
                lambda: supervisor.healthy,
                accounts=server.accounts,
            )
        )
        self._server.start(app, lambda: supervisor.healthy, lambda: supervisor.stalled_s)

    def _secret(self) -> str | None:
        if self._thinks:
            say("no fast lane: the gateway does not continue reasoning of vllm-rs")
            return None
        return self._server.token

    def record_replica_metadata(self) -> dict[str, Any]:
        """Called once by Ray Serve, which passes the result to the gateways."""
        metadata: dict[str, Any] = {"address": self._server.address, "token": self._server.token}
        if self._door is not None:
            metadata[FAST_LANE] = {
                "door": self._door.address,
                "models": [self._model],
                "max_model_len": self._engine.max_model_len,
                "vocabulary": self._engine.vocabulary,
            }
        return metadata

    async def wake(self) -> None:
        """Nothing. That a call waits makes Ray Serve start a replica where there is none."""

    async def __del__(self) -> None:
        """Called by Ray Serve when no gateway sends requests here any more.

        Serve does not know of the requests that are still here.
        """
        if (server := getattr(self, "_server", None)) is not None:
            await asyncio.gather(server.drain(self._shutdown_s), self._leave_fast_lane())
        self._end()
