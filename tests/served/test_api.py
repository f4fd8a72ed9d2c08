"""The whole API with the official clients, against the real engine with real weights."""

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server import Server

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ASK = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        # Without it vLLM, like OpenAI, does not hold the arguments to the schema.
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_model_by_its_name(client: openai.OpenAI) -> None:
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model 'other/model'"):
        client.models.retrieve("other/model")


def test_chat_is_an_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=32)
    assert "Paris" in str(answer.choices[0].message.content)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_same_answer_with_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=32)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 4
    assert chunks[-1].usage == whole.usage
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [r for r in reasons if r] == [whole.choices[0].finish_reason]


def test_completions_with_n_stop_seed_and_logprobs(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(
            model=MODEL, prompt="The sky is", n=3, seed=seed, temperature=1.0, max_tokens=12
        )
        return [choice.text for choice in answer.choices]

    first = ask(7)
    assert len(set(first)) == 3
    assert ask(7) == first
    assert ask(8) != first
    counted = client.completions.create(
        model=MODEL, prompt="1 2 3 4 5", stop=["8"], temperature=0, max_tokens=20, logprobs=2
    )
    choice = counted.choices[0]
    assert choice.finish_reason == "stop"
    assert "7" in choice.text
    assert "8" not in choice.text
    assert choice.logprobs is not None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs or [1.0])


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=4, logprobs=True, top_logprobs=3, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [len(token.top_logprobs) for token in logprobs.content or []] == [3] * 4


def test_no_request_makes_the_engine_compile(client: openai.OpenAI, server: Server) -> None:
    """Which vLLM does at the first one with logprobs, while all others wait."""
    client.completions.create(model=MODEL, prompt="1 2 3", max_tokens=2, logprobs=1)
    compiled = server.log.parent / "compiled"
    assert not [path for path in compiled.rglob("*") if path.is_file()]


def test_json_schema_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 10},
            "million": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["city", "million"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        max_tokens=80,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
    )
    parsed = json.loads(str(answer.choices[0].message.content))
    assert set(parsed) == {"city", "million"}
    assert isinstance(parsed["million"], int)


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather in Rome?"}],
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=60,
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_as_qwen_writes_it_is_parsed(client: openai.OpenAI, stream: bool) -> None:
    # The grammar makes the small model write what Qwen2.5 writes by itself; a strict tool would
    # bring a grammar of its own.
    tool = {"type": "function", "function": {**TOOL["function"], "strict": False}}
    qwen = r'<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "Rome"\}\}\n</tool_call>'
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather in Rome?"}],
        tools=[tool],
        tool_choice="auto",
        max_tokens=60,
        temperature=0,
        stream=stream,
        extra_body={"structured_outputs": {"regex": qwen}},
    )
    if stream:
        parts = [d for c in answer for d in (c.choices[0].delta.tool_calls or [])]
        name = "".join(p.function.name or "" for p in parts)
        arguments = "".join(p.function.arguments or "" for p in parts)
    else:
        (call,) = answer.choices[0].message.tool_calls or []
        name, arguments = call.function.name, call.function.arguments
        assert answer.choices[0].finish_reason == "tool_calls"
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Rome"})


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL, input=ASK[0]["content"], temperature=0, max_output_tokens=32
    )
    assert "Paris" in answer.output_text
    text = ""
    with client.responses.stream(
        model=MODEL, input=ASK[0]["content"], temperature=0, max_output_tokens=32
    ) as events:
        for event in events:
            if event.type == "response.output_text.delta":
                text += event.delta
    assert text == answer.output_text


def test_anthropic_messages(server: Server) -> None:
    import anthropic  # Takes seconds to load.

    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)
    greedy = {"temperature": 0}  # This client has no such argument.
    ask: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 32, "extra_body": greedy}
    answer = client.messages.create(**ask)
    assert "Paris" in answer.content[0].text
    assert answer.usage.output_tokens > 0
    with client.messages.stream(**ask) as stream:
        assert "".join(stream.text_stream) == answer.content[0].text
    count = client.messages.count_tokens(model=MODEL, messages=ASK)
    # Anthropic's input_tokens are those that were not read from the cache.
    cached = answer.usage.cache_read_input_tokens or 0
    assert count.input_tokens == answer.usage.input_tokens + cached


def test_tokenize_and_detokenize(server: Server) -> None:
    text = "Hello, world"
    tokens = httpx.post(f"{server.url}/tokenize", json={"model": MODEL, "prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"])
    body = {"model": MODEL, "tokens": tokens["tokens"]}
    assert httpx.post(f"{server.url}/detokenize", json=body).json()["prompt"] == text


def test_priority_is_taken(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="x", max_tokens=1, extra_body={"priority": -1}
    )
    assert answer.choices[0].finish_reason == "length"


def test_a_request_can_be_found_by_its_id(server: Server) -> None:
    response = httpx.get(f"{server.url}/v1/models", headers={"x-request-id": "find-me"})
    assert response.headers["x-request-id"] == "find-me"
