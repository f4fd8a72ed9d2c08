"""Which requests vLLM's Rust front end answers exactly as its Python application does.

`FIELDS` is the complete list: a request with any other field, or with a value that its check does
not accept, goes to the full lane, which answers everything. tests/lanes/test_contract.py sends the
same requests to both lanes of one engine and compares the answers field by field; only fields of
these requests are listed. Values that vLLM would refuse also go to the full lane, because the two
front ends have different error messages.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from serve_app.errors import RequestError
from serve_app.gates import reading, routes
from serve_app.settings import Limits

Check = Callable[[Any], bool]

# Headers that one of the two reads and the other does not, or that ask for another form of answer.
_HEADERS = frozenset(
    {
        b"origin",
        b"content-encoding",
        b"x-vllm-priority",
        b"x-data-parallel-rank",
        b"endpoint-load-metrics-format",
        b"expect",
    }
)
_ROLES = frozenset({"system", "user", "assistant"})


def _integer(minimum: int, maximum: int) -> Check:
    # A bool is an int, and type() tells them apart.
    return lambda value: type(value) is int and minimum <= value <= maximum


def _number(minimum: float, maximum: float) -> Check:
    return lambda value: type(value) in (int, float) and minimum <= value <= maximum


def _or_null(check: Check) -> Check:
    """Of a field for which both take null as if it were absent."""
    return lambda value: value is None or check(value)


def _null(value: Any) -> bool:
    return value is None


def _flag(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return type(value) is str and value != ""


def _prompt(value: Any) -> bool:
    """One prompt: a text, or token ids."""
    if type(value) is list:
        return bool(value) and all(type(each) is int and each >= 0 for each in value)
    return _text(value)


def _messages(value: Any) -> bool:
    """A conversation of texts. Several parts of one message are joined differently by the two."""
    return (
        type(value) is list
        and bool(value)
        and all(
            type(each) is dict
            and each.keys() == {"role", "content"}
            and type(each["role"]) is str
            and each["role"] in _ROLES
            and _content(each["content"])
            for each in value
        )
    )


def _content(value: Any) -> bool:
    if type(value) is not list:
        return _text(value)
    return (
        len(value) == 1
        and type(value[0]) is dict
        and value[0].keys() == {"type", "text"}
        and value[0]["type"] == "text"
        and _text(value[0]["text"])
    )


def _stop(value: Any) -> bool:
    if type(value) is list:
        return 1 <= len(value) <= 4 and all(map(_text, value))
    return _text(value)


def _texts(value: Any) -> bool:
    return type(value) is list and all(map(_text, value))


def _token_ids(value: Any) -> bool:
    return type(value) is list and all(type(each) is int and each >= 0 for each in value)


def _logit_bias(value: Any) -> bool:
    """By token id, which JSON writes as text."""
    return type(value) is dict and all(
        name.isascii() and name.isdigit() and _number(-100, 100)(bias)
        for name, bias in value.items()
    )


def _stream_options(value: Any) -> bool:
    return (
        type(value) is dict and value.keys() == {"include_usage"} and _flag(value["include_usage"])
    )


# What a schema may hold. Of these both lanes make the same grammar; a schema with other keywords
# may be refused by one of the two, or be left to another library.
_KEYWORDS = frozenset({"title", "description", "default", "$defs", "required"})
_TYPES = frozenset({"object", "array", "string", "integer", "number", "boolean", "null"})
_DEEPEST_SCHEMA = 16


def _schema(value: Any) -> bool:
    definitions = value.get("$defs", {}) if type(value) is dict else None
    return (
        type(definitions) is dict
        and _sound(value, definitions, 0)
        and all(_sound(definition, definitions, 0) for definition in definitions.values())
    )


def _sound(schema: Any, definitions: Mapping[str, Any], depth: int) -> bool:
    if type(schema) is not dict or depth > _DEEPEST_SCHEMA:
        return False

    def inner(value: Any) -> bool:
        return _sound(value, definitions, depth + 1)

    checks: Mapping[str, Check] = {
        "type": lambda value: type(value) is str and value in _TYPES,
        "properties": lambda value: type(value) is dict and all(map(inner, value.values())),
        "items": inner,
        "anyOf": lambda value: type(value) is list and bool(value) and all(map(inner, value)),
        "enum": lambda value: type(value) is list and bool(value) and all(map(_scalar, value)),
        "const": _scalar,
        "additionalProperties": _flag,
        "$ref": lambda value: (
            type(value) is str
            and value.startswith("#/$defs/")
            and value.removeprefix("#/$defs/") in definitions
        ),
    }
    required = schema.get("required", [])
    return (
        all(name in _KEYWORDS or (name in checks and checks[name](schema[name])) for name in schema)
        and type(required) is list
        and all(each in schema.get("properties", {}) for each in required)
    )


def _scalar(value: Any) -> bool:
    return type(value) in (str, int, bool)


def _response_format(value: Any) -> bool:
    if type(value) is not dict:
        return False
    if value.get("type") in ("text", "json_object"):
        return value.keys() == {"type"}
    schema = value.get("json_schema")
    return (
        value.keys() == {"type", "json_schema"}
        and value["type"] == "json_schema"
        and type(schema) is dict
        and schema.keys() <= {"name", "description", "strict", "schema"}
        and _text(schema.get("name"))
        and _flag(schema.get("strict", True))
        and _schema(schema.get("schema"))
    )


def _structured_outputs(value: Any) -> bool:
    """A schema. A broken regex or grammar gets another answer, and choices one from only some of
    the engine's compilers (`obstacle`).
    """
    return type(value) is dict and value.keys() == {"json"} and _schema(value["json"])


_LARGEST_INT = 2**31 - 1
_COMMON: Mapping[str, Check] = {
    "model": _text,
    "stream": _flag,
    "stream_options": _or_null(_stream_options),
    "max_tokens": _or_null(_integer(1, _LARGEST_INT)),
    "min_tokens": _integer(0, _LARGEST_INT),
    "n": _integer(1, 1),
    "temperature": _or_null(_number(0, 2)),
    "top_p": _or_null(_number(0.001, 1)),
    "top_k": _or_null(_integer(-1, _LARGEST_INT)),
    "min_p": _or_null(_number(0, 1)),
    "seed": _or_null(_integer(0, _LARGEST_INT)),
    "stop": _or_null(_stop),
    "stop_token_ids": _token_ids,
    "bad_words": _texts,
    "logit_bias": _or_null(_logit_bias),
    "presence_penalty": _or_null(_number(-2, 2)),
    "frequency_penalty": _or_null(_number(-2, 2)),
    "repetition_penalty": _or_null(_number(0.01, 2)),
    "ignore_eos": _flag,
    "return_token_ids": _flag,
    "skip_special_tokens": _flag,
    "include_stop_str_in_output": _flag,
    "cache_salt": _text,
    "user": _or_null(_text),
    # Other priorities change who goes first, which no comparison of answers shows.
    "priority": _integer(0, 0),
    "response_format": _or_null(_response_format),
    "structured_outputs": _or_null(_structured_outputs),
}
# By route and field: whether the fast lane takes the value.
FIELDS: Mapping[str, Mapping[str, Check]] = {
    "/v1/completions": {
        **_COMMON,
        "prompt": _prompt,
        "echo": _flag,
        # The two name tokens that are a part of a character in different ways, and here by them.
        "logprobs": _null,
    },
    "/v1/chat/completions": {
        **_COMMON,
        "messages": _messages,
        "max_completion_tokens": _or_null(_integer(1, _LARGEST_INT)),
        "logprobs": _flag,
        "top_logprobs": _or_null(_integer(0, 0)),
    },
}


@dataclass(frozen=True)
class Served:
    """What a replica serves.

    Attributes:
        models: the names that a request may ask for.
        max_model_len: prompt and output tokens of one request, together.
        vocabulary: token ids are below this.
    """

    models: frozenset[str]
    max_model_len: int
    vocabulary: int


def obstacle(
    path: str,
    headers: Mapping[bytes, bytes],
    body: bytes,
    served: Served,
    limits: Limits,
    grammars: bool = True,
) -> str | None:
    """Why a POST must take the full lane; None: both lanes answer it alike.

    Args:
        headers: by their names in lower case.
        grammars: whether the engine has the grammar compiler that the full lane asks for. An engine
            keeps the one that its first request with a grammar names, and the lanes name different
            ones.
    """
    if (fields := FIELDS.get(path)) is None:
        return "the route"
    for name in _HEADERS & headers.keys():
        return f"the header {name.decode()}"
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        return "the header content-type"
    try:
        values = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return "the body"
    if type(values) is not dict:
        return "the body"
    for name, value in values.items():
        if name not in fields or not fields[name](value):
            return f"the field {name}"
    if (field := _combination_obstacle(values)) is not None:
        return f"the field {field}"
    if not grammars and _has_grammar(values):
        return "the first grammar"
    return _size_obstacle(path, values, body, served, limits)


def _has_grammar(values: Mapping[str, Any]) -> bool:
    if values.get("structured_outputs") is not None:
        return True
    response_format = values.get("response_format")
    return response_format is not None and response_format["type"] != "text"


def _combination_obstacle(values: Mapping[str, Any]) -> str | None:
    """The field that the two answer differently beside another one, or that one of them refuses."""
    streamed = values.get("stream", False)
    if values.get("stream_options") is not None and not streamed:
        return "stream_options"
    # In a stream the prompt's token ids come from one lane only. The others were not compared.
    if values.get("echo") and (streamed or values.get("return_token_ids") or values.get("stop")):
        return "echo"
    if values.get("top_logprobs") is not None and not values.get("logprobs"):
        return "top_logprobs"
    if values.get("response_format") is not None and values.get("structured_outputs") is not None:
        return "structured_outputs"
    return None


def _size_obstacle(
    path: str, values: Mapping[str, Any], body: bytes, served: Served, limits: Limits
) -> str | None:
    """Whether the prompt may exceed the model or the limits; the full lane's refusal is clearer."""
    if values.get("model", next(iter(served.models))) not in served.models:
        return "the model"
    if "prompt" not in values and "messages" not in values:
        return "the prompt"
    prompt = values.get("prompt")
    token_ids = [
        *(prompt if type(prompt) is list else ()),
        *values.get("stop_token_ids", ()),
        *map(int, values.get("logit_bias") or ()),
    ]
    if max(token_ids, default=0) >= served.vocabulary:
        return "a token id"
    route = routes.find(path)
    assert route is not None
    try:
        parsed = reading.read(route, body)
    except RequestError:
        return "the body"
    if parsed.max_tokens is None and limits.max_tokens is not None:
        return "the default of max_tokens"
    if values.get("min_tokens", 0) > (parsed.max_tokens or served.max_model_len):
        return "the field min_tokens"
    if parsed.prompt_tokens + (parsed.max_tokens or 1) > served.max_model_len:
        return "the length of the prompt"
    if limits.max_prompt_tokens is not None and parsed.prompt_tokens > limits.max_prompt_tokens:
        return "the length of the prompt"
    return None
