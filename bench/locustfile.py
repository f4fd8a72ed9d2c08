"""Users that chat with an OpenAI-compatible endpoint, for Locust.

    locust -f bench/locustfile.py --headless -u 100 -r 10 -t 60s --host URL --bench-out DIR

Each user streams one chat completion after another. Locust shows two rows: POST is the whole
answer, TTFT the time until its first token. A stream that ends before `[DONE]` has failed, and
the text of a failure is the server's own. Beside Locust's statistics, `DIR/records.jsonl` gets
the raw times of every request, and `DIR/result.json` what `bench.measure` derives from them and a
few example prompts that were asked during the full load, with the answers. Locust's exit status
is kept, but a run that was broken off, or in which nothing was answered, ends with 1.

`locust_client.py` sends the requests, and `locust_run.py` has the records and writes the result.
"""

from typing import Any

from locust import User, events
from locust.exception import StopTest, StopUser
from locust.runners import MasterRunner, WorkerRunner

from bench.errors import BenchError, TargetError
from bench.locust_client import connect, first_model, headers, stream
from bench.locust_run import Run
from bench.records import Record
from bench.traffic import access
from bench.traffic.target import Target, encode

# Answers may be shorter: 64 tokens are the upper limit.
_WORKLOAD = "synthetic:input=100,output=64,exact=no"
# Locust waits for running answers when the time is up, unless --stop-timeout says otherwise.
# Without them the slowest answers would be missing.
_DRAIN_S = 30.0
# A user whose request failed waits, so that refused users do not flood the server.
_PAUSE_AFTER_FAILURE_S = 1.0


def _arguments(parser: Any) -> None:
    def add(name: str, text: str, **options: Any) -> None:
        variable = "LOCUST_" + name.strip("-").replace("-", "_").upper()
        parser.add_argument(name, env_var=variable, include_in_web_ui=False, help=text, **options)

    add("--bench-out", "folder for records.jsonl and result.json", default="")
    add("--bench-model", "its name in requests; by default the first served model", default="")
    add("--bench-workload", "the requests: see docs/benchmarking.md", default=_WORKLOAD)
    add("--bench-seed", "seed of the workload", type=int, default=0)
    add("--bench-salt", "salt of an earlier run, to send its prompts again", default="")
    add("--bench-think", "seconds a user waits between requests", type=float, default=0.0)
    add(
        "--bench-timeout",
        "seconds of silence that fail a request",
        type=float,
        default=300.0,
    )
    add(
        "--bench-api-key",
        "bearer token; better as the variable",
        default="",
        is_secret=True,
    )
    access.arguments(parser.add_argument, prefix="bench-", include_in_web_ui=False)
    add("--bench-examples", "file of example prompts, one per line", default="")


class RequestFailed(Exception):
    """A failure as Locust shows it: its text."""


class Visitor(User):  # type: ignore[misc]
    """A user who streams one answer after another."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self._run: Run = environment.bench
        try:
            self._http, base = connect(self.host, self._run.options)
            # The model is known since the start, unless the web page asked for the host.
            self._run.model = self._run.model or first_model(self._http, base, self._run.options)
        except TargetError as error:
            environment.process_exit_code = 1
            raise StopTest(str(error)) from None
        self._path = f"{base}/chat/completions"
        self._headers = headers(self._run.options)
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
            # Locust ends waiting users at once. A user that wakes meanwhile would be ended in the
            # middle of a request that is not needed.
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
            # Only the answers of examples are shown, so other texts are dropped.
            size, self._failed = len(record.text), not record.ok
            record.text = record.text if record.kind == "example" else ""
            self._run.add([record])
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
    listeners.spawning_complete.add_listener(run.all_users_started)
    listeners.test_stopping.add_listener(lambda **_: run.stopping())
    listeners.test_stop.add_listener(lambda **_: run.flush(last=True))
    listeners.quitting.add_listener(lambda **_: run.judge())
    listeners.quit.add_listener(lambda **_: run.close())


events.init_command_line_parser.add_listener(_arguments)
events.init.add_listener(_init)
