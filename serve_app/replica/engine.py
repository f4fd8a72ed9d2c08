"""The engine of one replica: vLLM's AsyncLLM and vLLM's own ASGI application.

Only this package imports vllm, because what it touches moves between releases. Everything else sees
`Engine`: start it, serve `app()`, `warm_up()` once, `probe()` now and then, `restart()` it if it
has died, `stop()` it.
"""

import argparse
import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from types import SimpleNamespace
from typing import Any

import fastapi
import psutil
import starlette.exceptions
import vllm.model_executor.models.registry as registry
import vllm.v1.engine.async_llm as async_llm
import vllm.v1.engine.utils as engine_processes
from starlette.responses import JSONResponse
from starlette.types import ASGIApp
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.plugins import load_general_plugins
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.loggers import StatLoggerBase

from serve_app.errors import ConfigError
from serve_app.gates import routes
from serve_app.pacing import Pacer
from serve_app.progress import say
from serve_app.replica import forkserver, frontends, unreadable
from serve_app.replica.arguments import first_sentence, loading, parse
from serve_app.replica.bounds import Bounds
from serve_app.replica.iterations import FastIteration, iteration_of
from serve_app.replica.llm import ContinuingLLM, CountingLLM
from serve_app.replica.reports import GONE, LATE, Report
from serve_app.replica.startup import Startup
from serve_app.scaling.signals import Signals

# How often an engine that moves its memory is looked at.
_MOVE_CHECK_S = 1.0

# A Python front end, and the Rust one where there is one.
_Launched = tuple[async_llm.AsyncLLM, frontends.RustFrontend | None]


def _inspected(inspect: Callable[[], Any]) -> Any:
    """Run vLLM's inspection of a model's class in a fork. Returns what it found out."""

    def with_plugins() -> Any:
        load_general_plugins()  # As in the process that vLLM starts for it.
        return inspect()

    return forkserver.call(with_plugins)


class Engine:
    """A running engine, with the application that serves it.

    Attributes:
        max_running_requests: sequences that the engine batches at once.
        bounds: of prompts and answers; may change while requests run.
        max_model_len: prompt and output tokens of one request, together.
        last_sign_s: when the engine was last heard of, on the monotonic clock.
        fast: its Rust front end; None: it has the Python one only.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        launch: Callable[[Startup, Mapping[str, Any]], _Launched],
        pacer: Pacer,
        startup: Startup,
        load: Mapping[str, Any],
    ) -> None:
        self._args, self._launch, self._pacer = args, launch, pacer
        self.bounds = Bounds()
        self._take(*self._launched(startup, load))
        self.max_running_requests: int = self._llm.vllm_config.scheduler_config.max_num_seqs
        self.max_model_len: int = self._llm.model_config.max_model_len

    @classmethod
    def start(
        cls,
        arguments: Mapping[str, Any],
        pacer: Pacer,
        signals: Signals,
        continuing: bool = False,
        fast_host: str | None = None,
        startup: Startup | None = None,
        load: Mapping[str, Any] | None = None,
    ) -> "Engine":
        """Load the model; blocks until the engine's processes are ready.

        Args:
            arguments: vLLM's engine and API server arguments, by their Python names.
            pacer: decides when tokens of a stream travel together.
            signals: is told what each step did.
            continuing: whether it is behind a gateway, which goes on with what broke off.
            fast_host: the address on which a Rust front end listens; None: there is to be none.
            startup: is told what the start is doing.
            load: arguments about loading, in place of those in `arguments`.

        Raises:
            ConfigError: for an argument that vLLM does not know or cannot honour.
        """
        startup = startup or Startup(dedicated=False)
        # In a Ray worker vLLM spawns its engine process, and offers no other way.
        engine_processes.get_mp_context = forkserver.Context
        # vLLM inspects a model's class in a Python of its own, which imports everything again.
        registry._run_in_subprocess = _inspected
        with startup.configuration():
            args = parse(arguments)
        if pacer.max_gap_s > 0:
            # AsyncLLM builds its collectors by this name, and offers no other way in.
            async_llm.RequestOutputCollector = _collector(pacer)
        kind = ContinuingLLM if continuing else CountingLLM
        if fast_host is not None and (
            why := frontends.obstacle(args, parse({"model": args.model}))
        ):
            say(f"no fast lane: {why}; Python answers every request")
            fast_host = None

        def launch(startup: Startup, load: Mapping[str, Any]) -> _Launched:
            # The usage context sets vLLM's default batch limits: this one is `vllm serve`'s.
            context = UsageContext.OPENAI_API_SERVER
            try:
                if fast_host is not None:
                    recorders = [_recorder(signals, None)]
                    return frontends.launch(kind, args, fast_host, recorders, startup, load)
                with startup.configuration():
                    engine_args = AsyncEngineArgs.from_cli_args(loading(args, load))
                    config = engine_args.create_engine_config(context)
            except (ValueError, OSError) as error:
                raise ConfigError("engine", args.model, first_sentence(error)) from error
            llm = kind.from_vllm_config(
                config,
                usage_context=context,
                stat_loggers=[_recorder(signals, signals.state)],
                disable_log_stats=args.disable_log_stats,
            )
            return llm, None

        return cls(args, launch, pacer, startup, load or {})

    async def ended(self) -> None:
        """Return once its processes have ended, after `kill()`: the memory that they had of a GPU
        is free.
        """
        await asyncio.to_thread(psutil.wait_procs, self._processes, 30)

    async def restart(self, startup: Startup, load: Mapping[str, Any] | None = None) -> None:
        """Restart the engine after `kill()`. `app()` then returns the application that serves it.

        Only its own processes are new: this one has imported everything already. The event loop
        turns meanwhile.

        Args:
            load: as in `start`.
        """
        await self.ended()
        self._llm.shutdown(timeout=0)
        if self.fast is not None:
            self.fast.stop()

        def start() -> _Launched:
            forkserver.start()  # Should it have died as well.
            return self._launched(startup, load or {})

        self._take(*await asyncio.to_thread(start))

    def _launched(self, startup: Startup, load: Mapping[str, Any]) -> _Launched:
        with startup.phase("engine process"), startup.engine():
            return self._launch(startup, load)

    def _take(self, llm: async_llm.AsyncLLM, fast: frontends.RustFrontend | None) -> None:
        self._llm, self.fast = llm, fast
        # Its core and workers. Those whose parent was killed are nobody's children afterwards.
        self._processes = forkserver.children()
        self.last_sign_s = time.monotonic()
        self._observe(llm)

    async def app(self) -> ASGIApp:
        """vLLM's ASGI application, with those of its routes that we serve (gates/routes.py)."""
        # What `vllm serve` does before its first request.
        await self._llm.reset_mm_cache()
        tasks = await self._llm.get_supported_tasks()
        app = build_app(self._args, tasks, self._llm.model_config)
        # Then /openapi.json lists no other either.
        app.router.routes = [route for route in app.routes if routes.find(route.path) is not None]
        # An unknown route or method is Starlette's exception, and vLLM's handler FastAPI's.
        app.add_exception_handler(
            starlette.exceptions.HTTPException, app.exception_handlers[fastapi.HTTPException]
        )
        unreadable.answer_400(app)
        # OpenAI's API has it, vLLM's has not.
        app.add_api_route("/v1/models/{model:path}", _card_of, methods=["GET"])
        app.middleware_stack = app.build_middleware_stack()  # vLLM built it without.
        await init_app_state(self._llm, app.state, self._args, tasks)
        self.bounds.serve(app.state)
        # vLLM's error handlers tell this object to exit when the engine dies; here the replica's
        # own supervisor does, and it must first let the other requests hear of it.
        app.state.server = SimpleNamespace(should_exit=False)
        asgi: ASGIApp = app
        return asgi

    async def warm_up(self) -> tuple[float, float]:
        """Generate a little, so that 'ready' means that an answer was made.

        Returns the least time to a first token and between two tokens, seconds: what one request
        alone takes.
        """
        first_s: list[float] = []
        gaps_s: list[float] = []
        for place in range(2):
            # The first one compiles what only log probabilities need: better now than while others
            # wait. The second one is as most are.
            params = SamplingParams(
                max_tokens=8, ignore_eos=True, temperature=0.0, logprobs=None if place else 1
            )
            last_s = time.monotonic()
            tokens = 0
            async for output in self._llm.generate(
                {"prompt_token_ids": [0]}, params, request_id=f"warm-up-{place}"
            ):
                now_s, more = time.monotonic(), len(output.outputs[0].token_ids) - tokens
                (gaps_s if tokens else first_s).append((now_s - last_s) / max(1, more))
                last_s, tokens = now_s, tokens + more
        return min(first_s), min(gaps_s, default=0.0)

    @property
    def unread_tokens(self) -> int:
        """Prompt tokens of the requests that have no first token yet."""
        return int(self._llm.get_num_queued_tokens())

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return int(self._llm.model_config.get_vocab_size())

    @property
    def dead(self) -> bool:
        return bool(self._llm.errored)

    @property
    def cpu_s(self) -> float:
        """CPU time that its processes have used since they started, seconds."""
        used_s = 0.0
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used_s += times.user + times.system
        return used_s

    async def sleep(self) -> None:
        """Move the weights to this machine's memory, and drop the KV cache. No request may run."""
        await self._moving(self._llm.sleep(level=1))

    async def wake(self, startup: Startup) -> None:
        """Bring the weights back, with an empty KV cache.

        Args:
            startup: is told what the engine is doing.
        """
        with startup.phase("weights"):
            await self._moving(self._llm.wake_up(["weights"]))
        with startup.phase("KV cache"):
            await self._moving(self._llm.wake_up(["kv_cache"]))

    async def _moving(self, change: Coroutine[Any, Any, Any]) -> None:
        """Await a change of the engine's memory, in which it answers no probe.

        Large weights take longer than an engine may be silent. As long as its processes work, that
        is a sign of life.
        """
        moving, used_s = asyncio.ensure_future(change), self.cpu_s
        while not (await asyncio.wait({moving}, timeout=_MOVE_CHECK_S))[0]:
            if self.cpu_s > used_s:
                self.last_sign_s, used_s = time.monotonic(), self.cpu_s
        await moving
        self.last_sign_s = time.monotonic()

    async def probe(self) -> None:
        """Return once every process of the engine has answered; a hung one never does."""
        await self._llm.collective_rpc("check_health")
        self.last_sign_s = time.monotonic()

    async def abort(self, request_id: str) -> None:
        """End a request of the fast lane that is late; its stream ends with an error event."""
        await self._llm.engine_core.abort_requests_async([LATE + request_id])

    def count(self, report: Report) -> None:
        """Add what the fast lane did to vLLM's metrics."""
        if (manager := self._llm.logger_manager) is not None:
            manager.record(scheduler_stats=None, iteration_stats=iteration_of(report))

    async def restart_frontend(self) -> None:
        """Start another vllm-rs in the place of one that was killed; the engine runs on.

        Raises:
            OSError: it does not start.
        """
        assert self.fast is not None
        # Nobody reads what the engine still makes for the requests of the one that is gone.
        await self._llm.engine_core.abort_requests_async([GONE])
        await asyncio.to_thread(self.fast.restart)
        await self.fast.probe()

    def _observe(self, llm: async_llm.AsyncLLM) -> None:
        """Note each message of the engine core, and tell the pacer how old its outputs are."""
        llm.bounds = self.bounds
        self.bounds.watch(llm.renderer)
        pacer, processor = self._pacer, llm.output_processor
        compare = llm.compared if isinstance(llm, ContinuingLLM) else None
        process, update = processor.process_outputs, processor.update_scheduler_stats

        def process_outputs(outputs: Any, timestamp: float, *rest: Any, **kwargs: Any) -> Any:
            # Both clocks are this machine's monotonic one: the engine core is a local process.
            pacer.observe(time.monotonic() - timestamp)
            if compare is not None:
                outputs = compare(outputs)
            return process(outputs, timestamp, *rest, **kwargs)

        def update_scheduler_stats(stats: Any) -> None:
            # Called for every message, also for a step that gave no output, as in a long prefill.
            self.last_sign_s = time.monotonic()
            update(stats)

        processor.process_outputs = process_outputs
        processor.update_scheduler_stats = update_scheduler_stats

    def kill(self) -> None:
        """End its core and workers at once; requests of a hung one then fail instead of waiting."""
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        if self.fast is not None:
            self.fast.kill()

    def stop(self) -> None:
        """End the engine's processes; returns when they have ended."""
        # Those that a restart has begun and not finished are only the fork server's yet.
        mine = {*self._processes, *forkserver.children()}
        if self.fast is not None:
            self.fast.stop()
        self._llm.shutdown(timeout=5)
        forkserver.stop()
        _, alive = psutil.wait_procs(mine, timeout=5)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5)


async def _card_of(model: str, request: fastapi.Request) -> JSONResponse:
    """One of the models or adapters that `/v1/models` lists."""
    listed = await request.app.state.openai_serving_models.show_available_models()
    card = next((card for card in listed.data if card.id == model), None)
    if card is None:
        raise fastapi.HTTPException(404, f"There is no model {model!r}.")
    return JSONResponse(card.model_dump())


def _recorder(
    signals: Signals, state: Callable[[int, int, int, float], None] | None
) -> Callable[[Any, int], StatLoggerBase]:
    """What vLLM calls after each step of an engine core, beside its own metrics.

    Args:
        state: is told what the scheduler holds after each step; None: its reports say so.
    """

    class Recorder(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._engine = engine_index

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, *rest: Any, **kwargs: Any
        ) -> None:
            if scheduler_stats is not None and state is not None:
                state(
                    self._engine,
                    scheduler_stats.num_running_reqs,
                    scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                    scheduler_stats.kv_cache_usage,
                )
            if iteration_stats is not None and not isinstance(iteration_stats, FastIteration):
                signals.step(
                    iteration_stats.num_prompt_tokens,
                    iteration_stats.num_generation_tokens,
                    iteration_stats.num_preempted_reqs,
                    iteration_stats.time_to_first_tokens_iter,
                    iteration_stats.inter_token_latencies_iter,
                    [
                        (ended.queued_time + ended.prefill_time, ended.mean_time_per_output_token)
                        for ended in iteration_stats.finished_requests
                        if ended.num_generation_tokens  # Others were given up before.
                    ],
                )

    return Recorder


def _collector(pacer: Pacer) -> type[RequestOutputCollector]:
    """vLLM's per-stream mailbox, opened no more often than the pacer allows.

    The first output and the last leave at once. What comes in between is merged by vLLM's own
    `RequestOutput.add`, as it is whenever a consumer is late.
    """

    class PacedCollector(RequestOutputCollector):  # type: ignore[misc]
        output: Any

        def __init__(self, output_kind: RequestOutputKind, request_id: str) -> None:
            super().__init__(output_kind, request_id)
            self._last_s: float | None = None
            self._timer: asyncio.TimerHandle | None = None

        def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
            if not self.aggregate or isinstance(output, Exception):
                super().put(output)
                return
            if self.output is None:
                self.output = output
            else:
                self.output.add(output, aggregate=True)
            if self.ready.is_set():
                return
            if output.finished or self._last_s is None:
                self._open()
                return
            if self._timer is not None:
                return
            hold_s = pacer.hold_s(time.monotonic() - self._last_s)
            if hold_s <= 0:
                self._open()
            else:
                self._timer = asyncio.get_running_loop().call_later(hold_s, self._open)

        def _open(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._last_s = time.monotonic()
            self.ready.set()

        async def get(self) -> RequestOutput | PoolingRequestOutput:
            await self.ready.wait()
            return await super().get()

        def get_nowait(self) -> RequestOutput | PoolingRequestOutput | None:
            return super().get_nowait() if self.ready.is_set() else None

    return PacedCollector
