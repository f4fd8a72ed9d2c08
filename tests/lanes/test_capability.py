"""Which requests may take the fast lane. That both lanes answer those alike: test_contract.py."""

import json
from typing import Any

import pytest

from serve_app.lanes.capability import FIELDS, Served, obstacle
from serve_app.settings import Limits

JSON = {b"content-type": b"application/json; charset=utf-8"}
SERVED = Served(frozenset({"tiny"}), max_model_len=1024, vocabulary=500)
COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 5}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}


def why(
    body: Any, path: str = "/v1/completions", limits: Limits | None = None, **headers: bytes
) -> str | None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return obstacle(path, JSON | named, data, SERVED, limits or Limits())


def test_a_plain_request_takes_the_fast_lane() -> None:
    assert why(COMPLETION) is None
    assert why({**COMPLETION, "prompt": [1, 2, 3]}) is None
    assert why(CHAT, "/v1/chat/completions") is None
    everything = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "min_tokens": 1,
        "n": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 10,
        "min_p": 0.1,
        "seed": 3,
        "stop": ["a", "b"],
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    assert why(COMPLETION | everything) is None
    assert why(CHAT | everything, "/v1/chat/completions") is None
    assert why({**COMPLETION, "logprobs": None, "seed": None, "stop": None}) is None


def test_a_grammar_takes_the_fast_lane_once_the_engine_has_the_compiler_for_it() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for grammar in (
        {"structured_outputs": {"json": schema}},
        {"response_format": {"type": "json_object"}},
        {"response_format": named},
    ):
        data = json.dumps(CHAT | grammar).encode()
        asked = ("/v1/chat/completions", JSON, data, SERVED, Limits())
        assert obstacle(*asked, grammars=True) is None
        assert obstacle(*asked, grammars=False) == "the first grammar"
    for none in ({"structured_outputs": None}, {"response_format": {"type": "text"}}):
        data = json.dumps(CHAT | none).encode()
        asked = ("/v1/chat/completions", JSON, data, SERVED, Limits())
        assert obstacle(*asked, grammars=False) is None


_FLAGS = (
    "ignore_eos",
    "echo",
    "return_token_ids",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


@pytest.mark.parametrize("field", sorted(FIELDS["/v1/completions"]))
@pytest.mark.parametrize(
    "value", [None, "", "x" * 3, True, -1, 1.5, 10**12, [], {}, [[1]], ["a"] * 5]
)
def test_no_value_is_taken_that_is_not_known_to_be_answered_alike(field: str, value: Any) -> None:
    taken = {
        "stop": [None, "x" * 3],
        "max_tokens": [None],
        "user": [None, "x" * 3],
        "cache_salt": ["x" * 3],
        "min_p": [None],
        "top_k": [None, -1],
        "logit_bias": [None, {}],
        "bad_words": [[], ["a"] * 5],
        "stop_token_ids": [[]],
        "response_format": [None],
        "structured_outputs": [None],
        **{name: [True] for name in _FLAGS},
        "prompt": ["x" * 3],
        "stream": [True],
        "temperature": [None, 1.5],
        "presence_penalty": [None, -1, 1.5],
        "frequency_penalty": [None, -1, 1.5],
        "repetition_penalty": [None, 1.5],
        "logprobs": [None],
        "stream_options": [None],
        "seed": [None],
        "top_p": [None],
    }
    expected = any(value == each and type(value) is type(each) for each in taken.get(field, []))
    assert (why({**COMPLETION, field: value}) is None) == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({**COMPLETION, "n": 2}, "the field n"),
        ({**COMPLETION, "prompt": ["a", "b"]}, "the field prompt"),
        ({**COMPLETION, "suffix": "x"}, "the field suffix"),
        ({**COMPLETION, "nonsense": 1}, "the field nonsense"),
        ({**COMPLETION, "model": "other"}, "the model"),
        ({"model": "tiny", "max_tokens": 5}, "the prompt"),
        ({**COMPLETION, "stream_options": {"include_usage": True}}, "the field stream_options"),
        ({**COMPLETION, "prompt": [1, 500]}, "a token id"),
        ({**COMPLETION, "stop_token_ids": [500]}, "a token id"),
        ({**COMPLETION, "logit_bias": {"500": 1}}, "a token id"),
        ({**COMPLETION, "logit_bias": {"x": 1}}, "the field logit_bias"),
        ({**COMPLETION, "logit_bias": {"1": 101}}, "the field logit_bias"),
        ({**COMPLETION, "echo": True, "stream": True}, "the field echo"),
        ({**COMPLETION, "echo": True, "stop": "a"}, "the field echo"),
        ({**COMPLETION, "echo": True, "return_token_ids": True}, "the field echo"),
        ({**COMPLETION, "priority": 1}, "the field priority"),
        ({**COMPLETION, "structured_outputs": {"regex": "a+"}}, "the field structured_outputs"),
        ({**COMPLETION, "structured_outputs": {"choice": ["a"]}}, "the field structured_outputs"),
        (
            {
                **COMPLETION,
                "structured_outputs": {"json": {"type": "object"}},
                "response_format": {"type": "json_object"},
            },
            "the field structured_outputs",
        ),
        ({**COMPLETION, "prompt": "x" * 2000}, "the length of the prompt"),
        ({**COMPLETION, "max_tokens": 1024}, "the length of the prompt"),
        ({**COMPLETION, "min_tokens": 6}, "the field min_tokens"),
        (b"[]", "the body"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "the body"),
        (b'{"model": "tiny", "prompt": NaN}', "the body"),
        (b"{", "the body"),
    ],
)
def test_everything_else_takes_the_full_lane(body: Any, reason: str) -> None:
    assert why(body) == reason


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "taken"),
    [
        (OBJECT, True),
        ({**OBJECT, "additionalProperties": False, "title": "A"}, True),
        ({"$defs": {"a": OBJECT}, "type": "array", "items": {"$ref": "#/$defs/a"}}, True),
        ({"anyOf": [{"type": "string"}, {"enum": [1, "b", True]}]}, True),
        ({**OBJECT, "required": ["b"]}, False),
        ({"type": "nonsense"}, False),
        ({"type": ["string", "null"]}, False),
        ({"type": "array", "items": {"$ref": "#/$defs/a"}}, False),
        ({"type": "string", "pattern": "["}, False),
        ({"type": "integer", "multipleOf": 3}, False),
        ({"type": "array", "items": OBJECT, "uniqueItems": True}, False),
        ({"properties": {"a": {"properties": {"b": {"format": "date"}}}}}, False),
        ({"enum": []}, False),
        (True, False),
        ("{}", False),
        (None, False),
    ],
)
def test_a_schema_is_taken_where_both_lanes_make_the_same_grammar(schema: Any, taken: bool) -> None:
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert (why({**CHAT, "response_format": named}, "/v1/chat/completions") is None) == taken
    assert (why({**COMPLETION, "structured_outputs": {"json": schema}}) is None) == taken


def test_a_schema_of_any_depth_is_read() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    assert why({**COMPLETION, "structured_outputs": {"json": schema}}) is not None


def test_log_probabilities_of_a_chat() -> None:
    path = "/v1/chat/completions"
    assert why({**CHAT, "logprobs": True, "top_logprobs": 0}, path) is None
    assert why({**CHAT, "logprobs": True, "top_logprobs": 1}, path) == "the field top_logprobs"
    assert why({**CHAT, "top_logprobs": 0}, path) == "the field top_logprobs"
    assert why({**CHAT, "logprobs": None}, path) == "the field logprobs"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * 2}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": ""}]}],
        [{"role": "user", "content": []}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "user", "content": "x", "name": "ann"}],
        [{"role": "user", "content": ""}],
    ],
)
def test_a_conversation_of_other_parts_takes_the_full_lane(messages: Any) -> None:
    assert why({**CHAT, "messages": messages}, "/v1/chat/completions") == "the field messages"


def test_limits_that_need_the_number_of_tokens_are_left_to_the_full_lane() -> None:
    unnamed = {"model": "tiny", "prompt": "hello"}
    assert why(unnamed) is None
    assert why(unnamed, limits=Limits(max_tokens=5)) == "the default of max_tokens"
    assert why(COMPLETION, limits=Limits(max_prompt_tokens=4)) == "the length of the prompt"
    ids = {**COMPLETION, "prompt": [1, 2, 3, 4]}
    assert why(ids, limits=Limits(max_prompt_tokens=4)) is None


def test_headers_that_one_lane_does_not_read() -> None:
    assert why(COMPLETION, origin=b"https://example.com") == "the header origin"
    assert why(COMPLETION, content_type=b"text/plain") == "the header content-type"
    assert why(COMPLETION, x_vllm_priority=b"1") == "the header x-vllm-priority"


def test_other_routes_take_the_full_lane() -> None:
    for path in ("/v1/responses", "/v1/messages", "/v1/completions/", "//v1/completions"):
        assert why(COMPLETION, path) == "the route"
