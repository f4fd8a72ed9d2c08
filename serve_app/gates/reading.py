"""The work that a request asks for, read once from its body, in the same way as vLLM reads it.

`read` is pure. Limits, admission, gateway and lanes use its `Reading`, and none of them parses the
body again. vLLM parses with pydantic, which accepts "64", 64.0 and 1e2 as integers; this module
uses pydantic too. A value that vLLM would refuse counts as absent here, because vLLM's own error
explains it best.

A prompt or conversation is never converted to Python objects, only counted and sliced: a body of
4 MiB takes a few milliseconds of the event loop that all streams share.
"""

import functools
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError

from serve_app.errors import BadRequest
from serve_app.gates import grammar
from serve_app.gates.routes import Counts, Route

# Of a prompt, for routing by what it begins with.
PROMPT_HEAD_BYTES = 128 * 2**10
# What a chat template adds of its own at most, in tokens: a default system message, and the
# instructions for calling tools.
_TEMPLATE_TOKENS = 256

# What a request is taken to cost before anything is known of it: bytes of a prompt for each token,
# tokens of an answer that names no bound, and of one that names any.
_BYTES_A_TOKEN, _TOKENS_EXPECTED, _MOST_TOKENS_EXPECTED = 4, 256, 4096

# Nothing deeper is counted where there are more parts already: it is refused for these.
_COUNTED_PARTS = 2**15

# Bodies up to this size are remembered for a moment.
_RECENT_BYTES = 2**16

_EMPTY = msgspec.Raw()


class _Body(msgspec.Struct):
    """The fields of any route that determine its work. All others are skipped."""

    model: Any = None
    stream: Any = None
    session_id: Any = None
    priority: Any = None
    n: Any = None
    best_of: Any = None
    max_completion_tokens: Any = None
    max_tokens: Any = None
    max_output_tokens: Any = None
    # Prompts.
    instructions: msgspec.Raw = _EMPTY
    system: msgspec.Raw = _EMPTY
    tools: msgspec.Raw = _EMPTY
    messages: msgspec.Raw = _EMPTY
    prompt: msgspec.Raw = _EMPTY
    input: msgspec.Raw = _EMPTY
    token_ids: msgspec.Raw = _EMPTY
    prompt_embeds: msgspec.Raw = _EMPTY
    items: msgspec.Raw = _EMPTY
    questions: msgspec.Raw = _EMPTY
    texts: msgspec.Raw = _EMPTY
    images: msgspec.Raw = _EMPTY
    inputs: msgspec.Raw = _EMPTY
    text_1: msgspec.Raw = _EMPTY
    text_2: msgspec.Raw = _EMPTY
    data_1: msgspec.Raw = _EMPTY
    data_2: msgspec.Raw = _EMPTY
    queries: msgspec.Raw = _EMPTY
    documents: msgspec.Raw = _EMPTY
    bad_words: Any = None
    # Grammars.
    structured_outputs: Any = None
    response_format: Any = None
    text: Any = None
    output_config: Any = None
    tool_choice: Any = None
    # Grammars of earlier versions of vLLM, which ignores these now.
    guided_json: msgspec.Raw = _EMPTY
    guided_regex: msgspec.Raw = _EMPTY
    guided_choice: msgspec.Raw = _EMPTY
    guided_grammar: msgspec.Raw = _EMPTY
    # /inference/v1/generate has n, max_tokens and structured_outputs in here.
    sampling_params: Any = None


class _Part(msgspec.Struct):
    """The fields of a message, or of a part of one, that may hold more parts."""

    content: msgspec.Raw = _EMPTY
    tool_calls: msgspec.Raw = _EMPTY
    output: msgspec.Raw = _EMPTY
    summary: msgspec.Raw = _EMPTY


_decoder = msgspec.json.Decoder(_Body)
_part = msgspec.json.Decoder(_Part)
_elements = msgspec.json.Decoder(list[msgspec.Raw])
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_int = TypeAdapter(int | None)
_bool = TypeAdapter(bool | None)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one request asks for.

    Attributes:
        body_bytes: length of the body.
        choices: answers to each prompt, `n`. Beam search has as many beams.
        best_of: candidates that the request asks for; vLLM ignores it, and the limit of this server
            does not.
        sequences: that the engine runs for it; 0 where it runs none.
        max_tokens: that each answer may have, as far as the request says; None: it does not.
        token_bounds: every field that bounds an answer's tokens, with its value; vLLM ignores
            those of other routes, and the limit of this server does not.
        prompt_tokens: of the longest prompt, at most. Exact for a prompt of token ids, otherwise
            from the body's length: a token has at least a byte. Holds for text, not for images.
        token_ids: length of `token_ids`, the prompt of /inference/v1/generate, or 0.
        prompt_head: the first bytes of the prompt, in the order in which the model reads it.
        messages: of all conversations, or items of input, each of which takes time to render.
        parts: messages, their content parts and tool calls, parts of a system prompt, and tools:
            each takes time to validate and to render.
        bad_words_length: characters of the words that an answer may not contain. vLLM tokenizes
            them on the event loop.
        grammar_bytes: size of the grammars that it must be compiled to (grammar.py).
        session: what the body calls its conversation.
        priority: whether it asks vLLM's scheduler for another priority than 0.
    """

    body_bytes: int = 0
    model: str | None = None
    stream: bool = False
    choices: int = 1
    best_of: int = 1
    sequences: int = 0
    max_tokens: int | None = None
    token_bounds: tuple[tuple[str, int], ...] = ()
    prompt_tokens: int = 0
    token_ids: int = 0
    prompt_head: bytes = b""
    messages: int = 0
    parts: int = 0
    bad_words_length: int = 0
    grammar_bytes: int = 0
    session: str | None = None
    priority: bool = False

    @property
    def prompt_tokens_expected(self) -> int:
        """What the prompt is taken to be before it was tokenized."""
        return self.body_bytes // _BYTES_A_TOKEN

    @property
    def output_tokens_expected(self) -> int:
        """The expected length of the answers. A huge bound does not predict a long answer."""
        answer = self.max_tokens or _TOKENS_EXPECTED
        return min(max(answer, 1), _MOST_TOKENS_EXPECTED) * self.sequences


def read(route: Route, body: bytes) -> Reading:
    """The reading of a POST's body.

    In the fast lane it is used twice: by the capability table, then by the limits.

    Raises:
        BadRequest: it is not a JSON object.
    """
    return _recent(route, body) if len(body) <= _RECENT_BYTES else _read(route, body)


@functools.lru_cache(maxsize=16)
def _recent(route: Route, body: bytes) -> Reading:
    return _read(route, body)


def _read(route: Route, body: bytes) -> Reading:
    if not body:
        return Reading(sequences=int(route.generates))
    try:
        if not body.isascii():
            body.decode()  # What the decoder skips it does not check.
        fields = _decoder.decode(body)
    except msgspec.ValidationError as error:
        if body.lstrip().startswith(b"{"):
            raise BadRequest(f"The body is not valid JSON: {error}") from None
        raise BadRequest("The body must be a JSON object.") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is not valid JSON: {error}") from None
    _refuse_removed(fields)
    sampling = fields.sampling_params if isinstance(fields.sampling_params, dict) else {}
    choices = max(1, _integer(fields.n) or 1, _integer(sampling.get("n")) or 1)
    bounds = _token_bounds(fields, sampling)
    return Reading(
        body_bytes=len(body),
        model=fields.model if isinstance(fields.model, str) else None,
        stream=_true(fields.stream),
        choices=choices,
        best_of=_integer(fields.best_of) or 1,
        sequences=_sequences(route.counts, fields, choices),
        max_tokens=bounds[0][1] if bounds else None,
        token_bounds=bounds,
        prompt_tokens=_prompt_tokens(fields, len(body)),
        token_ids=_token_ids(fields.token_ids),
        prompt_head=_prompt_head(fields),
        messages=max(_messages(route.counts, fields), _items(fields.input)),
        parts=sum(_parts(each) for each in _conversation(fields)),
        bad_words_length=_length(fields.bad_words) + _length(sampling.get("bad_words")),
        grammar_bytes=_grammar_bytes(fields, sampling),
        session=fields.session_id if isinstance(fields.session_id, str) else None,
        priority=bool(_integer(fields.priority)),
    )


def _refuse_removed(fields: _Body) -> None:
    """A grammar that vLLM would silently drop: the answer would be any text."""
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        if not _null(getattr(fields, name)):
            now = name.removeprefix("guided_")
            raise BadRequest(
                f"vLLM no longer supports {name}: send structured_outputs with {now!r}, or "
                "response_format.",
                param=name,
            )


def _token_bounds(fields: _Body, sampling: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """In vLLM's order of precedence; without those that are absent."""
    bounds = (
        ("max_completion_tokens", _integer(fields.max_completion_tokens)),
        ("max_tokens", _integer(fields.max_tokens)),
        ("max_output_tokens", _integer(fields.max_output_tokens)),
        ("sampling_params.max_tokens", _integer(sampling.get("max_tokens"))),
    )
    return tuple((name, value) for name, value in bounds if value is not None)


def _sequences(counts: Counts, fields: _Body, choices: int) -> int:
    match counts:
        case Counts.NOTHING:
            return 0
        case Counts.CHOICES:
            return choices
        case Counts.PROMPTS:
            embedded = 0 if _null(fields.prompt_embeds) else _prompts(fields.prompt_embeds)
            given = 0 if embedded and _null(fields.prompt) else _prompts(fields.prompt)
            return max(1, given + embedded) * choices
        case Counts.CONVERSATIONS:
            return max(1, len(_list(fields.messages))) * choices
        case Counts.ITEMS:
            return max(1, len(_list(fields.items)))
        case Counts.QUESTIONS:
            return max(1, _member_count(fields.questions))
        case Counts.INPUTS:
            several = (fields.texts, fields.images, fields.inputs)
            prompts = max(_prompts(fields.input), _prompts(fields.messages))
            return max(prompts, sum(len(_list(each)) for each in several))
        case Counts.PAIRS:
            texts = (fields.text_1, fields.text_2, fields.data_1, fields.data_2)
            sides = (*texts, fields.queries, fields.documents, fields.items)
            return max(1, *(len(_list(side)) for side in sides))
        case _:
            return 1


def _prompts(value: msgspec.Raw) -> int:
    """How many prompts a field holds: a list of texts or of lists is one for each."""
    first = _first_byte(value, after=b"[")
    if first not in (b'"', b"["):
        return 1
    elements = _list(value)
    # ["1", 2] are two token ids for pydantic, and one prompt.
    return len(elements) if all(_first_byte(element) in (b'"', b"[") for element in elements) else 1


def _prompt_tokens(fields: _Body, body_bytes: int) -> int:
    if (count := _token_ids(fields.token_ids)) > 0:
        return count
    if _first_byte(fields.prompt, after=b"[").isdigit():
        return _commas(fields.prompt) + 1
    if _first_byte(fields.prompt, after=b"[") == b"[":
        return max((_commas(each) + 1 for each in _list(fields.prompt)), default=0)
    # Templates write tools with spaces between their parts.
    return body_bytes + len(bytes(fields.tools)) + _TEMPLATE_TOKENS


def _messages(counts: Counts, fields: _Body) -> int:
    messages = _list(fields.messages)
    if counts is Counts.CONVERSATIONS:
        return sum(len(_list(message)) for message in messages)
    return len(messages)


def _conversation(fields: _Body) -> tuple[msgspec.Raw, ...]:
    return fields.messages, fields.input, fields.system, fields.tools


def _parts(value: msgspec.Raw) -> int:
    """The elements of a list and of all lists in it that hold parts; token ids are none."""
    count, waiting = 0, [value]
    while waiting:
        elements = _list(waiting.pop())
        if elements and _first_byte(elements[0]).isdigit():
            continue
        count += len(elements)
        if count > _COUNTED_PARTS:
            break
        for element in elements:
            first = _first_byte(element)
            if first == b"[":
                waiting.append(element)
            elif first == b"{":
                waiting += _lists_in(element)
    return count


def _lists_in(element: msgspec.Raw) -> list[msgspec.Raw]:
    part = _part.decode(element)
    lists = (part.content, part.tool_calls, part.output, part.summary)
    return [each for each in lists if _first_byte(each) == b"["]


def _items(value: msgspec.Raw) -> int:
    """Items of the input of /v1/responses; token ids are none."""
    return len(_list(value)) if _first_byte(value, after=b"[") == b"{" else 0


def _token_ids(value: msgspec.Raw) -> int:
    return _commas(value) + 1 if _first_byte(value) == b"[" else 0


def _prompt_head(fields: _Body) -> bytes:
    """What two requests share at the beginning, they share here as well.

    The system prompt comes first and tools after it, as most templates have them.
    """
    head = b""
    for part in (
        fields.instructions,
        fields.system,
        fields.tools,
        fields.messages,
        fields.prompt,
        fields.input,
        fields.token_ids,
    ):
        head += memoryview(part)[: PROMPT_HEAD_BYTES - len(head)]
    return head


def _grammar_bytes(fields: _Body, sampling: dict[str, Any]) -> int:
    size = sum(
        grammar.size(each)
        for each in (
            fields.structured_outputs,
            fields.response_format,
            fields.text,
            fields.output_config,
            sampling.get("structured_outputs"),
        )
        if each is not None
    )
    if bytes(fields.tools) and grammar.of_tools(fields.tool_choice, tools := _any(fields.tools)):
        size += grammar.size(tools)
    return size


def _length(words: Any) -> int:
    """The characters of a list of texts."""
    if not isinstance(words, list):
        return 0
    return sum(len(word) for word in words if isinstance(word, str))


def _integer(value: Any) -> int | None:
    """A whole number as pydantic parses it; None for values that it refuses."""
    if value is None or type(value) is int:
        return value
    try:
        return _int.validate_python(value)
    except ValidationError:
        return None


def _true(value: Any) -> bool:
    if value is None or type(value) is bool:
        return bool(value)
    try:
        return bool(_bool.validate_python(value))
    except ValidationError:
        return False


def _null(value: msgspec.Raw) -> bool:
    return bytes(memoryview(value)[:4]) in (b"", b"null")


def _first_byte(value: msgspec.Raw, after: bytes = b"") -> bytes:
    """The first byte that is not blank; `after`: the next one, if that one is this."""
    head = bytes(memoryview(value)[:256]).lstrip()
    if after and head.startswith(after):
        head = head[1:].lstrip() or bytes(value)[1:].lstrip()
    elif after:
        return b""
    return head[:1]


def _commas(value: msgspec.Raw) -> int:
    return bytes(value).count(b",")


def _list(value: msgspec.Raw) -> list[msgspec.Raw]:
    """The elements of a JSON array, not decoded; none of anything else."""
    if _first_byte(value) != b"[":
        return []
    return _elements.decode(value)


def _member_count(value: msgspec.Raw) -> int:
    return len(_members.decode(value)) if _first_byte(value) == b"{" else 0


def _any(value: msgspec.Raw) -> Any:
    return msgspec.json.decode(value)
