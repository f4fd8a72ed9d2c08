"""Both lanes of one engine are asked the same, and must answer the same, field by field.

Every request here may take the fast lane, by `capability.obstacle`; a new vLLM that changes either
front end's answer to one of them fails here. `DIFFERENCES` is the whole list of what may differ,
and docs/lanes.md says it to users. Every field of `capability.FIELDS` is among the requests.
"""

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from serve_app.lanes import capability
from serve_app.settings import Limits
from tests.lanes import answers
from tests.lanes.conftest import Lanes
from tests.server import ENGINE

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
SERVED = capability.Served(frozenset({"tiny"}), max_model_len=2048, vocabulary=1024)
ASK = [{"role": "user", "content": "Tell me something."}]
# Little of the context is left for its answer. A greedy answer of this model never ends by itself.
LONG = [{"role": "user", "content": "~" * 1600}]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, 世界!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": [{"type": "text", "text": "More\n\n please"}]},
]
POINT = {
    "type": "object",
    "title": "Point",
    "properties": {
        "x": {"type": "integer", "description": "to the right"},
        "name": {"enum": ["here", "there"]},
    },
    "required": ["x", "name"],
    "additionalProperties": False,
}
NESTED = {
    "$defs": {"point": POINT},
    "type": "object",
    "properties": {
        "points": {"type": "array", "items": {"$ref": "#/$defs/point"}},
        "seen": {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None},
        "kind": {"const": "map"},
    },
    "required": ["kind", "points"],
}
PROMPTS: tuple[tuple[str, dict[str, Any]], ...] = (
    (COMPLETION, {"prompt": "hello"}),
    (COMPLETION, {"prompt": "été 世界 🙂 \n x"}),
    (COMPLETION, {"prompt": [261, 78, 78, 81]}),
    (CHAT, {"messages": ASK}),
    (CHAT, {"messages": CONVERSATION}),
)
PARAMETERS: tuple[dict[str, Any], ...] = (
    {},
    {"max_tokens": 1},
    {"max_tokens": None, "stop_token_ids": [*range(78, 1024, 16)], "temperature": 1.0, "seed": 9},
    {"stop": ["e", "o"]},
    {"stop": "a", "min_tokens": 4, "include_stop_str_in_output": True},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.3, "ignore_eos": True},
    {"temperature": 0.8, "seed": 11, "top_p": 0.9, "top_k": 20},
    {"temperature": 1.0, "seed": 12, "min_p": 0.05, "n": 1},
    {"seed": None, "stop": None, "top_p": None, "top_k": None, "min_p": None, "user": None},
    {"presence_penalty": None, "frequency_penalty": None, "repetition_penalty": None},
    {"temperature": None, "seed": 5, "top_k": -1, "priority": 0, "user": "ann"},
    {"bad_words": ["o", " the"], "logit_bias": {"100": 5, "78": -100}},
    {"bad_words": [], "logit_bias": None, "cache_salt": "salt", "response_format": None},
    {"return_token_ids": True, "skip_special_tokens": False, "structured_outputs": None},
    {"return_token_ids": False},
    {"structured_outputs": {"json": POINT}, "max_tokens": 40},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}, "max_tokens": 30},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "map", "schema": NESTED, "strict": True},
        },
        "max_tokens": 60,
        "temperature": 0.9,
        "seed": 4,
    },
)
# Of one of the two routes.
COMPLETIONS: tuple[dict[str, Any], ...] = (
    {"logprobs": None},
    {"echo": False, "temperature": 0.8, "seed": 3},
)
ECHOES: tuple[dict[str, Any], ...] = ({"echo": True}, {"echo": True, "stop": None})
CHATS: tuple[dict[str, Any], ...] = (
    {"messages": LONG, "max_tokens": None, "ignore_eos": True},
    {"max_tokens": None, "max_completion_tokens": 7},
    {"max_completion_tokens": None},
    {"logprobs": True},
    {"logprobs": False, "top_logprobs": None},
    {"logprobs": True, "top_logprobs": 0},
    {"logprobs": True, "temperature": 0.8, "seed": 3, "return_token_ids": True},
)


def _any(fast: Any, full: Any) -> bool:
    return True


def _whole_characters(fast: Any, full: Any) -> bool:
    """An answer that ends inside a character: one lane shows that, and the other drops it."""
    return bool((fast or "").rstrip("\ufffd") == (full or "").rstrip("\ufffd"))


def _part(fast: Any, full: Any) -> bool:
    """The text of a token that is a part of a character: U+FFFD in one lane, empty in the other."""
    return bool(fast.strip("\ufffd") == "" == full)


def _bytes_of_a_part(fast: Any, full: Any) -> bool:
    return bool(bytes(fast).decode().strip("\ufffd") == "" and full == [])


def _charset(fast: Any, full: Any) -> bool:
    return bool(full == f"{fast}; charset=utf-8")


Allowed = Callable[[Any, Any], bool]
# By field, as docs/lanes.md has them: which values of the two lanes may differ.
DIFFERENCES: Mapping[str, Allowed] = {
    "created": _any,
    "system_fingerprint": _any,
    "usage.completion_tokens_details": _any,
    # The lane that is asked second finds the prompt in the prefix cache.
    "usage.prompt_tokens_details": _any,
    "usage.prompt_tokens_details.cached_tokens": _any,
    "usage.prompt_tokens_details.created_cache_tokens": _any,
    "content-type": _charset,
    "choices.text": _whole_characters,
    "choices.message.content": _whole_characters,
    "choices.delta.content": _whole_characters,
    "choices.logprobs.content.token": _part,
    "choices.logprobs.content.bytes": _bytes_of_a_part,
}


def ask(lanes: Lanes, fast: bool, path: str, body: dict[str, Any]) -> Any:
    client = lanes.fast if fast else lanes.full
    answer = client.post(path, json=body, headers={"x-request-id": "asked-1"})
    assert answer.status_code == 200, f"{'fast' if fast else 'full'}: {answer.text}"
    read = answers.joined if body.get("stream") else answers.whole
    return {**read(answer.text), "content-type": answer.headers["content-type"]}


def compare(lanes: Lanes, path: str, bodies: list[dict[str, Any]], stream: bool) -> None:
    # By field, the first example.
    different: dict[str, Any] = {}
    for each in bodies:
        body = {"model": "tiny", "max_tokens": 8, "temperature": 0, **each}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {b"content-type": b"application/json"}
        data = json.dumps(body).encode()
        assert capability.obstacle(path, headers, data, SERVED, Limits()) is None, each
        fast, full = ask(lanes, True, path, body), ask(lanes, False, path, body)
        for field, one, other in answers.differences(fast, full):
            if field not in DIFFERENCES or not DIFFERENCES[field](one, other):
                different.setdefault(field, (each, one, other))
    assert not different, json.dumps(different, ensure_ascii=False)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("place", range(len(PROMPTS)))
def test_both_lanes_answer_alike(lanes: Lanes, place: int, stream: bool) -> None:
    path, prompt = PROMPTS[place]
    # All of them for a completion and a chat, and for the other prompts some each.
    chosen = PARAMETERS if place in (0, 3) else PARAMETERS[place::3]
    compare(lanes, path, [{**prompt, **parameters} for parameters in chosen], stream)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_both_lanes_answer_a_completion_alike(lanes: Lanes, stream: bool) -> None:
    chosen = COMPLETIONS if stream else (*COMPLETIONS, *ECHOES)
    prompts = [prompt for path, prompt in PROMPTS if path == COMPLETION]
    bodies = [
        {**prompts[place % len(prompts)], **parameters} for place, parameters in enumerate(chosen)
    ]
    compare(lanes, COMPLETION, bodies, stream)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_both_lanes_answer_a_chat_alike(lanes: Lanes, stream: bool) -> None:
    compare(lanes, CHAT, [{"messages": ASK, **parameters} for parameters in CHATS], stream)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_both_lanes_count_the_cached_tokens_of_a_prompt(lanes: Lanes, stream: bool) -> None:
    prompt = f"{uuid.uuid4().hex} is a prompt that nobody asked before. " * 8
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    usages = [ask(lanes, fast, COMPLETION, body)["usage"] for fast in (True, True, False)]
    first, *later = [each.get("prompt_tokens_details") for each in usages]
    assert not first
    # Whole blocks, and never the last token.
    whole = (usages[0]["prompt_tokens"] - 1) // ENGINE["block_size"] * ENGINE["block_size"]
    assert whole > 0
    assert [each["cached_tokens"] for each in later] == [whole, whole]


def test_every_field_of_the_table_is_among_the_requests() -> None:
    asked = {"model", "stream", "stream_options"}
    for each in (*PARAMETERS, *COMPLETIONS, *CHATS, *ECHOES, *(body for _, body in PROMPTS)):
        asked |= each.keys()
    asked |= {"max_tokens", "temperature"}
    assert {field for fields in capability.FIELDS.values() for field in fields} == asked


def test_what_may_differ_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "lanes.md").read_text()
    table = page.partition("## Where the two differ")[2].partition("\n## ")[0]
    named = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert named == DIFFERENCES.keys()
