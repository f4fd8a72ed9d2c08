"""LiteLLM in front of this server, as its router would ask it."""

import asyncio
import json

import litellm
from checks import MODEL, URL, check, raises, run

HELLO = [{"role": "user", "content": "Say hello."}]
CALL = {
    "model": f"hosted_vllm/{MODEL}",
    "api_base": f"{URL}/v1",
    "api_key": "unused",
    "messages": HELLO,
    "max_tokens": 16,
    "temperature": 0,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}


@check
def completion():
    answer = litellm.completion(**CALL)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens


@check
def streamed_as_plain():
    chunks = list(litellm.completion(**CALL, stream=True))
    whole = litellm.stream_chunk_builder(chunks, messages=HELLO)
    plain = litellm.completion(**CALL)
    assert whole.choices[0].message.content == plain.choices[0].message.content


@check
def asynchronous():
    answer = asyncio.run(litellm.acompletion(**CALL))
    assert answer.choices[0].message.content


@check
def forced_tool():
    call = {**CALL, "max_tokens": 100, "tools": [WEATHER], "tool_choice": "required"}
    [made] = litellm.completion(**call).choices[0].message.tool_calls
    assert set(json.loads(made.function.arguments)) == {"city"}


@check
def text_completion():
    answer = litellm.text_completion(
        model=f"hosted_vllm/{MODEL}",
        api_base=f"{URL}/v1",
        api_key="unused",
        prompt="One",
        max_tokens=4,
    )
    assert answer.choices[0].text


@check
def messages_of_anthropic():
    answer = asyncio.run(
        litellm.anthropic.messages.acreate(
            model=f"hosted_vllm/{MODEL}",
            api_base=f"{URL}/v1",
            api_key="unused",
            messages=HELLO,
            max_tokens=8,
        )
    )
    assert answer["content"]


@check
def unknown_model():
    with raises(litellm.NotFoundError, "nobody"):
        litellm.completion(**{**CALL, "model": "hosted_vllm/nobody"})


@check
def prompt_too_long():
    long = [{"role": "user", "content": "word " * 20000}]
    with raises(litellm.BadRequestError):
        litellm.completion(**{**CALL, "messages": long})


run()
