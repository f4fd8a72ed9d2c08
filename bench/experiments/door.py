"""What the door of the fast lane takes: time for one answer, and requests/s of one process.

    python -m bench.experiments.door [--requests 20000] [--at-once 64] [--profile FILE]

A process holds the door with all gates of a replica before it (Meter with its log line, keys,
limits, admission) and a grant that the engine ends at once. Its event loop is uvloop, as Ray's is.
This process asks as HAProxy's Lua does (launch/ask_door.lua): a connection for each request, closed
once the answer is there. First one request at a time, then `--at-once`. The door shares the machine
with this client.

Reported are the median and p99 of one answer, requests/s, and the door's CPU time a request. The
last line is one JSON object.
"""

import argparse
import asyncio
import cProfile
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil
import uvloop

from bench.measure.latency import percentile
from serve_app.gates.admission import Admission, AdmissionGate
from serve_app.gates.keys import KeyGate, KeyRing
from serve_app.gates.limits import LimitGate
from serve_app.lanes import capability
from serve_app.lanes.door import Door, Ends, Grant, Request
from serve_app.observe.exposition import Exposition
from serve_app.observe.logs import Log, RotatedFile
from serve_app.observe.meter import Meter
from serve_app.replica.reports import Ended
from serve_app.scaling.signals import Signals
from serve_app.settings import ApiKeys, Limits, Replicas

SECRET, KEY, MODEL = "secret", "sk-bench", "bench"
# A chat of some 200 tokens, as clients send it.
_MESSAGES = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 20}]
_BODY = json.dumps({"model": MODEL, "messages": _MESSAGES, "max_tokens": 128, "stream": True})
_REQUEST = (
    f"POST /v1/chat/completions HTTP/1.1\r\nx-door: {SECRET}\r\nhost: bench\r\n"
    f"authorization: Bearer {KEY}\r\ncontent-type: application/json\r\naccept: */*\r\n"
    f"user-agent: bench\r\ncontent-length: {len(_BODY)}\r\n\r\n{_BODY}"
).encode()


# --- the door -------------------------------------------------------------------------------


class _Frontend:
    host, port, token = "127.0.0.1", 1, "token-of-this-replica"


class _EndedAtOnce(Ends):
    """An engine that is done with each request before the door asks."""

    def expect(self, request_id: str) -> "asyncio.Future[Ended]":
        expected = super().expect(request_id)
        now_s = time.monotonic()
        self.tell(Ended(f"cmpl-{request_id}", 200, 128, now_s, now_s, now_s, "length"))
        return expected


async def _hold(folder: Path, profile: str | None) -> None:
    """Hold the door until standard input ends."""
    keys = folder / "keys"
    keys.write_text(f"ann {KEY}\n")
    limits, signals = Limits(), Signals()

    async def abort(request_id: str) -> None:
        """Nothing: only those are aborted that are under way as this process ends."""

    grant = Grant(lambda: _Frontend, _EndedAtOnce(), MODEL, abort, lambda: 600.0)
    admitted = AdmissionGate(
        grant, Admission(4096, 256, 1.0), limits, lambda: True, signals, cancellable=True
    )
    limited = LimitGate(Exposition(admitted, by_tenant=True), limits)
    keyed = KeyGate(limited, KeyRing(ApiKeys(file=str(keys))))
    app = Meter(keyed, MODEL, Replicas(), Log(RotatedFile(folder / "requests.log").write))
    served = capability.Served(frozenset({MODEL}), 32768, 150_000)

    def obstacle(request: Request) -> str | None:
        headers = dict(request.headers)
        return capability.obstacle(request.path, headers, request.body, served, limits)

    door = Door(app, SECRET, obstacle, lambda: limits.queue_timeout_s)
    await door.start("127.0.0.1")
    print(door.address, flush=True)
    profiler = cProfile.Profile() if profile else None
    if profiler is not None:
        profiler.enable()
    await asyncio.to_thread(sys.stdin.read)
    if profiler is not None:
        profiler.disable()
        profiler.dump_stats(profile)  # type: ignore[arg-type]


# --- the client -----------------------------------------------------------------------------


async def _ask(host: str, port: int) -> float:
    """Ask once; the seconds until the answer was there."""
    began_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(_REQUEST)
    line = await reader.readline()
    if line.startswith(b"wait "):  # The machine is busy: half a second has passed.
        line = await reader.readline()
    took_s = time.perf_counter() - began_s
    writer.close()
    if not line.startswith(b"fast "):
        raise ValueError(f"the door said {line!r}")
    return took_s


async def _load(address: str, requests: int, at_once: int) -> tuple[list[float], float]:
    """The seconds of each answer, and of all of them."""
    host, _, port = address.partition(":")
    left, took_s = iter(range(requests)), []

    async def user() -> None:
        for _ in left:
            took_s.append(await _ask(host, int(port)))

    began_s = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(at_once)))
    return took_s, time.perf_counter() - began_s


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The output: latencies with one client and with many, and the cost of a request.

    Attributes:
        requests_per_cpu_s: what one core can answer if it does nothing else.
    """

    benchmark: str = "door"
    requests: int
    at_once: int
    alone_p50_us: int
    alone_p99_us: int
    many_p50_us: int
    requests_per_s: int
    cpu_us_per_request: int
    requests_per_cpu_s: int


def measure(requests: int, at_once: int, profile: str | None = None) -> Figures:
    """One door, asked by one client and then by many."""
    with tempfile.TemporaryDirectory(prefix="door.") as folder:
        words = [sys.executable, "-m", "bench.experiments.door", "--hold", folder]
        words += ["--profile", profile] if profile else []
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as door:
            assert door.stdout is not None
            address = door.stdout.readline().strip()
            process = psutil.Process(door.pid)
            uvloop.run(_load(address, 500, 8))  # Every path has run once before it counts.
            alone_s, _ = uvloop.run(_load(address, max(500, requests // 10), 1))
            before = process.cpu_times()
            many_s, elapsed_s = uvloop.run(_load(address, requests, at_once))
            after = process.cpu_times()
            assert door.stdin is not None
            door.stdin.close()
    cpu_s = after.user + after.system - before.user - before.system
    return Figures(
        requests=requests,
        at_once=at_once,
        alone_p50_us=round(statistics.median(alone_s) * 1e6),
        alone_p99_us=round((percentile(np.array(alone_s), 99) or 0.0) * 1e6),
        many_p50_us=round(statistics.median(many_s) * 1e6),
        requests_per_s=round(requests / elapsed_s),
        cpu_us_per_request=round(cpu_s / requests * 1e6),
        requests_per_cpu_s=round(requests / cpu_s),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--profile", help="write cProfile's figures of the door to this file")
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold:
        uvloop.run(_hold(Path(options.hold), options.profile))
        return
    figures = measure(options.requests, options.at_once, options.profile)
    print(msgspec.json.encode(figures).decode())


if __name__ == "__main__":
    main()
