"""The engine of one replica: vLLM's AsyncLLM and vLLM's own ASGI application.

The only module that imports vllm, because what it touches moves between releases. Everything else
sees `Engine`: start it, serve `app()`, `warm_up()` once, `probe()` now and then, `restart()` it if
it has died, `stop()` it.
"""

import argparse
import asyncio
import contextlib
import copy
import json
import signal
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import fastapi
import numpy as np
import psutil
import starlette.exceptions
import vllm.v1.engine.async_llm as async_llm
import vllm.v1.engine.utils as engine_processes
from starlette.types import ASGIApp
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.outputs import LogprobsLists

from serve_app import forkserver, metrics
from serve_app.backend import Exchange, exchange
from serve_app.continuation import Logprobs, Method, Progress
from serve_app.errors import ConfigError, nearest
from serve_app.keys import tenant
from serve_app.pacing import Pacer
from serve_app.signals import Signals


class Engine:
    """A running engine, with the application that serves it.

    Attributes:
        max_running_requests: sequences that the engine batches at once.
        max_model_len: prompt and output tokens of one request, together.
        last_sign_s: when the engine was last heard of, on the monotonic clock.
    """

    def __init__(
        self, args: argparse.Namespace, launch: Callable[[], async_llm.AsyncLLM], pacer: Pacer
    ) -> None:
        self._args, self._launch, self._pacer = args, launch, pacer
        self._take(launch())
        self.max_running_requests: int = self._llm.vllm_config.scheduler_config.max_num_seqs
        self.max_model_len: int = self._llm.model_config.max_model_len

    @classmethod
    def start(
        cls,
        arguments: Mapping[str, Any],
        pacer: Pacer,
        signals: Signals,
        continuing: bool = False,
    ) -> "Engine":
        """Load the model; blocks until the engine's processes are ready.

        Args:
            arguments: vLLM's engine and API server arguments, by their Python names.
            pacer: decides when tokens of a stream travel together.
            signals: is told what each step did.
            continuing: whether it is behind a gateway, which goes on with what broke off.

        Raises:
            ConfigError: for an argument that vLLM does not know or cannot honour.
        """
        args = parse(arguments)
        # In a Ray worker vLLM spawns its engine process, and offers no other way.
        engine_processes.get_mp_context = forkserver.Context
        if pacer.max_gap_s > 0:
            # AsyncLLM builds its collectors by this name, and offers no other way in.
            async_llm.RequestOutputCollector = _collector(pacer)
        kind = _ContinuingLLM if continuing else _CountingLLM

        def launch() -> async_llm.AsyncLLM:
            # The usage context sets vLLM's default batch limits: this one is `vllm serve`'s.
            context = UsageContext.OPENAI_API_SERVER
            try:
                config = AsyncEngineArgs.from_cli_args(args).create_engine_config(context)
            except (ValueError, OSError) as error:
                raise ConfigError("engine", args.model, _first_sentence(error)) from error
            return kind.from_vllm_config(
                config,
                usage_context=context,
                stat_loggers=[_recorder(signals)],
                disable_log_stats=args.disable_log_stats,
            )

        return cls(args, launch, pacer)

    async def restart(self) -> None:
        """Start it anew after `kill()`; `app()` then gives the application that serves it.

        Only its own processes are new: this one has imported everything already. The event loop
        turns meanwhile.
        """
        # A GPU's memory is free once those who held it are gone.
        await asyncio.to_thread(psutil.wait_procs, self._processes, 30)
        self._llm.shutdown(timeout=0)

        def start() -> async_llm.AsyncLLM:
            forkserver.start()  # Should it have died as well.
            return self._launch()

        self._take(await asyncio.to_thread(start))

    def _take(self, llm: async_llm.AsyncLLM) -> None:
        self._llm = llm
        # Its core and workers. Those whose parent was killed are nobody's children afterwards.
        self._processes = forkserver.children()
        self.last_sign_s = time.monotonic()
        self._observe(llm)

    async def app(self) -> ASGIApp:
        """vLLM's ASGI application, every endpoint of it."""
        # What `vllm serve` does before its first request.
        await self._llm.reset_mm_cache()
        tasks = await self._llm.get_supported_tasks()
        app = build_app(self._args, tasks, self._llm.model_config)
        # An unknown route or method is Starlette's exception, and vLLM's handler FastAPI's.
        app.add_exception_handler(
            starlette.exceptions.HTTPException, app.exception_handlers[fastapi.HTTPException]
        )
        app.middleware_stack = app.build_middleware_stack()  # vLLM built it without.
        await init_app_state(self._llm, app.state, self._args, tasks)
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
    def dead(self) -> bool:
        return bool(self._llm.errored)

    async def probe(self) -> None:
        """Return once every process of the engine has answered; a hung one never does."""
        await self._llm.collective_rpc("check_health")
        self.last_sign_s = time.monotonic()

    def _observe(self, llm: async_llm.AsyncLLM) -> None:
        """Note each message of the engine core, and tell the pacer how old its outputs are."""
        pacer, processor = self._pacer, llm.output_processor
        compare = llm.compared if isinstance(llm, _ContinuingLLM) else None
        process, update = processor.process_outputs, processor.update_scheduler_stats

        def process_outputs(outputs: Any, timestamp: float, *rest: Any, **named: Any) -> Any:
            # Both clocks are this machine's monotonic one: the engine core is a local process.
            pacer.observe(time.monotonic() - timestamp)
            if compare is not None:
                outputs = compare(outputs)
            return process(outputs, timestamp, *rest, **named)

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

    def stop(self) -> None:
        """End the engine's processes; returns when they have ended."""
        # Those that a restart has begun and not finished are only the fork server's yet.
        mine = {*self._processes, *forkserver.children()}
        self._llm.shutdown(timeout=5)
        forkserver.stop()
        _, alive = psutil.wait_procs(mine, timeout=5)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5)


def parse(arguments: Mapping[str, Any]) -> argparse.Namespace:
    """vLLM's parsed arguments, checked against vLLM's own definition.

    Raises:
        ConfigError: naming the argument, its value and the nearest valid choice.
    """
    parser = make_arg_parser(_Parser(add_help=False))
    known = {action.dest: action for action in parser._actions}
    argv: list[str] = []
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(f"engine.{key}", value, "unknown to vLLM", nearest(key, known))
        choices = known[key].choices
        if choices is not None and isinstance(value, str) and value not in choices:
            words = [str(choice) for choice in choices]
            near = nearest(value, words)
            raise ConfigError(f"engine.{key}", value, f"not one of {', '.join(words)}", near)
        argv += _argv(key, value)
    try:
        args: argparse.Namespace = parser.parse_args(argv)
        validate_parsed_serve_args(args)
    except _Unparsable as error:
        key = error.argument.lstrip("-").replace("-", "_")
        raise ConfigError(f"engine.{key}", arguments.get(key), error.problem) from None
    except (TypeError, ValueError) as error:
        raise ConfigError("engine", dict(arguments), _first_sentence(error)) from error
    return args


class _Unparsable(Exception):
    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(problem)
        self.argument, self.problem = argument, problem


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]
    """vLLM's parser, raising where a command line would exit."""

    def error(self, message: str) -> NoReturn:
        # "argument --max-model-len: invalid value" or a sentence about the whole.
        subject, _, problem = message.removeprefix("argument ").partition(": ")
        raise _Unparsable(subject.split("/")[0], problem or message)


def _argv(key: str, value: Any) -> list[str]:
    flag = "--" + key.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    if isinstance(value, list | tuple):
        return [flag, *(json.dumps(v) if isinstance(v, Mapping) else str(v) for v in value)]
    return [flag, str(value)]


def _first_sentence(error: Exception) -> str:
    """The part of vLLM's often many-lined messages that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic: "1 validation error for ModelConfig", then "  Value error, what is wrong [type=..."
    for line in lines:
        if line.startswith("Value error, "):
            return line.removeprefix("Value error, ").split(" [type=")[0]
    return lines[0] if lines else type(error).__name__


class _CountingLLM(async_llm.AsyncLLM):  # type: ignore[misc]
    """Counts the tokens of each tenant. vLLM's own counters do not know who asked."""

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **named: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        current = exchange.get()
        # An answer that goes on here had its prompt counted where it began.
        new = current is None or current.progress is None
        read = generated = 0
        stream = super().generate(prompt, sampling_params, request_id, **named)
        try:
            async with contextlib.aclosing(stream):
                async for output in stream:
                    if new:
                        read = len(output.prompt_token_ids or ())
                    for completion in output.outputs:
                        generated += len(completion.token_ids)
                    yield output
        finally:
            # Not those of the warm-up, whose outputs hold all tokens so far.
            if sampling_params.output_kind is not RequestOutputKind.CUMULATIVE:
                names = self.model_config.served_model_name
                model = names[0] if isinstance(names, list) else str(names)
                metrics.prompt_tokens.labels(model, tenant.get()).inc(read)
                metrics.generated_tokens.labels(model, tenant.get()).inc(generated)


class _ContinuingLLM(_CountingLLM):
    """Marks the tokens that it gives out, and goes on with what another engine began.

    To go on, the tokens so far go through the output processor as if they had just been made, so
    that everything in front of it is where it was. The engine core gets them as part of the prompt
    (resume), or makes them again, and they are compared (repeat).
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # By internal request id: tokens that must come again.
        self._due: dict[str, deque[int]] = {}

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **named: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        stream = super().generate(prompt, sampling_params, request_id, **named)
        current = exchange.get()
        if current is None:
            async with contextlib.aclosing(stream):
                async for output in stream:
                    yield output
            return
        current.sequences += sampling_params.n
        method = _method(sampling_params) if current.sequences == 1 else Method.NEVER
        current.marks.how(method)
        try:
            async with contextlib.aclosing(stream):
                async for output in stream:
                    while current.replayed:
                        yield _marked(current, current.replayed.popleft())
                    yield _marked(current, output)
        except EngineDeadError:
            current.broken = True
            raise
        except Exception:
            # What the client has comes first also where an error follows.
            while current.replayed:
                yield _marked(current, current.replayed.popleft())
            raise
        finally:
            self._due.pop(current.repeating, None)

    async def _add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: Any,
        index: int,
        queue: RequestOutputCollector,
    ) -> None:
        current = exchange.get()
        if current is None or current.progress is None:
            await super()._add_request(request, prompt, parent_req, index, queue)
            return
        progress, current.progress = current.progress, None
        self.check_admission(request_id=request.request_id)
        self.output_processor.add_request(request, prompt, parent_req, index, queue)
        if self._replay(request, progress, current, queue):
            return
        if progress.repeat:
            current.repeating = request.request_id
            self._due[request.request_id] = deque(progress.tokens)
        else:
            request = _after(request, progress.tokens)
        await self.engine_core.add_request_async(request)

    def _replay(
        self,
        request: EngineCoreRequest,
        progress: Progress,
        current: Exchange,
        queue: RequestOutputCollector,
    ) -> bool:
        """Put the groups through the output processor; whether the answer is over with them."""
        state = self.output_processor.request_states[request.request_id]
        # Without a queue they are returned, one for each group, and not merged.
        state.queue = None
        for place, group in enumerate(progress.groups, 1):
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=list(group),
                new_logprobs=_logprobs(group, request.sampling_params),
            )
            if place == len(progress.groups):
                if progress.logprobs:
                    output.new_logprobs = _lists(progress.logprobs)
                if progress.finish is not None:
                    output.finish_reason = FinishReason[progress.finish.upper()]
                    output.stop_reason = progress.stop
            made = OutputProcessor.process_outputs(self.output_processor, [output])
            current.replayed.extend(made.request_outputs)
        state.queue = queue
        state.is_prefilling = True
        if request.request_id in self.output_processor.request_states:
            return False
        queue.put(current.replayed.pop())
        return True

    def compared(self, outputs: list[EngineCoreOutput]) -> list[EngineCoreOutput]:
        """Engine outputs without the tokens that were made again."""
        return [output for output in outputs if self._new(output)] if self._due else outputs

    def _new(self, output: EngineCoreOutput) -> bool:
        """Whether there is anything new in it, once what was due is taken out."""
        due = self._due.get(output.request_id)
        if due is None:
            return True
        again = [due.popleft() for _ in range(min(len(due), len(output.new_token_ids)))]
        same = output.new_token_ids[: len(again)] == again
        del output.new_token_ids[: len(again)]
        if output.new_logprobs is not None:
            rest = len(output.new_token_ids)
            output.new_logprobs = output.new_logprobs.slice_request(len(again), rest)
        if not same or not due or output.finish_reason is not None:
            del self._due[output.request_id]
        if not same or (due and output.finish_reason is not None):
            state = self.output_processor.request_states.get(output.request_id)
            if state is not None:
                state.queue.put(NotTheSame("The answer broke off, and came out otherwise again."))
            return False
        return bool(output.new_token_ids) or output.finish_reason is not None


class NotTheSame(Exception):
    """An answer that was made again is not the one that broke off."""


def _method(params: SamplingParams) -> Method:
    """How an answer with these parameters can go on exactly.

    Prompt and tokens so far are all that the next token depends on, unless something counts the
    output tokens alone, has a state of its own (a grammar, a generator with a seed), or belongs to
    the prompt. Then the same tokens must be made again, which only those do who draw none, or draw
    from a seed.
    """
    sampled = params.temperature > 0
    stateful = (
        (sampled and params.seed is not None)
        or params.presence_penalty
        or params.frequency_penalty
        or params.bad_words
        or params.structured_outputs
        or params.prompt_logprobs is not None
        or params.logprob_token_ids
        or params.thinking_token_budget is not None
        or params.repetition_detection is not None
        or params.extra_args
    )
    if params.n > 1:
        return Method.NEVER
    if not stateful:
        return Method.RESUME
    return Method.REPEAT if not sampled or params.seed is not None else Method.NEVER


def _marked(current: Exchange, output: RequestOutput) -> RequestOutput:
    """The output, noted for the next event."""
    for completion in output.outputs:
        tokens, logprobs = completion.token_ids, completion.logprobs
        current.marks.group(tokens, _told(tokens, logprobs) if logprobs else None)
        if output.finished:
            current.marks.end(completion.finish_reason, completion.stop_reason)
    return output


def _after(request: EngineCoreRequest, tokens: list[int]) -> EngineCoreRequest:
    """What is left of a request when these tokens have been made."""
    params = request.sampling_params.clone()
    params.max_tokens = max(1, params.max_tokens - len(tokens))
    params.min_tokens = max(0, params.min_tokens - len(tokens))
    rest = copy.copy(request)
    rest.prompt_token_ids = [*request.prompt_token_ids, *tokens]
    rest.sampling_params = params
    return rest


def _told(tokens: Sequence[int], logprobs: Sequence[Mapping[int, Any]]) -> Logprobs:
    """vLLM's logprobs of some tokens, as `_lists` reads them."""
    told = []
    for token, of_place in zip(tokens, logprobs, strict=True):
        ranked = sorted((each.rank, id_, each.logprob) for id_, each in of_place.items())
        likeliest = [(id_, logprob) for rank, id_, logprob in ranked if rank <= len(of_place)]
        told.append(([(token, of_place[token].logprob), *likeliest], of_place[token].rank))
    return told


def _lists(told: Logprobs) -> LogprobsLists:
    """What the engine core would say. Each row is filled up with its own token."""
    width = max(len(row) for row, _ in told)
    rows = [row + row[:1] * (width - len(row)) for row, _ in told]
    return LogprobsLists(
        np.array([[id_ for id_, _ in row] for row in rows], np.int32),
        np.array([[logprob for _, logprob in row] for row in rows], np.float32),
        np.array([rank for _, rank in told], np.int32),
    )


def _logprobs(tokens: list[int], params: SamplingParams) -> LogprobsLists | None:
    """Stands for logprobs that the client has already."""
    if params.logprobs is None:
        return None
    ids = np.repeat(np.array(tokens, dtype=np.int32)[:, None], max(params.logprobs, 0) + 1, axis=1)
    return LogprobsLists(ids, np.zeros(ids.shape, np.float32), np.zeros(len(tokens), np.int32))


def _recorder(signals: Signals) -> Callable[[Any, int], StatLoggerBase]:
    """What vLLM calls after each step of an engine core, beside its own metrics."""

    class Recorder(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._engine = engine_index

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, *rest: Any, **named: Any
        ) -> None:
            if scheduler_stats is not None:
                signals.state(
                    self._engine,
                    scheduler_stats.num_running_reqs,
                    scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                    scheduler_stats.kv_cache_usage,
                )
            if iteration_stats is not None:
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
