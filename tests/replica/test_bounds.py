"""What an engine runs for a request, counted by the engine itself: prompts, answers, sequences."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from starlette.types import ASGIApp

from serve_app.gates import routes
from serve_app.gates.admission import Admission, AdmissionGate
from serve_app.gates.limits import LimitGate
from serve_app.pacing import Pacer
from serve_app.planning.plan import CPU_DEFAULTS
from serve_app.replica import forkserver
from serve_app.scaling.signals import Signals
from serve_app.settings import Limits
from tests.server import ENGINE

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Stack:
    """An engine with the gates of a replica in front of it."""

    engine: Any
    app: ASGIApp
    admission: Admission
    gate: LimitGate

    def limit(self, **limits: Any) -> None:
        """As `Replica.reconfigure` does."""
        self.gate.limits = Limits(**limits)
        self.engine.bounds.change(self.gate.limits)

    async def ask(self, path: str, body: dict[str, Any], method: str = "POST") -> httpx.Response:
        transport = httpx.ASGITransport(self.gate)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.request(method, path, json=body, timeout=120)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tiny: Path) -> AsyncIterator[Stack]:
    from serve_app.replica.engine import Engine

    os.environ.update(
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        TORCHDYNAMO_DISABLE="1",
    )
    forkserver.start()
    arguments = {
        "model": str(tiny),
        "served_model_name": ["m"],
        "enable_auto_tool_choice": True,
        "tool_call_parser": "hermes",
        "dtype": "float32",
        **CPU_DEFAULTS,
        **ENGINE,
        "max_num_seqs": 64,
        "enable_scale_out": True,
    }
    engine = Engine.start(arguments, Pacer(0.0), Signals())
    app = await engine.app()
    admission = Admission(engine.max_running_requests, 10, 1.0)
    admitted = AdmissionGate(app, admission, Limits(), lambda: True, Signals())
    yield Stack(engine, app, admission, LimitGate(admitted, Limits()))
    engine.stop()


HELLO = [{"role": "user", "content": "Hello, how are you today?"}]
PROMPTS = [
    ("/v1/completions", {"prompt": "Hello, how are you today? " * 5, "max_tokens": 1}),
    ("/v1/completions", {"prompt": [5] * 11, "max_tokens": 1}),
    ("/v1/completions", {"prompt": [[5], [5] * 11], "max_tokens": 1}),
    ("/v1/completions", {"prompt": ["x", "Hello, how are you today? " * 5], "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1}),
    ("/v1/chat/completions/batch", {"messages": [HELLO], "max_tokens": 1}),
    ("/v1/responses", {"input": "Hello, how are you today?", "max_output_tokens": 1}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 1}),
    ("/inference/v1/generate", {"token_ids": [5] * 11, "sampling_params": {"max_tokens": 1}}),
    (
        "/v1/chat/completions",
        {"messages": HELLO, "max_tokens": 1, "kv_transfer_params": {"prompt_token_ids": [5] * 11}},
    ),
    (
        "/generative_scoring",
        {"query": [5] * 8, "items": [[5] * 3], "label_token_ids": [1, 2]},
    ),
]


@pytest.mark.parametrize(("path", "body"), PROMPTS)
async def test_a_prompt_that_is_too_long_is_refused_on_every_route(
    stack: Stack, path: str, body: dict[str, Any]
) -> None:
    stack.limit(max_prompt_tokens=10)
    refused = await stack.ask(path, {"model": "m", **body})
    assert refused.status_code == 400, refused.text
    assert "above this server's 10" in refused.text
    stack.limit(max_prompt_tokens=200)
    answered = await stack.ask(path, {"model": "m", **body})
    assert answered.status_code == 200, answered.text


async def test_a_stream_whose_prompt_is_too_long_is_refused_before_it_begins(stack: Stack) -> None:
    stack.limit(max_prompt_tokens=10)
    for path, body in (PROMPTS[0], PROMPTS[4], PROMPTS[6], PROMPTS[7], PROMPTS[8]):
        refused = await stack.ask(path, {"model": "m", **body, "stream": True})
        assert refused.status_code == 400, refused.text


async def test_a_prompt_of_any_length_may_be_tokenized(stack: Stack) -> None:
    stack.limit(max_prompt_tokens=10)
    answered = await stack.ask("/tokenize", {"model": "m", "prompt": "word " * 100})
    assert answered.json()["count"] > 90
    counted = await stack.ask(
        "/v1/messages/count_tokens", {"model": "m", "messages": HELLO, "max_tokens": 1}
    )
    assert counted.status_code in (200, 400)


async def test_a_truncated_prompt_counts_as_what_is_left_of_it(stack: Stack) -> None:
    stack.limit(max_prompt_tokens=10)
    body = {"model": "m", "prompt": [5] * 50, "truncate_prompt_tokens": 5, "max_tokens": 1}
    assert (await stack.ask("/v1/completions", body)).status_code == 200


async def test_a_changed_bound_of_answers_holds_for_requests_that_name_none(stack: Stack) -> None:
    chat = {"model": "m", "messages": HELLO, "ignore_eos": True}

    async def length() -> int:
        answer = (await stack.ask("/v1/chat/completions", chat)).json()
        return int(answer["usage"]["completion_tokens"])

    stack.limit(max_tokens=5)
    assert await length() == 5
    stack.limit(max_tokens=9)
    assert await length() == 9
    for path, body, key in (
        ("/v1/responses", {"input": "Hello", "ignore_eos": True}, "output_tokens"),
        ("/v1/completions", {"prompt": "Hello", "ignore_eos": True}, "completion_tokens"),
    ):
        answer = (await stack.ask(path, {"model": "m", **body})).json()
        assert answer["usage"][key] <= 9
    tokens = {"token_ids": [5], "sampling_params": {"ignore_eos": True}}
    answer = (await stack.ask("/inference/v1/generate", tokens)).json()
    assert len(answer["choices"][0]["token_ids"]) == 9
    refused = await stack.ask("/v1/chat/completions", {**chat, "max_tokens": "10"})
    assert refused.status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "n": "8"}),
        ("/v1/chat/completions/batch", {"messages": [HELLO] * 24}),
        ("/v1/completions", {"prompt": ["x"] * 6, "n": 4.0}),
        ("/v1/completions", {"prompt": "x", "n": 8, "use_beam_search": True}),
        ("/generative_scoring", {"query": "x", "items": ["a"] * 30, "label_token_ids": [1, 2]}),
        ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"n": 5}}),
    ],
)
async def test_admission_counts_at_least_what_the_engine_runs(
    stack: Stack, path: str, body: dict[str, Any]
) -> None:
    stack.limit()
    more = {"max_tokens": 24, "ignore_eos": True}
    if "sampling_params" in body:
        body = {**body, "sampling_params": {**body["sampling_params"], **more}}
    request = asyncio.create_task(stack.ask(path, {"model": "m", **body, **more}))
    admitted = in_engine = 0
    states = stack.engine._llm.output_processor.request_states
    while not request.done():
        await asyncio.sleep(0.001)
        admitted = max(admitted, stack.admission.running)
        in_engine = max(in_engine, len(states))
    assert request.result().status_code == 200, request.result().text
    assert in_engine <= admitted
    assert stack.admission.running == 0


async def test_what_is_served_is_what_is_listed(stack: Stack) -> None:
    schema = (await stack.ask("/openapi.json", {}, "GET")).json()
    served = {route.path for route in stack.app.routes}  # type: ignore[attr-defined]
    for path in served | set(schema["paths"]):
        assert routes.find(path) is not None
    assert {"/v1/chat/completions", "/v1/messages", "/tokenize"} <= set(schema["paths"])


async def test_answers_are_bounded_by_the_smaller_of_two_bounds() -> None:
    from serve_app.replica.bounds import Bounds

    chat, tokens = SimpleNamespace(override_max_tokens=None), SimpleNamespace(override_max_tokens=7)
    bounds = Bounds()
    bounds.change(Limits(max_tokens=5))
    bounds.serve(SimpleNamespace(openai_serving_chat=chat, serving_tokens=tokens))
    assert (chat.override_max_tokens, tokens.override_max_tokens) == (5, 5)
    bounds.change(Limits(max_tokens=9))
    assert (chat.override_max_tokens, tokens.override_max_tokens) == (9, 7)
    bounds.change(Limits())
    assert (chat.override_max_tokens, tokens.override_max_tokens) == (None, 7)
