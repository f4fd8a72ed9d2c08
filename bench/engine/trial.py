"""An engine in a separate process that runs loads: what trials of `bench tune` measure.

    with Engine(model, arguments, folder) as engine:
        outcome = engine.load("synthetic:input=200,output=64", "poisson:rate=5", count=100, ...)

The process (trial_process.py) is separate because only a process that ends releases all of a GPU's
memory, and because an engine that runs out of memory takes its process with it. That is an
EngineError, and the next engine can start. Some limits of the scheduler can be changed between
loads (`live`), up to the values with which the engine was started.
"""

import contextlib
import json
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
from typing import Any, Self, TypeVar

import msgspec

from bench import measure
from bench.engine import orders
from bench.engine.orders import Completions, LoadOutcome, Ready, Refused
from bench.errors import BenchError
from bench.measure import Slo
from bench.records import Record, read

START_S = 600.0
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


A = TypeVar("A", Ready, LoadOutcome, Completions)


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
            "bench.engine.trial_process",
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
            self.ready = self._answer(Ready, self._start_s)
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
    ) -> LoadOutcome:
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
        order = orders.Load(
            what=what,
            when=when,
            count=count,
            seed=seed,
            slo=slo,
            live=dict(live or {}),
            limit_s=limit_s,
            path=str(path),
            priorities=dict(priorities or {}),
        )
        self._order(order)
        outcome = self._answer(LoadOutcome, limit_s + 60)
        outcome.records = list(read(path))
        return outcome

    def complete(self, prompts: Sequence[str], tokens: int, limit_s: float) -> list[list[int]]:
        """The greedy tokens after each prompt, asked one at a time so that no batch changes them.

        Raises:
            EngineError: the engine ended, or did not answer in time.
        """
        self._order(orders.Complete(prompts=list(prompts), tokens=tokens))
        return self._answer(Completions, limit_s).tokens

    def _order(self, order: orders.Order) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._failed()

    def _answer(self, kind: type[A], timeout_s: float) -> A:
        """The next line of the process that is an answer; what vLLM prints is not."""
        assert self._process.stdout
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                break
            line = self._process.stdout.readline()
            if not line:
                self._failed()
            if line.startswith(orders.PREFIX):
                answer = msgspec.json.decode(line, type=orders.Line).bench
                if isinstance(answer, Refused):
                    raise BenchError(answer.error)
                assert isinstance(answer, kind)
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


def missed(records: Sequence[Record], slo: Slo) -> int:
    """Requests that did not keep the objective."""
    return sum(not slo.met_by(record) for record in records)


def good_share(records: Sequence[Record], slo: Slo) -> float:
    return 1 - missed(records, slo) / len(records) if records else 0.0


def output_tokens_per_s(outcome: LoadOutcome, by_cpu: bool = False) -> float:
    """Of a load that was answered whole."""
    tokens = sum(record.output_tokens or 0 for record in outcome.records)
    took_s = outcome.cpu_s if by_cpu else outcome.elapsed_s
    return tokens / took_s if took_s > 0 else 0.0


def tpot_s(records: Sequence[Record]) -> float | None:
    """The mean time per token of those that have one."""
    values = [value for record in records if (value := measure.tpot_s(record)) is not None]
    return sum(values) / len(values) if values else None
