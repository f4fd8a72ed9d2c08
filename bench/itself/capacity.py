"""How many events a second one load actor absorbs, beside `vllm bench serve`, on one server.

    python -m bench.itself.capacity [--clients ours,vllm,two] [--rounds 3] [--seconds 4]

The server (`bench/itself/known_server.py`, a process of its own) has N streams open, each with
an event every ITL and its own phase, so that it offers N / ITL events a second, evenly. The text
of an event is the time at which the server wrote it (CLOCK_MONOTONIC, the clock of every process
of a machine). The lag of an event is the time that the client noted for its arrival, minus that.

    absorbed    every request succeeded, the 99th percentile of the lag is at most 5 ms, and at
                least 98% of what was offered arrived within the window
    capacity    the highest rate that was absorbed, found by doubling N and then halving the
                interval; a rate is tried again before it counts as too high, because what else
                the machine does can only make the lag longer (`--tries`)

Both clients are judged by the times that they themselves report: ours by `chunk_s`, vLLM's by
`start_times`, `ttfts` and `itls`. Left out are the first half second after the last stream began
and what follows the end of the first stream. The clients take turns, round after round.

A server that is late itself (its 99th percentile above 5 ms) cannot offer the rate: then the
capacity is only known to be at least the rate below, and `at_least` says so. The server and each
actor want a core: on a machine with two, two actors share one with all the rest, and what they
gain cannot be seen. Where other work disturbs the machine, the CPU time per event still compares
the clients. The last line is one JSON object.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import msgspec

from bench.itself import known_server
from bench.itself.known_server import Stats
from bench.itself.peer import Peer
from bench.traffic import load
from bench.traffic.request import Request
from bench.traffic.schedule import Closed, Plan, Planned
from bench.traffic.target import Target

LAG_S = 0.005
_SHARE = 0.98
_SETTLE_S = 0.5
_PROMPT = "The quick brown fox jumps over the lazy dog"


class Reading(msgspec.Struct, kw_only=True):
    """What a client made of one rate.

    Attributes:
        streams: how many were open at once.
        offered_per_s, arrived_per_s: events.
        lag_p50_s, lag_p99_s: of the events of the window.
        cpu: CPU time over time of the client's process or processes, connecting included.
        cpu_us_per_event: CPU time over all events.
        failed: requests.
        server_late_s: 99th percentile of how late the server was with its own events.
    """

    streams: int
    offered_per_s: float
    arrived_per_s: float = 0.0
    lag_p50_s: float = float("inf")
    lag_p99_s: float = float("inf")
    cpu: float = 0.0
    cpu_us_per_event: float = 0.0
    failed: int = 0
    server_late_s: float = 0.0

    @property
    def absorbed(self) -> bool:
        return (
            not self.failed
            and self.lag_p99_s <= LAG_S
            and self.arrived_per_s >= _SHARE * self.offered_per_s
        )

    @property
    def server_is_late(self) -> bool:
        return self.server_late_s > LAG_S


class Stream(msgspec.Struct):
    """The events of one stream: when the server sent each and when the client had it, seconds."""

    sent_s: list[float]
    arrived_s: list[float]


def read(streams: Iterable[Stream], reading: Reading) -> Reading:
    """Fill in what the events say. A stream whose events do not match its stamps has failed."""
    whole = [s for s in streams if s.sent_s and len(s.sent_s) == len(s.arrived_s)]
    reading.failed = reading.streams - len(whole)
    if not whole:
        return reading
    from_s = max(stream.sent_s[0] for stream in whole) + _SETTLE_S
    to_s = min(stream.sent_s[-1] for stream in whole)
    pairs = [pair for s in whole for pair in zip(s.sent_s, s.arrived_s, strict=True)]
    lags = sorted(came - sent for sent, came in pairs if from_s <= sent < to_s)
    if not lags:
        return reading
    reading.lag_p50_s = lags[len(lags) // 2]
    reading.lag_p99_s = lags[int(0.99 * (len(lags) - 1))]
    arrived = sum(from_s <= came < to_s for _, came in pairs)
    reading.arrived_per_s = arrived / (to_s - from_s)
    return reading


# --- the clients ----------------------------------------------------------------------------

# Opens that many streams of that many tokens at once. Returns their events, the CPU time that the
# client used, and the time it took, both in seconds.
Probe = Callable[[int, int], tuple[list[Stream], float, float]]


def ours(url: str, actors: int) -> Probe:
    """The load actors of this package."""

    def probe(streams: int, tokens: int) -> tuple[list[Stream], float, float]:
        request = Request(prompt=_PROMPT, output_tokens=tokens)
        plan = Plan([Planned(index, request) for index in range(streams)], Closed(streams))
        target = Target(url=url, model="fake", keep_text=True)
        outcome = asyncio.run(load.run(plan, target, actors, lambda records, progress: None))
        read = []
        for record in outcome.records:
            # On one machine all clocks are one: what the offset was measured to be is its error.
            start_s = outcome.start_s + outcome.clock_offset_s[record.actor]
            came = [start_s + at_s for at_s in record.chunk_s]
            read.append(Stream([float(word) for word in record.text.split()], came))
        cpu_s = sum(outcome.cpu.values()) * outcome.duration_s
        return read, cpu_s, outcome.duration_s

    return probe


def vllms(url: str, peer: Peer) -> Probe:
    """`vllm bench serve`, with as many requests at once as there are streams."""

    def probe(streams: int, tokens: int) -> tuple[list[Stream], float, float]:
        arguments = ["--backend", "openai", "--base-url", url, "--model", "fake"]
        arguments += ["--max-concurrency", str(streams), "--ready-check-timeout-sec", "0"]
        result = peer.run(arguments, [(_PROMPT, tokens)] * streams)
        read = []
        for start_s, ttft_s, itls_s, text in zip(
            result["start_times"],
            result["ttfts"],
            result["itls"],
            result["generated_texts"],
            strict=True,
        ):
            came = list(itertools.accumulate(itls_s, initial=start_s + ttft_s))
            read.append(Stream([float(word) for word in text.split()], came))
        return read, result["cpu_s"], result["wall_s"]

    return probe


# --- the search -----------------------------------------------------------------------------


class Capacity(msgspec.Struct, kw_only=True):
    """The highest rate that was absorbed, and whether the server kept a higher one from being."""

    best: Reading
    at_least: bool


def search(try_rate: Callable[[int], Reading], first: int, steps: int, tries: int = 2) -> Capacity:
    """Double the streams until they are too many, then halve the interval `steps` times.

    A rate is too high when it was not absorbed in any of `tries` probes.
    """
    best = Reading(streams=0, offered_per_s=0.0)
    good, bad, at_least = 0, 0, False
    streams, left = first, steps
    while left and streams >= 1:
        reading = try_rate(streams)
        for _ in range(tries - 1):
            if not reading.absorbed:
                again = try_rate(streams)
                reading = min(reading, again, key=lambda r: (not r.absorbed, r.lag_p99_s))
        if reading.absorbed:
            best, good = reading, streams
        else:
            bad, at_least = streams, reading.server_is_late
        if bad:
            left -= 1
            streams = (good + bad) // 2
        else:
            streams *= 2
        if streams == good:
            break
    return Capacity(best=best, at_least=at_least)


def _describe(name: str, reading: Reading) -> str:
    parts = [
        f"{name:5} {reading.streams:5} streams",
        f"{reading.offered_per_s:8.0f}/s offered {reading.arrived_per_s:8.0f}/s arrived",
        f"lag p50 {reading.lag_p50_s * 1e3:6.2f} p99 {reading.lag_p99_s * 1e3:7.2f} ms",
        f"cpu {reading.cpu:4.2f} ({reading.cpu_us_per_event:.1f} us/event)",
        f"failed {reading.failed}",
        f"server late {reading.server_late_s * 1e3:.2f} ms",
    ]
    return "  ".join(parts)


def measure(
    probes: dict[str, Probe], stats: Callable[[], Stats], options: argparse.Namespace
) -> dict[str, list[Capacity]]:
    """Every client's capacity, round after round."""
    tokens = round((options.seconds + _SETTLE_S) * 1e3 / options.itl_ms)
    by_probe: dict[str, list[Capacity]] = {name: [] for name in probes}
    for _, (name, probe) in itertools.product(range(options.rounds), probes.items()):

        def try_rate(streams: int, name: str = name, probe: Probe = probe) -> Reading:
            stats()
            reading = Reading(streams=streams, offered_per_s=streams * 1e3 / options.itl_ms)
            events, cpu_s, wall_s = probe(streams, tokens)
            reading.cpu = cpu_s / wall_s
            reading.cpu_us_per_event = cpu_s * 1e6 / (streams * tokens)
            reading.server_late_s = stats().late_p99_ms / 1e3
            read(events, reading)
            print(_describe(name, reading), file=sys.stderr)
            return reading

        earlier = [capacity.best.streams // 2 for capacity in by_probe[name]]
        first = max(1, *earlier) if earlier else options.first
        by_probe[name].append(search(try_rate, first, options.steps, options.tries))
    return by_probe


# --- the result -----------------------------------------------------------------------------


class Spread(msgspec.Struct, frozen=True):
    """A figure over the rounds."""

    median: float
    min: float
    max: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One client.

    Attributes:
        at_least: whether the server was the limit in a round.
        lag_p99_ms, cpu, cpu_us_per_event: of each round, at the highest rate that was absorbed.
        ratio_to: its events/s over those of each other client, by round.
    """

    client: str
    events_per_s: Spread
    at_least: bool
    lag_p99_ms: list[float]
    cpu: list[float]
    cpu_us_per_event: list[float]
    ratio_to: dict[str, Spread]


def summarise(by_probe: dict[str, list[Capacity]]) -> list[Row]:
    """For each client: events/s over the rounds, and the ratio to each other client."""
    rates = {name: [c.best.offered_per_s for c in values] for name, values in by_probe.items()}
    return [
        Row(
            client=name,
            events_per_s=_spread(rates[name]),
            at_least=any(capacity.at_least for capacity in capacities),
            lag_p99_ms=[round(c.best.lag_p99_s * 1e3, 2) for c in capacities],
            cpu=[round(c.best.cpu, 2) for c in capacities],
            cpu_us_per_event=[round(c.best.cpu_us_per_event, 1) for c in capacities],
            ratio_to={
                other: _spread([a / b for a, b in zip(rates[name], theirs, strict=True)])
                for other, theirs in rates.items()
                if other != name and all(theirs)
            },
        )
        for name, capacities in by_probe.items()
    ]


def _spread(values: list[float]) -> Spread:
    return Spread(round(statistics.median(values), 2), round(min(values), 2), round(max(values), 2))


def table(rows: list[Row]) -> str:
    lines = [f"{'client':8}{'events/s':>10} (min-max)          ratio to the others"]
    for row in rows:
        rate = row.events_per_s
        ratios = [
            f"{other}: {ratio.median:.2f} ({ratio.min:.2f}-{ratio.max:.2f})"
            for other, ratio in row.ratio_to.items()
        ]
        least = ">=" if row.at_least else ""
        lines.append(
            f"{row.client:8}{least + format(rate.median, '.0f'):>10} "
            f"{f'({rate.min:.0f}-{rate.max:.0f})':18} {', '.join(ratios)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clients",
        default="ours,vllm,two",
        help="clients to measure; two: two load actors of bench",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of a probe in seconds")
    parser.add_argument(
        "--steps",
        type=int,
        default=5,
        help="rates to try between the highest good and the lowest bad one",
    )
    parser.add_argument(
        "--tries", type=int, default=2, help="failed probes after which a rate counts as too high"
    )
    parser.add_argument("--first", type=int, default=50, help="streams of the first probe")
    parser.add_argument("--itl-ms", type=float, default=20.0)
    parser.add_argument(
        "--ttft-ms",
        type=float,
        default=1500.0,
        help="limit of the TTFT in ms; all streams connect at once",
    )
    parser.add_argument("--port", type=int, default=8869)
    options = parser.parse_args()
    server_options = known_server.Options(
        ttft_ms=options.ttft_ms, itl_ms=options.itl_ms, stamp=True, spread=True
    )
    with ExitStack() as stack:
        server = stack.enter_context(known_server.launched(options.port, server_options))
        probes: dict[str, Probe] = {}
        for name in options.clients.split(","):
            if name == "vllm":
                probes[name] = vllms(server.url, stack.enter_context(Peer()))
            elif name in ("ours", "two"):
                load.connect()
                probes[name] = ours(server.url, 1 if name == "ours" else 2)
            else:
                raise SystemExit(f"unknown client {name!r}: ours, vllm, two")
        by_probe = measure(probes, server.stats, options)
    rows = summarise(by_probe)
    print(table(rows))
    result = {"benchmark": "capacity", "lag_limit_ms": LAG_S * 1e3, "itl_ms": options.itl_ms}
    result |= {"rounds": options.rounds, "seconds": options.seconds, "cores": os.cpu_count()}
    print(json.dumps({**result, "results": msgspec.to_builtins(rows)}))


if __name__ == "__main__":
    main()
