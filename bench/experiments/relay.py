"""The capacity of one gateway process: tokens/s, CPU time per token, and the gap between events.

    python -m bench.experiments.relay [--streams 64] [--tokens 128] [--step-ms 9] [--rounds 3]

A simulated engine sends each stream one token per step, in the format of vLLM's Rust front end, and
does not wait for the reader. In front of it runs the relay of a gateway, in a separate process,
with uvicorn and uvloop as in Ray Serve but without the other gates. Each round measures both ways
in turn: every token is passed on at once, or several together if the gateway is late
(`stream_gap_ms`). The client shares the machine. The last line is one JSON object.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import psutil
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from serve_app.gateway import routing
from serve_app.gateway.fleet import Fleet
from serve_app.gateway.relay import Relay
from serve_app.gateway.request import Request
from serve_app.pacing import Pacer, watch
from serve_app.replica.backend import FAST_LANE
from serve_app.settings import Gateway, Limits

_GAP_S = 0.05  # As in serve_config.yaml.
_TOKEN = "secret"


# --- the engine -----------------------------------------------------------------------------


class _Replica(asyncio.Protocol):
    """The door and the Rust front end of a replica, by what the connection begins with."""

    def __init__(self, streams: "dict[asyncio.Transport, int]", address: Callable[[], str]) -> None:
        self._streams, self._address, self._data = streams, address, b""

    def connection_made(self, transport: Any) -> None:
        self._transport: asyncio.Transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, separator, body = self._data.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        lengths = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
        if not separator or len(body) < (lengths or [0])[0]:
            return
        self._data = b""
        if any(line.startswith(b"x-door:") for line in lines):
            host, port = self._address().split(":")
            self._transport.write(f"fast {host} {port} {_TOKEN} r1 60000 0\n".encode())
        elif lines[0].startswith(b"get"):
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        else:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
            self._streams[self._transport] = 0

    def connection_lost(self, error: Exception | None) -> None:
        self._streams.pop(self._transport, None)


async def _engine(tokens: int, step_s: float, up: Connection) -> None:
    streams: dict[asyncio.Transport, int] = {}
    loop, address = asyncio.get_running_loop(), ""
    server = await loop.create_server(lambda: _Replica(streams, lambda: address), "127.0.0.1", 0)
    address = "{}:{}".format(*server.sockets[0].getsockname()[:2])
    up.send(address)
    pieces = [_chunk(_event(text="", prompt_token_ids=[1, 2, 3]))]
    pieces += [_chunk(_event(text=" word", token_ids=[token])) for token in range(tokens)]
    pieces.append(_chunk(_event(text="", finish_reason="length")) + _chunk(b"data: [DONE]\n\n"))
    pieces[-1] += b"0\r\n\r\n"
    due_s = loop.time()
    while True:
        for transport, place in list(streams.items()):
            transport.write(pieces[place])
            streams[transport] = place + 1
            if place + 1 == len(pieces):
                del streams[transport]
        due_s = max(due_s + step_s, loop.time())
        await asyncio.sleep(due_s - loop.time())


def _event(**choice: Any) -> bytes:
    each = {"index": 0, "finish_reason": None, "stop_reason": None, **choice}
    data = {"id": "cmpl-0123456789", "object": "text_completion", "created": 1, "model": "m"}
    return b"data: " + json.dumps({**data, "choices": [each]}).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


# --- the gateway ----------------------------------------------------------------------------


async def _gateway(engine: str, max_gap_s: float, up: Connection) -> None:
    served = {"models": ["m"], "max_model_len": 4096, "vocabulary": 4096}
    metadata = {"address": engine, "token": _TOKEN, FAST_LANE: {"door": engine, **served}}
    fleet, pacer = Fleet(), Pacer(max_gap_s)
    fleet.update([("a", metadata)])
    router = routing.make("least_outstanding", random.Random(1))
    relay = Relay(fleet, router, Gateway(), Limits(), "m", pacer=pacer)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        await relay(Request.of(scope, body, "x-session-id"), send)

    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    with contextlib.suppress(asyncio.CancelledError):
        serving, watching = asyncio.create_task(server.serve()), asyncio.create_task(watch(pacer))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it.
            await asyncio.sleep(0.01)
        up.send(server.servers[0].sockets[0].getsockname()[1])
        await serving
        watching.cancel()


# --- the client -----------------------------------------------------------------------------


class _Client(asyncio.Protocol):
    """One stream: counts its pieces and its tokens."""

    def __init__(self) -> None:
        self.over = asyncio.get_running_loop().create_future()
        self.pieces = self.tokens = 0

    def connection_made(self, transport: Any) -> None:
        self._transport: asyncio.Transport = transport
        body = json.dumps({"model": "m", "prompt": "p", "stream": True, "max_tokens": 9}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)

    def data_received(self, data: bytes) -> None:
        self.pieces += 1
        self.tokens += data.count(b'" word"')
        if b"[DONE]" in data:
            self._transport.close()
            self.over.set_result(None)


async def _load(port: int, streams: int) -> tuple[float, list[_Client]]:
    loop, began_s = asyncio.get_running_loop(), time.perf_counter()
    made = await asyncio.gather(
        *(loop.create_connection(_Client, "127.0.0.1", port) for _ in range(streams))
    )
    clients = [client for _, client in made]
    await asyncio.wait_for(asyncio.gather(*(client.over for client in clients)), 120)
    return time.perf_counter() - began_s, clients


# --- rounds ---------------------------------------------------------------------------------


def _run(work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
    uvloop.run(work(*args))


@contextlib.contextmanager
def _started(
    work: Callable[..., Coroutine[Any, Any, None]], *args: Any
) -> Iterator[tuple[Any, int]]:
    """A process with an event loop; yields what it says once it is up, and its id."""
    spawn = multiprocessing.get_context("spawn")
    parent_end, child_end = spawn.Pipe()
    process = spawn.Process(target=_run, args=(work, *args, child_end), daemon=True)
    process.start()
    try:
        assert process.pid is not None
        assert parent_end.poll(60), "not up after 60 s"
        yield parent_end.recv(), process.pid
    finally:
        process.terminate()
        process.join()


class Figures(msgspec.Struct, kw_only=True):
    """Of one load of a gateway, or medians over rounds."""

    tokens_per_s: float
    cpu_us_per_token: float
    tokens_per_piece: float

    @classmethod
    def medians(cls, rounds: Sequence["Figures"]) -> "Figures":
        return cls(
            **{
                name: round(statistics.median(getattr(each, name) for each in rounds), 3)
                for name in cls.__struct_fields__
            }
        )


def measured(port: int, pid: int, options: argparse.Namespace) -> Figures:
    """One load of a gateway."""
    before = psutil.Process(pid).cpu_times()
    took_s, clients = asyncio.run(_load(port, options.streams))
    after = psutil.Process(pid).cpu_times()
    tokens = sum(client.tokens for client in clients)
    assert tokens == options.streams * options.tokens, "tokens were lost"
    cpu_s = after.user + after.system - before.user - before.system
    return Figures(
        tokens_per_s=tokens / took_s,
        cpu_us_per_token=cpu_s / tokens * 1e6,
        tokens_per_piece=tokens / sum(client.pieces for client in clients),
    )


def main() -> int:
    """Measure, and print one JSON object."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64, help="concurrent streams")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each stream")
    parser.add_argument(
        "--step-ms", type=float, default=9.0, help="gap between tokens of the engine"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds: dict[str, list[Figures]] = {"every token": [], "together": []}
    with (
        _started(_engine, options.tokens, options.step_ms / 1000) as (engine, _),
        _started(_gateway, engine, 0.0) as every,
        _started(_gateway, engine, _GAP_S) as together,
    ):
        for gateway in (every, together):
            measured(*gateway, options)  # Warm.
        for _ in range(options.rounds):
            for name, gateway in zip(rounds, (every, together), strict=True):
                rounds[name].append(measured(*gateway, options))
                print(name, rounds[name][-1], file=sys.stderr)
    output = {
        "benchmark": "relay",
        "streams": options.streams,
        "offered_tokens_per_s": round(options.streams / options.step_ms * 1000),
        **{name: Figures.medians(each) for name, each in rounds.items()},
    }
    print(msgspec.json.encode(output).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
