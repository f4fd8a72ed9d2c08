"""An answer that broke off goes on exactly, whatever it was and wherever it broke off.

A real engine with both of its front ends, without Ray: each answer is taken whole, then cut after
some of its events, and the rest asked for as a gateway would.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio

from serve_app.continuation import Method, Stream
from serve_app.errors import CannotContinue
from serve_app.gateway.handover import FastStream
from serve_app.gateway.lanes import state_of
from serve_app.pacing import Pacer
from serve_app.planning.plan import CPU_DEFAULTS
from serve_app.replica import forkserver
from serve_app.replica.backend import CONTINUE_HEADER, TOKEN_HEADER, Backend
from serve_app.replica.reports import Receiver
from serve_app.scaling.signals import Signals
from tests.server import ENGINE

if TYPE_CHECKING:
    from serve_app.replica.engine import Engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(smollm: Path) -> AsyncIterator["Engine"]:
    # Only who runs these tests pays for loading vLLM.
    from serve_app.replica import frontends
    from serve_app.replica.engine import Engine

    os.environ.update(
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        TORCHDYNAMO_DISABLE="1",
    )
    # What the engine's scheduler reports must be read, or it waits in the end.
    receiver = Receiver(lambda report: None)
    receiver.start()
    forkserver.start()
    arguments = {
        "model": str(smollm),
        "served_model_name": ["m"],
        "enable_auto_tool_choice": True,
        "tool_call_parser": "hermes",
        "dtype": "float32",
        **CPU_DEFAULTS,
        **ENGINE,
    }
    host = "127.0.0.1" if frontends.binary() is not None else None
    engine = Engine.start(arguments, Pacer(0.0), Signals(), continuing=True, fast_host=host)
    yield engine
    engine.stop()
    receiver.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(engine: "Engine") -> Backend:
    return Backend(await engine.app(), "secret")


async def ask_fast(engine: "Engine", path: str, body: dict[str, Any]) -> bytes:
    """The raw stream of the Rust front end, as the gateway asks for it."""
    if (fast := engine.fast) is None:
        pytest.skip("vllm-rs is not installed")
    headers = {"authorization": f"Bearer {fast.token}", "x-request-id": "r"}
    async with httpx.AsyncClient(base_url=f"http://{fast.host}:{fast.port}") as client:
        sent = {"return_token_ids": True, **body}
        answer = await client.post(path, json=sent, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.content


async def ask(app: Backend, path: str, body: dict[str, Any], stream: Stream | None = None) -> bytes:
    """The raw answer; with a stream that broke off, as its continuation."""
    headers = {TOKEN_HEADER: "secret", "content-type": "application/json", "x-request-id": "r"}
    content = json.dumps(body).encode()
    if stream is not None:
        known = state_of(stream)
        headers[CONTINUE_HEADER] = str(len(known))
        content = known + content
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        answer = await client.post(path, content=content, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.content


def content(events: list[bytes]) -> dict[str, Any]:
    """What a client makes of events, whatever their sizes: joined text, and all that comes once."""
    output: dict[str, Any] = {}

    def join(key: str, value: str | list[Any] | None) -> None:
        if value:
            output[key] = output[key] + value if key in output else value

    for event in events:
        line = next(part for part in event.split(b"\n") if part.startswith(b"data: "))
        if line == b"data: [DONE]":
            join("done", [1])
            continue
        data = json.loads(line[6:])
        kind = data.get("type", "")
        join("names", sorted({data["id"]} - set(output.get("names", []))) if "id" in data else None)
        if created := data.get("created"):
            output.setdefault("created", set()).add(created)
        if usage := data.get("usage"):
            usage.pop("prompt_tokens_details", None)
            usage.pop("completion_tokens_details", None)
            # With every event: how many there are differs with how tokens travel together.
            output["usage"] = usage
        for choice in data.get("choices", []):
            delta = choice.get("delta", choice)
            join("role", [delta["role"]] if delta.get("role") else None)
            join("text", delta.get("content") or delta.get("text"))
            join("ids", choice.get("token_ids"))
            join("logprobs", _logprobs(choice.get("logprobs")))
            join("finish", [choice["finish_reason"]] if choice.get("finish_reason") else None)
            join("stop", [choice["stop_reason"]] if choice.get("stop_reason") else None)
            for call in delta.get("tool_calls") or []:
                join("call", call["function"].get("name"))
                output.setdefault("calls", set()).update([call["id"]] if call.get("id") else [])
                join("arguments", call["function"].get("arguments"))
        if kind == "response.output_text.delta":
            join("text", data["delta"])
        elif kind == "response.completed":
            usage = data["response"]["usage"]
            join("usage", [[usage["input_tokens"], usage["output_tokens"]]])
            join("ended", [data["response"]["output"][-1]["content"][0]["text"]])
        elif kind == "content_block_delta":
            join("text", data["delta"].get("text"))
        elif kind == "message_delta":
            join("finish", [data["delta"]["stop_reason"]])
        if kind in ("response.created", "message_start"):
            whole = data.get("response") or data["message"]
            join("begun", [whole["id"]])
        if kind in ("response.completed",):
            join("begun", [data["response"]["id"]])
        if "item_id" in data:
            output.setdefault("items", set()).add(data["item_id"])
    return output


def _logprobs(given: dict[str, Any] | None) -> list[Any]:
    if not given:
        return []
    if "content" in given:
        return [
            [c["token"], round(c["logprob"], 1), len(c["top_logprobs"])] for c in given["content"]
        ]
    pairs = zip(given["tokens"], given["token_logprobs"], given["text_offset"], strict=True)
    return [[token, round(logprob, 1), offset] for token, logprob, offset in pairs]


PROMPT = "The three primary colours are"
CHAT = [{"role": "user", "content": "Name three colours, in words and as emoji."}]
GREEDY: dict[str, Any] = {"model": "m", "stream": True, "temperature": 0}
COMPLETION = GREEDY | {"prompt": PROMPT, "max_tokens": 24}
ANSWERS: dict[str, tuple[str, dict[str, Any], Method]] = {
    "completion": ("/v1/completions", COMPLETION, Method.RESUME),
    "chat": (
        "/v1/chat/completions",
        GREEDY
        | {"messages": CHAT, "max_tokens": 24, "stream_options": {"include_usage": True}}
        | {"return_token_ids": True},
        Method.RESUME,
    ),
    "usage with every event": (
        "/v1/completions",
        COMPLETION | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        Method.RESUME,
    ),
    # Several bytes each: a cut falls within a character.
    "characters of several bytes": (
        "/v1/completions",
        COMPLETION | {"prompt": "Emoji: 🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧 and again: 🦊🐻🐼"},
        Method.RESUME,
    ),
    "a stop string": (
        "/v1/completions",
        COMPLETION | {"prompt": "1, 2, 3, 4,", "stop": ["9, 10, 11, 12"], "max_tokens": 60},
        Method.RESUME,
    ),
    "min_tokens": (
        "/v1/completions",
        COMPLETION | {"min_tokens": 20, "stop_token_ids": [28, 30, 284], "max_tokens": 40},
        Method.RESUME,
    ),
    "max_tokens of one": ("/v1/completions", COMPLETION | {"max_tokens": 1}, Method.RESUME),
    "repetition_penalty": (
        "/v1/completions",
        COMPLETION | {"repetition_penalty": 1.4},
        Method.RESUME,
    ),
    "logit_bias": ("/v1/completions", COMPLETION | {"logit_bias": {"260": -8}}, Method.RESUME),
    "logprobs": ("/v1/completions", COMPLETION | {"logprobs": 2}, Method.RESUME),
    "logprobs of chat": (
        "/v1/chat/completions",
        GREEDY | {"messages": CHAT, "max_tokens": 16, "logprobs": True, "top_logprobs": 2},
        Method.RESUME,
    ),
    # The tokens that a grammar forbids have a logprob of minus infinity.
    "a grammar with top_logprobs": (
        "/v1/chat/completions",
        GREEDY
        | {"messages": CHAT, "max_tokens": 8, "logprobs": True, "top_logprobs": 5}
        | {"structured_outputs": {"choice": ["yes and no", "no and yes"]}},
        Method.REPEAT,
    ),
    "a grammar with logprobs of completions": (
        "/v1/completions",
        COMPLETION | {"max_tokens": 8, "logprobs": 3, "structured_outputs": {"regex": "[ab]{6}"}},
        Method.REPEAT,
    ),
    "echo": ("/v1/completions", COMPLETION | {"echo": True}, Method.RESUME),
    "presence and frequency": (
        "/v1/completions",
        COMPLETION | {"presence_penalty": 0.7, "frequency_penalty": 0.6},
        Method.REPEAT,
    ),
    "a seed": (
        "/v1/completions",
        COMPLETION | {"temperature": 0.9, "top_p": 0.95, "seed": 7},
        Method.REPEAT,
    ),
    "bad_words": ("/v1/completions", COMPLETION | {"bad_words": ["red"]}, Method.REPEAT),
    "a schema": (
        "/v1/chat/completions",
        GREEDY
        | {"messages": CHAT, "max_tokens": 24}
        | {"structured_outputs": {"regex": "(red|green|blue)( (red|green|blue)){6}"}},
        Method.REPEAT,
    ),
    "a tool call": (
        "/v1/chat/completions",
        GREEDY
        | {"messages": CHAT, "max_tokens": 40, "tools": [TOOL]}
        | {"tool_choice": {"type": "function", "function": {"name": "look"}}},
        Method.REPEAT,
    ),
    "responses": (
        "/v1/responses",
        GREEDY | {"input": PROMPT, "max_output_tokens": 16},
        Method.RESUME,
    ),
    "messages": ("/v1/messages", GREEDY | {"messages": CHAT, "max_tokens": 16}, Method.RESUME),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole_answers(app: Backend) -> dict[str, bytes]:
    """Each of `ANSWERS`, whole. Together they take little longer than one."""
    asked = [ask(app, path, body) for path, body, _ in ANSWERS.values()]
    return dict(zip(ANSWERS, await asyncio.gather(*asked), strict=True))


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_continues_exactly_from_every_cut(
    app: Backend, whole_answers: dict[str, bytes], name: str
) -> None:
    path, body, method = ANSWERS[name]
    raw = whole_answers[name]
    events = Stream().events(raw)
    whole = content(events)
    marked = [event + b"\n\n" for event in raw.split(b"\n\n")[:-1]]
    assert len(marked) == len(events)
    # The first and last events differ in kind; those between do not.
    last = len(marked) - 1
    cuts = sorted({cut for cut in (1, last // 2, last) if 0 < cut <= last})
    streams = [Stream() for _ in cuts]
    firsts = []
    for cut, stream in zip(cuts, streams, strict=True):
        firsts.append(stream.events(b"".join(marked[:cut]) + marked[cut][:7]))
        if stream.progress.groups:
            assert stream.method is method
    rests = await asyncio.gather(*(ask(app, path, body, stream) for stream in streams))
    for cut, stream, first, rest in zip(cuts, streams, firsts, rests, strict=True):
        result = content(first + stream.events(rest))
        # Made anew for each answer, unless the client has it already; one answer has one.
        for key in ("calls", "begun", "items"):
            assert len(set(result.pop(key, ()))) == len(set(whole.get(key, ())))
        expected = {k: v for k, v in whole.items() if k not in ("calls", "begun", "items")}
        assert result == expected, f"cut after {cut} of {len(marked)} events"


EMOJI = COMPLETION | {"prompt": "Emoji: 🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧 and again: 🦊🐻🐼"}
USAGE = {"stream_options": {"include_usage": True}}
# Of the answers above and others those that may take the fast lane.
FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", COMPLETION | USAGE),
    "chat": (
        "/v1/chat/completions",
        GREEDY | USAGE | {"messages": CHAT, "max_tokens": 24},
    ),
    "characters of several bytes": ("/v1/completions", EMOJI),
    "the end within a character": ("/v1/completions", EMOJI | USAGE | {"max_tokens": 10}),
    "a stop string": (
        "/v1/completions",
        COMPLETION | USAGE | {"prompt": "1, 2, 3, 4,", "stop": ["9, 10, 11"], "max_tokens": 60},
    ),
    "the model's own end": (
        "/v1/chat/completions",
        GREEDY | {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 200},
    ),
    "max_tokens of one": ("/v1/completions", COMPLETION | USAGE | {"max_tokens": 1}),
    "presence and frequency": (
        "/v1/completions",
        COMPLETION | {"presence_penalty": 0.7, "frequency_penalty": 0.6},
    ),
    "a seed": ("/v1/completions", COMPLETION | {"temperature": 0.9, "top_p": 0.95, "seed": 7}),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fast_answers(engine: "Engine") -> dict[str, bytes]:
    """Each of `FAST`, whole."""
    asked = [ask_fast(engine, path, body) for path, body in FAST.values()]
    return dict(zip(FAST, await asyncio.gather(*asked), strict=True))


@pytest.mark.parametrize("name", FAST)
async def test_an_answer_of_the_fast_lane_continues_exactly_in_the_full_lane(
    app: Backend, fast_answers: dict[str, bytes], name: str
) -> None:
    path, body = FAST[name]
    raw = fast_answers[name]
    written = [event + b"\n\n" for event in raw.split(b"\n\n")[:-1]]
    whole = content(FastStream().events(raw))
    last = len(written) - 1
    # After the first token, in the middle, and around the end, whose parts come one by one.
    cuts = sorted({2, last // 2, last - 2, last - 1, last} & {*range(1, last + 1)})
    streams = [FastStream() for _ in cuts]
    firsts = [
        stream.events(b"".join(written[:cut]) + written[cut][:7])
        for cut, stream in zip(cuts, streams, strict=True)
    ]
    # Where nothing was sent, it is asked again whole.
    begun = [each for each in zip(cuts, streams, firsts, strict=True) if each[1].sent]
    rests = await asyncio.gather(*(ask(app, path, body, stream) for _, stream, _ in begun))
    for (cut, stream, first), rest in zip(begun, rests, strict=True):
        result = content(first + stream.events(rest))
        stream.finish()
        expected = dict(whole)
        if "\ufffd" in whole["text"] and "\ufffd" not in content(first).get("text", ""):
            # An answer that ends inside a character: the full lane drops that part of it.
            expected["text"] = whole["text"].rstrip("\ufffd")
        assert result == expected, f"cut after {cut} of {len(written)} events"


async def test_an_answer_of_the_fast_lane_that_cannot_continue_says_so(
    engine: "Engine", app: Backend
) -> None:
    body = COMPLETION | {"temperature": 1.0, "frequency_penalty": 0.5}
    raw = await ask_fast(engine, "/v1/completions", body)
    stream = FastStream()
    assert stream.events(b"".join(event + b"\n\n" for event in raw.split(b"\n\n")[:5]))
    with pytest.raises(CannotContinue):
        stream.events(await ask(app, "/v1/completions", body, stream))


async def test_an_answer_breaks_off_twice(app: Backend) -> None:
    path, body, _ = ANSWERS["chat"]
    raw = await ask(app, path, body)
    marked = [event + b"\n\n" for event in raw.split(b"\n\n")[:-1]]
    stream = Stream()
    got = stream.events(b"".join(marked[:5]))
    again = await ask(app, path, body, stream)
    # Broken off while it repeats what is known: nothing is lost of that.
    got += stream.events(again[: len(b"".join(marked[:3]))])
    again = await ask(app, path, body, stream)
    got += stream.events(b"".join(e + b"\n\n" for e in again.split(b"\n\n")[:9]))
    got += stream.events(await ask(app, path, body, stream))
    assert content(got) == content(Stream().events(raw))


async def test_what_cannot_be_exact_says_so(app: Backend) -> None:
    for different in (
        {"temperature": 1.0, "frequency_penalty": 0.5},
        {"n": 2, "temperature": 1.0},
        {"prompt": ["a", "b"]},
        {"echo": True, "logprobs": 2},
    ):
        raw = await ask(app, "/v1/completions", COMPLETION | different)
        stream = Stream()
        stream.events(raw)
        assert stream.method is Method.NEVER, different


async def test_an_answer_that_comes_out_otherwise_is_an_error_after_what_was_sent(
    app: Backend,
) -> None:
    path, body, _ = ANSWERS["a seed"]
    raw = await ask(app, path, body)
    marked = [event + b"\n\n" for event in raw.split(b"\n\n")[:-1]]
    stream = Stream()
    stream.events(b"".join(marked[:6]))
    rest = stream.events(await ask(app, path, body | {"seed": 8}, stream))
    assert b"error" in rest[0]
    assert "text" not in content(rest[1:])


async def test_a_model_is_described_by_its_name(app: Backend) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        headers = {TOKEN_HEADER: "secret"}
        listed = (await client.get("/v1/models", headers=headers)).json()["data"]
        first = (await client.get("/v1/models/m", headers=headers)).json()
        # vLLM makes an id for the permission each time.
        assert {**first, "permission": 0} == {**listed[0], "permission": 0}
        missing = await client.get("/v1/models/other", headers=headers)
    assert missing.status_code == 404
    assert "no model 'other'" in missing.json()["error"]["message"]


async def test_without_its_token_nothing_is_answered(app: Backend) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        for headers in ({}, {TOKEN_HEADER: "other"}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 404
