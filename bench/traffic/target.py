"""The endpoint that is measured, and the body of a request to it."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from bench.traffic.request import Request

# How long an idle connection is reused if the server does not say: the shortest time that common
# servers keep one is 5 s (uvicorn).
KEEP_ALIVE_S = 4.0

Endpoint = Literal["completions", "chat", "responses", "messages", "embeddings"]
PAGES: Mapping[Endpoint, str] = {
    "completions": "/completions",
    "chat": "/chat/completions",
    "responses": "/responses",
    "messages": "/messages",
    "embeddings": "/embeddings",
}


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The server that is measured, and how requests are sent to it.

    Attributes:
        url: base of the API, "http://host:8000" or "https://host/v1"; /v1 is added to a bare host.
        model: its name in requests.
        endpoint: the API: OpenAI's completions, chat, Responses or embeddings, or
            Anthropic's messages.
        headers: more headers of each request; an API key is one of them.
        ca_file: the certificate authority to trust in place of the system's.
        timeout_s: from the start of a request to the end of its response.
        keep_text: whether records keep what was generated.
        fresh_connections: a connection for each request, instead of keeping them alive.
        kept_alive_s: how long an idle connection is used again where the server does not say.
        extra: more fields of each body, such as `{"ignore_eos": True}`; those of a request come
            before these, and None takes a field away.
    """

    url: str
    model: str
    endpoint: Endpoint = "completions"
    headers: dict[str, str] = {}
    ca_file: str = ""
    timeout_s: float = 600.0
    keep_text: bool = False
    fresh_connections: bool = False
    kept_alive_s: float = KEEP_ALIVE_S
    extra: dict[str, Any] = {}


def encode(target: Target, request: Request) -> bytes:
    """The body of a request.

    Raises:
        ValueError: the prompt is of a kind that the endpoint does not take.
    """
    body = {
        "model": target.model,
        **_body_of(target.endpoint, request),
        **target.extra,
        **request.extra,
    }
    if target.endpoint == "embeddings":
        body = {key: value for key, value in body.items() if key not in _OF_TEXT}
    elif not body["stream"]:
        body.pop("stream_options", None)  # Servers refuse it otherwise.
    return msgspec.json.encode({key: value for key, value in body.items() if value is not None})


# What an answer in text may be asked to be, and an embedding not.
_OF_TEXT = ("temperature", "ignore_eos", "stream", "max_tokens")


def _body_of(endpoint: Endpoint, request: Request) -> dict[str, Any]:
    """The fields of a body that say the prompt, how long the answer may be, and that it streams.

    Raises:
        ValueError: the prompt is of a kind that the endpoint does not take.
    """
    prompt, tokens = request.prompt, request.output_tokens
    messages = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
    if endpoint in ("completions", "embeddings") and messages:
        raise ValueError(f"the {endpoint} endpoint takes text or token ids, not messages")
    if endpoint == "embeddings":
        return {"input": prompt}
    if endpoint == "completions":
        usage = {"stream_options": {"include_usage": True}}
        return {"prompt": prompt, "max_tokens": tokens, "stream": True, **usage}
    if not messages and not isinstance(prompt, str):
        raise ValueError(f"the {endpoint} endpoint takes text or messages, not token ids")
    if endpoint == "responses":
        return {"input": prompt, "max_output_tokens": tokens, "stream": True}
    content: list[Any] = (
        prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    )
    if endpoint == "chat":
        usage = {"stream_options": {"include_usage": True}}
        return {"messages": content, "max_tokens": tokens, "stream": True, **usage}
    # Messages have the system prompt apart.
    systems = [part["content"] for part in content if part.get("role") == "system"]
    rest = [part for part in content if part.get("role") != "system"]
    system = {"system": "\n".join(map(str, systems))} if systems else {}
    return {**system, "messages": rest, "max_tokens": tokens, "stream": True}


def header_lines(host: str, target: Target) -> str:
    """The header lines of each request, without content-length."""
    headers = {"host": host, "content-type": "application/json", "user-agent": "bench"}
    if target.endpoint == "messages":
        headers["anthropic-version"] = "2023-06-01"
    headers |= {name.lower(): value for name, value in target.headers.items()}
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())
