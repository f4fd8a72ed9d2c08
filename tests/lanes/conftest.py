"""One engine with both front ends, in this process: no Ray, no HAProxy."""

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from serve_app.gates.refusal import RefusalGate
from serve_app.pacing import Pacer
from serve_app.planning.plan import CPU_DEFAULTS
from serve_app.replica import forkserver
from serve_app.replica.reports import Ended, Receiver, Report
from serve_app.scaling.signals import Signals
from tests.server import ENGINE


@dataclass
class Lanes:
    """An engine, whose event loop runs in a thread of its own.

    Attributes:
        fast, full: clients of vllm-rs and of vLLM's Python application.
        ended: what the engine reported of requests in the fast lane.
    """

    loop: asyncio.AbstractEventLoop
    engine: Any
    fast: httpx.Client
    full: httpx.Client
    ended: list[Ended] = field(default_factory=list)

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    @property
    def running(self) -> int:
        """Requests of both lanes that the scheduler has, by its last report."""
        return self._held

    _held: int = 0

    def note(self, report: Report) -> None:
        self.ended += report.ended
        self._held = report.running + report.waiting


@pytest.fixture(scope="package")
def lanes(tiny: Path) -> Iterator[Lanes]:
    from serve_app.replica import frontends
    from serve_app.replica.engine import Engine

    if frontends.binary() is None:
        pytest.skip("vllm-rs is not installed")
    os.environ.update(
        VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1"
    )
    arguments = {
        "model": str(tiny),
        "served_model_name": ["tiny"],
        "enable_auto_tool_choice": True,
        "enable_prompt_tokens_details": True,
        "tool_call_parser": "hermes",
        "dtype": "float32",
        **CPU_DEFAULTS,
        **ENGINE,
        "max_num_seqs": 64,
    }
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    forkserver.start()
    found: list[Lanes] = []
    receiver = Receiver(lambda report: found[0].note(report) if found else None)

    async def start() -> tuple[Any, uvicorn.Server]:
        engine = Engine.start(arguments, Pacer(0.0), Signals(), fast_host="127.0.0.1")
        receiver.start()
        app = RefusalGate(await engine.app())
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="critical", lifespan="off", loop="none")
        )
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        server.serving = serving  # type: ignore[attr-defined]
        await engine.fast.probe()
        return engine, server

    engine, server = asyncio.run_coroutine_threadsafe(start(), loop).result(240)
    port = server.servers[0].sockets[0].getsockname()[1]
    key = {"authorization": f"Bearer {engine.fast.token}"}
    fast = f"http://{engine.fast.host}:{engine.fast.port}"
    with (
        httpx.Client(base_url=fast, headers=key, timeout=60) as rust,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as python,
    ):
        # The engine keeps the grammar compiler that the full lane asks for (lanes/fastlane.py).
        grammar = {"model": "tiny", "prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}}
        assert python.post("/v1/completions", json=grammar).status_code == 200
        found.append(Lanes(loop, engine, rust, python))
        yield found[0]
    server.should_exit = True
    engine.stop()
    receiver.close()
    loop.call_soon_threadsafe(loop.stop)
