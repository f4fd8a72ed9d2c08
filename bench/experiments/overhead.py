"""What the serving layers cost: this application beside a bare vLLM, in one run.

    python -m bench.experiments.overhead --model FOLDER [--systems rust,ours,..] [--rounds 3]

Without --systems: vLLM's Rust front end (`rust`, the reference, where it is installed), this
application (`ours`), and vLLM's Python front end as four processes (`apis4`), as one (`bare`), and
with four tokens sent at a time (`bare-si4`). bench/engine/systems.py has the others.

Ray Serve's own LLM application is measured twice: `ray-serve-llm`, with its defaults, and
`ray-serve-llm-direct`, with the variables that its guide gives for the highest throughput. (They
import pyarrow, which nothing here needs: install it first.)

Every system serves the same model with the same engine arguments and is measured by the same
client, one at a time, in interleaved rounds: rust, ours, apis4, then ours, apis4, rust, ... A
machine that drifts then drifts under all of them, and none is always the first. The systems that
wait are stopped (SIGSTOP), so that their idle loops take nothing from the one that is measured;
with `--running` they are not, as Ray Serve replaces proxies that did not answer while they stood.

Reported are ratios to the first system: the median over rounds, with the lowest and the highest.
The last line is one JSON object.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench import measure
from bench.engine.systems import ENGINE, NAME, System, key_header, running, wait
from bench.records import Record
from bench.traffic.client import Client
from bench.traffic.crowd import Crowd
from bench.traffic.request import Request
from bench.traffic.response import Response
from bench.traffic.target import Target
from serve_app.launch import rust as rust_frontend


class Figures(msgspec.Struct, kw_only=True):
    """Of one load of one system, or medians over rounds."""

    tokens_per_s: float
    cpu_us_per_token: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


class Row(Figures, kw_only=True):
    """One load of one system in one round."""

    system: str
    round: int
    concurrency: int


class Ratio(msgspec.Struct):
    """A system beside the reference, over the rounds."""

    median: float
    min: float
    max: float


class Compared(Figures, kw_only=True):
    """One system at one concurrency: its medians, and their ratios to the reference."""

    system: str
    concurrency: int
    tokens_per_s_ratio: Ratio
    cpu_us_per_token_ratio: Ratio
    ttft_p50_ms_ratio: Ratio
    ttft_p99_ms_ratio: Ratio
    itl_p50_ms_ratio: Ratio
    itl_p99_ms_ratio: Ratio


@dataclass
class Sample:
    """One measured load: what every stream saw. Times in seconds.

    Attributes:
        cpu_s: processor time of the system meanwhile, which is steadier than how fast it was.
    """

    tokens: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.elapsed_s

    def row(self, system: str, round_: int, concurrency: int) -> Row:
        return Row(
            system=system,
            round=round_,
            concurrency=concurrency,
            tokens_per_s=self.tokens_per_s,
            cpu_us_per_token=self.cpu_s / self.tokens * 1e6,
            ttft_p50_ms=_percentile(self.ttft_s, 50) * 1e3,
            ttft_p99_ms=_percentile(self.ttft_s, 99) * 1e3,
            itl_p50_ms=_percentile(self.itl_s, 50) * 1e3,
            itl_p99_ms=_percentile(self.itl_s, 99) * 1e3,
        )


def _percentile(values: list[float], percent: int) -> float:
    if not values:
        return math.nan  # Each stream came in one piece: there was no gap to measure.
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


# --- the client -----------------------------------------------------------------------------


async def load(port: int, concurrency: int, requests: int, output_tokens: int) -> Sample:
    """`requests` streams of `output_tokens` tokens, `concurrency` at a time."""
    target = Target(
        url=f"http://127.0.0.1:{port}",
        model=NAME,
        headers=key_header(),
        fresh_connections=True,
        extra={"ignore_eos": True, "temperature": 0},
    )
    request = Request(
        prompt="The quick brown fox jumps over the lazy dog, and then it",
        output_tokens=output_tokens,
    )
    client, indexes = Client(target, time.perf_counter), iter(range(requests))
    answers: list[Response] = []

    async def user() -> None:
        for index in indexes:
            answers.append(Response(Record(index=index, planned_s=time.perf_counter()), False))
            await client.exchange(request, answers[-1])

    started_s = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(concurrency)))
    elapsed_s = time.perf_counter() - started_s
    # Decoded when it is over: the client shares the machine with the server.
    records = [answer.read() for answer in answers]
    for record in records:
        # A run with fewer tokens than were asked for is not a slower run, it is another one.
        if record.error or record.output_tokens != output_tokens:
            raise ValueError(f"{record.output_tokens} of {output_tokens} tokens: {record.error}")
    return Sample(
        tokens=requests * output_tokens,
        elapsed_s=elapsed_s,
        ttft_s=[ttft for record in records if (ttft := measure.ttft_s(record)) is not None],
        # Events that came in one read are one gap: this is what a reader of the stream sees.
        itl_s=[gap for record in records for gap in measure.itl_s(record) if gap > 0],
    )


def _load(port: int, concurrency: int, requests: int, output_tokens: int) -> Sample:
    return asyncio.run(load(port, concurrency, requests, output_tokens))


def together(
    crowd: Crowd, port: int, concurrency: int, requests: int, output_tokens: int
) -> Sample:
    """The same, from the processes of a crowd, which share it evenly."""
    samples = crowd.each(
        _load,
        [
            (port, share, requests * share // concurrency, output_tokens)
            for share in crowd.shares(concurrency)
        ],
    )
    return Sample(
        tokens=sum(sample.tokens for sample in samples),
        elapsed_s=max(sample.elapsed_s for sample in samples),
        ttft_s=[value for sample in samples for value in sample.ttft_s],
        itl_s=[value for sample in samples for value in sample.itl_s],
    )


# --- the comparison -------------------------------------------------------------------------


def interleaved(systems: list[System], crowd: Crowd, options: argparse.Namespace) -> list[Row]:
    """Every concurrency, every round, every system in turn. One row for each."""
    rows: list[Row] = []
    go = signal.SIGCONT
    stop = go if options.running else signal.SIGSTOP
    for system in systems:
        system.signal(stop)
    for round_ in range(options.rounds + 1):
        for concurrency in options.concurrency:
            place = round_ % len(systems)
            for system in systems[place:] + systems[:place]:
                system.signal(go)
                # What was stopped first catches up with its timers.
                time.sleep(options.settle)
                requests = max(options.least, concurrency * options.waves)
                used_s = system.cpu_s()
                sample = together(crowd, system.port, concurrency, requests, options.output_tokens)
                sample.cpu_s = system.cpu_s() - used_s
                system.signal(stop)
                if round_ == 0:
                    continue  # Every path runs once before it counts.
                rows.append(sample.row(system.name, round_, concurrency))
                print(_json(rows[-1]), file=sys.stderr)
    for system in systems:
        system.signal(go)
    return rows


def default_systems() -> list[str]:
    """This application and its peers; without vllm-rs, what can be compared without it."""
    rust = rust_frontend.destination()
    if rust is not None and os.access(rust, os.X_OK):
        return ["rust", "ours", "apis4", "bare", "bare-si4"]
    print("vllm-rs is not installed: bare is the reference, and rust is left out", file=sys.stderr)
    return ["bare", "ours", "apis4", "bare-si4"]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def compare(rows: list[Row], reference: str) -> list[Compared]:
    """For each system and concurrency: its ratio to the reference of the same round."""
    compared = []
    for concurrency, name in sorted({(row.concurrency, row.system) for row in rows}):
        mine, theirs = (
            [row for row in rows if (row.concurrency, row.system) == (concurrency, system)]
            for system in (name, reference)
        )
        figures: dict[str, object] = {"system": name, "concurrency": concurrency}
        for metric in Figures.__struct_fields__:
            values = [getattr(row, metric) for row in mine]
            to = [value / getattr(row, metric) for value, row in zip(values, theirs, strict=True)]
            figures[metric] = round(statistics.median(values), 3)
            figures[f"{metric}_ratio"] = Ratio(
                *(round(figure, 3) for figure in (statistics.median(to), min(to), max(to)))
            )
        compared.append(msgspec.convert(figures, Compared))
    return compared


def table(compared: list[Compared]) -> str:
    lines = [
        f"{'system':18}{'conc':>5}{'tok/s':>8}{'ratio':>7} (min-max)    {'CPU':>6} "
        f"{'TTFT p50':>9}{'ratio':>7}{'p99':>7}{'ITL p50':>9}{'ratio':>7}{'p99':>7}"
    ]
    for row in compared:
        ratio = row.tokens_per_s_ratio
        lines.append(
            f"{row.system:18}{row.concurrency:>5}{row.tokens_per_s:>8.0f}"
            f"{ratio.median:>7.2f} ({ratio.min:.2f}-{ratio.max:.2f})"
            f"{row.cpu_us_per_token_ratio.median:>7.2f}"
            f"{row.ttft_p50_ms:>10.1f}{row.ttft_p50_ms_ratio.median:>8.2f}"
            f"{row.ttft_p99_ms_ratio.median:>7.2f}{row.itl_p50_ms:>9.2f}"
            f"{row.itl_p50_ms_ratio.median:>7.2f}{row.itl_p99_ms_ratio.median:>7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a local model folder")
    parser.add_argument("--systems", help="separated by commas; the first is the reference")
    parser.add_argument("--concurrency", default="1,8,32,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waves", type=int, default=2, help="requests of each user")
    parser.add_argument("--least", type=int, default=4, help="least number of requests of a load")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--settle", type=float, default=4.0, help="seconds before each load")
    parser.add_argument(
        "--start-together",
        action="store_true",
        help="start all systems at once; ready_s then includes the others",
    )
    parser.add_argument("--running", action="store_true", help="do not stop the systems that wait")
    parser.add_argument("--clients", type=int, default=1, help="client processes")
    parser.add_argument("--port", type=int, default=8100, help="port of the first system")
    parser.add_argument("--engine", type=json.loads, default=ENGINE, help="arguments as JSON")
    options = parser.parse_args()
    options.concurrency = [int(word) for word in options.concurrency.split(",")]
    names = options.systems.split(",") if options.systems else default_systems()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overhead.")))
        systems = []
        for index, name in enumerate(names):
            port = options.port + 10 * index
            start = running(name, options.engine, options.model, port, folder)
            systems.append(stack.enter_context(start))
            if not options.start_together:
                wait(systems[-1])
                if not options.running:
                    systems[-1].signal(signal.SIGSTOP)
        for system in systems:
            system.signal(signal.SIGCONT)
            if options.start_together:
                wait(system)
        with Crowd(options.clients) as crowd:
            rows = interleaved(systems, crowd, options)
    compared = compare(rows, names[0])
    print(table(compared))
    ready = {system.name: round(system.ready_s, 1) for system in systems}
    print(
        _json(
            {"benchmark": "overhead", "reference": names[0], "ready_s": ready, "results": compared}
        )
    )


if __name__ == "__main__":
    main()
