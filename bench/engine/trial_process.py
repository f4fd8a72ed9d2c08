"""The process of a trial: vLLM's engine, stepped by a loop that adds requests at their times.

The loop adds the requests that are due before each step, as vLLM's own loop does. There is no HTTP
and no detokenizer, so the difference between two trials is the engine's. Latencies count from the
planned time. A load is aborted as soon as more requests have missed the objective than it allows.

Orders arrive as lines of JSON on standard input; each is answered with one line (orders.py).
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench.engine import orders
from bench.engine.orders import Completions, LoadOutcome, Ready, Refused
from bench.engine.trial import LIVE
from bench.errors import BenchError
from bench.hardware import gpu
from bench.measure import Slo
from bench.records import Record, append
from bench.traffic import schedule, workload
from bench.traffic.request import Request
from serve_app.planning import kernels

_SETTLE_STEPS = 100
_LOOK_S = 0.2  # How often the loop checks whether the objective can still be met.


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", type=json.loads, default={})
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    kernels.settle()
    # Only answers go to standard output; what libraries print there goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    began_s = time.monotonic()
    engine = _start(options.model, options.engine)
    scheduler = engine.engine_core.engine_core.scheduler
    cache = engine.vllm_config.cache_config
    config = engine.vllm_config.scheduler_config
    limits = {name: int(getattr(config, name)) for name in LIVE}
    ready = Ready(
        limits=limits,
        kv_blocks=int(cache.num_gpu_blocks),
        block_tokens=int(cache.block_size),
        load_s=time.monotonic() - began_s,
    )
    answer: orders.Answer = ready
    while True:
        print(msgspec.json.encode(orders.Line(answer)).decode(), file=answers, flush=True)
        if not (line := sys.stdin.readline()):
            return
        order: orders.Order = msgspec.json.decode(line, type=orders.Order)
        if isinstance(order, orders.Complete):
            answer = Completions(_complete(engine, order.prompts, order.tokens))
            continue
        try:
            _limit(scheduler, limits, order.live)
            answer = _drive(engine, scheduler, order)
        except BenchError as error:
            answer = Refused(str(error))
            continue
        path = Path(order.path)
        path.write_bytes(b"")
        append(path, answer.records)
        answer.records = []


def _start(model: str, arguments: dict[str, Any]) -> Any:
    """vLLM's engine, with the limits that its server would have."""
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    if not gpu.present():
        # The CPU build compiles wrong code.
        arguments = {"enforce_eager": True, **arguments}
    return LLMEngine.from_engine_args(
        EngineArgs(model=model, disable_log_stats=False, **arguments),
        usage_context=UsageContext.OPENAI_API_SERVER,
    )


def _limit(scheduler: Any, started: Mapping[str, int], live: Mapping[str, int]) -> None:
    """Give the scheduler its limits for the next load.

    Raises:
        BenchError: one is above what the engine was started with, or cannot be changed.
    """
    limits = {**started, **live}
    for name, value in live.items():
        if name not in LIVE:
            raise BenchError.of("live", name, "cannot be changed in a running engine", LIVE)
        if name != "long_prefill_token_threshold" and value > started[name]:
            raise BenchError.of(name, value, f"the engine was started with {started[name]}")
    # Slots and buffers stay as they were made; only fewer of them are used.
    scheduler.max_num_active_reqs = limits["max_num_seqs"]
    scheduler.max_num_scheduled_tokens = limits["max_num_batched_tokens"]
    config = scheduler.scheduler_config
    config.long_prefill_token_threshold = limits["long_prefill_token_threshold"]
    config.enable_chunked_prefill = bool(limits["enable_chunked_prefill"])


def _complete(engine: Any, prompts: Sequence[str], tokens: int) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    completions = []
    for number, prompt in enumerate(prompts):
        ids = engine.get_tokenizer().encode(prompt)
        engine.add_request(f"completion-{number}", {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    completions.append(list(output.outputs[0].token_ids))
    return completions


def _drive(engine: Any, scheduler: Any, order: orders.Load) -> LoadOutcome:
    """Run one load: add requests at their times, and step until all are answered."""
    requests = workload.parse(order.what, order.seed, salt="").take(order.count)
    times_s = _times_s(order.when, len(requests), order.seed)
    prepared = [_prepared(engine, request, order.priorities) for request in requests]
    records = [
        Record(
            index=index,
            planned_s=times_s[index],
            kind=request.kind,
            asked_input_tokens=request.input_tokens,
            asked_output_tokens=request.output_tokens,
            error="unfinished: the load was broken off",
        )
        for index, request in enumerate(requests)
    ]
    engine.reset_prefix_cache()
    pool = scheduler.kv_cache_manager.block_pool
    outcome, waiting, at = LoadOutcome(), _Waiting(order.slo, records), 0
    blocks = pool.num_gpu_blocks - 1
    start_s, cpu_s = time.monotonic(), time.process_time()
    look_s = 0.0
    while True:
        now_s = time.monotonic() - start_s
        while at < len(records) and times_s[at] <= now_s:
            prompt, params, priority = prepared[at]
            records[at].sent_s = now_s
            name = engine.add_request(str(at), prompt, params, priority=priority)
            waiting.sent(at, name)
            at += 1
        if not engine.has_unfinished_requests():
            if at == len(records):
                break
            time.sleep(max(0.0, min(times_s[at] - now_s, 0.05)))
            continue
        outputs = engine.step()
        ended_s = time.monotonic() - start_s
        outcome.steps += 1
        outcome.step_s += ended_s - now_s
        for output in outputs:
            if output.finished:
                _note(records[int(output.request_id)], output, start_s)
                outcome.preempted += output.metrics.num_preemptions
                waiting.ended(int(output.request_id))
        if ended_s >= look_s:
            look_s = ended_s + _LOOK_S
            used = blocks - pool.get_num_free_blocks()
            outcome.kv.append(_kv(scheduler, ended_s, used))
            outcome.kv_peak = max(outcome.kv_peak, used / blocks)
            outcome.lost = waiting.lost(ended_s, engine.output_processor.request_states, start_s)
            if outcome.lost or ended_s > order.limit_s:
                outcome.lost = True
                engine.abort_request([str(index) for index in waiting.open])
                break
    outcome.elapsed_s = time.monotonic() - start_s
    outcome.cpu_s = time.process_time() - cpu_s
    outcome.records = records
    _settle(engine, scheduler)
    return outcome


def _times_s(when: str, count: int, seed: int) -> list[float]:
    """When each request is sent; all at once for `users=N`, where the engine's limits are users."""
    load = schedule.parse(when)
    if isinstance(load, schedule.Closed):
        return [0.0] * count
    if isinstance(load, schedule.TraceTimes):
        raise BenchError.of("load", when, "needs a load with times of its own")
    return load.times_s(count, None, seed)


def _prepared(engine: Any, request: Request, priorities: Mapping[str, int]) -> tuple[Any, Any, int]:
    """The prompt as tokens, so that a load does not include tokenization, and its parameters."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    ids = engine.get_tokenizer().encode(request.prompt)
    params = SamplingParams(
        temperature=0,
        max_tokens=request.output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return {"prompt_token_ids": ids}, params, priorities.get(request.kind, 0)


def _note(record: Record, output: Any, start_s: float) -> None:
    """Fill in the record of a completed answer, with the engine's own times."""
    stats = output.metrics
    tokens = len(output.outputs[0].token_ids)
    first_s, last_s = stats.first_token_ts - start_s, stats.last_token_ts - start_s
    record.chunk_s = [first_s, last_s][:tokens]
    record.end_s, record.status, record.error = last_s, 200, ""
    record.input_tokens = len(output.prompt_token_ids)
    record.output_tokens = tokens
    record.cached_tokens = output.num_cached_tokens
    record.finish_reason = output.outputs[0].finish_reason or ""


def _kv(scheduler: Any, at_s: float, used: int) -> dict[str, float]:
    """The KV cache at this moment: blocks in use, and the tokens that are in them."""
    tokens = sum(request.num_computed_tokens for request in scheduler.running)
    return {
        "t_s": at_s,
        "blocks": float(used),
        "tokens": float(tokens),
        "running": float(len(scheduler.running)),
        "waiting": float(len(scheduler.waiting)),
    }


def _settle(engine: Any, scheduler: Any) -> None:
    """Let running steps end: with asynchronous scheduling one step is still to be read."""
    for _ in range(_SETTLE_STEPS):
        if not (scheduler.has_requests() or engine.engine_core.engine_core.batch_queue):
            return
        engine.step()


class _Waiting:
    """The open requests, and whether too many have missed for the objective to be met."""

    def __init__(self, slo: Slo | None, records: Sequence[Record]) -> None:
        self._slo, self._records = slo, records
        self._open: dict[int, str] = {}  # Index, and the engine's own name for it.
        self._missed = 0
        share = 1 - (slo.percentile / 100 if slo else 0.0)
        self._may_miss = math.floor(share * len(records) + 1e-9)

    @property
    def open(self) -> list[int]:
        return sorted(self._open)

    def sent(self, index: int, name: str) -> None:
        self._open[index] = name

    def ended(self, index: int) -> None:
        del self._open[index]
        if self._slo is not None and not self._slo.met_by(self._records[index]):
            self._missed += 1

    def lost(self, now_s: float, states: Mapping[str, Any], start_s: float) -> bool:
        """Whether more requests miss the objective than it allows, late open ones included."""
        if self._slo is None:
            return False
        late = 0
        if self._slo.ttft_s is not None:
            for index in self._open:
                planned_s = self._records[index].planned_s
                if now_s - planned_s > self._slo.ttft_s:
                    late += self._without_token(states, index, start_s, planned_s)
        return self._missed + late > self._may_miss

    def _without_token(
        self, states: Mapping[str, Any], index: int, start_s: float, planned_s: float
    ) -> bool:
        """Whether the first token of an open request was late, or has not arrived."""
        assert self._slo is not None
        assert self._slo.ttft_s is not None
        state = states.get(self._open[index])
        first_s = state.stats.first_token_ts if state is not None and state.stats else 0.0
        return not first_s or first_s - start_s - planned_s > self._slo.ttft_s


if __name__ == "__main__":
    main()
