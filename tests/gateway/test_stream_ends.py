"""However replicas fail, a stream ends with its last event or with an error event.

Properties over random cuts, refusals, stalls, errors and malformed answers, against small real
servers; and over random cuts of the bytes that a gateway reads.
"""

import asyncio
import io
import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from serve_app.continuation import Malformed, Marks, Method, Stream
from serve_app.gateway.handover import FastStream
from serve_app.gateway.request import Request
from serve_app.observe.logs import Log
from serve_app.observe.meter import Meter
from serve_app.settings import Replicas
from tests.examples import examples
from tests.gateway.test_relay import Client, Fleet, fleet
from tests.services import streams
from tests.services.engine import EngineServer, Fault

LENGTH = 10
PLACES = st.integers(0, LENGTH)

KEEP_ALIVE = b": keep-alive"

# What an engine never writes, or writes only when it fails, or not there.
GARBAGE = st.sampled_from(
    [
        b"\n\n",
        b"\n\n\n\n",
        b"garbage\n\n",
        b'{"error": {"message": "raw"}}\n\n',
        b'data: {"text": \n\n',
        b'data: {"choices": [{"text": "x"}]}\r\n\r\n',
        b"data:\n\n",
        b"data: \n\n",
        b"dat\n\n",
        b": how nonsense\n: t x y\n\n",
        b": how resume\n: t 1 2 x\ndata: {}\n\n",
        b': how resume\n: t 3\n: l [[[[3, null]], 1]]\ndata: {"text": ""}\n\n',
        b": how resume\n: t 3\n: l [nonsense\ndata: {}\n\n",
        b": end\ndata: {}\n\n",
        b"\xff\xfe\n\n",
        b'data: {"choices": [{"text": "\xc3"}]}\n\n',
        b'data: {"error": "\xff"}\n\n',
        b'data: {"error": ' + b"[" * 3000 + b"\n\n",
        b"event: error\n\n",
        b"event: error\ndata: \xff\n\n",
        b'event: error\ndata: {"message": "no type"}\n\n',
        b"event: response.failed\ndata: {}\n\n",
        b"data: [DONE]\n\n",
        b"data: [DONE]\n\ndata: [DONE]\n\n",
        b'event: message_stop\ndata: {"type": "message_stop"}\n\n',
        b'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\n',
        b'data: {"choices": [{"index": 7, "text": "x"}]}\n\n',
        b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n',
        b'data: {"choices": [{"delta": {"reasoning": "x", "tool_calls": [{}]}}]}\n\n',
        b'data: {"choices": [{"text": "x", "logprobs": {"token_logprobs": [-Infinity]}}]}\n\n',
        b'data: {"choices": 7}\n\n',
        b"data: null\n\n",
        b": keep-alive\n\n",
    ]
)
PLANTED = st.dictionaries(PLACES, GARBAGE, max_size=3)
# Sizes of pieces, so that the bytes are cut within events, lines and characters; 0: an event.
PIECES = st.lists(st.integers(0, 60), max_size=6).filter(lambda sizes: not sizes or any(sizes))
FAULTS = st.one_of(
    st.builds(Fault, cut_after=PLACES, half=st.booleans(), orderly=st.booleans(), pieces=PIECES),
    st.builds(Fault, status=st.sampled_from([200, 204, 400, 404, 422, 429, 500, 502, 503])),
    st.builds(Fault, error_after=PLACES, pieces=PIECES),
    st.builds(Fault, stall_after=PLACES, stall_s=st.just(0.02)),
    st.builds(
        Fault,
        cut_after=st.none() | PLACES,
        half=st.booleans(),
        instead=PLANTED,
        beside=PLANTED,
        pieces=PIECES,
    ),
)
METHODS = st.sampled_from(["resume", "repeat", "never"])
PATHS = st.sampled_from(streams.PATHS)
FLEETS = st.lists(st.lists(FAULTS, max_size=3), min_size=1, max_size=3)


def is_honest(fault: Fault) -> bool:
    """No part of the stream is changed: where such a stream is called complete, it is."""
    return not (fault.instead or fault.beside)


HONEST = st.lists(st.lists(FAULTS.filter(is_honest), max_size=3), min_size=1, max_size=3)
# In any script: characters of two and four bytes.
UNIT = "é🙂 "
WHOLE = "".join(f"{token}{UNIT}" for token in range(LENGTH))


def relayed(
    faults: list[list[Fault]], method: str, fast: bool, path: str, **relay: Any
) -> tuple[Client, dict[str, Any]]:
    """What a client sees of one stream, and the line in the log."""
    engines = [
        EngineServer(f"e{place}", LENGTH, unit=UNIT, method=method, faults=list(each), fast=fast)
        for place, each in enumerate(faults)
    ]
    written = io.StringIO()
    client = Client()

    async def run() -> None:
        async with fleet(*engines, replica_timeout_s=0.3, **relay) as there:
            await metered(there, written)({**SCOPE, "path": path}, _receive, client.send)

    asyncio.run(asyncio.wait_for(run(), 60))
    assert all(engine.places == engine.left_places for engine in engines), "a place is kept"
    return client, json.loads(written.getvalue().splitlines()[-1])


SCOPE: Scope = {"type": "http", "method": "POST"}
SCOPE["headers"] = [(b"content-type", b"application/json")]
PROMPTS: dict[str, dict[str, Any]] = {
    streams.COMPLETIONS: {"prompt": "p"},
    streams.RESPONSES: {"input": "p"},
}
MESSAGE = {"messages": [{"role": "user", "content": "p"}], "max_tokens": LENGTH}


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b""}


def metered(there: Fleet, written: io.StringIO) -> Meter:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked = {"model": "m", "stream": True, **PROMPTS.get(scope["path"], MESSAGE)}
        body = json.dumps(asked).encode()
        await there.relay(Request.of(dict(scope), body, "x-session-id"), send)

    return Meter(app, "m", Replicas(), Log(written.write, replica="r"))


SLOW = examples(120)
LAST = (b"data: [DONE]", b"event: response.completed", b"event: message_stop")


@SLOW
@given(FLEETS, METHODS, st.booleans(), st.integers(1, 4), PATHS)
@example([[Fault(instead={5: streams.DONE})]], "resume", False, 1, streams.COMPLETIONS)
@example([[Fault(error_after=5)]], "resume", False, 1, streams.RESPONSES)
def test_a_stream_ends_with_its_last_event_or_an_error(
    faults: list[list[Fault]], method: str, fast: bool, max_deaths: int, path: str
) -> None:
    client, line = relayed(faults, method, fast, path, max_deaths=max_deaths)
    assert client.over
    assert line["lane"] == client.headers.get(b"x-serve-lane", b"python").decode()
    assert b": how" not in client.body
    assert b"token_ids" not in client.body
    if client.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        assert client.body.endswith(b"\n\n")
        events = [event for event in client.body.split(b"\n\n")[:-1] if event != KEEP_ALIVE]
        failed = [event for event in events if is_failure(event)]
        assert failed or events[-1].startswith(LAST)
        assert events[-1].startswith(LAST) or events[-1] == failed[-1]
        assert sum(event.startswith(LAST) for event in events) <= 1
        if not failed and path in (streams.COMPLETIONS, streams.CHAT):
            assert streams.Read.of(client.body).finishes, "it ends without a finish reason"
        assert line["status"] == (500 if failed else 200)
        assert bool(line.get("reason")) == bool(failed)
    elif client.status >= 400:
        assert json.loads(client.body)["error"]
        assert line["status"] == client.status


def is_failure(event: bytes) -> bool:
    """Whether a client takes it for an error: by its name, or by its field `error`."""
    if event.startswith((b"event: error", b"event: response.failed")):
        return True
    try:
        data = json.loads(event.split(b"\n")[-1].removeprefix(b"data: "))
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("error") is not None


@SLOW
@given(HONEST, METHODS, st.booleans(), st.integers(1, 4), PATHS)
def test_what_a_client_is_sent_is_a_part_of_the_right_answer_and_all_of_it_if_it_ends_well(
    faults: list[list[Fault]], method: str, fast: bool, max_deaths: int, path: str
) -> None:
    client, line = relayed(faults, method, fast, path, max_deaths=max_deaths)
    if not client.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        return
    read = streams.Read.of(client.body)
    assert WHOLE.startswith(read.text)
    assert read.ends <= 1
    if line["status"] == 200:
        assert read.text == WHOLE
        assert (read.finishes, read.failed) == (1, False)
        assert len(read.ids) == 1, "two answers in one"


def events_of(length: int, method: Method = Method.RESUME) -> list[bytes]:
    engine = EngineServer("a", length=length, method=method.value)
    return list(engine._events(None))


@given(st.integers(1, 8), st.data())
def test_events_are_the_same_however_their_bytes_are_cut(length: int, data: st.DataObject) -> None:
    raw = b"".join(events_of(length))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=12)) | {0, len(raw)})
    stream, got = Stream(), []
    for start, end in itertools.pairwise(cuts):
        got += stream.events(raw[start:end])
    assert b"\n\n".join(got) + b"\n\n" == b"".join(
        event[event.index(b"data: ") :] for event in events_of(length)
    )
    assert stream.ended
    stream.finish()


@pytest.mark.parametrize("stream", [Stream, FastStream])
@given(where=st.sets(st.integers(0, 4)), broken=st.none() | st.integers(0, 4))
def test_keep_alive_comments_are_passed_on_and_count_as_no_events(
    stream: type[Stream], where: set[int], broken: int | None
) -> None:
    """`sse_keep_alive_interval`: they keep proxies from closing a silent connection."""
    engine = EngineServer("a", length=3, fast=True)
    events = list(engine._fast_events() if stream is FastStream else engine._events(None))
    reader, got = stream(), b""
    for place, event in enumerate(events):
        if place in where:
            assert reader.events(b": keep-alive\n\n") == [KEEP_ALIVE]
        if place == broken:
            break
        got += b"".join(each + b"\n\n" for each in reader.events(event))
    assert KEEP_ALIVE not in got
    assert reader.sent == got.count(b"data: ")
    if broken is None or broken >= len(events):
        assert reader.ended
        assert reader.events(b": keep-alive\n\n") == []


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reading_of_a_stream(raw: bytes) -> None:
    stream = Stream()
    try:
        for event in stream.events(raw + b"\n\n"):
            assert event.startswith((b"data: ", b"event: ", b":"))
        stream.finish()
    except Malformed:
        assert not stream.ended


@pytest.mark.parametrize("logprob", [-0.5, float("-inf"), -9999.0])
def test_a_token_that_a_grammar_forbids_has_a_logprob_that_travels(logprob: float) -> None:
    marks, stream = Marks(), Stream()
    marks.how(Method.REPEAT)
    marks.group([5], [([(5, -0.1), (6, logprob)], 1)])
    assert stream.events(marks.take() + b'data: {"text": "x"}\n\n')
    assert stream.continuable
    assert stream.progress.logprobs is not None
    (likeliest, _), *_ = stream.progress.logprobs
    expected = None if logprob == float("-inf") else logprob
    assert likeliest[1] == (6, expected)
