"""A stream of vllm-rs that goes on in the full lane: nothing twice, nothing lost.

The events are those of vllm-rs and vLLM 0.32, of which each lane cuts a text in its own way.
"""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.continuation import EngineReportedDead, Malformed, Method, Stream
from serve_app.errors import CannotContinue
from serve_app.gateway.handover import FastStream

HEAD = {"id": "chatcmpl-r1", "object": "chat.completion.chunk", "created": 1}
USAGE = {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}


def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    data = {**HEAD, "choices": choices, **more}
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def delta(chat: bool, text: str, **more: Any) -> dict[str, Any]:
    said = {"delta": {"content": text} if text else {}} if chat else {"text": text}
    return {"index": 0, **said, "finish_reason": None, **more}


def fast(texts: list[str], chat: bool, usage: bool = False) -> list[bytes]:
    """What vllm-rs writes: token n with texts[n]."""
    if chat:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        made = [event([role], prompt_token_ids=[7, 8])]
    else:
        made = [event([delta(chat, "", prompt_token_ids=[7, 8])])]
    made += [event([delta(chat, text, token_ids=[n])]) for n, text in enumerate(texts)]
    made.append(event([delta(chat, "", finish_reason="length", stop_reason=None)]))
    made += [event([], usage=USAGE)] if usage else []
    return [*made, b"data: [DONE]\n\n"]


def full(
    texts: list[str], chat: bool, usage: bool = False, ids: bool = False, method: str = "resume"
) -> list[bytes]:
    """What vLLM's application writes, with marks: the end comes with the last token."""
    made = [b""] if chat else []
    if chat:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        made = [event([role], created=2, **({"prompt_token_ids": [7, 8]} if ids else {}))]
    for n, text in enumerate(texts):
        ends = n == len(texts) - 1
        marks = f": how {method}\n" * (n == 0) + f": t {n}\n" + ": end length null\n" * ends
        end: dict[str, Any] = {"finish_reason": "length"} if ends else {}
        if ids:
            prompt = {"prompt_token_ids": None if n else [7, 8]}
            end |= {"token_ids": [n], **({} if chat else prompt)}
        made.append(marks.encode() + event([delta(chat, text, **end)], created=2))
    made += [event([], usage=USAGE, created=2)] if usage else []
    return [*made, b"data: [DONE]\n\n"]


def cut(whole: str, places: list[int]) -> list[str]:
    """A text in one piece more than there are places."""
    ends = [*sorted(min(place, len(whole)) for place in places), len(whole)]
    return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]


TOKENS = 6
PLACES = st.lists(st.integers(0, 12), min_size=TOKENS - 1, max_size=TOKENS - 1)


@settings(deadline=None)
@given(
    st.text('aé🙂"\\ \n', min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(PLACES, min_size=4, max_size=4),
    st.lists(st.integers(0, 200), max_size=3),
    st.data(),
)
def test_a_stream_continues_by_its_text(
    whole: str,
    chat: bool,
    usage: bool,
    ids: bool,
    places: list[list[int]],
    breaks: list[int],
    data: st.DataObject,
) -> None:
    """However each lane holds text back, and wherever each of several attempts breaks off."""
    stream, got = FastStream(ids), list[bytes]()
    for attempt, each in enumerate(places):
        texts = cut(whole, each)
        if attempt:
            if not stream.sent:
                stream = FastStream(ids)  # As the relay does: nothing is to be continued.
            else:
                stream.restart()
        fresh = not stream.sent
        written = fast(texts, chat, usage) if fresh else full(texts, chat, usage, ids)
        raw = b"".join(written)
        broken = attempt < len(breaks)
        raw = raw[: min(len(raw) - 1, breaks[attempt] * len(raw) // 200)] if broken else raw
        middle = data.draw(st.integers(0, len(raw)))
        got += stream.events(raw[:middle]) + stream.events(raw[middle:])
        if not broken:
            break
    stream.finish()
    assert got[-1] == b"data: [DONE]"
    assert got.count(b"data: [DONE]") == 1
    said = [json.loads(each[6:]) for each in got[:-1]]
    choices = [choice for each in said for choice in each["choices"]]
    text = [
        choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices
    ]
    assert "".join(text) == whole
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]
    assert [each["usage"] for each in said if each.get("usage")] == [USAGE] * usage
    assert {each["created"] for each in said} == {said[0]["created"]}
    places_of_ids = [*said, *choices]
    given = [each["prompt_token_ids"] for each in places_of_ids if each.get("prompt_token_ids")]
    assert given == [[7, 8]] * ids
    tokens = [token for choice in choices for token in choice.get("token_ids") or []]
    assert tokens == list(range(TOKENS)) * ids
    assert stream.progress.tokens == list(range(TOKENS))


def test_an_event_that_holds_only_token_ids_is_not_sent() -> None:
    stream = FastStream()
    got = stream.events(b"".join(fast(["", "a", "", "b"], chat=True)))
    said = [json.loads(each[6:])["choices"][0] for each in got[:-1]]
    assert [choice["delta"] for choice in said] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    assert stream.progress.tokens == [0, 1, 2, 3]
    assert (stream.progress.finish, stream.progress.stop) == ("length", None)


@pytest.mark.parametrize("part", ["reasoning", "tool_calls"])
def test_what_is_no_text_is_sent_and_not_continued(part: str) -> None:
    stream = FastStream()
    first = fast(["a"], chat=True)[0]
    odd = {"index": 0, "delta": {part: [{"x": 1}]}, "finish_reason": None, "token_ids": [5]}
    assert len(stream.events(first + event([odd]))) == 2
    assert not stream.continuable


def test_text_that_looks_like_token_ids_is_sent() -> None:
    text = ',"token_ids":[1,2],"prompt_token_ids":null'
    stream = FastStream()
    got = stream.events(b"".join(fast([text], chat=False)))
    assert json.loads(got[0][6:])["choices"] == [{"index": 0, "text": text, "finish_reason": None}]


@pytest.mark.parametrize("error", [b'data: {"error":{}}', b'event: error\ndata: {"error":{}}'])
def test_an_error_of_the_fast_lane_is_a_failed_replica(error: bytes) -> None:
    stream = FastStream()
    first = b"".join(fast(["a", "b"], chat=False)[:2])
    # What came before it in the same piece is not lost.
    (got,) = stream.events(first + error + b"\n\n")
    assert b'"text":"a"' in got
    with pytest.raises(Malformed):
        stream.finish()
    with pytest.raises(EngineReportedDead):
        stream.events(b"")
    assert stream.continuable


def test_an_error_of_the_full_lane_is_the_end() -> None:
    stream = FastStream()
    stream.events(b"".join(fast(["a", "b"], chat=False)[:2]))
    stream.restart()
    error = b'data: {"error":{"message":"x"}}'
    assert stream.events(error + b"\n\ndata: [DONE]\n\n") == [error, b"data: [DONE]"]
    assert stream.ended


def test_a_text_that_comes_out_otherwise_is_an_error() -> None:
    stream = FastStream()
    stream.events(b"".join(fast(["ab", "c"], chat=False)[:2]))
    stream.restart()
    with pytest.raises(CannotContinue):
        stream.events(b"".join(full(["ax", "c"], chat=False)))


def test_what_no_engine_can_continue_is_an_error() -> None:
    stream = FastStream()
    stream.events(b"".join(fast(["ab", "c"], chat=False)[:2]))
    assert stream.continuable, "nobody has said how it goes on"
    stream.restart()
    with pytest.raises(CannotContinue):
        stream.events(b"".join(full(["ab", "c"], chat=False, method="never")))
    assert stream.method is Method.NEVER
    assert not stream.continuable


def test_an_end_without_a_finish_reason_is_no_end() -> None:
    stream = FastStream()
    with pytest.raises(Malformed):
        stream.events(b"data: [DONE]\n\n")
    assert not stream.ended


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_no_bytes_break_the_reading_of_a_fast_stream(raw: bytes) -> None:
    for stream in (FastStream(), Stream()):
        try:
            stream.events(b"data: " + raw + b"\n\n")
        except Malformed:
            assert not stream.ended
