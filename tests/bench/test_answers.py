"""Right or wrong: answers with planted faults, and the events of a stream as they arrived."""

from typing import Any

import msgspec
import pytest

from bench.faults import answers
from bench.faults.answers import Alignment, Right, align, compare, ends, margins, may_tie
from bench.traffic.response import Response
from bench.traffic.transcript import Transcript, events, transcribe

TOKENS = [17, 4, 99, 23, 8, 61, 5, 42, 77, 31, 12, 64, 3, 88, 29, 50, 71, 9, 36, 15]


def text(tokens: list[int]) -> str:
    return "".join(f" t{token}" for token in tokens)


def heard_of(tokens: list[int] | None = None, **more: Any) -> Transcript:
    tokens = TOKENS if tokens is None else tokens
    fields = {
        "index": 0,
        "planned_s": 0.0,
        "status": 200,
        "text": text(tokens),
        "token_ids": tokens,
        "finish_reasons": ["length"],
        "finish_reason": "length",
        "usages": [(3, len(tokens))],
        "names": ["a"],
        "dones": 1,
        "asked_output_tokens": len(TOKENS),
    }
    return Transcript(**{**fields, **more})


RIGHT = Right(
    text=text(TOKENS),
    finish_reason="length",
    token_ids=TOKENS,
    prompt_token_ids=[1, 2, 3],
    input_tokens=3,
    output_tokens=len(TOKENS),
)


# --- alignment ------------------------------------------------------------------------------


def test_a_piece_that_comes_again_is_doubled() -> None:
    result = align(TOKENS[:9] + TOKENS[6:], TOKENS, 8, whole=True)
    assert result == Alignment(parted_at=9, doubled=3)


def test_a_piece_left_out_is_missing() -> None:
    result = align(TOKENS[:9] + TOKENS[11:], TOKENS, 8, whole=True)
    assert result == Alignment(parted_at=9, missing=2)


def test_pieces_at_the_ends() -> None:
    assert align(TOKENS[2:], TOKENS, 8, True) == Alignment(parted_at=0, missing=2)
    assert align(TOKENS[:-2], TOKENS, 8, True) == Alignment(parted_at=18, missing=2)
    assert align(TOKENS + TOKENS[-2:], TOKENS, 8, True) == Alignment(parted_at=20, doubled=2)
    assert align([], TOKENS, 8, True) == Alignment(parted_at=0, missing=20)


def test_a_stream_that_was_continued_twice_has_two_pieces() -> None:
    received = TOKENS[:5] + TOKENS[4:13] + TOKENS[14:]
    assert align(received, TOKENS, 4, True) == Alignment(parted_at=5, doubled=1, missing=1)


def test_a_doubled_answer_that_keeps_to_its_length_ends_too_early() -> None:
    received = (TOKENS[:9] + TOKENS[6:])[: len(TOKENS)]
    assert align(received, TOKENS, 8, True) == Alignment(parted_at=9, doubled=3, missing=3)


def test_other_tokens_are_different() -> None:
    result = align([*TOKENS[:9], *range(200, 211)], TOKENS, 8, whole=True)
    assert result == Alignment(parted_at=9, different_at=9)


def test_what_was_cut_lacks_nothing_that_came_before() -> None:
    assert align(TOKENS[:7], TOKENS, 8, whole=False) == Alignment()


# --- verdicts -------------------------------------------------------------------------------


def test_the_right_answer_has_no_fault() -> None:
    verdict = compare(heard_of(), RIGHT)
    assert verdict.outcome == "whole"
    assert verdict.parted_at is None
    assert verdict.faults == []


@pytest.mark.parametrize(
    ("transcript", "faults"),
    [
        (heard_of(TOKENS[:9] + TOKENS[6:]), ["doubled"]),
        (heard_of(TOKENS[:9] + TOKENS[11:]), ["missing"]),
        (heard_of([*TOKENS[:9], *range(200, 211)]), ["different"]),
        (heard_of(finish_reasons=["length", "length"]), ["finish"]),
        (heard_of(finish_reasons=["stop"]), ["finish"]),
        (heard_of(late=1), ["finish"]),
        (heard_of(usages=[(3, 20), (3, 20)]), ["usage"]),
        (heard_of(usages=[]), ["usage"]),
        (heard_of(usages=[(3, 11)]), ["usage"]),
        (heard_of(usages=[(12, 20)]), ["usage"]),
        (heard_of(names=["a", "b"]), ["identity"]),
        (heard_of(roles=2), ["identity"]),
        (heard_of(dones=2), ["identity"]),
        (heard_of(TOKENS[:7], error="cut: the stream ended without [DONE]"), ["lost"]),
        (heard_of([], error="http 503: no room", status=503), ["lost"]),
        (heard_of([], error="connection refused", status=0), ["lost"]),
        (heard_of(TOKENS[:9] + TOKENS[6:8], error="error event: x"), ["lost", "doubled"]),
    ],
)
def test_each_fault_is_told_from_the_others(transcript: Transcript, faults: list[str]) -> None:
    assert compare(transcript, RIGHT).faults == faults


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        ("", 200, "whole"),
        ("cut: connection reset in the response", 200, "cut"),
        ("timeout: not over after 5 s", 200, "cut"),
        ("error event: the engine died", 200, "error"),
        ("http 429: busy", 429, "refused"),
        ("connection refused", 0, "unreached"),
    ],
)
def test_outcomes(error: str, status: int, outcome: str) -> None:
    assert compare(heard_of(error=error, status=status), RIGHT).outcome == outcome


def test_half_of_a_character_lost_at_the_cut_is_seen_in_the_text() -> None:
    right = msgspec.structs.replace(RIGHT, text=RIGHT.text.replace(" t31", " t€1"))
    verdict = compare(heard_of(text=right.text.replace("€", "\ufffd")), right)
    assert verdict.faults == ["different"]
    assert verdict.unit == "characters"


def test_without_ids_texts_are_compared() -> None:
    right = msgspec.structs.replace(RIGHT, token_ids=None)
    doubled = heard_of(TOKENS[:9] + TOKENS[6:], token_ids=None)
    verdict = compare(doubled, right)
    assert (verdict.unit, verdict.doubled) == ("characters", len(text(TOKENS[6:9])))
    assert verdict.faults == ["doubled"]


def test_an_answer_that_goes_round_is_known() -> None:
    assert not RIGHT.loops
    for period in ([5], [5, 6, 7]):
        tokens = TOKENS[:10] + period * 10
        assert msgspec.structs.replace(RIGHT, token_ids=tokens).loops


# --- ties -----------------------------------------------------------------------------------


def test_margins_are_of_the_answer_alone() -> None:
    places = [
        None,
        {"2": {"logprob": -9.0}, "7": {"logprob": -0.1}},
        {"5": {"logprob": -0.2}},
        {"6": {"logprob": -0.75}, "8": {"logprob": -0.5}},
    ]
    assert margins(places, [5, 6]) == [0.0, 0.25]


def test_a_token_that_the_server_does_not_name_is_no_tie() -> None:
    assert margins([None, {"8": {"logprob": -0.5}}], [6]) == [float("inf")]


def test_only_a_whole_answer_with_a_real_end_can_be_a_tie() -> None:
    def can(transcript: Transcript, right: Right = RIGHT) -> bool:
        return may_tie(transcript, compare(transcript, right), frozenset({2}))

    other = [*TOKENS[:9], *range(200, 211)]
    assert can(heard_of(other))
    assert can(heard_of([*other[:-3], 2], finish_reason="stop"))
    assert not can(heard_of())
    # Each token that came is a greedy choice, and some are missing.
    assert not can(heard_of(TOKENS[:-2]))
    assert not can(heard_of(other[:-3]))
    assert not can(heard_of(other[:-3], finish_reason="stop"))
    assert not can(heard_of(other, error="cut: x"))
    # The right tokens with a wrong text.
    assert not can(heard_of(text="something else"))


def test_what_ends_answers_is_learnt_from_the_right_ones() -> None:
    stopped = msgspec.structs.replace(RIGHT, finish_reason="stop", token_ids=[4, 5, 2])
    assert ends([RIGHT, stopped]) == {2}


def test_a_tie_is_not_wrong_and_its_usage_may_be() -> None:
    verdict = compare(heard_of([*TOKENS[:9], *range(200, 211)], usages=[(3, 9)]), RIGHT)
    verdict.tie = True
    assert verdict.faults == ["usage"]


def test_all_faults_have_a_name() -> None:
    worst = answers.Verdict(
        outcome="cut",
        doubled=1,
        missing=1,
        different_at=1,
        finish="x",
        usage="x",
        identity="x",
    )
    assert tuple(worst.faults) == answers.FAULTS


# --- transcripts ---------------------------------------------------------------------------------


def transcript_of(
    *parts: bytes, cut: str = "", streamed: bool = True, status: int = 200
) -> Transcript:
    record = Transcript(index=0, planned_s=0.0, status=status)
    answer = Response(record, keep_text=True)
    answer.parts, answer.times = list(parts), [float(n) for n in range(len(parts))]
    answer.streamed, answer.cut = streamed, cut
    return transcribe(record, answer)


def test_events_have_the_time_of_the_piece_that_completes_them() -> None:
    parts = [b"data: 1\n", b"\ndata: 2\n\nda", b"ta: 3\r\n\r\n: ping\n\n", b"data: 4\n"]
    result = list(events(parts, [0.0, 1.0, 2.0, 3.0]))
    assert result == [(b"", b"1", 1.0), (b"", b"2", 1.0), (b"", b"3", 2.0)]


def test_a_stream_is_kept_whole() -> None:
    record = transcript_of(
        b'data: {"id":"a","choices":[{"text":" x","token_ids":[7],"prompt_token_ids":[1,2]}]}\n\n',
        b'data: {"id":"a","choices":[{"text":"","token_ids":[8]}]}\n\n',
        b'data: {"id":"b","choices":[{"text":" y","token_ids":[9],"finish_reason":"stop"}]}\n\n',
        b'data: {"id":"b","choices":[{"text":" z","token_ids":[9],"finish_reason":"stop"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":4}}\n\n',
        b"data: [DONE]\n\ndata: [DONE]\n\n",
    )
    assert record.error == ""
    assert (record.text, record.token_ids) == (" x y z", [7, 8, 9, 9])
    assert record.prompt_token_ids == [1, 2]
    assert record.finish_reasons == ["stop", "stop"]
    assert (record.late, record.dones, record.names) == (1, 2, ["a", "b"])
    assert (record.usages, record.output_tokens) == ([(2, 4)], 4)
    assert record.chunk_s == [0.0, 1.0, 2.0, 3.0]


def test_a_chat_names_its_role_once() -> None:
    begin = b'data: {"id":"a","choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    word = b'data: {"id":"a","choices":[{"delta":{"content":"Hi"},"token_ids":[3]}]}\n\n'
    record = transcript_of(begin, word, begin, word)
    assert (record.roles, record.text, record.token_ids) == (2, "HiHi", [3, 3])


@pytest.mark.parametrize(
    ("parts", "cut", "error"),
    [
        ([b'data: {"choices":[{"text":"x"}]}\n\n'], "", "cut: the stream ended without [DONE]"),
        ([b'data: {"choices":[{"text":"x"}]}\n\n'], "cut: reset", "cut: reset"),
        ([b"data: [DONE]\n\n"], "", "cut: the stream ended without a finish_reason"),
        ([b'data: {"error":{"message":"dead"}}\n\ndata: [DONE]\n\n'], "", "error event: dead"),
        ([b'event: error\ndata: {"message":"dead"}\n\n'], "", "error event: dead"),
        ([b"data: {nonsense\n\n"], "", "bad event: {nonsense"),
    ],
)
def test_what_went_wrong_with_a_stream(parts: list[bytes], cut: str, error: str) -> None:
    assert transcript_of(*parts, cut=cut).error == error


def test_an_answer_in_one_piece() -> None:
    body = (
        b'{"id":"a","choices":[{"text":"x","token_ids":[7],"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":2,"completion_tokens":1}}'
    )
    record = transcript_of(body, streamed=False)
    assert (record.error, record.text, record.token_ids) == ("", "x", [7])
    assert (record.finish_reasons, record.usages) == (["stop"], [(2, 1)])
    assert transcript_of(b'{"error":{"message":"no room"}}', streamed=False, status=503).error == (
        "http 503: no room"
    )
    assert transcript_of(body[:20], streamed=False, cut="cut: closed").error == "cut: closed"
