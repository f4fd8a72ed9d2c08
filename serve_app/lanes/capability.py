"""Which requests vLLM's Rust front end answers exactly as its Python application does.

`FIELDS` is the whole list: a request with any other field, or with a value that its check does not
take, goes to the full lane, which answers everything. tests/lanes/test_contract.py asks both lanes
of one engine the same requests and compares the answers field by field; a field is listed once it
is among those requests. A value that vLLM would refuse is left to the full lane as well, because
the two word their errors differently.
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
    {b"origin", b"content-encoding", b"x-vllm-priority", b"x-data-parallel-rank", b"expect"}
)
_ROLES = frozenset({"system", "user", "assistant"})


def _whole(minimum: int, maximum: int) -> Check:
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
    """A conversation of texts. Content in parts is joined differently by the two."""
    return (
        type(value) is list
        and bool(value)
        and all(
            type(each) is dict
            and each.keys() == {"role", "content"}
            and type(each["role"]) is str
            and each["role"] in _ROLES
            and _text(each["content"])
            for each in value
        )
    )


def _stop(value: Any) -> bool:
    if type(value) is list:
        return 1 <= len(value) <= 4 and all(map(_text, value))
    return _text(value)


def _stream_options(value: Any) -> bool:
    return (
        type(value) is dict and value.keys() == {"include_usage"} and _flag(value["include_usage"])
    )


_LARGEST_INT = 2**31 - 1
_COMMON: Mapping[str, Check] = {
    "model": _text,
    "stream": _flag,
    "stream_options": _or_null(_stream_options),
    "max_tokens": _whole(1, _LARGEST_INT),
    "min_tokens": _whole(0, _LARGEST_INT),
    "n": _whole(1, 1),
    "temperature": _or_null(_number(0, 2)),
    "top_p": _or_null(_number(0.001, 1)),
    "top_k": _whole(1, _LARGEST_INT),
    "min_p": _number(0, 1),
    "seed": _or_null(_whole(0, _LARGEST_INT)),
    "stop": _or_null(_stop),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 2),
    "ignore_eos": _flag,
    "return_token_ids": _flag,
    "logprobs": _null,
}
# By route and field: whether the fast lane takes the value.
FIELDS: Mapping[str, Mapping[str, Check]] = {
    "/v1/completions": {**_COMMON, "prompt": _prompt},
    "/v1/chat/completions": {
        **_COMMON,
        "messages": _messages,
        "max_completion_tokens": _whole(1, _LARGEST_INT),
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
    path: str, headers: Mapping[bytes, bytes], body: bytes, served: Served, limits: Limits
) -> str | None:
    """Why a POST must take the full lane; None: both lanes answer it alike.

    Args:
        headers: by their names in lower case.
    """
    if (fields := FIELDS.get(path)) is None:
        return "the route"
    for name in _HEADERS & headers.keys():
        return f"the header {name.decode()}"
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        return "the header content-type"
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "the body"
    if type(values) is not dict:
        return "the body"
    for name, value in values.items():
        if name not in fields or not fields[name](value):
            return f"the field {name}"
    return _size_obstacle(path, values, body, served, limits)


def _size_obstacle(
    path: str, values: Mapping[str, Any], body: bytes, served: Served, limits: Limits
) -> str | None:
    """Whether it may be longer than the model or the limits allow; the full lane says so best."""
    if values.get("model", next(iter(served.models))) not in served.models:
        return "the model"
    if "prompt" not in values and "messages" not in values:
        return "the prompt"
    if values.get("stream_options") is not None and not values.get("stream"):
        return "the field stream_options"
    if type(prompt := values.get("prompt")) is list and max(prompt) >= served.vocabulary:
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
