"""OpenAI's own SDK: every resource of it that a chat server has."""

import asyncio
import json

import openai
from checks import MODEL, URL, check, raises, run
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="unused", max_retries=0)
HELLO = [{"role": "user", "content": "Say hello."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    city: str = Field(max_length=20)
    rank: int = Field(ge=0, le=99)


@check
def models_list_and_retrieve():
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@check
def unknown_model():
    with raises(openai.NotFoundError, "nobody"):
        client.chat.completions.create(model="nobody", messages=HELLO, max_tokens=4)


@check
def chat():
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=16, temperature=0
    )
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@check
def chat_of_several_choices_with_logprobs():
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=4, n=2, seed=1, logprobs=True, top_logprobs=3
    )
    assert [len(choice.logprobs.content) for choice in answer.choices] == [4, 4]
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3


@check
def chat_streamed_with_usage():
    text, usage, finish = "", None, None
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    plain = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=16, temperature=0
    )
    assert text == plain.choices[0].message.content
    assert finish == plain.choices[0].finish_reason
    assert usage.completion_tokens == plain.usage.completion_tokens


@check
def chat_stream_helper():
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, max_tokens=200, stop=["."], temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    assert stream.get_final_completion().choices[0].message.content


@check
def content_in_parts():
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}], max_tokens=8
    )
    assert answer.choices[0].message.content


@check
def parsed_schema():
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=HELLO,
        response_format=City,
        max_tokens=100,
        temperature=0,
        frequency_penalty=2,  # So small a model writes empty lines without end.
    )
    assert isinstance(answer.choices[0].message.parsed, City)


@check
def json_object():
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        response_format={"type": "json_object"},
        max_tokens=200,
        temperature=0,
    )
    if answer.choices[0].finish_reason == "stop":
        json.loads(answer.choices[0].message.content)


@check
def forced_tool():
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            tools=[WEATHER],
            tool_choice=choice,
            max_tokens=100,
            temperature=0,
        )
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == {"city"}


@check
def tool_and_its_result():
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], max_tokens=8
    )
    assert answer.choices[0].finish_reason


@check
def completion_with_echo_and_logprobs():
    answer = client.completions.create(
        model=MODEL, prompt="One two", max_tokens=4, echo=True, logprobs=1, temperature=0
    )
    assert answer.choices[0].text.startswith("One two")
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)


@check
def completions_of_several_prompts():
    answer = client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=4)
    assert len(answer.choices) == 2


@check
def responses():
    answer = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=16)
    assert answer.output_text
    assert answer.usage.output_tokens <= 16


@check
def responses_streamed():
    with client.responses.stream(model=MODEL, input="Say hello.", max_output_tokens=16) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds[-1]
    assert "response.output_text.delta" in kinds


@check
def bad_requests_are_400():
    for wrong in ({"temperature": -1}, {"max_tokens": -5}, {"top_p": 7}):
        with raises(openai.BadRequestError, next(iter(wrong))):
            client.chat.completions.create(model=MODEL, messages=HELLO, **wrong)


@check
def many_at_once():
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="unused") as many:
            answers = await asyncio.gather(
                *(
                    many.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
                    for _ in range(20)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    assert all(asyncio.run(ask()))


@check
def raw_headers():
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=1
    )
    assert answer.headers["content-type"].startswith("application/json")


run()
