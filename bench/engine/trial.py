"""An engine in a process of its own that bench gives loads to: what trials of `bench tune` run on.

    with Engine(model, arguments, folder) as engine:
        answer = engine.load("synthetic:input=200,output=64", "poisson:rate=5", count=100, ...)

The engine is vLLM's, in process, stepped by the loop below: before each step the requests whose
time has come are added, as vLLM's own loop does. There is no HTTP and no tokenizer's answer in it,
so what differs between two trials is the engine. Latencies count from the planned time.

A process of its own, since a GPU's memory is only given back whole by one that ends, and an engine
that runs out of memory takes its process with it: that is an EngineError, and the next one starts.
Limits of the scheduler can be changed while it stands (`live`), below those it was started with.
A load is broken off as soon as so many requests have missed the objective that it cannot be kept.
"""

import argparse
import contextlib
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from bench import measure
from bench.errors import BenchError
from bench.hardware import gpu
from bench.measure import Slo
from bench.records import Record, append, read
from bench.traffic import schedule, workload
from bench.traffic.request import Request
from serve_app.planning import kernels

START_S = 600.0
_SETTLE_STEPS = 100
_LOOK_S = 0.2  # How often it is looked whether a load is lost already.
_OOM = re.compile(
    r"out of memory|CUDA error: out of|can't allocate memory|not enough memory|MemoryError|"
    r"No available memory|larger than the available KV cache|less than (desired|requested)|"
    r"Cannot allocate memory",
    re.IGNORECASE,
)
LIVE = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "long_prefill_token_threshold",
    "enable_chunked_prefill",
)


class EngineError(BenchError):
    """An engine that did not start, or ended. `oom`: it ran out of memory."""

    oom: bool = False


class Ready(msgspec.Struct, kw_only=True):
    """The report of an engine that has started.

    Attributes:
        limits: of its scheduler, vLLM's defaults resolved.
        kv_blocks, block_tokens: of the KV cache.
        load_s: how long its start took.
    """

    limits: dict[str, int]
    kv_blocks: int
    block_tokens: int
    load_s: float


class Answer(msgspec.Struct, kw_only=True):
    """What became of a load.

    Attributes:
        lost: it was broken off, as the objective could no longer be kept.
        elapsed_s: until the last answer; `cpu_s`: of the engine's process meanwhile.
        steps: of the engine, and how long all of them took.
        kv_peak: greatest share of the KV cache in use; `preempted`: sequences that lost blocks.
        kv: samples of the KV cache over the load: time, blocks in use, tokens in them, running,
            waiting.
    """

    records: list[Record] = []
    lost: bool = False
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    steps: int = 0
    step_s: float = 0.0
    kv_peak: float = 0.0
    preempted: int = 0
    kv: list[dict[str, float]] = []


# --- from outside ---------------------------------------------------------------------------


class Engine:
    """The process. Use it as a context manager.

    Args:
        model: a local folder, or a hub id.
        arguments: vLLM's engine arguments.
        folder: for its log and the records of its loads.
        start_s: how long its start may take.
    """

    def __init__(
        self, model: str, arguments: Mapping[str, Any], folder: Path, start_s: float = START_S
    ) -> None:
        self.arguments = dict(arguments)
        self._command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "bench.engine.trial",
            "--model",
            model,
        ]
        self._command += ["--engine", json.dumps(self.arguments)]
        self._folder, self._start_s = folder, start_s
        self.ready: Ready | None = None

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._log = open(self._folder / "engine.log", "wb")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            process_group=0,
        )
        try:
            self.ready = msgspec.convert(self._answer(self._start_s), Ready)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def load(
        self,
        what: str,
        when: str,
        *,
        count: int,
        seed: int,
        slo: Slo | None = None,
        live: Mapping[str, int] | None = None,
        limit_s: float = 120.0,
        priorities: Mapping[str, int] | None = None,
    ) -> Answer:
        """Send a load and wait for its answers.

        Args:
            what, when, count, seed: workload, load, requests and seed of `bench run`.
            slo: the load is broken off once it cannot be kept.
            live: limits of the scheduler for this load; those that are not named are as started.
            limit_s: the load is broken off after so long.
            priorities: of requests, by their kind (needs scheduling_policy priority).

        Raises:
            EngineError: the engine ended, or did not answer in time.
        """
        path = self._folder / "load.jsonl"
        order = {
            "what": what,
            "when": when,
            "count": count,
            "seed": seed,
            "slo": msgspec.to_builtins(slo),
            "live": dict(live or {}),
            "limit_s": limit_s,
            "path": str(path),
            "priorities": dict(priorities or {}),
        }
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._failed()
        answer = msgspec.convert(self._answer(limit_s + 60), Answer)
        answer.records = list(read(path))
        return answer

    def complete(self, prompts: Sequence[str], tokens: int, limit_s: float) -> list[list[int]]:
        """The greedy tokens after each prompt, asked one at a time so that no batch changes them.

        Raises:
            EngineError: the engine ended, or did not answer in time.
        """
        assert self._process.stdin
        order = {"prompts": list(prompts), "tokens": tokens}
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._failed()
        return msgspec.convert(self._answer(limit_s)["completions"], list[list[int]])

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line of the process that is an answer; what vLLM prints is not."""
        assert self._process.stdout
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                break
            line = self._process.stdout.readline()
            if not line:
                self._failed()
            if line.startswith(b'{"bench"'):
                answer: dict[str, Any] = json.loads(line)["bench"]
                if "error" in answer:
                    raise BenchError(answer["error"])
                return answer
        raise EngineError(f"the engine did not answer within {timeout_s:.0f} s")

    def _failed(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        log = (self._folder / "engine.log").read_text(errors="replace")
        raise failure(log, self._process.returncode)

    def _end(self) -> None:
        """The process, and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()


def failure(log: str, status: int | None) -> EngineError:
    """Why an engine ended, from the end of its log. SIGKILL means that the kernel ran out of
    memory.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    oom = next((line for line in reversed(lines) if _OOM.search(line)), None)
    errors = [line for line in lines if re.match(r"^(failed:|[\w.]*(Error|Exception)\b)", line)]
    text = oom or (errors or lines or ["it said nothing"])[-1]
    if oom is None and status == -signal.SIGKILL:
        oom = text = "killed, as when a machine is out of memory"
    error = EngineError(f"the engine ended with status {status}: {text[:300]}")
    error.oom = oom is not None
    return error


# --- inside ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", type=json.loads, default={})
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    kernels.settle()
    # Answers go where nothing else does; what libraries print goes to the log.
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
    print(json.dumps({"bench": msgspec.to_builtins(ready)}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "prompts" in order:
            completions = {"completions": _complete(engine, order["prompts"], order["tokens"])}
            print(json.dumps({"bench": completions}), file=answers, flush=True)
            continue
        try:
            _limit(scheduler, limits, order["live"])
            answer = _drive(engine, scheduler, order)
        except BenchError as error:
            print(json.dumps({"bench": {"error": str(error)}}), file=answers, flush=True)
            continue
        path = Path(order["path"])
        path.write_bytes(b"")
        append(path, answer.records)
        answer.records = []
        print(json.dumps({"bench": msgspec.to_builtins(answer)}), file=answers, flush=True)


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


def _drive(engine: Any, scheduler: Any, order: Mapping[str, Any]) -> Answer:
    """One load: its requests when their time comes, and steps until all are answered."""
    slo = msgspec.convert(order["slo"], Slo) if order["slo"] else None
    source = workload.parse(order["what"], order["seed"], salt="")
    count = order["count"]
    requests = source.take(count)
    times_s = _times_s(order["when"], len(requests), order["seed"])
    prepared = [_prepared(engine, request, order["priorities"]) for request in requests]
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
    answer, waiting, at = Answer(), _Waiting(slo, records), 0
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
        answer.steps += 1
        answer.step_s += ended_s - now_s
        for output in outputs:
            if output.finished:
                _note(records[int(output.request_id)], output, start_s)
                answer.preempted += output.metrics.num_preemptions
                waiting.ended(int(output.request_id))
        if ended_s >= look_s:
            look_s = ended_s + _LOOK_S
            used = blocks - pool.get_num_free_blocks()
            answer.kv.append(_kv(scheduler, ended_s, used))
            answer.kv_peak = max(answer.kv_peak, used / blocks)
            answer.lost = waiting.lost(ended_s, engine.output_processor.request_states, start_s)
            if answer.lost or ended_s > order["limit_s"]:
                answer.lost = True
                engine.abort_request([str(index) for index in waiting.open])
                break
    answer.elapsed_s = time.monotonic() - start_s
    answer.cpu_s = time.process_time() - cpu_s
    answer.records = records
    _settle(engine, scheduler)
    return answer


def _times_s(when: str, count: int, seed: int) -> list[float]:
    """When each request is sent; all at once for `users=N`, where the engine's limits are users."""
    load = schedule.parse(when)
    if isinstance(load, schedule.Closed):
        return [0.0] * count
    if isinstance(load, schedule.TraceTimes):
        raise BenchError.of("load", when, "needs a load with times of its own")
    return load.times_s(count, None, seed)


def _prepared(engine: Any, request: Request, priorities: Mapping[str, int]) -> tuple[Any, Any, int]:
    """Prompt as tokens, so that no load pays for the tokenizer, and how it is to be answered."""
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
    """What an answer that is over was like, by the engine's own times."""
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
        """Those that wait longer for their first token than they may have missed already."""
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
        """Whether a request that is open got its first token too late, or has none."""
        assert self._slo is not None
        assert self._slo.ttft_s is not None
        state = states.get(self._open[index])
        first_s = state.stats.first_token_ts if state is not None and state.stats else 0.0
        return not first_s or first_s - start_s - planned_s > self._slo.ttft_s


def missed(records: Sequence[Record], slo: Slo) -> int:
    """Requests that did not keep the objective."""
    return sum(not slo.met_by(record) for record in records)


def good_share(records: Sequence[Record], slo: Slo) -> float:
    return 1 - missed(records, slo) / len(records) if records else 0.0


def output_tokens_per_s(answer: Answer, by_cpu: bool = False) -> float:
    """Of a load that was answered whole."""
    tokens = sum(record.output_tokens or 0 for record in answer.records)
    took_s = answer.cpu_s if by_cpu else answer.elapsed_s
    return tokens / took_s if took_s > 0 else 0.0


def tpot_s(records: Sequence[Record]) -> float | None:
    """The mean time per token of those that have one."""
    values = [value for record in records if (value := measure.tpot_s(record)) is not None]
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    main()
