"""Users that chat with an OpenAI-compatible endpoint, for Locust.

    locust -f bench/locustfile.py --headless -u 100 -r 10 -t 60s --host URL --bench-out DIR

Each user streams one chat completion after another. Locust shows two rows: POST is the whole
answer, TTFT the time until its first token. A stream that ends before `[DONE]` has failed, and
the text of a failure is the server's own. Beside Locust's statistics, `DIR/records.jsonl` gets
the raw times of every request, and `DIR/result.json` what `bench.measure` derives from them and a
few example prompts that were asked during the full load, with the answers. Locust's exit status
is kept, but a run that was broken off, or in which nothing was answered, ends with 1.

Answers are read line by line off geventhttpclient, Locust's fast client. The usual ways do not
show when tokens come: `iter_lines` of FastHttpUser waits for 1024 bytes, and that of requests
for 512 where a response is not chunked.
"""

import shlex
import socket
import ssl
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent  # type: ignore[import-untyped]
import msgspec
from gevent import GreenletExit
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError
from locust import User, events
from locust.exception import StopTest, StopUser
from locust.runners import MasterRunner, WorkerRunner

from bench import records, result
from bench.errors import BenchError, TargetError, WorkloadError
from bench.pages import locust_report
from bench.pages.locust_report import Locust
from bench.records import Record
from bench.result import TargetName
from bench.traffic import access, workload
from bench.traffic.request import Request
from bench.traffic.sse import Events, error_text
from bench.traffic.target import Target, encode
from bench.traffic.words import fresh_salt

EXAMPLES = (
    "What is a black hole? Answer in two sentences.",
    "Write a haiku about the sea.",
    "Give three tips for a good night's sleep.",
    "Translate into French: The train to Paris leaves at noon.",
)
_EXAMPLE_TOKENS, _EXAMPLE_EVERY_S = 96, 1.0
# Users take what the model says: 64 tokens are the most, and not what is measured.
_WORKLOAD = "synthetic:input=100,output=64,exact=no"
# Answers in flight when the time is up are waited for, unless --stop-timeout says otherwise:
# leaving them out would leave out the slowest.
_DRAIN_S = 30.0
# How long a worker may take beyond that to hand over its last records.
_HAND_OVER_S = 10.0
# A user whose request failed waits: refused users would do nothing but hammer.
_PAUSE_AFTER_FAILURE_S = 1.0
_FLUSH_RECORDS, _FLUSH_S = 64, 1.0


def _arguments(parser: Any) -> None:
    def add(name: str, text: str, **options: Any) -> None:
        variable = "LOCUST_" + name.strip("-").replace("-", "_").upper()
        parser.add_argument(name, env_var=variable, include_in_web_ui=False, help=text, **options)

    add("--bench-out", "folder for records.jsonl and result.json", default="")
    add("--bench-model", "model to ask; by default the first that is served", default="")
    add("--bench-workload", "what to send, as bench.traffic.workload says it", default=_WORKLOAD)
    add("--bench-seed", "seed of the workload", type=int, default=0)
    add("--bench-salt", "of an earlier run, to send its prompts again", default="")
    add("--bench-think", "seconds a user waits between requests", type=float, default=0.0)
    add("--bench-timeout", "seconds without a byte until it failed", type=float, default=300.0)
    add("--bench-api-key", "bearer token; better as the variable", default="", is_secret=True)
    access.arguments(parser.add_argument, prefix="bench-", include_in_web_ui=False)
    add("--bench-examples", "file of example prompts, one a line", default="")


# --- the endpoint ---------------------------------------------------------------------------


def connect(host: str | None, options: Any) -> tuple[HTTPClient, str]:
    """A client of the host, and the path of its API, such as "/v1".

    Raises:
        TargetError: the host is not a URL, or there is no such certificate authority.
    """
    parts = urlsplit(host or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TargetError.of("host", host, "is not http://host:port or https://host")
    if options.bench_ca:
        access.tls(options.bench_ca)  # Says what is wrong with the file.
    client = HTTPClient(
        parts.hostname,
        parts.port,
        ssl=parts.scheme == "https",
        ssl_options={"ca_certs": options.bench_ca} if options.bench_ca else None,
        network_timeout=options.bench_timeout,
        connection_timeout=options.bench_timeout,
    )
    return client, parts.path.rstrip("/") or "/v1"


def first_model(http: HTTPClient, base: str, options: Any) -> str:
    """The model to ask where none is named.

    Raises:
        TargetError: the endpoint cannot be reached, or names none.
    """
    path = f"{base}/models"
    try:
        response = http.request("GET", path, headers=_headers(options))
        body = response.read()
        if response.status_code != 200:
            raise TargetError(f"{path}: http {response.status_code}: {error_text(body)}")
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (OSError, HTTPParseError) as error:
        where = f"{http.host}:{http.port}"
        raise TargetError(f"{where} cannot be reached: {error}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise TargetError(f"{path} does not name a model: {error!r}") from None


def _headers(options: Any) -> dict[str, str]:
    headers = {"content-type": "application/json"}
    if options.bench_api_key:
        headers["authorization"] = f"Bearer {options.bench_api_key}"
    return headers | access.headers(
        options.bench_api_key_env, options.bench_key_header, options.bench_header
    )


# --- one request ----------------------------------------------------------------------------


def stream(
    http: HTTPClient,
    path: str,
    body: bytes,
    headers: dict[str, str],
    record: Record,
    now_s: Callable[[], float],
) -> None:
    """Send a request and read its answer into `record`; a failure becomes its error.

    `sent_s` is when the client set about sending: where a connection must be made, before that.
    """
    record.sent_s = now_s()
    answer = Events(record, keep_text=True)
    try:
        response = http.request("POST", path, body=body, headers=headers)
        record.headers_s, record.status = now_s(), response.status_code
        try:
            if record.status == 200:
                _feed(answer, response, now_s)
                answer.end()
            else:
                text = error_text(response.read())
                record.error = f"http {record.status}: {text}" if text else f"http {record.status}"
        finally:
            response.release()
    except (OSError, HTTPParseError) as error:
        if not answer.done:
            record.error = record.error or _reason(error, record)
        answer.end()
    except GreenletExit:
        record.error = "interrupted: the run was stopped"
        answer.end()
        raise
    finally:
        record.end_s = now_s()


def _feed(answer: Events, response: Any, now_s: Callable[[], float]) -> None:
    """Hand on the lines up to each empty one, which ends an event, as soon as it is there."""
    lines = b""
    while line := response.readline(b"\n"):
        lines += line
        if line in (b"\n", b"\r\n"):
            answer.feed(lines, now_s())
            lines = b""
    answer.feed(lines + response.read(), now_s())


def _reason(error: Exception, record: Record) -> str:
    """The same failure in the same words as from bench's own client."""
    if isinstance(error, TimeoutError):
        return "timeout: nothing came for as long as --bench-timeout allows"
    if isinstance(error, HTTPParseError | ConnectionResetError) and record.status:
        return (
            f"cut: connection {'reset' if isinstance(error, OSError) else 'closed'} in the response"
        )
    if isinstance(error, HTTPConnectionClosed):
        return "connection closed without a response"
    if isinstance(error, HTTPParseError):
        return f"bad response: not HTTP: {error}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionResetError):
        return "connection reset"
    if isinstance(error, ssl.SSLError):
        return f"tls: {error.reason or error}"
    if isinstance(error, socket.gaierror):
        return "unknown host"
    return f"connection failed: {error}"


# --- the run --------------------------------------------------------------------------------


class Run:
    """The requests and answers of this process since the test began.

    In a distributed run each worker has one, and sends what it heard to the master's.
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
        self._heard: list[Record] = []
        self._pending: list[Record] = []
        self._prompts: dict[int, str] = {}  # The prompt of an example, by the index of its record.
        self._cpu: dict[str, float] = {}
        self._complete: set[str] = set()  # Workers that have handed over their last records.
        self._incomplete = 0
        self._users, self._hatched = 0, 0
        self._all_there_s: float | None = None
        self._stopped_s: float | None = None
        self._index, self._taken = -1, 0
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
        # A workload that has an end, such as a file, begins again.
        place = self._taken % (self._workload.length or sys.maxsize)
        self._taken += 1
        return self._index, self._workload.request(place)

    def all_users_are_there(self, user_count: int) -> None:
        self._users = user_count
        self._all_there_s = self._example_due_s = self.now_s()

    @property
    def over(self) -> bool:
        return self._stopped_s is not None

    def stopping(self) -> None:
        self._stopped_s = self.now_s()

    def hear(self, heard: list[Record]) -> None:
        self._heard += heard
        self._pending += heard
        if len(self._pending) >= _FLUSH_RECORDS or self.now_s() >= self._flushed_s + _FLUSH_S:
            self.flush()

    def flush(self, last: bool = False) -> None:
        """Write records to the disk at once, so that they survive a crash.

        Args:
            last: the users have ended, so that a worker hears nothing more.
        """
        self._flushed_s = self.now_s()
        pending, self._pending = self._pending, []
        if self._worker:
            self.runner.send_message("bench", {**self._parcel(pending), "last": last})
        elif self._out:
            self._journal.add(pending)

    def _parcel(self, heard: list[Record]) -> dict[str, Any]:
        return {
            "epoch_s": self._epoch_s,
            "actor": self.actor,
            "model": self.model,
            "cpu": self._busy(),
            "asked": list(self._prompts.items()),
            "records": msgspec.json.encode(heard),
        }

    def receive(self, environment: Any, msg: Any) -> None:
        """On the master: take a worker's records, and convert their times to the master's clock."""
        parcel = msg.data
        shift_s = parcel["epoch_s"] - self._epoch_s
        heard = msgspec.json.decode(parcel["records"], type=list[Record])
        self.model = self.model or parcel["model"]
        if parcel["last"]:
            self._complete.add(msg.node_id)
        self._cpu[f"worker {parcel['actor']}"] = parcel["cpu"]
        self._prompts.update((index, prompt) for index, prompt in parcel["asked"])
        self.hear([_shifted(record, shift_s) for record in heard])

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
        if self._cut_short() or not any(record.ok for record in self._heard):
            self._environment.process_exit_code = self._environment.process_exit_code or 1

    def close(self) -> None:
        """Write the result, and print a summary of one line."""
        if self._worker:
            return
        self.flush()
        output = locust_report.result(
            self._heard,
            self._prompts,
            self._users or self.options.num_users or 1,
            self._cpu or {"locust": self._busy()},
            self._about(),
            self._cut_short(),
            self._all_there_s,
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
            result.write(folder, output, self._heard)
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


class RequestFailed(Exception):
    """What Locust shows of a failure: its text."""


class Visitor(User):  # type: ignore[misc]
    """A user who streams one answer after another."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self._run: Run = environment.bench
        try:
            self._http, base = connect(self.host, self._run.options)
            # Known since the start, unless the web page has asked for the host.
            self._run.model = self._run.model or first_model(self._http, base, self._run.options)
        except TargetError as error:
            environment.process_exit_code = 1
            raise StopTest(str(error)) from None
        self._path = f"{base}/chat/completions"
        self._headers = _headers(self._run.options)
        self._target = Target(url=str(self.host), model=self._run.model, endpoint="chat")
        self._number = self._run.number()
        self._free_s, self._failed = self._run.now_s(), False

    def wait_time(self) -> float:
        wait_s: float = self._run.options.bench_think
        if self._failed:
            wait_s = max(wait_s, _PAUSE_AFTER_FAILURE_S)
        self._free_s = self._run.now_s() + wait_s
        return wait_s

    def ask(self) -> None:
        if self._run.over:
            # Locust ends at once who waits, and a user who wakes meanwhile would be ended in the
            # middle of a request that nobody needs.
            raise StopUser
        index, request = self._run.next()
        record = Record(
            index=index,
            planned_s=self._free_s,
            kind=request.kind,
            actor=self._run.actor,
            user=self._number,
            asked_input_tokens=request.input_tokens,
            asked_output_tokens=request.output_tokens,
            limit=request.limit,
            shared=request.shared,
        )
        try:
            body = encode(self._target, request)
            stream(self._http, self._path, body, self._headers, record, self._run.now_s)
        finally:
            # Answers are kept for examples only: those of the others are of no use to anyone.
            size, self._failed = len(record.text), not record.ok
            record.text = record.text if record.kind == "example" else ""
            self._run.hear([record])
        self._show(record, size)

    def _show(self, record: Record, size: int) -> None:
        """Locust's own statistics."""
        assert record.sent_s is not None
        assert record.end_s is not None
        fire, common = self.environment.events.request.fire, {"name": self._path, "context": {}}
        if record.chunk_s:
            first_ms = (record.chunk_s[0] - record.planned_s) * 1e3
            fire(
                request_type="TTFT",
                response_time=first_ms,
                response_length=0,
                exception=None,
                **common,
            )
        fire(
            request_type="POST",
            response_time=(record.end_s - record.planned_s) * 1e3,
            response_length=size,
            exception=RequestFailed(record.error) if record.error else None,
            **common,
        )


Visitor.tasks = [Visitor.ask]


# --- the life of the test -------------------------------------------------------------------


def _init(environment: Any, runner: Any, **_: Any) -> None:
    try:
        run = environment.bench = Run(environment)
        if environment.host and not run.model:
            http, base = connect(environment.host, run.options)
            run.model = first_model(http, base, run.options)
    except (BenchError, OSError) as error:
        raise SystemExit(str(error)) from error
    if isinstance(runner, MasterRunner):
        runner.register_message("bench", run.receive)
        environment.events.test_stop.add_listener(lambda **_: run.end())
    if isinstance(runner, WorkerRunner):
        # A task of its own: it waits for users, and the worker answers its master meanwhile.
        runner.register_message("bench-end", run.hand_over, concurrent=True)
    environment.stop_timeout = environment.stop_timeout or _DRAIN_S
    listeners = environment.events
    listeners.test_start.add_listener(lambda **_: run.begin())
    listeners.spawning_complete.add_listener(run.all_users_are_there)
    listeners.test_stopping.add_listener(lambda **_: run.stopping())
    listeners.test_stop.add_listener(lambda **_: run.flush(last=True))
    listeners.quitting.add_listener(lambda **_: run.judge())
    listeners.quit.add_listener(lambda **_: run.close())


events.init_command_line_parser.add_listener(_arguments)
events.init.add_listener(_init)
