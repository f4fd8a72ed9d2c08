"""A run of Locust: the records of one process, its clock, and the result at the end."""

import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
import msgspec
from locust.runners import WorkerRunner

from bench import records, result
from bench.errors import WorkloadError
from bench.pages import locust_report
from bench.pages.locust_report import Locust
from bench.records import Record
from bench.result import TargetName
from bench.traffic import access, workload
from bench.traffic.request import Request
from bench.traffic.words import fresh_salt

EXAMPLES = (
    "What is a black hole? Answer in two sentences.",
    "Write a haiku about the sea.",
    "Give three tips for a good night's sleep.",
    "Translate into French: The train to Paris leaves at noon.",
)
_EXAMPLE_TOKENS, _EXAMPLE_EVERY_S = 96, 1.0
# How long a worker may take to hand over its last records, after --stop-timeout.
_HAND_OVER_S = 10.0
_FLUSH_RECORDS, _FLUSH_S = 64, 1.0


class Parcel(msgspec.Struct, kw_only=True):
    """What a worker sends to the master.

    Attributes:
        epoch_s: Unix time of the start of its clock.
        cpu: the share of one core that it has used.
        prompts: the example prompts, by the indexes of their records.
        last: the worker gets no more records.
    """

    epoch_s: float
    actor: int
    model: str
    cpu: float
    prompts: dict[int, str]
    records: list[Record]
    last: bool


class Run:
    """The requests and answers of this process since the test began.

    In a distributed run each worker has one, and sends its records to the master's.
    """

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self.options = options = environment.parsed_options
        self.runner = environment.runner
        self._worker = isinstance(self.runner, WorkerRunner)
        self._out = Path(options.bench_out) if options.bench_out and not self._worker else None
        if self._out:
            self._out.mkdir(parents=True, exist_ok=True)
        self.model: str = options.bench_model
        self._examples = _examples(options.bench_examples)
        self._salt: str = options.bench_salt
        self._reset()

    def begin(self) -> None:
        """The clock starts. Called again where the web page runs the test again."""
        if not self._worker:  # Workers are given the master's options, and with them its salt.
            self.options.bench_salt = self._salt or fresh_salt()
        self._reset()
        if self._out:  # Not before: a mistake in the command moves no older result.
            self._journal = records.Journal(result.prepare(self._out))

    def _reset(self) -> None:
        # Workers send different prompts, or a prefix cache would answer for all but one.
        self.actor = max(0, getattr(self.runner, "worker_index", 0))
        self._workload = workload.parse(
            self.options.bench_workload,
            self.options.bench_seed + 7919 * self.actor,
            self.options.bench_salt,
        )
        self._started = datetime.now(UTC)
        self._epoch_s, self._start_s = time.time(), time.perf_counter()
        self._start_cpu_s = time.process_time()
        self._records: list[Record] = []
        self._pending: list[Record] = []
        self._prompts: dict[int, str] = {}  # The prompt of an example, by the index of its record.
        self._cpu: dict[str, float] = {}
        self._complete: set[str] = set()  # Workers that have handed over their last records.
        self._incomplete = 0
        self._users, self._hatched = 0, 0
        self._all_started_s: float | None = None
        self._stopped_s: float | None = None
        self._index, self._requests = -1, 0
        self._example_due_s, self._flushed_s = float("inf"), 0.0

    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def number(self) -> int:
        """The number of the next user, another one in each process."""
        self._hatched += 1
        return self._hatched - 1 + 100_000 * self.actor

    def next(self) -> tuple[int, Request]:
        """The next request of the workload, or an example where one is due."""
        self._index += 1
        count = len(self._prompts)
        if not self.actor and count < len(self._examples) and self.now_s() > self._example_due_s:
            self._example_due_s = self.now_s() + _EXAMPLE_EVERY_S
            prompt = self._prompts[self._index] = self._examples[count]
            return self._index, Request(
                prompt=prompt, output_tokens=_EXAMPLE_TOKENS, kind="example"
            )
        # A finite workload, such as a file, begins again.
        place = self._requests % (self._workload.length or sys.maxsize)
        self._requests += 1
        return self._index, self._workload.request(place)

    def all_users_started(self, user_count: int) -> None:
        self._users = user_count
        self._all_started_s = self._example_due_s = self.now_s()

    @property
    def over(self) -> bool:
        return self._stopped_s is not None

    def stopping(self) -> None:
        self._stopped_s = self.now_s()

    def add(self, finished: list[Record]) -> None:
        self._records += finished
        self._pending += finished
        if len(self._pending) >= _FLUSH_RECORDS or self.now_s() >= self._flushed_s + _FLUSH_S:
            self.flush()

    def flush(self, last: bool = False) -> None:
        """Write records to the disk at once, so that they survive a crash.

        Args:
            last: the users have ended, so a worker gets no more records.
        """
        self._flushed_s = self.now_s()
        pending, self._pending = self._pending, []
        if self._worker:
            parcel = self._parcel(pending, last)
            self.runner.send_message("bench", msgspec.json.encode(parcel))
        elif self._out:
            self._journal.add(pending)

    def _parcel(self, finished: list[Record], last: bool) -> Parcel:
        return Parcel(
            epoch_s=self._epoch_s,
            actor=self.actor,
            model=self.model,
            cpu=self._busy(),
            prompts=self._prompts,
            records=finished,
            last=last,
        )

    def receive(self, environment: Any, msg: Any) -> None:
        """On the master: take a worker's records, and convert their times to the master's clock."""
        parcel = msgspec.json.decode(msg.data, type=Parcel)
        shift_s = parcel.epoch_s - self._epoch_s
        self.model = self.model or parcel.model
        if parcel.last:
            self._complete.add(msg.node_id)
        self._cpu[f"worker {parcel.actor}"] = parcel.cpu
        self._prompts.update(parcel.prompts)
        self.add([_shifted(record, shift_s) for record in parcel.records])

    def end(self) -> None:
        """On the master: return once each worker has finished its requests and handed them over.

        Locust itself waits half a second for them, and streams may take longer.
        """
        self.runner.send_message("bench-end")
        due_s = time.monotonic() + self._environment.stop_timeout + _HAND_OVER_S
        while (missing := self._expected() - self._complete) and time.monotonic() < due_s:
            gevent.sleep(0.1)
        self._incomplete = len(missing)

    def _expected(self) -> set[str]:
        clients = self.runner.clients
        return {client.id for client in clients.all} - {client.id for client in clients.missing}

    def hand_over(self, environment: Any, msg: Any) -> None:
        """On a worker: finish the requests that are under way, and send the last records."""
        environment.runner.stop()
        self.flush(last=True)

    def _busy(self) -> float:
        """The share of one core that this process has used."""
        return (time.process_time() - self._start_cpu_s) / max(1e-9, self.now_s())

    def _cut_short(self) -> str:
        """Why the run is not the one that was asked for; empty where it is."""
        asked_s, ran_s = self.options.run_time, self._stopped_s or self.now_s()
        if self._incomplete:
            return f"interrupted: {self._incomplete} workers did not hand over their last records"
        if not asked_s or ran_s > asked_s - 1:
            return ""
        return f"interrupted: stopped after {ran_s:.1f} s of {asked_s} s"

    def judge(self) -> None:
        """A run that was broken off, or in which nothing was answered, has failed anyway."""
        if self._worker:
            return
        if self._cut_short() or not any(record.ok for record in self._records):
            self._environment.process_exit_code = self._environment.process_exit_code or 1

    def close(self) -> None:
        """Write the result, and print a summary of one line."""
        if self._worker:
            return
        self.flush()
        output = locust_report.result(
            self._records,
            self._prompts,
            self._users or self.options.num_users or 1,
            self._cpu or {"locust": self._busy()},
            self._about(),
            self._cut_short(),
            self._all_started_s,
            self._stopped_s or self.now_s(),
        )
        if self._out:
            if self._journal.problem:
                output = result.doubted(output, self._journal.problem)
            self._write(output, self._out)
        brief = {name: getattr(output, name) for name in output.__struct_fields__}
        short = {name: value for name, value in brief.items() if name not in _LONG}
        print(msgspec.json.encode(short).decode(), flush=True)

    def _write(self, output: Locust, folder: Path) -> None:
        """The same files as of any other run; a full disk costs them, and not the figures."""
        from bench.pages import report  # Loads matplotlib, which takes a second.

        try:
            result.write(folder, output, self._records)
            report.report([folder], folder / result.REPORT)
        except OSError as error:
            print(f"bench: {folder}: {error.strerror}", file=sys.stderr)
            self._environment.process_exit_code = 3

    def _about(self) -> dict[str, Any]:
        options = self.options
        load = f"users={options.num_users or 1}, {options.spawn_rate or 1:g} more a second"
        return result.header("locust") | {
            "command": _command(sys.argv, options.bench_api_key),
            "started": self._started.isoformat(timespec="seconds"),
            "target": TargetName(url=self._environment.host, model=self.model, endpoint="chat"),
            "workload": options.bench_workload,
            "load": load + (f", for {options.run_time} s" if options.run_time else ""),
            "seed": options.bench_seed,
            "salt": options.bench_salt,
            "actors": max(1, len(self._cpu)),
        }


_LONG = ("machine", "repeats", "whole", "summary", "examples", "cpu", "server", "command")


def _command(arguments: list[str], secret: str) -> str:
    """What was typed, without the key."""
    shown = ["locust", *access.shown(arguments[1:])]
    return shlex.join(word.replace(secret, "...") if secret else word for word in shown)


def _shifted(record: Record, by_s: float) -> Record:
    """The record on a clock that began `by_s` earlier."""
    times = {"sent_s": record.sent_s, "headers_s": record.headers_s, "end_s": record.end_s}
    moved = {name: None if at_s is None else at_s + by_s for name, at_s in times.items()}
    return msgspec.structs.replace(
        record,
        planned_s=record.planned_s + by_s,
        chunk_s=[at_s + by_s for at_s in record.chunk_s],
        **moved,
    )


def _examples(path: str) -> list[str]:
    if not path:
        return list(EXAMPLES)
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise WorkloadError.of("bench-examples", path, str(error)) from error
    return [line.strip() for line in lines if line.strip()]
