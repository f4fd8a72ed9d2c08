"""The client against real servers, and its reading of responses that are cut anywhere."""

import asyncio
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from bench.errors import TargetError
from bench.itself.known_server import Options, Server, serving
from bench.records import Record
from bench.traffic import alarm
from bench.traffic.client import Client, check
from bench.traffic.request import Request
from bench.traffic.response import Response
from bench.traffic.sse import Events, error_text
from bench.traffic.target import Target, encode
from tests.bench.made import certificate_of_localhost

PORT = 8850
OTHER_PORT = 8851
NOBODY_PORT = 8852
THREE = Request(prompt="one two three", output_tokens=3)


def target(port: int = PORT, **changes: Any) -> Target:
    settings: dict[str, Any] = {"url": f"http://127.0.0.1:{port}", "model": "fake"}
    return Target(**{**settings, "keep_text": True, "timeout_s": 20.0, **changes})


def record() -> Record:
    return Record(index=0, planned_s=time.perf_counter())


@asynccontextmanager
async def client(**changes: Any) -> AsyncIterator[Client]:
    made = Client(target(**changes), time.perf_counter)
    try:
        yield made
    finally:
        made.close()


async def ask(request: Request = THREE, **changes: Any) -> Record:
    async with client(**changes) as made:
        return await made.ask(request, record())


Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw(answer: Answering) -> AsyncIterator[None]:
    """A server whose connections are handled by `answer`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", OTHER_PORT)
    try:
        yield
    finally:
        server.close()


async def request_of(reader: asyncio.StreamReader) -> bytes:
    """The next request of a connection, whole; empty when the client has closed it."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


# --- events ---------------------------------------------------------------------------------


def event(text: str | None = None, reason: str | None = None, **more: Any) -> str:
    choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": reason}]
    return "data: " + json.dumps({"choices": choices, **more}, ensure_ascii=False)


USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 4},
}
LINES = [
    ": a comment",
    "",
    event("h\u00e9"),
    "",
    event("\U0001f642 {\\n}"),
    ": a ping in an event",
    "event: message",
    "",
    'data: {"choices":',
    'data:[{"text": "two lines"}]}',
    "",
    event("", usage=None),
    "",
    event(" end", "length"),
    "",
    event(usage=USAGE),
    "",
    "data: [DONE]",
    "",
    "",
]


def read(pieces: list[bytes]) -> Record:
    """The record of a stream that came in these pieces, at 1 s, 2 s, ..."""
    read = Record(index=0, planned_s=0.0)
    events = Events(read, keep_text=True)
    for at_s, piece in enumerate(pieces, 1):
        events.feed(piece, float(at_s))
    events.end()
    return read


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_stream_reads_the_same_wherever_it_is_cut(end: str) -> None:
    stream = end.join(LINES).encode()
    cuts = [[stream[:at], stream[at:]] for at in range(len(stream) + 1)]
    cuts.append([stream[at : at + 1] for at in range(len(stream))])
    cuts.append([stream])
    for pieces in cuts:
        result = read(pieces)
        assert (result.error, result.finish_reason) == ("", "length")
        assert result.text == "h\u00e9\U0001f642 {\\n}two lines end"
        assert (result.input_tokens, result.output_tokens, result.cached_tokens) == (7, 5, 4)
        assert len(result.chunk_s) == 4


def test_the_time_of_an_event_is_when_its_last_byte_came() -> None:
    stream = (event("a") + "\n\n" + event("b", "stop") + "\n\n").encode()
    half = len(event("a")) + 2 + 10
    assert read([stream[:half], stream[half:]]).chunk_s == [1.0, 2.0]
    assert read([stream]).chunk_s == [1.0, 1.0]
    assert read([stream[: half - 11], stream[half - 11 :]]).chunk_s == [2.0, 2.0]
    assert read([stream[:4], stream[4:20], stream[20:]]).chunk_s == [3.0, 3.0]


@pytest.mark.parametrize(
    ("delta", "shows"),
    [
        ({"role": "assistant", "content": ""}, False),
        ({"content": "a"}, True),
        ({"reasoning_content": "a"}, True),
        ({"reasoning": "a"}, True),
        ({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}, True),
        ({}, False),
    ],
)
def test_an_event_of_a_chat_counts_if_it_shows_something(
    delta: dict[str, Any], shows: bool
) -> None:
    line = "data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}) + "\n\n"
    assert read([line.encode()]).chunk_s == ([1.0] if shows else [])


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (event("a") + "\n\n", "cut: the stream ended without [DONE]"),
        (event("a") + "\n\ndata: [DONE]\n\n", "cut: the stream ended without a finish_reason"),
        ('data: {"error": {"message": "out of\\n memory"}}\n\n', "error event: out of memory"),
        ('data: {"object": "error", "message": "old"}\n\n', "error event: old"),
        ('event: error\ndata: {"detail": "no"}\n\n', "error event: no"),
        ('data: {"choices": [{"text": "a"}\n\n', 'bad event: {"choices": [{"text": "a"}'),
        ('data: {"choices": [{"text": 1}]}\n\n', 'bad event: {"choices": [{"text": 1}]}'),
        ("data: \xff\n\n", "bad event: \xff"),
        (
            'data: {"choices": [{"text": "\udcff"}]}\n\n',
            'bad event: {"choices": [{"text": "\ufffd"}]}',
        ),
        ("", "cut: the stream ended without [DONE]"),
    ],
)
def test_what_is_wrong_with_a_stream_is_said(stream: str, error: str) -> None:
    assert read([stream.encode(errors="surrogateescape")]).error == error


def test_a_line_that_came_before_belongs_to_the_event() -> None:
    assert read([b"event: error\n", b'data: {"message": "no"}\n\n']).error == "error event: no"


def test_the_first_error_is_the_cause() -> None:
    stream = b'data: {"error": "out of memory"}\n\ndata: {"error": "aborted"}\n\n'
    assert read([stream]).error == "error event: out of memory"


def test_the_text_of_an_error_is_one_short_line() -> None:
    assert error_text(b'{"error": {"message": "too\\nlong", "code": 400}}') == "too long"
    assert error_text(b'{"error": "plain"}') == "plain"
    assert error_text(b'{"detail": [{"loc": ["body"]}]}') == '[{"loc":["body"]}]'
    assert error_text(b"<html>\n  Bad Gateway") == "<html> Bad Gateway"
    assert error_text(b"") == ""
    assert len(error_text(b"x" * 1000)) == 200


# --- responses ------------------------------------------------------------------------------


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_a_response_reads_the_same_byte_by_byte() -> None:
    """Whether a piece ends in a header, in the frame of a chunk or in a character."""
    response = STREAM + chunked("\r\n".join(LINES).encode(), 50)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        for at in range(len(response)):
            writer.write(response[at : at + 1])
            await asyncio.sleep(0)

    async with raw(answer):
        reply = await ask(Request(prompt="one two three", output_tokens=5), port=OTHER_PORT)
    assert (reply.error, reply.status, reply.output_tokens) == ("", 200, 5)
    assert reply.text == "h\u00e9\U0001f642 {\\n}two lines end"
    assert len(reply.chunk_s) == 4


WHOLE = json.dumps({"choices": [{"text": "all", "finish_reason": "stop"}], "usage": USAGE}).encode()
DONE = (event("a", "stop") + "\n\ndata: [DONE]\n\n").encode()


@pytest.mark.parametrize(
    ("response", "status", "error", "text"),
    [
        (STREAM + chunked(DONE, 1000), 200, "", "a"),
        (b"HTTP/1.1 102 Processing\r\n\r\n" + STREAM + chunked(DONE, 7), 200, "", "a"),
        (b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + DONE, 200, "", "a"),
        (b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + WHOLE, 200, "", "all"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
            200,
            "bad response: hello",
            "",
        ),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
            200,
            "bad response: no choices",
            "",
        ),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\nhello",
            200,
            "cut: connection closed in the response",
            "",
        ),
        (STREAM + b"400\r\n" + DONE[:20], 200, "cut: connection closed in the response", ""),
        # All that was said has come; the frame around it is the server's business.
        (STREAM + chunked(DONE, 1000)[:-5], 200, "", "a"),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", 503, "http 503", ""),
        (
            b'HTTP/1.1 400 Bad\r\ncontent-length: 18\r\n\r\n{"message": "oh"} ',
            400,
            "http 400: oh",
            "",
        ),
        (b"", 0, "connection closed without a response", ""),
        (b"HTTP/1.1 200 O", 0, "connection closed without a response", ""),
        (b"SSH-2.0-OpenSSH\r\n", 0, "bad response: not HTTP", ""),
    ],
)
async def test_any_response_becomes_a_record(
    response: bytes, status: int, error: str, text: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(response)
        await writer.drain()

    async with raw(answer):
        reply = await ask(port=OTHER_PORT)
    assert reply.status == status
    assert reply.error.startswith(error)
    assert bool(reply.error) == bool(error)
    assert reply.text == text
    assert reply.end_s is not None
    assert (reply.headers_s is not None) == bool(status)


# --- the server that is known ---------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize(
    "options",
    [{}, {"events_per_write": 2}, {"ping": True, "crlf": True}, {"itl_ms": 2.0}],
    ids=str,
)
async def test_what_came_back_is_in_the_record(endpoint: str, options: dict[str, Any]) -> None:
    async with serving(Options(cached_tokens=2, word=" w\u00f6rd", **options), PORT):
        answer = await ask(Request(prompt="a b c d", output_tokens=5), endpoint=endpoint)
    assert (answer.error, answer.status, answer.finish_reason) == ("", 200, "length")
    assert (answer.input_tokens, answer.output_tokens, answer.cached_tokens) == (4, 5, 2)
    assert answer.text == " w\u00f6rd" * 5
    assert len(answer.chunk_s) == 5
    assert answer.sent_s is not None
    assert answer.headers_s is not None
    assert answer.end_s is not None
    times = [answer.planned_s, answer.sent_s, answer.headers_s, *answer.chunk_s, answer.end_s]
    assert times == sorted(times)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_an_answer_that_is_not_streamed_came_at_once(endpoint: str) -> None:
    async with serving(Options(), PORT):
        request = Request(prompt="a", output_tokens=4, extra={"stream": False})
        answer = await ask(request, endpoint=endpoint)
    assert (answer.error, answer.output_tokens, answer.text) == ("", 4, " word" * 4)
    assert answer.chunk_s == [answer.end_s]
    assert answer.finish_reason == "length"


async def test_time_to_the_first_token_and_between_tokens() -> None:
    async with serving(Options(ttft_ms=200, itl_ms=20), PORT):
        answer = await ask(Request(prompt="a", output_tokens=6))
    assert answer.chunk_s[0] - answer.planned_s > 0.195
    # A client that saw them all at the end would say 0.
    assert answer.chunk_s[-1] - answer.chunk_s[0] > 0.05


async def test_failures_are_counted_as_the_server_made_them() -> None:
    options = Options(error_rate=0.25, cut_rate=0.5, event_error_rate=0.34)
    async with serving(options, PORT) as server, client() as made:
        results = [await made.ask(THREE, record()) for _ in range(16)]
        answers = server.answers
    errors = [each.error for each in results]
    assert answers == {"200": 12, "500": 4}
    assert errors.count("http 500: the engine is dead") == 4
    assert errors.count("error event: the engine fell over") == 4
    cut = [each for each in results if each.error.startswith("cut: connection")]
    assert len(cut) == 4
    # What came before the cut is kept.
    assert all(each.status == 200 and each.chunk_s and not each.finish_reason for each in cut)
    assert errors.count("") == 4


async def test_a_rate_limit_is_an_error_of_its_own() -> None:
    async with serving(Options(rate_limit=3), PORT), client() as made:
        result = await asyncio.gather(*(made.ask(THREE, record()) for _ in range(8)))
    assert [each.status for each in result].count(200) == 3
    refused = [each for each in result if each.status == 429]
    assert len(refused) == 5
    assert {each.error for each in refused} == {"http 429: rate limit reached"}


async def test_a_server_that_is_not_there() -> None:
    answer = await ask(port=NOBODY_PORT)
    assert (answer.error, answer.status, answer.sent_s) == ("connection refused", 0, None)
    assert answer.end_s is not None
    answer = await ask(url="http://no.such.host.invalid")
    assert answer.error == "unknown host: no.such.host.invalid"


async def test_a_response_that_takes_too_long() -> None:
    async with serving(Options(ttft_ms=60_000), PORT) as server:
        answer = await ask(timeout_s=0.2)
        assert (answer.error, answer.status) == ("timeout: not over after 0.2 s", 0)
        assert await gone(server)
    async with serving(Options(ttft_ms=10, itl_ms=60_000), PORT) as server:
        answer = await ask(timeout_s=1.5)
        assert (answer.error, answer.status) == ("timeout: not over after 1.5 s", 200)
        assert len(answer.chunk_s) == 1
        assert await gone(server)


async def comes(true: Callable[[], bool]) -> bool:
    """Whether it comes true within a few seconds."""
    for _ in range(300):
        if true():
            return True
        await asyncio.sleep(0.01)
    return False


async def gone(server: Server) -> bool:
    """Whether the server sees that its clients have closed their connections."""
    return await comes(lambda: not server.connections)


async def test_cancelled_it_closes_the_connection() -> None:
    async with serving(Options(ttft_ms=10, itl_ms=60_000), PORT) as server, client() as made:
        answer = Response(record(), keep_text=True)
        asking = asyncio.create_task(made.exchange(THREE, answer))
        assert await comes(lambda: bool(answer.parts))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await gone(server)
    assert answer.read().error == "interrupted: the run was stopped"
    assert answer.record.text == " word"


async def test_a_reset_is_told_from_a_close() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(STREAM)
        await writer.drain()
        await asyncio.sleep(0.05)
        linger = b"\1\0\0\0\0\0\0\0"  # On, 0 s: closing sends RST.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    async with raw(answer):
        reply = await ask(port=OTHER_PORT)
    assert reply.error == "cut: connection reset in the response"


# --- connections ----------------------------------------------------------------------------


async def test_connections_are_kept_alive_unless_fresh_ones_are_wanted() -> None:
    async with serving(Options(), PORT) as server:
        async with client() as made:
            for _ in range(5):
                assert (await made.ask(THREE, record())).ok
        assert server.accepted == 1
        async with client(fresh_connections=True) as made:
            for _ in range(5):
                assert (await made.ask(THREE, record())).ok
        assert server.accepted == 6
        assert await gone(server)


async def test_as_many_connections_as_requests_at_once() -> None:
    async with serving(Options(ttft_ms=100), PORT) as server, client() as made:
        result = await asyncio.gather(*(made.ask(THREE, record()) for _ in range(50)))
        assert all(each.ok for each in result)
        assert server.accepted == 50


async def test_a_reused_connection_that_closes_without_an_answer_is_a_failure() -> None:
    """It answers one request of each connection, and closes on the second."""
    seen = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request_of(reader))
        writer.write(STREAM + chunked(DONE, 1000))
        seen.append(await request_of(reader))

    async with raw(answer), client(port=OTHER_PORT) as made:
        assert (await made.ask(THREE, record())).ok
        again = await made.ask(THREE, record())
        assert (again.error, again.status) == ("connection closed without a response", 0)
    assert len([request for request in seen if request]) == 2, "a request was sent twice"


@pytest.mark.parametrize("header", [b"", b"keep-alive: timeout=3, max=100\r\n"])
async def test_a_connection_that_is_due_to_close_is_not_used(header: bytes) -> None:
    """Idle for as long as servers keep one at least, or as long as this one says, less a second."""
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await request_of(reader):
            writer.write(STREAM[:-2] + header + b"\r\n" + chunked(DONE, 1000))

    now_s = 0.0
    trusted_s = 2.0 if header else 4.0
    async with raw(answer):
        made = Client(target(OTHER_PORT), lambda: now_s)
        for idle_s, expected in ((0.0, 1), (trusted_s - 0.1, 1), (trusted_s + 0.1, 2)):
            now_s += idle_s
            assert (await made.ask(THREE, record())).ok
            assert connections == expected
        made.close()


async def test_a_new_connection_that_closes_on_a_request_is_a_failure() -> None:
    seen = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request_of(reader))

    async with raw(answer):
        reply = await ask(port=OTHER_PORT)
    assert reply.error == "connection closed without a response"
    assert len(seen) == 1


async def test_a_reused_connection_that_breaks_in_a_response_is_a_failure() -> None:
    seen = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request_of(reader))
        writer.write(STREAM + chunked(DONE, 1000))
        seen.append(await request_of(reader))
        writer.write(STREAM)

    async with raw(answer), client(port=OTHER_PORT) as made:
        assert (await made.ask(THREE, record())).ok
        assert (await made.ask(THREE, record())).error == "cut: connection closed in the response"
    assert len(seen) == 2


async def test_a_server_that_closes_idle_connections() -> None:
    async with serving(Options(close_idle_ms=1), PORT), client() as made:
        for _ in range(20):
            assert (await made.ask(THREE, record())).ok
            await asyncio.sleep(0.05)


# --- https ----------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return certificate_of_localhost(tmp_path)


async def test_https(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    async with serving(Options(), PORT, tls):
        answer = await ask(url=f"https://127.0.0.1:{PORT}")
        assert answer.error == "tls: CERTIFICATE_VERIFY_FAILED"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with client(url=f"https://127.0.0.1:{PORT}/v1") as made:
            for _ in range(2):
                answer = await made.ask(THREE, record())
                assert (answer.error, answer.text) == ("", " word" * 3)
        monkeypatch.delenv("SSL_CERT_FILE")
        async with client(url=f"https://127.0.0.1:{PORT}", ca_file=str(certificate)) as made:
            assert (await made.ask(THREE, record())).error == ""


# --- what is sent ---------------------------------------------------------------------------


async def test_the_request_as_a_server_sees_it() -> None:
    seen = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request_of(reader))
        writer.write(STREAM + chunked(DONE, 1000))

    async with raw(answer):
        url = f"http://127.0.0.1:{OTHER_PORT}/openai/v1/"
        await ask(
            url=url, port=OTHER_PORT, headers={"Authorization": "Bearer secret", "X-Tenant": "a"}
        )
    head, _, body = seen[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /openai/v1/completions HTTP/1.1"
    assert {f"host: 127.0.0.1:{OTHER_PORT}", "authorization: Bearer secret", "x-tenant: a"} <= set(
        lines
    )
    assert json.loads(body) == {
        "model": "fake",
        "prompt": "one two three",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_bodies() -> None:
    chat = target(endpoint="chat", extra={"temperature": 0, "ignore_eos": True})
    body = json.loads(encode(chat, Request(prompt="hi", output_tokens=2)))
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert (body["temperature"], body["ignore_eos"]) == (0, True)
    extra = {"temperature": 1, "ignore_eos": None, "stream": False}
    messages = [{"role": "system", "content": "be brief"}]
    body = json.loads(encode(chat, Request(prompt=messages, output_tokens=2, extra=extra)))
    assert body["messages"] == messages
    assert body["temperature"] == 1
    assert not {"ignore_eos", "stream_options"} & set(body)
    ids = Request(prompt=[1, 2, 3], output_tokens=2)
    assert json.loads(encode(target(), ids))["prompt"] == [1, 2, 3]


async def test_a_prompt_that_the_endpoint_does_not_take() -> None:
    answer = await ask(Request(prompt=[1, 2], output_tokens=1), endpoint="chat")
    assert answer.error == "cannot be sent: the chat endpoint takes text or messages, not token ids"
    messages = Request(prompt=[{"role": "user", "content": "hi"}], output_tokens=1)
    assert (await ask(messages)).error.startswith("cannot be sent: the completions endpoint takes")


async def test_check_says_what_is_wrong_with_a_target() -> None:
    with pytest.raises(TargetError, match="is not http"):
        await check(target(url="localhost:8000"))
    with pytest.raises(TargetError, match="connection refused"):
        await check(target(NOBODY_PORT))
    async with serving(Options(), PORT):
        await check(target())
        with pytest.raises(TargetError, match=r"'fakir': is not served .* did you mean 'fake'"):
            await check(target(model="fakir"))
        with pytest.raises(TargetError, match="http 404: no such page: /v2/models"):
            await check(target(url=f"http://127.0.0.1:{PORT}/v2"))


# --- time -----------------------------------------------------------------------------------


@pytest.fixture(params=["file", "loop", "uvloop"])
def runner(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[asyncio.Runner]:
    """With the timers of Linux, and with those of the event loops, which are coarse."""
    if request.param != "file":
        monkeypatch.setattr(alarm, "_LIBRARY", None)
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as made:
        yield made


def test_an_alarm_never_rings_early(runner: asyncio.Runner) -> None:
    async def sleep() -> None:
        for wait_s in (-1.0, 0.0, 0.0003, 0.0011, 0.0025, 0.0038, 0.0101):
            at_s = time.perf_counter() + wait_s
            await asyncio.wait_for(alarm.sleep_until(at_s), 60)
            assert time.perf_counter() >= at_s

    runner.run(sleep())


def test_an_alarm_can_be_set_anew_and_stopped(runner: asyncio.Runner) -> None:
    rung: list[float] = []

    async def ring() -> None:
        loop = asyncio.get_running_loop()
        made = alarm.Alarm(loop, lambda: rung.append(time.perf_counter()))
        made.set(time.perf_counter() + 0.01)
        made.set(at_s := time.perf_counter() + 0.05)
        assert await comes(lambda: bool(rung))
        await asyncio.sleep(0.02)
        assert len(rung) == 1
        assert rung[0] >= at_s
        made.set(time.perf_counter() + 0.01)
        made.stop()
        await asyncio.sleep(0.03)
        made.set(time.perf_counter() + 0.01)
        made.close()
        await asyncio.sleep(0.03)
        assert len(rung) == 1

    runner.run(ring())
