"""A real HTTP server that speaks the OpenAI API and keeps time exactly; it generates no thought.

    python -m bench.itself.known_server --port 8850 --ttft-ms 200 --itl-ms 10

What a benchmark should find is known: time to the first token, time between tokens, how many
requests fail, are refused or are cut, and when the whole server stands still. Faults are dealt
out evenly and not by chance (a rate of 0.25 is every fourth request), so that counts are exact.

One timer serves all streams. As every stream has the same pace, the streams that are due next
stand in a plain queue, an event was encoded before it was due, and it goes straight to the
socket: about as much as a Python process can send.
"""

import argparse
import asyncio
import contextlib
import gc
import heapq
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import httptools
import msgspec

from bench.itself.known_words import MODEL, Words, failure, json_answer
from bench.traffic.alarm import Alarm

ROOT = Path(__file__).parents[2]
# Events sent before the loop looks for new requests.
_ROUND = 200


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the server does. Rates are shares of the requests, from 0 to 1."""

    ttft_ms: float = field(default=0.0, metadata={"help": "from the request to its first event"})
    itl_ms: float = field(default=0.0, metadata={"help": "between the events of a stream"})
    tokens: int = field(default=16, metadata={"help": "output tokens, if the request says none"})
    events_per_write: int = field(
        default=1,
        metadata={"help": "that many events go out together, after as many ITL"},
    )
    spread: bool = field(
        default=False,
        metadata={"help": "streams have different phases: up to one ITL is added to their TTFT"},
    )
    stamp: bool = field(
        default=False,
        metadata={"help": "the text of an event is when it was sent, CLOCK_MONOTONIC"},
    )
    error_rate: float = field(default=0.0, metadata={"help": "answered with HTTP 500"})
    event_error_rate: float = field(
        default=0.0, metadata={"help": "an error event stands in the middle of the stream"}
    )
    cut_rate: float = field(default=0.0, metadata={"help": "closed in the middle of the stream"})
    rate_limit: float = field(
        default=0.0, metadata={"help": "requests/s, and at once; more get 429. 0: no limit"}
    )
    stall_at: float = field(
        default=0.0, metadata={"help": "seconds after the first request when all stands still"}
    )
    stall_s: float = field(default=0.0, metadata={"help": "how long all stands still"})
    cached_tokens: int = field(default=0, metadata={"help": "said in the usage"})
    events: int = field(
        default=0, metadata={"help": "events of a stream, whatever its usage says. 0: one a token"}
    )
    said_share: float = field(
        default=1.0, metadata={"help": "output tokens said in the usage, over those sent"}
    )
    prompt_share: float = field(
        default=1.0, metadata={"help": "prompt tokens said in the usage, over those received"}
    )
    held: bool = field(
        default=False,
        metadata={"help": "what follows the first event goes out together, when the last is due"},
    )
    after_end: bool = field(
        default=False, metadata={"help": "another event with text follows the finish reason"}
    )
    ping: bool = field(default=False, metadata={"help": "a comment stands before each event"})
    crlf: bool = field(default=False, metadata={"help": "lines end with CR LF"})
    close_idle_ms: float = field(
        default=0.0, metadata={"help": "a connection is closed that long after a response. 0: not"}
    )
    word: str = field(default=" word", metadata={"help": "the text of each event"})


class _Share:
    """True for `rate` of the calls, evenly: with 0.25 for the 4th, the 8th..."""

    def __init__(self, rate: float) -> None:
        self._rate, self._calls = rate, 0

    def __call__(self) -> bool:
        self._calls += 1
        return int(self._calls * self._rate) > int((self._calls - 1) * self._rate)


class _Stream:
    """A streamed answer on its way."""

    __slots__ = ("begun", "connection", "due_s", "fault", "left", "tail", "words")

    def __init__(
        self, connection: "_Connection", words: Words, tokens: int, tail: bytes, fault: str
    ) -> None:
        self.connection, self.words, self.tail, self.fault = connection, words, tail, fault
        self.left, self.due_s, self.begun = tokens, 0.0, False

    def __lt__(self, other: "_Stream") -> bool:
        return self.due_s < other.due_s


class _Connection(asyncio.Protocol):
    """A client's connection: reads requests, writes answers."""

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", b""
        self._buffered = False
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        secure = transport.get_extra_info("ssl_object")
        self._file = -1 if secure else transport.get_extra_info("socket").fileno()
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._server.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._body = b"", b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        method = self._parser.get_method().decode()
        self._server.answer(self, method, self._url.decode(), self._body)

    def send(self, data: bytes) -> None:
        """Straight to the socket; through the transport only what the socket does not take."""
        if self.lost:
            return
        if self._buffered or self._file < 0:
            self.transport.write(data)
            self._buffered = self.transport.get_write_buffer_size() > 0
            return
        try:
            sent = os.write(self._file, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.lost = True
            self.transport.abort()
            return
        if sent < len(data):
            self._buffered = True
            self.transport.write(data[sent:])

    def answered(self, idle_ms: float) -> None:
        """The response is out; the connection waits for the next request, or closes."""
        if idle_ms:
            asyncio.get_running_loop().call_later(idle_ms / 1e3, self.transport.close)


class Stats(msgspec.Struct, kw_only=True):
    """What the server did.

    Attributes:
        answers: their numbers, by status.
        accepted: connections.
        events: sent since this was last asked; so is `late_p99_ms`.
        late_p99_ms: how late the server itself was.
        cpu_s: of its process.
    """

    answers: dict[str, int]
    accepted: int
    events: int
    late_p99_ms: float
    cpu_s: float


class Server:
    """The server's state, shared by its connections. Counts what it answered, by status."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.answers: dict[str, int] = {}
        self.events = 0
        self.accepted = 0
        self.connections: set[_Connection] = set()
        self._late_s: deque[float] = deque(maxlen=100_000)
        self._words = {
            chat: Words(chat, options.word, options.crlf, options.ping) for chat in (False, True)
        }
        self._fails, self._errs = _Share(options.error_rate), _Share(options.event_error_rate)
        self._cuts = _Share(options.cut_rate)
        self._allowance, self._allowed_s = options.rate_limit, time.perf_counter()
        self._begun = 0
        self._starting: list[_Stream] = []  # A heap: their phases differ.
        self._flowing: deque[_Stream] = deque()
        self._alarm = Alarm(asyncio.get_running_loop(), self._tick)
        self._stall_from_s = float("inf")
        self._stalled = not options.stall_s

    def close(self) -> None:
        self._alarm.close()
        for connection in list(self.connections):
            connection.transport.abort()

    def protocol(self) -> _Connection:
        self.accepted += 1
        return _Connection(self)

    # --- requests ---------------------------------------------------------------------------

    def answer(self, connection: _Connection, method: str, url: str, body: bytes) -> None:
        if url == "/v1/models":
            connection.send(json_answer("200 OK", {"object": "list", "data": [{"id": MODEL}]}))
        elif url == "/stats":
            connection.send(json_answer("200 OK", msgspec.to_builtins(self._stats())))
        elif url == "/health":
            connection.send(json_answer("200 OK", {}))
        elif method == "POST" and url in ("/v1/completions", "/v1/chat/completions"):
            self._generate(connection, json.loads(body), chat="chat" in url)
        else:
            connection.send(failure("404 Not Found", "not_found", f"no such page: {url}"))

    def _generate(self, connection: _Connection, request: dict[str, Any], chat: bool) -> None:
        self._note_stall()
        if self._over_limit():
            self._count("429")
            refusal = "rate limit reached"
            connection.send(
                failure("429 Too Many Requests", "rate_limit", refusal, "retry-after: 1")
            )
        elif self._fails():
            self._count("500")
            connection.send(
                failure("500 Internal Server Error", "server_error", "the engine is dead")
            )
        else:
            self._count("200")
            self._begin(connection, request, chat)

    def _begin(self, connection: _Connection, request: dict[str, Any], chat: bool) -> None:
        options, words = self.options, self._words[chat]
        tokens = request.get("max_tokens") or options.tokens
        usage = _usage(request, tokens, options)
        tail = words.event + words.done if options.after_end else words.done
        if (request.get("stream_options") or {}).get("include_usage"):
            tail = words.usage(usage) + tail
        fault = "error" if self._errs() else "cut" if self._cuts() else ""
        stream = _Stream(connection, words, options.events or tokens, tail, fault)
        wait_ms = options.ttft_ms
        if not request.get("stream"):
            # A reader of one piece sees nothing before the last token.
            stream.left, stream.tail = 0, words.whole(tokens, usage)
            wait_ms += options.itl_ms * (tokens - 1)
        elif options.spread:
            # Neighbours get phases far from each other: the multiples of the golden section.
            wait_ms += options.itl_ms * options.events_per_write * (self._begun * 0.6180339887 % 1)
        self._begun += 1
        stream.due_s = self._now_s() + wait_ms / 1e3
        heapq.heappush(self._starting, stream)
        self._set()

    def _over_limit(self) -> bool:
        """A bucket of one second's worth, refilled all the time."""
        limit, now_s = self.options.rate_limit, time.perf_counter()
        if not limit:
            return False
        self._allowance = min(limit, self._allowance + (now_s - self._allowed_s) * limit)
        self._allowed_s = now_s
        if self._allowance < 1:
            return True
        self._allowance -= 1
        return False

    def _count(self, status: str) -> None:
        self.answers[status] = self.answers.get(status, 0) + 1

    def _stats(self) -> Stats:
        late, self._late_s = sorted(self._late_s), deque(maxlen=100_000)
        events, self.events = self.events, 0
        p99_ms = late[int(len(late) * 0.99)] * 1e3 if late else 0.0
        return Stats(
            answers=self.answers,
            accepted=self.accepted,
            events=events,
            late_p99_ms=p99_ms,
            cpu_s=time.process_time(),
        )

    # --- time -------------------------------------------------------------------------------

    def _note_stall(self) -> None:
        if not self._stalled and self._stall_from_s == float("inf"):
            self._stall_from_s = time.perf_counter() + self.options.stall_at

    def _now_s(self) -> float:
        """The server's own clock: it stands still while the server does."""
        now_s = time.perf_counter()
        if now_s < self._stall_from_s:
            return now_s
        return max(self._stall_from_s, now_s - self.options.stall_s)

    def _set(self) -> None:
        """Ring when the next stream is due; a stall moves that."""
        due_s = min(
            self._starting[0].due_s if self._starting else float("inf"),
            self._flowing[0].due_s if self._flowing else float("inf"),
        )
        if due_s == float("inf"):
            return
        if due_s > self._stall_from_s:
            due_s += self.options.stall_s
        self._alarm.set(due_s)

    def _tick(self) -> None:
        """Send what is due, the longest due first."""
        starting, flowing, now_s = self._starting, self._flowing, self._now_s()
        gap_s = self.options.itl_ms * self.options.events_per_write / 1e3
        for number in range(_ROUND):
            if starting and starting[0].due_s <= now_s:
                stream = heapq.heappop(starting)
                if stream.left:
                    stream.connection.send(stream.words.head + stream.words.role)
            elif flowing and flowing[0].due_s <= now_s:
                stream = flowing.popleft()
            else:
                break
            if number == 0:
                self._late_s.append(now_s - stream.due_s)
            if self._send(stream):
                stream.due_s += gap_s * (stream.left if self.options.held else 1)
                flowing.append(stream)
        self._set()

    def _send(self, stream: _Stream) -> bool:
        """Send the next event, or several. Whether more are to come."""
        count, words, connection = self.options.events_per_write, stream.words, stream.connection
        if connection.lost:
            return False
        if self.options.held and stream.begun:
            count = stream.left
        stream.begun = True
        stream.left -= count
        self.events += count
        if stream.left > 0:
            if self.options.stamp:
                connection.send(words.stamped % time.perf_counter() * count)
            else:
                connection.send(words.event * count)
            return not stream.fault or not self._break(stream)
        self._finish(stream, count + stream.left)
        return False

    def _finish(self, stream: _Stream, count: int) -> None:
        """The last `count` events, the usage and the end. `count` < 0: not a stream."""
        words, event, last = stream.words, stream.words.event, stream.words.last
        if self.options.stamp:
            now_s = time.perf_counter()
            event, last = words.stamped % now_s, words.stamped_last % now_s
        end = event * (count - 1) + last if count > 0 else b""
        stream.connection.send(end + stream.tail)
        stream.connection.answered(self.options.close_idle_ms)

    def _break(self, stream: _Stream) -> bool:
        """Break off a stream that is to fail, after its first event. Whether it is over."""
        if stream.fault == "error":
            stream.connection.send(stream.words.error + stream.words.done)
        else:
            stream.connection.lost = True
            stream.connection.transport.abort()
        return True


def _usage(request: dict[str, Any], tokens: int, options: Options) -> dict[str, Any]:
    """A word is a token here, and a token of a list one too; unless the server is to lie."""
    prompt = request.get("prompt", "")
    if "messages" in request:
        prompt = " ".join(message["content"] for message in request["messages"])
    count = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
    read, written = round(count * options.prompt_share), round(tokens * options.said_share)
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {**usage, "prompt_tokens_details": {"cached_tokens": options.cached_tokens}}


# --- starting it ----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(
    options: Options, port: int, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    """A server in the loop that runs now. It listens when the block is entered."""
    server = Server(options)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(server.protocol, "127.0.0.1", port, ssl=tls, backlog=4096)
    try:
        yield server
    finally:
        listener.close()
        server.close()


@dataclass
class Process:
    """A server in a process of its own."""

    port: int
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stats(self) -> Stats:
        with urllib.request.urlopen(f"{self.url}/stats", timeout=10) as answer:
            return msgspec.json.decode(answer.read(), type=Stats)


@contextlib.contextmanager
def launched(port: int, options: Options, timeout_s: float = 30.0) -> Iterator[Process]:
    """Start a server as a process, wait until it listens; stop it on the way out."""
    command = [sys.executable, "-m", "bench.itself.known_server", "--port", str(port)]
    for name in (f.name for f in fields(Options)):
        value = getattr(options, name)
        flag = "--" + name.replace("_", "-")
        command += ([flag] if value else []) if isinstance(value, bool) else [f"{flag}={value}"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert process.stdout
        if not process.stdout.readline():
            raise RuntimeError(f"the server ended with status {process.wait(timeout_s)}")
        yield Process(port, process)
    finally:
        process.kill()
        process.wait(timeout_s)
        assert process.stdout
        process.stdout.close()


async def _serve(options: Options, port: int) -> None:
    async with serving(options, port):
        gc.collect()
        gc.freeze()
        print(f"listening on {port}", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8850)
    for item in fields(Options):
        flag = "--" + item.name.replace("_", "-")
        if item.type is bool:
            parser.add_argument(flag, action="store_true", help=item.metadata["help"])
        else:
            kind: Any = item.type
            parser.add_argument(flag, type=kind, default=item.default, help=item.metadata["help"])
    arguments = vars(parser.parse_args())
    port = arguments.pop("port")
    try:
        import uvloop
    except ImportError:
        run: Any = asyncio.run
    else:
        run = uvloop.run
    with contextlib.suppress(KeyboardInterrupt):
        run(_serve(Options(**arguments), port))


if __name__ == "__main__":
    main()
