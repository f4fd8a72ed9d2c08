"""A job's input as an HTTP request: all of it is used, or refused by its name."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from question import CHAT, COMPLETIONS, BadJob, Question

USER = {"role": "user", "content": "Say hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def body(**given: Any) -> dict[str, Any]:
    request = Question.of(given).body
    assert request is not None
    return request


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": 3},
        {"temperature": 0},
        {"model": "org/model"},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"response_format": {"type": "json_object"}},
        {"n": 2, "stop": ["."], "seed": 0, "logprobs": True},
        {"stream_options": {"include_usage": True}},
    ],
)
@pytest.mark.parametrize("beside", [{"messages": [USER]}, {"prompt": "x"}])
def test_fields_beside_messages_and_prompts_are_asked_for(
    field: dict[str, Any], beside: dict[str, Any]
) -> None:
    assert body(**beside, **field) == {**beside, **field, "stream": False}
    assert body(**beside, sampling_params=field) == {**beside, **field, "stream": False}
    # The same in both places is no contradiction.
    assert body(**beside, **field, sampling_params=field) == {**beside, **field, "stream": False}


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        *((word, False) for word in (False, "false", "False", " no ", "0", 0, "off", None)),
        *((word, True) for word in (True, "true", "TRUE", "1", 1, "yes", "on")),
    ],
)
def test_a_flag_is_what_it_says(value: Any, meant: bool) -> None:
    assert body(messages=[USER], stream=value)["stream"] is meant
    assert body(prompt="x", sampling_params={"stream": value})["stream"] is meant
    # Where it is null, the server's default holds.
    openai = body(openai_route=CHAT, openai_input={"messages": [USER], "stream": value})
    assert openai["stream"] is (meant if value is not None else None)
    routed = body(route=COMPLETIONS, body={"prompt": "x", "stream": value})
    assert routed["stream"] is (meant if value is not None else None)


@pytest.mark.parametrize("value", ["perhaps", "", 2, 1.0, [], {}])
@pytest.mark.parametrize("name", ["stream", "apply_chat_template", "use_openai_format"])
def test_a_flag_that_says_nothing_is_refused(name: str, value: Any) -> None:
    with pytest.raises(BadJob, match=f"{name}: .* is not true or false"):
        Question.of({"prompt": "x", name: value})


def test_a_chat_template_is_applied_where_it_is_asked_for() -> None:
    question = Question.of({"prompt": "Say hi", "apply_chat_template": "true", "max_tokens": 3})
    assert (question.method, question.route) == ("POST", CHAT)
    assert question.body == {"messages": [USER], "max_tokens": 3, "stream": False}
    assert Question.of({"prompt": "x", "apply_chat_template": "false"}).route == COMPLETIONS
    assert Question.of({"messages": [USER], "apply_chat_template": True}).route == CHAT
    assert body(messages="Say hi")["messages"] == [USER]


@pytest.mark.parametrize(
    ("job", "problem"),
    [
        ({"messages": [USER], "apply_chat_template": False}, "apply_chat_template: false"),
        ({"prompt": ["a", "b"], "apply_chat_template": True}, "a prompt that is one text"),
        ({"messages": [USER], "prompt": "x"}, "messages and prompt are both given"),
        ({"prompt": "x", "max_tokens": 3, "sampling_params": {"max_tokens": 4}}, "max_tokens is"),
        ({"prompt": "x", "stream": True, "sampling_params": {"stream": False}}, "stream is given"),
        ({"prompt": "x", "sampling_params": [1]}, "sampling_params must be an object"),
        ({"prompt": "x", "max_batch_size": 4}, "max_batch_size is not supported"),
        ({"prompt": "x", "use_openai_format": False}, "use_openai_format: false"),
        ({"openai_route": CHAT, "openai_input": {}, "max_tokens": 3}, "max_tokens beside openai"),
        ({"route": "/v1/models", "stream": True}, "stream beside route"),
        ({"route": CHAT, "body": {"prompt": "x"}, "method": "ASK"}, "method 'ASK'"),
        ({"route": CHAT, "method": 1}, "method 1"),
        ({"route": "/v1/models HTTP/1.1\r\nx-api-key: k"}, "is not a route"),
        ({"route": "//elsewhere/v1/models"}, "is not a route"),
        ({"messages": None, "prompt": None}, "input needs openai_route"),
        ({"sampling_params": {"max_tokens": 3}}, "input needs openai_route"),
        (None, "input must be an object"),
        ("Say hi", "input must be an object"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_name(job: Any, problem: str) -> None:
    with pytest.raises(BadJob, match=problem):
        Question.of(job)


def test_a_null_prompt_or_null_messages_are_not_given() -> None:
    assert body(prompt=None, messages=[USER]) == {"messages": [USER], "stream": False}
    assert body(prompt="x", messages=None) == {"prompt": "x", "stream": False}


@pytest.mark.parametrize("empty", [{}, None])
@pytest.mark.parametrize("route", ["/v1/models", "/v1/models/org/m", "/health", "/version?x=1"])
def test_an_empty_body_of_a_route_that_is_read_is_none(route: str, empty: Any) -> None:
    read = Question("GET", route, None)
    assert Question.of({"openai_route": route, "openai_input": empty}) == read
    assert Question.of({"route": route, "body": empty}) == read
    assert Question.of({"openai_route": route}) == read


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, "/v1/responses", "/v1/messages"])
def test_an_empty_body_of_a_route_that_answers_is_for_the_server_to_refuse(route: str) -> None:
    assert Question.of({"openai_route": route, "openai_input": {}}) == Question("POST", route, {})


_names = st.sampled_from(
    [
        *("max_tokens", "temperature", "stream", "model", "tools", "messages", "prompt"),
        *("apply_chat_template", "use_openai_format", "max_batch_size", "sampling_params"),
    ]
)
_values = st.sampled_from([None, True, False, 0, 1, 2, "", "x", "true", "false", [], [USER]])


# Two noisy cores draw slowly.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(_names, _values | st.dictionaries(_names, _values)))
def test_no_field_is_lost(job: dict[str, Any]) -> None:
    """Whatever a job says is in the request, or is the reason of a refusal."""
    try:
        question = Question.of(job)
    except BadJob:
        return
    sent = question.body or {}
    wanted = {**(job.get("sampling_params") or {}), **job}
    for name in ("sampling_params", "apply_chat_template", "use_openai_format"):
        wanted.pop(name, None)
    chat = question.route == CHAT
    for name, value in wanted.items():
        if name == "stream":
            assert isinstance(sent[name], bool)
        elif (name == "prompt" and chat) or (name == "messages" and isinstance(value, str)):
            assert sent["messages"][0]["content"] == value
        else:
            assert sent[name] == value
