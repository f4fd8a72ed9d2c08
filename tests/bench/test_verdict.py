"""Answers that contradict themselves: a server that lies is found out, one that does not is not."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import measure
from bench.itself.known_server import Options, serving
from bench.itself.known_words import MODEL
from bench.measure import SLOS
from bench.records import Record
from bench.traffic.client import Client
from bench.traffic.request import Request
from bench.traffic.target import Target
from bench.traffic.verdict import judge

LIARS = Path(__file__).parents[3] / "shared" / "cases" / "bench" / "liars.py"
ASKED = 16
PORT = 8747


def answer(**changes: Any) -> Record:
    """16 tokens of 4 bytes, 10 ms apart."""
    times = [0.1 + 0.01 * place for place in range(ASKED)]
    settings: dict[str, Any] = {
        "status": 200,
        "chunk_s": times,
        "end_s": 0.3,
        "asked_output_tokens": ASKED,
        "output_tokens": ASKED,
        "text_bytes": 4 * ASKED,
        "finish_reason": "length",
    }
    return Record(index=0, planned_s=0.0, sent_s=0.0, **{**settings, **changes})


def judged(streamed: bool = True, answers: int = 1, **changes: Any) -> Record:
    record = answer(**changes)
    judge(record, streamed, answers)
    return record


def test_a_plain_answer_is_not_doubted() -> None:
    record = judged()
    assert (record.ok, record.odd, record.output_tokens) == (True, "", ASKED)
    assert measure.tpot_s(record) == pytest.approx(0.01)


@pytest.mark.parametrize("tokens", [0, 1, 10, 160, 16_000])
def test_a_usage_that_cannot_be_is_not_counted(tokens: int) -> None:
    record = judged(output_tokens=tokens, asked_output_tokens=64, finish_reason="stop")
    assert record.odd.startswith("usage: ")
    assert record.output_tokens is None
    assert measure.tpot_s(record) is None
    assert not SLOS["mlperf-server"].met_by(record)


@settings(deadline=None)
@given(
    tokens=st.integers(1, 300),
    per_event=st.integers(1, 8),
    token_bytes=st.integers(1, 12),
    gap_s=st.floats(0.0002, 0.1),
)
def test_an_honest_server_is_never_doubted(
    tokens: int, per_event: int, token_bytes: int, gap_s: float
) -> None:
    """Several tokens an event, short and long tokens, slow and fast ones."""
    events = -(-tokens // per_event)
    record = judged(
        output_tokens=tokens,
        asked_output_tokens=tokens,
        text_bytes=tokens * token_bytes,
        chunk_s=[0.1 + gap_s * per_event * place for place in range(events)],
    )
    assert record.ok
    # Few events do not show how long a token took, and nothing else is odd.
    assert record.odd == "" or (events < 4 and record.odd.startswith(("one piece", "few events")))
    assert record.output_tokens == tokens


@settings(deadline=None)
@given(tokens=st.integers(8, 300), factor=st.sampled_from([0.0, 0.1, 10.0]))
def test_a_tenth_and_tenfold_are_found_out(tokens: int, factor: float) -> None:
    record = judged(
        output_tokens=int(tokens * factor),
        asked_output_tokens=tokens,
        text_bytes=5 * tokens,
        chunk_s=[0.1 + 0.01 * place for place in range(tokens)],
    )
    assert record.output_tokens is None


def test_hidden_reasoning_is_no_contradiction() -> None:
    settings: dict[str, Any] = {"asked_output_tokens": 500, "finish_reason": "stop"}
    assert judged(output_tokens=400, reasoning_tokens=380, **settings).odd == ""
    assert judged(output_tokens=400, **settings).odd.startswith("usage: ")


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_an_answer_without_output_is_a_failure(reason: str) -> None:
    for tokens in (None, 0, 3):
        record = judged(chunk_s=[], text_bytes=0, output_tokens=tokens, finish_reason=reason)
        assert record.error.startswith("empty: ")
        assert not SLOS["mlperf-server"].met_by(record)


def test_an_answer_of_tokens_that_are_not_shown_is_odd_and_not_good() -> None:
    """As with `ignore_eos`, where a model goes on with special tokens."""
    record = judged(chunk_s=[], text_bytes=0)
    assert record.ok
    assert record.odd.startswith("no text: ")
    assert not measure.Slo(e2e_s=10.0).met_by(record)


def test_what_comes_at_once_has_no_time_between_tokens() -> None:
    buffered = [[0.2 + gap_s * place for place in range(ASKED)] for gap_s in (0.0, 1e-6, 6e-5)]
    for chunk_s in ([0.2], *buffered):
        record = judged(chunk_s=chunk_s)
        assert record.odd.startswith("one piece: ")
        assert measure.tpot_s(record) is None
        assert measure.itl_s(record) == []
        assert measure.ttft_s(record) == 0.2
        assert not SLOS["mlperf-interactive"].met_by(record)


def test_a_few_events_that_a_busy_client_read_at_once_are_not_odd() -> None:
    record = judged(chunk_s=[0.2, 0.2, 0.2], output_tokens=3, asked_output_tokens=3, text_bytes=12)
    assert record.odd == ""
    assert measure.tpot_s(record) is None


def test_an_answer_that_was_not_to_be_streamed_is_not_odd_and_has_no_tpot() -> None:
    record = judged(streamed=False, chunk_s=[0.2])
    assert record.odd == ""
    assert measure.tpot_s(record) is None
    assert not SLOS["mlperf-interactive"].met_by(record)


def test_more_answers_than_were_asked_for_are_odd() -> None:
    changes: dict[str, Any] = {"choices": 2, "output_tokens": 2 * ASKED}
    times = [at_s for at_s in answer().chunk_s for _ in range(2)]
    assert judged(chunk_s=times, **changes).odd.startswith("choices: ")
    both = judged(answers=2, chunk_s=times, **changes)
    assert both.odd == ""
    assert measure.tpot_s(both) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        # The whole length is said after three events, however long their text is.
        ({"chunk_s": [0.1, 0.11, 0.12], "text_bytes": 12}, "few events: 16 tokens came in 3"),
        ({"chunk_s": [0.1, 0.11, 0.12], "text_bytes": 90}, "few events: 16 tokens came in 3"),
        (
            {"output_tokens": 64, "asked_output_tokens": 64, "text_bytes": 25}
            | {"chunk_s": [0.1, 0.11, 0.12, 0.13, 0.14]},
            "usage: 64 output tokens are said, and the text has 25 bytes",
        ),
        # The first token is quick, and what follows was held back; or the other way round.
        ({"chunk_s": [0.1] + [0.4] * 15}, "few events: all events but one came at once"),
        ({"chunk_s": [0.1] * 15 + [0.4]}, "few events: all events but one came at once"),
        ({"chunk_s": answer().chunk_s[:8], "output_tokens": 8}, "finish: the server says 'length'"),
        ({"input_tokens": 0}, "prompt usage: 0 prompt tokens"),
        ({"input_tokens": 4000, "asked_input_tokens": 200}, "prompt usage: 4000 prompt tokens"),
        ({"input_tokens": 20, "asked_input_tokens": 200}, "prompt usage: 20 prompt tokens"),
        ({"input_tokens": 200, "cached_tokens": 208}, "prompt usage: 208 of 200"),
    ],
)
def test_usage_text_finish_and_times_that_disagree_are_never_good(
    changes: dict[str, Any], what: str
) -> None:
    record = judged(**changes)
    assert record.odd.startswith(what)
    assert measure.tpot_s(record) is None
    assert not measure.Slo(e2e_s=10.0).met_by(record)
    assert "cannot be believed" in measure.answer_doubts(measure.measure([record]))[0]


LONG = " words enough for as many tokens as the usage says, and for more than that"
LIES: dict[str, dict[str, Any]] = {
    "usage: 64 output tokens are said, and the text has 15": {"events": 3},
    "usage: 64 output tokens are said, and the text has 10": {"events": 5, "word": " w"},
    # Apart, as a busy client would read two of them at once.
    "few events: 64 tokens came in 3 events": {"events": 3, "itl_ms": 250, "word": LONG},
    "few events: all events but one": {"held": True},
    "one piece": {"events": 1, "word": LONG},
    "finish": {"events": 8, "said_share": 0.125},
    "prompt usage: 0": {"prompt_share": 0.0},
    "prompt usage: 4000": {"prompt_share": 1000.0},
    "prompt usage: 90 of 4": {"cached_tokens": 90},
    "late output": {"after_end": True},
}


@pytest.mark.parametrize("what", LIES)
async def test_a_known_server_that_lies_is_doubted_and_never_good(what: str) -> None:
    options = Options(**{"ttft_ms": 20, "itl_ms": 5, **LIES[what]})
    async with serving(options, PORT):
        client = Client(Target(url=f"http://127.0.0.1:{PORT}", model=MODEL), time.perf_counter)
        request = Request(prompt="one two three four", output_tokens=64, input_tokens=4)
        record = await client.ask(request, Record(index=0, planned_s=time.perf_counter()))
        client.close()
    assert record.odd.startswith(what)
    assert not measure.Slo(e2e_s=100.0).met_by(record)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_the_server_broke_off_is_a_failure(reason: str) -> None:
    assert judged(finish_reason=reason).error.startswith("broken off")


def test_odd_answers_make_a_run_doubtful_and_one_in_two_hundred_does_not() -> None:
    def doubts(odd: int) -> list[str]:
        records = [judged(output_tokens=0) for _ in range(odd)] + [
            judged() for _ in range(200 - odd)
        ]
        return measure.answer_doubts(measure.measure(records))

    assert doubts(1) == []
    assert "cannot be believed" in doubts(4)[0]


def test_answers_that_stop_early_are_another_load() -> None:
    def doubts(**changes: Any) -> list[str]:
        early: dict[str, Any] = {"output_tokens": 3, "finish_reason": "stop"}
        record = judged(chunk_s=answer().chunk_s[:3], text_bytes=12, **early, **changes)
        return measure.answer_doubts(measure.measure([record]))

    assert "19% of the output tokens" in doubts()[0]
    assert doubts(limit=True) == []


# --- the liars of the project's cases -------------------------------------------------------


@pytest.fixture(scope="module")
def liar() -> Iterator[str]:
    if not LIARS.exists():
        pytest.skip(f"{LIARS.name} is not here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(LIARS), str(port)], env=dict(os.environ))
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


async def records_of(url: str, mode: str) -> list[Record]:
    """What became of two requests, one after the other, on one connection."""
    target = Target(url=url, model="liar", endpoint="chat", timeout_s=1.5, extra={"mode": mode})
    client = Client(target, time.perf_counter)
    try:
        return [
            await client.ask(
                Request(prompt="hi", output_tokens=ASKED),
                Record(index=index, planned_s=time.perf_counter()),
            )
            for index in range(2)
        ]
    finally:
        client.close()


HONEST = """
plain usage_each burst4 twoevents_onechunk role space keepalive crlf nospace multibyte close
slowheaders dupfinish reasoning tools function_call usage_null_late drop_after_done
""".split()  # noqa: SIM905
FAILED = """
errormid errordone_finish err200json err200sse html200 reset fin_mid close_cut gzip 429 empty
empty_usage nodone nofinish redirect 204
""".split()  # noqa: SIM905
DOUBTED = ["nousage", "usage0", "cached", "onechunk", "nonstream", "short", "n2"]


@pytest.mark.parametrize("mode", HONEST)
def test_an_honest_mode_is_measured(liar: str, mode: str) -> None:
    measures = measure.measure(asyncio.run(records_of(liar, mode)))
    assert (measures.ok, measures.output_tokens) == (2, 2 * ASKED)
    assert measure.answer_doubts(measures) == []


@pytest.mark.parametrize("mode", FAILED)
def test_a_failing_mode_is_a_failure(liar: str, mode: str) -> None:
    records = asyncio.run(records_of(liar, mode))
    assert [record.ok for record in records] == [False, False]


@pytest.mark.parametrize("mode", DOUBTED)
def test_a_lying_mode_is_doubted(liar: str, mode: str) -> None:
    measures = measure.measure(asyncio.run(records_of(liar, mode)))
    assert measures.ok == 2
    assert measure.answer_doubts(measures)
    assert measures.output_tokens != 0
    assert measures.tpot_mean_s is None or measures.tpot_mean_s > 0.001
