"""A server that bench starts, with the loads of a trial: `trial.Engine`, behind HTTP.

    with Served("ours", model, arguments, folder, port=8890) as server:
        answer = server.load("synthetic:input=200,output=64", "poisson:rate=5", count=100, seed=0)

The systems are a bare vLLM ("bare") and this application ("ours"), which may have several replicas.
Requests are sent from this process at their planned times, whatever came of the others.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import psutil
import yaml

from bench import deployment, measure, overhead, schedule, trial, workload
from bench.client import Client, Target
from bench.errors import BenchError
from bench.measure import Slo
from bench.records import Record
from bench.schedule import Closed, Open
from bench.trial import Answer, EngineError

_LAG_S = 0.05
_STOP_S = 60.0
SYSTEMS = ("bare", "ours")


class Served:
    """The server. Use it as a context manager.

    Args:
        arguments: vLLM's, tensor_parallel_size among them.
        replicas: of "ours".

    Raises EngineError where it does not start.
    """

    def __init__(
        self,
        system: str,
        model: str,
        arguments: Mapping[str, Any],
        folder: Path,
        port: int = 8890,
        start_s: float = trial.START_S,
        replicas: int = 1,
    ) -> None:
        if system not in SYSTEMS:
            raise BenchError.of("system", system, "no such system", SYSTEMS)
        if replicas > 1 and system == "bare":
            raise BenchError.of("replicas", replicas, "a bare vLLM has one")
        folder.mkdir(parents=True, exist_ok=True)
        self._port, self._folder, self._start_s = port, folder, start_s
        if system == "bare":
            self._command = _bare(model, arguments, port)
        else:
            self._command = _ours(model, arguments, port, folder, replicas)
        self._replicas = replicas
        self.load_s = 0.0

    def __enter__(self) -> Self:
        begun_s = time.monotonic()
        self._log = open(self._folder / "server.log", "wb")
        self._process = subprocess.Popen(
            self._command,
            env={**os.environ, **overhead.QUIET, **overhead.apart(self._port)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        self.load_s = time.monotonic() - begun_s
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        """Ask it to stop, then see that nothing of it is left."""
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            family = [root, *root.children(recursive=True)]
            root.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=_STOP_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._log.close()

    def load(
        self,
        what: str,
        when: str,
        *,
        count: int,
        seed: int,
        slo: Slo | None = None,
        limit_s: float = 120.0,
    ) -> Answer:
        """As `trial.Engine.load`; `users=N` keeps N requests under way."""
        return asyncio.run(self._load(what, when, count, seed, limit_s))

    async def _load(self, what: str, when: str, count: int, seed: int, limit_s: float) -> Answer:
        target = Target(
            url=f"http://127.0.0.1:{self._port}",
            model=overhead.NAME,
            timeout_s=limit_s,
            extra={"temperature": 0, "ignore_eos": True},
        )
        requests = workload.parse(what, seed).take(count)
        load = schedule.parse(when)
        records = [
            Record(
                index=index,
                planned_s=0.0,
                kind=request.kind,
                asked_input_tokens=request.input_tokens,
                asked_output_tokens=request.output_tokens,
            )
            for index, request in enumerate(requests)
        ]
        start_s = time.perf_counter()
        with contextlib.closing(Client(target, time.perf_counter)) as client:

            async def ask(index: int) -> None:
                request = requests[index]
                request = msgspec.structs.replace(
                    request, extra={**request.extra, "min_tokens": request.output_tokens}
                )
                records[index] = await client.ask(request, records[index])

            async def at(index: int, time_s: float) -> None:
                records[index].planned_s = start_s + time_s
                await asyncio.sleep(start_s + time_s - time.perf_counter())
                await ask(index)

            async def user(left: Any) -> None:
                for index in left:
                    records[index].planned_s = time.perf_counter()
                    await ask(index)

            if isinstance(load, Closed):
                left = iter(range(count))
                await asyncio.gather(*(user(left) for _ in range(load.users)))
            else:
                assert isinstance(load, Open)
                times_s = load.times_s(count, None, seed)
                await asyncio.gather(*(at(i, time_s) for i, time_s in enumerate(times_s)))
        return Answer(records=records, elapsed_s=time.perf_counter() - start_s)

    def _wait(self) -> None:
        """Until it answers a request: a route may be there before its replica is."""
        deadline_s = time.monotonic() + self._start_s
        url = f"http://127.0.0.1:{self._port}/v1/models"
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                said = (self._folder / "server.log").read_text(errors="replace")
                raise trial.failure(said, self._process.returncode)
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=5).close()
                return
            time.sleep(0.2)
        raise EngineError(f"the server was not ready after {self._start_s:.0f} s")


def _bare(model: str, arguments: Mapping[str, Any], port: int) -> list[str]:
    words = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", model, "--served-model-name", overhead.NAME, "--host", "127.0.0.1"]
    words += ["--port", str(port), "--disable-uvicorn-access-log"]
    return words + [_flag(name, value) for name, value in arguments.items()]


def _flag(name: str, value: Any) -> str:
    """An argument as vLLM's command line has it: JSON for objects, --no-x for False."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    text = json.dumps(value) if isinstance(value, dict | list) else value
    return f"--{option}={text}"


def _ours(
    model: str, arguments: Mapping[str, Any], port: int, folder: Path, replicas: int
) -> list[str]:
    config = yaml.safe_load(
        deployment.text(model=model, engine=arguments, tuned={}, why="bench", replicas=replicas)
    )
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["served_model_name"] = overhead.NAME
    path = folder / f"{port}.yaml"
    path.write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "serve_app", "serve", "--config", str(path)]


def lag(records: list[Record]) -> str:
    """A doubt, where this process sent too late; else empty."""
    late_s = sorted(value for record in records if (value := measure.lag_s(record)) is not None)
    worst_s = late_s[int(0.99 * (len(late_s) - 1))] if late_s else 0.0
    return f"late: requests were sent up to {worst_s * 1e3:.0f} ms" if worst_s > _LAG_S else ""
