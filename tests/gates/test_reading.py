"""What a body asks for, beside what vLLM's own classes make of the same body."""

import json
import pkgutil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import BadRequest
from serve_app.gates import routes
from serve_app.gates.reading import Reading, read

CHAT = "/v1/chat/completions"
BATCH = "/v1/chat/completions/batch"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
GENERATE = "/inference/v1/generate"
HELLO = [{"role": "user", "content": "Hello"}]
# vLLM's class of each route. Tests import them, as every worker imports this module.
OPENAI = "vllm.entrypoints.openai"
CLASSES = {
    CHAT: f"{OPENAI}.chat_completion.protocol:ChatCompletionRequest",
    BATCH: f"{OPENAI}.chat_completion.protocol:BatchChatCompletionRequest",
    COMPLETIONS: f"{OPENAI}.completion.protocol:CompletionRequest",
    RESPONSES: f"{OPENAI}.responses.protocol:ResponsesRequest",
    MESSAGES: "vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest",
    GENERATE: "vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateRequest",
}


def reading(path: str, body: dict[str, Any] | bytes) -> Reading:
    route = routes.find(path)
    assert route is not None
    return read(route, body if isinstance(body, bytes) else json.dumps(body).encode())


def vllms(path: str, body: dict[str, Any]) -> Any:
    """What vLLM's own class makes of the body; None if vLLM refuses it."""
    from vllm.exceptions import VLLMValidationError

    try:
        return pkgutil.resolve_name(CLASSES[path]).model_validate(body)
    except (TypeError, ValueError, VLLMValidationError):
        return None


# Ways in which a client may write a number, and what is none.
numbers = st.one_of(
    st.integers(-3, 5000),
    st.integers(1, 5000).map(float),
    st.floats(0.5, 100.5),
    st.integers(0, 5000).map(str),
    st.integers(0, 5000).map(lambda n: f" {n} "),
    st.integers(0, 5000).map(lambda n: f"{n}.0"),
    st.integers(0, 5000).map(lambda n: f"+{n}"),
    st.sampled_from(["1_000", "1e2", "0x10", "", "many", "64.5", 1e30, 10**30, True, None, [1]]),
)


@settings(deadline=None, max_examples=300)
@given(n=numbers, stream=st.sampled_from([True, False, None, "true", "off", 1, 0, "yes", 2]))
def test_n_and_stream_of_a_chat_are_what_vllm_reads(n: Any, stream: Any) -> None:
    body = {"model": "m", "messages": HELLO, "n": n, "stream": stream}
    if (theirs := vllms(CHAT, body)) is None:
        return
    ours = reading(CHAT, body)
    assert ours.sequences == max(1, theirs.n or 1)
    assert ours.stream == bool(theirs.stream)


@settings(deadline=None, max_examples=300)
@given(value=numbers)
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {"messages": HELLO}, "max_tokens"),
        (CHAT, {"messages": HELLO}, "max_completion_tokens"),
        (BATCH, {"messages": [HELLO]}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x"}, "max_tokens"),
        (RESPONSES, {"input": "x"}, "max_output_tokens"),
        (MESSAGES, {"messages": HELLO}, "max_tokens"),
    ],
)
def test_the_bound_of_an_answer_is_what_vllm_reads(
    path: str, body: dict[str, Any], field: str, value: Any
) -> None:
    body = {"model": "m", **body, field: value}
    theirs = vllms(path, body)
    # Where a request says nothing, vLLM may have a default.
    if theirs is not None and value is not None:
        ours = reading(path, body)
        assert ours.max_tokens == getattr(theirs, field)
        assert dict(ours.token_bounds)[field] == getattr(theirs, field)


@settings(deadline=None, max_examples=200)
@given(n=numbers, tokens=numbers)
def test_sampling_parameters_of_token_ids_are_what_vllm_reads(n: Any, tokens: Any) -> None:
    body = {"token_ids": [1, 2, 3], "sampling_params": {"n": n, "max_tokens": tokens}}
    if (theirs := vllms(GENERATE, body)) is None:
        return
    ours = reading(GENERATE, body)
    assert ours.sequences == theirs.sampling_params.n
    assert ours.max_tokens == theirs.sampling_params.max_tokens
    assert ours.token_ids == 3


texts = st.text(max_size=4)
ids = st.integers(0, 99)
prompts = st.one_of(
    texts,
    st.lists(texts, max_size=5),
    st.lists(ids, max_size=5),
    st.lists(st.lists(ids, max_size=3), max_size=5),
    st.lists(ids.map(str), max_size=5),
    st.lists(st.one_of(ids, ids.map(str)), max_size=5),
    st.lists(st.one_of(texts, st.lists(ids, max_size=2)), max_size=4),
)


@settings(deadline=None, max_examples=400)
@given(prompt=prompts, n=st.integers(1, 4), blanks=st.sampled_from(["", " ", "\n\t "]))
def test_prompts_of_a_completion_are_what_vllm_reads(prompt: Any, n: int, blanks: str) -> None:
    if (read_by_vllm := vllms(COMPLETIONS, {"prompt": prompt, "n": n})) is None:
        return
    theirs = read_by_vllm.prompt
    several = isinstance(theirs, list) and theirs and not isinstance(theirs[0], int)
    body = f'{{"n": {n}, "prompt":{blanks}{json.dumps(prompt, indent=1)}{blanks}}}'.encode()
    ours = reading(COMPLETIONS, body)
    assert ours.sequences == n * (len(theirs) if several else 1)
    if several and isinstance(theirs[0], list):
        assert max(map(len, theirs)) <= max(1, ours.prompt_tokens)
    elif isinstance(theirs, list) and theirs and not several and prompt == theirs:
        assert ours.prompt_tokens == len(theirs)


@pytest.mark.parametrize(
    ("path", "body", "sequences"),
    [
        (BATCH, {"messages": [HELLO] * 64}, 64),
        (BATCH, {"messages": [HELLO] * 3, "n": "2"}, 6),
        (CHAT, {"messages": HELLO * 64}, 1),
        (CHAT, {"messages": HELLO, "n": 5, "use_beam_search": True}, 5),
        (COMPLETIONS, {"prompt_embeds": ["AA==", "AA=="], "n": 2}, 4),
        ("/generative_scoring", {"query": "x", "items": ["a", "b", "c"]}, 3),
        ("/generative_scoring", {"query": [1], "items": [[1, 2], [3]]}, 2),
        ("/v1/systemone", {"state": "x", "questions": {"a": {}, "b": {}}}, 2),
        (RESPONSES, {"input": [{}, {}], "n": 7}, 1),
        ("/v1/embeddings", {"input": ["a", "b"]}, 2),
        ("/v1/embeddings", {"input": [1, 2, 3]}, 1),
        ("/v1/embeddings", {"messages": HELLO}, 1),
        ("/v2/embed", {"texts": ["a", "b"], "images": ["c"]}, 3),
        ("/score", {"text_1": "a", "text_2": ["b", "c", "d"]}, 3),
        ("/rerank", {"query": "a", "documents": ["b", "c"]}, 2),
        ("/tokenize", {"prompt": "x", "n": 9}, 0),
    ],
)
def test_sequences_of_each_route(path: str, body: dict[str, Any], sequences: int) -> None:
    assert reading(path, {"model": "m", **body}).sequences == sequences


@pytest.mark.parametrize(
    ("body", "n"),
    [
        (b'{"\\u006e": 64}', 64),
        (b'{"n": 1, "n": "64"}', 64),
        (b'{"n": 6.4e1}', 64),
        (b'{"n": "6_4"}', 64),
        (b' \n{"N": 64}', 1),
    ],
)
def test_odd_ways_to_write_n(body: bytes, n: int) -> None:
    assert reading(CHAT, body).choices == n


def test_a_prompt_has_at_most_the_tokens_that_it_says(smollm: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(smollm))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for text in ("", "a", "Größe 日本 😀" * 50, "\x01\x02\n\t" * 100, "word " * 500):
        messages = [{"role": "user", "content": text}] * 3
        body = {"messages": messages, "tools": [tool] * 20}
        count = len(tokenizer.apply_chat_template(messages, tools=body["tools"], tokenize=True))
        for ascii_only in (True, False):
            raw = json.dumps(body, ensure_ascii=ascii_only, separators=(",", ":")).encode()
            assert reading(CHAT, raw).prompt_tokens >= count
    assert reading(COMPLETIONS, {"prompt": [5] * 500}).prompt_tokens == 500
    assert reading(COMPLETIONS, {"prompt": [[5] * 3, [6] * 7]}).prompt_tokens == 7


def test_a_prompt_begins_with_what_the_model_reads_first() -> None:
    head = reading(MESSAGES, {"messages": HELLO, "system": "You are kind."}).prompt_head
    assert head.index(b"You are kind.") < head.index(b"Hello")
    head = reading(RESPONSES, {"input": "Hello", "instructions": "Be brief."}).prompt_head
    assert head.index(b"Be brief.") < head.index(b"Hello")
    assert len(reading(COMPLETIONS, {"prompt": "x" * 10**6}).prompt_head) == 128 * 2**10


def test_what_is_no_object_is_refused() -> None:
    for body in (b"[1]", b"null", b'"x"', b"{", b"\xff", b"[" * 10_000, b'{"n": NaN}', b" "):
        with pytest.raises(BadRequest):
            reading(CHAT, body)
    assert reading(CHAT, b"").sequences == 1


def test_a_body_that_two_ask_for_is_read_once() -> None:
    route = routes.find("/v1/completions")
    assert route is not None
    body = b'{"prompt": "once"}'
    assert read(route, body) is read(route, bytes(bytearray(body)))
    other = routes.find("/v1/chat/completions")
    assert other is not None
    assert read(other, body) is not read(route, body)
    # Large bodies are not kept.
    large = b'{"prompt": "' + b"x" * 2**17 + b'"}'
    assert read(route, large) is not read(route, large)
