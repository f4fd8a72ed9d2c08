"""Whether answers are the same, and how sure that is."""

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import quality, scrape
from bench.errors import BenchError, ResultError, TargetFailed
from bench.traffic.target import Target

PORT = 8843


def test_equal_answers_agree_and_one_other_word_is_said() -> None:
    result = quality.agreement(["a b c d"] * 4, ["a b c d", "a b c d", "a b x d", "y"])
    assert (result.asked, result.equal, result.equal_share, result.first_words) == (4, 2, 0.5, 1)
    assert result.common_share == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert result.equal_low < 0.5 < result.equal_high


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab ", max_size=12), min_size=1, max_size=9))
def test_whatever_is_answered_agrees_with_itself(answers: list[str]) -> None:
    result = quality.agreement(answers, answers)
    assert (result.equal_share, result.common_share, result.equal_high) == (1.0, 1.0, 1.0)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_a_share_is_a_share(first: list[str], other: list[str]) -> None:
    share = quality.common_share(" ".join(first), " ".join(other))
    assert 0 <= share <= 1
    assert (share == 1) == (other[: len(first)] == first)


def test_an_answer_is_right_whatever_its_case_and_spaces() -> None:
    assert quality.correct(["It is  PARIS.", "London"], ["paris", "Paris"]) == [True, False]


def test_references_are_kept_and_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "reference.jsonl"
    quality.write(path, ["p", "q"], ["a", ""])
    assert [(each.prompt, each.answer) for each in quality.read(path)] == [("p", "a"), ("q", "")]
    path.write_text("{}")
    with pytest.raises(ResultError, match="line 1"):
        quality.read(path)
    path.write_text("")
    with pytest.raises(BenchError, match="no reference"):
        quality.read(path)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the prompt, backwards where it has a "!"; fails where it is empty."""
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            break
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        request = json.loads(await reader.readexactly(length))
        assert (request["temperature"], request["seed"]) == (0, 0)
        output = request["messages"][0]["content"]
        text = output[::-1] if "!" in output else output
        event = {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}
        whole = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        writer.write(b"content-length: %d\r\n\r\n%b" % (len(whole), whole))
        await writer.drain()
    writer.close()


async def test_a_target_is_asked_and_judged(tmp_path: Path) -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", PORT)
    target = Target(url=f"http://127.0.0.1:{PORT}", model="m", endpoint="chat")
    references = [quality.Reference(prompt=p, answer=p) for p in ("a b", "c d!", "e f")]
    result = await quality.judge(target, references, 8, scored=False, folder=tmp_path)
    assert (result.asked, result.equal) == (3, 2)
    assert result.answers[1].answer == "!d c"
    assert [each.prompt for each in result.answers] == ["a b", "c d!", "e f"]
    result = await quality.judge(target, references, 8, scored=True, folder=tmp_path)
    assert (result.correct, result.asked) == (2, 3)
    with pytest.raises(TargetFailed, match="empty"):
        await quality.ask(target, [""], 8)
    server.close()


def test_what_speculation_got_right_is_counted_since_the_start() -> None:
    drafted, accepted = "drafted", "accepted"
    scrapes = [(0.0, {drafted: 100.0, accepted: 90.0}), (1.0, {drafted: 300.0, accepted: 150.0})]
    first, last = scrape.samples(scrapes, 0.0)
    assert (first.acceptance_rate, last.acceptance_rate) == (None, 0.3)
    assert scrape.samples([(0.0, {"running": 1.0})], 0.0)[0].acceptance_rate is None
