"""vLLM's AsyncLLM, with what this application adds to it.

`CountingLLM` counts tokens by tenant. `ContinuingLLM` also marks the tokens of each answer, and
continues an answer that another replica began (continuation.py).
"""

import contextlib
import copy
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import numpy as np
import vllm.v1.engine.async_llm as async_llm
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from serve_app.continuation import Logprobs, Method, Progress
from serve_app.gates.keys import tenant
from serve_app.gates.work import Work, work
from serve_app.observe import metrics
from serve_app.replica.backend import Exchange, exchange
from serve_app.replica.bounds import Bounds


class CountingLLM(async_llm.AsyncLLM):  # type: ignore[misc]
    """Counts the tokens of each tenant. vLLM's own counters do not know tenants.

    Attributes:
        bounds: that a prompt is held to; set by the engine.
    """

    bounds = Bounds()

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.bounds.check(prompt)
        current = exchange.get()
        # An answer that goes on here had its prompt counted where it began.
        new = current is None or current.progress is None
        read = generated = 0
        done = work.get() or Work()
        done.begun = True
        stream = super().generate(prompt, sampling_params, request_id, **kwargs)
        try:
            async with contextlib.aclosing(stream):
                async for output in stream:
                    done.has_counts = True
                    if not read:
                        read = len(output.prompt_token_ids or ())
                        done.prompt_tokens += read
                        done.cached_tokens += output.num_cached_tokens or 0
                    for completion in output.outputs:
                        generated += len(completion.token_ids)
                        done.output_tokens += len(completion.token_ids)
                    yield output
        finally:
            # Not those of the warm-up, whose outputs hold all tokens so far.
            if sampling_params.output_kind is not RequestOutputKind.CUMULATIVE:
                names = self.model_config.served_model_name
                model = names[0] if isinstance(names, list) else str(names)
                labels = model, metrics.tenant_label(tenant.get())
                metrics.series(metrics.prompt_tokens, *labels).inc(read if new else 0)
                metrics.series(metrics.generated_tokens, *labels).inc(generated)


class ContinuingLLM(CountingLLM):
    """Marks its tokens, and continues answers that another engine began.

    To go on, the tokens so far go through the output processor as if they had just been made, so
    that everything in front of it is where it was. The engine core gets them as part of the prompt
    (resume), or makes them again, and they are compared (repeat).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By internal request id: tokens that must come again.
        self._due: dict[str, deque[int]] = {}

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        stream = super().generate(prompt, sampling_params, request_id, **kwargs)
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
        method = _method(request.sampling_params)
        if progress.repeat is None and progress.groups and method is Method.NEVER:
            raise NotTheSame("This response cannot be continued exactly where it was interrupted.")
        self.check_admission(request_id=request.request_id)
        self.output_processor.add_request(request, prompt, parent_req, index, queue)
        if progress.finish is None:
            progress.finish, progress.stop = self._ended(request, progress.tokens)
        if self._replay(request, progress, current, queue):
            return
        if progress.repeat or (progress.repeat is None and method is Method.REPEAT):
            current.repeating = request.request_id
            self._due[request.request_id] = deque(progress.tokens)
        else:
            request = _after(request, progress.tokens)
        await self.engine_core.add_request_async(request)

    def _ended(
        self, request: EngineCoreRequest, tokens: list[int]
    ) -> tuple[str | None, int | str | None]:
        """Finish and stop reason of an answer that is over with these tokens, by vLLM's own rule.

        The fast lane says them in an event of their own, which may not have come.
        """
        if not tokens:
            return None, None
        scheduled = Request.from_engine_core_request(request, None)
        scheduled.append_output_token_ids(tokens)
        if not check_stop(scheduled, self.model_config.max_model_len):
            return None, None
        return str(scheduled.get_finished_reason()), scheduled.stop_reason

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
        """Whether anything new is in it after the part that is due is removed."""
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
                state.queue.put(
                    NotTheSame("The response was interrupted, and its repetition is different.")
                )
            return False
        return bool(output.new_token_ids) or output.finish_reason is not None


class NotTheSame(Exception):
    """An answer that was made again is not the one that broke off."""


def _method(params: SamplingParams) -> Method:
    """How an answer with these parameters can be continued exactly.

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
        or params.logprob_token_ids
        or params.thinking_token_budget is not None
        or params.repetition_detection is not None
        or params.extra_args
    )
    # The first event of an echoed prompt has the logprobs of the prompt, which no mark has.
    if params.n > 1 or params.prompt_logprobs is not None:
        return Method.NEVER
    if not stateful:
        return Method.RESUME
    return Method.REPEAT if not sampled or params.seed is not None else Method.NEVER


def _marked(current: Exchange, output: RequestOutput) -> RequestOutput:
    """The output, noted for the next event."""
    for completion in output.outputs:
        tokens, logprobs = completion.token_ids, completion.logprobs
        current.marks.group(tokens, _ranked(tokens, logprobs) if logprobs else None)
        if output.finished:
            current.marks.end(completion.finish_reason, completion.stop_reason)
    return output


def _after(request: EngineCoreRequest, tokens: list[int]) -> EngineCoreRequest:
    """The rest of a request after these tokens."""
    params = request.sampling_params.clone()
    params.max_tokens = max(1, params.max_tokens - len(tokens))
    params.min_tokens = max(0, params.min_tokens - len(tokens))
    rest = copy.copy(request)
    rest.prompt_token_ids = [*request.prompt_token_ids, *tokens]
    rest.sampling_params = params
    return rest


def _ranked(tokens: Sequence[int], logprobs: Sequence[Mapping[int, Any]]) -> Logprobs:
    """vLLM's logprobs of some tokens, as `_lists` reads them."""
    positions = []
    for token, of_place in zip(tokens, logprobs, strict=True):
        ranked = sorted((each.rank, id_, each.logprob) for id_, each in of_place.items())
        likeliest = [(id_, logprob) for rank, id_, logprob in ranked if rank <= len(of_place)]
        positions.append(([(token, of_place[token].logprob), *likeliest], of_place[token].rank))
    return positions


def _lists(positions: Logprobs) -> LogprobsLists:
    """What the engine core would say. Each row is filled up with its own token."""
    width = max(len(row) for row, _ in positions)
    rows = [row + row[:1] * (width - len(row)) for row, _ in positions]
    return LogprobsLists(
        np.array([[id_ for id_, _ in row] for row in rows], np.int32),
        np.array([[-np.inf if it is None else it for _, it in row] for row in rows], np.float32),
        np.array([rank for _, rank in positions], np.int32),
    )


def _logprobs(tokens: list[int], params: SamplingParams) -> LogprobsLists | None:
    """Stands for logprobs that the client has already."""
    if params.logprobs is None:
        return None
    ids = np.repeat(np.array(tokens, dtype=np.int32)[:, None], max(params.logprobs, 0) + 1, axis=1)
    return LogprobsLists(ids, np.zeros(ids.shape, np.float32), np.zeros(len(tokens), np.int32))
