"""What a job asks: its input, as one HTTP request to the application. Pure.

    {"openai_route": "/v1/chat/completions", "openai_input": {...}}   as Runpod's /openai sends it
    {"route": "/v1/models", "method": "GET", "body": {...}}           any route
    {"messages": [...] or "prompt": ..., "max_tokens": 8, ...}        OpenAI's fields beside them,
                                                                      or in "sampling_params"

These are the inputs of Runpod's worker-vllm. Every field of an input is used or refused by its
name: one that is dropped would give another answer than the one that was asked for.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Routes of which an empty body is a request that lacks its fields, and the server says which. An
# empty body of any other route is none: worker-vllm's `"openai_input": {}` goes with a GET.
_ASKING = frozenset(
    {CHAT, COMPLETIONS, "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"}
    | {"/v1/embeddings", "/tokenize", "/detokenize"}
)
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
# Fields of worker-vllm's jobs that no HTTP request of the application has.
_SENT_AS_THEY_COME = "is not supported: a stream's events are sent as they come"
_UNSUPPORTED: Mapping[str, str] = {
    "max_batch_size": _SENT_AS_THEY_COME,
    "min_batch_size": _SENT_AS_THEY_COME,
    "batch_size": _SENT_AS_THEY_COME,
    "batch_size_growth_factor": _SENT_AS_THEY_COME,
}


class BadJob(Exception):
    """An input that is none of the three, or has a field that cannot be used; one sentence."""


@dataclass(frozen=True)
class Question:
    """One HTTP request to the application."""

    method: str
    route: str
    body: dict[str, Any] | None

    @classmethod
    def of(cls, given: Any) -> "Question":
        """From a job's input.

        Raises:
            BadJob: in one sentence.
        """
        if not isinstance(given, dict):
            raise BadJob("input must be an object")
        if "openai_route" in given or "openai_input" in given:
            _only(given, "openai_route", "openai_input")
            return _at(given.get("openai_route") or CHAT, given.get("openai_input"))
        if "route" in given:
            _only(given, "route", "body", "method")
            return _at(given["route"], given.get("body"), given.get("method"))
        if given.get("messages") is not None or given.get("prompt") is not None:
            return _shorthand(given)
        raise BadJob("input needs openai_route with openai_input, or route, or messages, or prompt")


def _only(given: Mapping[str, Any], *allowed: str) -> None:
    if strange := sorted(set(given) - set(allowed)):
        raise BadJob(
            f"{', '.join(strange)} beside {allowed[0]} cannot be used: put it in {allowed[1]}"
        )


def _at(route: Any, body: Any, method: Any = None) -> Question:
    if not isinstance(route, str) or not re.fullmatch(r"/(?!/)[!-~]*", route):
        raise BadJob(f"{route!r} is not a route, such as {CHAT}")
    if body is not None and not isinstance(body, dict):
        raise BadJob("the body must be an object")
    if method is None:
        asks = bool(body) or route.partition("?")[0].rstrip("/") in _ASKING
        method, body = ("POST", body or {}) if asks else ("GET", None)
    if not isinstance(method, str) or method.upper() not in _METHODS:
        raise BadJob(f"method {method!r} is not one of {', '.join(_METHODS)}")
    if body and body.get("stream") is not None:
        body = {**body, "stream": _flag("stream", body["stream"])}
    return Question(method.upper(), route, body)


def _shorthand(given: Mapping[str, Any]) -> Question:
    """Messages or a prompt, with what else was asked for beside them or in sampling_params."""
    # A null messages or prompt is one that is not given, as for worker-vllm.
    fields = {k: v for k, v in given.items() if v is not None or k not in ("messages", "prompt")}
    sampling = fields.pop("sampling_params", None)
    if sampling is not None and not isinstance(sampling, dict):
        raise BadJob("sampling_params must be an object")
    for name, value in (sampling or {}).items():
        if name in fields and fields[name] != value:
            raise BadJob(f"{name} is given twice: in input and in sampling_params")
        fields[name] = value
    for name in fields:
        if name in _UNSUPPORTED:
            raise BadJob(f"{name} {_UNSUPPORTED[name]}")
    if not _flag("use_openai_format", fields.pop("use_openai_format", None), default=True):
        raise BadJob("use_openai_format: false is not supported: answers are as OpenAI's")
    template = fields.pop("apply_chat_template", None)
    templated = _flag("apply_chat_template", template, default="messages" in fields)
    fields["stream"] = _flag("stream", fields.get("stream"), default=False)
    if "messages" not in fields:
        return _of_prompt(fields, templated)
    if "prompt" in fields:
        raise BadJob("messages and prompt are both given: which of them?")
    if not templated:
        raise BadJob("apply_chat_template: false cannot be used with messages: give a prompt")
    if isinstance(fields["messages"], str):
        fields["messages"] = _message(fields["messages"])
    return Question("POST", CHAT, fields)


def _of_prompt(fields: dict[str, Any], templated: bool) -> Question:
    if not templated:
        return Question("POST", COMPLETIONS, fields)
    prompt = fields.pop("prompt")
    if not isinstance(prompt, str):
        raise BadJob("apply_chat_template needs a prompt that is one text")
    return Question("POST", CHAT, {**fields, "messages": _message(prompt)})


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _flag(name: str, value: Any, default: bool | None = None) -> bool:
    """True or false, however it is written; never the truth of a text."""
    if value is None and default is not None:
        return default
    word = str(value).strip().lower() if isinstance(value, bool | int | str) else ""
    if word not in _TRUE + _FALSE:
        raise BadJob(f"{name}: {value!r} is not true or false")
    return word in _TRUE
