"""Anthropic's SDK over /v1/messages."""

import anthropic
from checks import MODEL, URL, check, raises, run

client = anthropic.Anthropic(base_url=URL, api_key="unused", max_retries=0)
GREEDY = {"temperature": 0}
HELLO = [{"role": "user", "content": "Say hello."}]
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
    },
}


@check
def message():
    answer = client.messages.create(model=MODEL, max_tokens=16, messages=HELLO, extra_body=GREEDY)
    assert answer.content[0].text
    assert 0 < answer.usage.output_tokens <= 16
    assert answer.stop_reason in ("end_turn", "max_tokens")


@check
def system_and_stop_sequences():
    answer = client.messages.create(
        model=MODEL,
        max_tokens=16,
        system="You are brief.",
        stop_sequences=["."],
        messages=HELLO,
        extra_body=GREEDY,
    )
    assert answer.role == "assistant"


@check
def streamed_as_plain():
    plain = client.messages.create(model=MODEL, max_tokens=16, messages=HELLO, extra_body=GREEDY)
    with client.messages.stream(
        model=MODEL, max_tokens=16, messages=HELLO, extra_body=GREEDY
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == plain.content[0].text == final.content[0].text
    assert final.stop_reason == plain.stop_reason
    assert final.usage.output_tokens == plain.usage.output_tokens


@check
def forced_tool():
    answer = client.messages.create(
        model=MODEL,
        max_tokens=100,
        messages=HELLO,
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "weather"},
        extra_body=GREEDY,
    )
    [call] = [block for block in answer.content if block.type == "tool_use"]
    assert call.name == "weather"
    assert set(call.input) == {"city"}


@check
def forced_tool_streamed():
    with client.messages.stream(
        model=MODEL,
        max_tokens=100,
        messages=HELLO,
        tools=[WEATHER],
        tool_choice={"type": "any"},
        extra_body=GREEDY,
    ) as stream:
        final = stream.get_final_message()
    assert [block.name for block in final.content if block.type == "tool_use"] == ["weather"]


@check
def tool_result():
    use = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}
    answer = client.messages.create(
        model=MODEL,
        max_tokens=8,
        tools=[WEATHER],
        messages=[
            *HELLO,
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
        ],
    )
    assert answer.content


@check
def count_tokens():
    counted = client.messages.count_tokens(model=MODEL, messages=HELLO)
    answer = client.messages.create(model=MODEL, max_tokens=1, messages=HELLO)
    assert counted.input_tokens == answer.usage.input_tokens


@check
def bad_request():
    with raises(anthropic.BadRequestError, "max_tokens"):
        client.messages.create(model=MODEL, max_tokens=-1, messages=HELLO)


@check
def unknown_model():
    with raises(anthropic.NotFoundError, "nobody"):
        client.messages.create(model="nobody", max_tokens=1, messages=HELLO)


run()
