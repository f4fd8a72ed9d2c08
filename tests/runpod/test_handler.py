"""The queue worker: the SDK's real loop, a real job server, and a small application behind it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import handler
from tests.runpod import job_server, web
from tests.runpod.conftest import FOLDER, SDK
from tests.runpod.job_server import Jobs

pytestmark = pytest.mark.skipif(not SDK, reason="Runpod's SDK is not installed")
APPLICATION, JOBS = 8872, 8873


class Application(web.Server):
    """Answers by the model's name: what is asked of it is what it does wrong."""

    def __init__(self) -> None:
        super().__init__(APPLICATION, _Answer)
        self.requests: list[tuple[str, str, Any]] = []
        self.left = threading.Event()
        self.go = threading.Event()
        self.busy = 0


class _Answer(web.Handler):
    server: Application

    def do_GET(self) -> None:
        self.server.requests.append(("GET", self.path, None))
        self.send_json(200, {"data": [{"id": "served"}]})

    def do_POST(self) -> None:
        body = self.body()
        self.server.requests.append(("POST", self.path, body))
        model = body["model"]
        if model == "unknown":
            self.send_json(404, {"error": {"message": "no such model", "code": "model_not_found"}})
        elif model == "busy" and self.server.busy < 2:
            self.server.busy += 1
            self.send_json(503, {"error": {"message": "busy"}}, {"Retry-After": "0"})
        elif body.get("stream"):
            self._stream(model)
        else:
            self.send_json(200, {"model": model, "choices": [{"text": "whole"}]})

    def _stream(self, model: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            if model == "endless":
                for number in range(3000):
                    self._event({"n": number})
                    time.sleep(0.02)
                return
            for number in range(100):
                if number == 50 and model == "held":
                    assert self.server.go.wait(60)
                if number == 50 and model == "broken":
                    error = {"message": "late", "type": "timeout_error", "code": "timeout"}
                    self._event({"error": error})
                    break
                if number == 50 and model == "cut":
                    self.connection.close()
                    self.close_connection = True
                    return
                # In two halves: what arrives is not what was an event.
                self._event({"n": number}, halves=True)
            self._chunk(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.left.set()
            self.close_connection = True

    def _event(self, value: Any, halves: bool = False) -> None:
        data = f"data: {json.dumps(value)}\n\n".encode()
        if halves:
            self._chunk(data[:9])
            data = data[9:]
        self._chunk(data)
        time.sleep(0.002)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


@pytest.fixture(scope="module")
def application() -> Iterator[Application]:
    with web.running(Application()) as server:
        yield server


@contextlib.contextmanager
def working(jobs: Jobs, log: Path, **environ: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker process, killed in the end if the test did not stop it."""
    environment = {**os.environ, **jobs.environment(), "PYTHONUNBUFFERED": "1"}
    environment |= {"SERVE_URL": f"http://127.0.0.1:{APPLICATION}", **environ}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(FOLDER / "handler.py")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def jobs(application: Application, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """A job server with one worker at it."""
    log = tmp_path_factory.mktemp("worker") / "log"
    with job_server.serving(JOBS) as server, working(server, log):
        yield server


def openai(body: Any, route: str = "/v1/chat/completions") -> Any:
    return {"openai_route": route, "openai_input": body}


def error(done: Any) -> Any:
    assert "output" not in done
    return json.loads(done["error"])


def numbers(text: str) -> list[int]:
    """The events of a stream, by what they say; each of them whole."""
    assert text.endswith("\n\n")
    events = [json.loads(e.removeprefix("data: ")) for e in text.split("\n\n") if "{" in e]
    return [event["n"] for event in events]


def test_a_stream_comes_in_batches_of_whole_events(jobs: Jobs) -> None:
    job = jobs.submit(openai({"model": "m", "stream": True}))
    done = jobs.over(job)
    assert job.streamed is True
    assert numbers(job.text) == list(range(100))
    assert job.text.endswith("data: [DONE]\n\n")
    assert 1 < len(job.stream) < 50
    assert all(part["output"].endswith("\n\n") for part in job.stream)
    # /run and /runsync answer with the same.
    assert "".join(done["output"]) == job.text


@pytest.mark.parametrize(
    ("given", "method", "path", "body"),
    [
        (
            openai({"model": "m"}),
            "POST",
            "/v1/chat/completions",
            {"model": "m"},
        ),
        ({"openai_route": "/v1/models"}, "GET", "/v1/models", None),
        (
            {"route": "/v1/messages", "body": {"model": "m"}},
            "POST",
            "/v1/messages",
            {"model": "m"},
        ),
        ({"route": "/version", "method": "get"}, "GET", "/version", None),
        (
            {"messages": [], "sampling_params": {"max_tokens": 3}},
            "POST",
            "/v1/chat/completions",
            {"max_tokens": 3, "stream": False, "messages": [], "model": "served"},
        ),
        (
            {"prompt": "x"},
            "POST",
            "/v1/completions",
            {"stream": False, "prompt": "x", "model": "served"},
        ),
    ],
)
def test_every_shape_of_an_input(
    jobs: Jobs, application: Application, given: Any, method: str, path: str, body: Any
) -> None:
    done = jobs.over(jobs.submit(given))
    assert application.requests[-1] == (method, path, body)
    assert len(done["output"]) == 1


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({}, 400, "input needs openai_route"),
        ({"route": "http://elsewhere/"}, 400, "is not a route"),
        ({"route": "//elsewhere/"}, 400, "is not a route"),
        ({"route": "/x", "body": []}, 400, "the body must be an object"),
        (openai({"model": "unknown"}), 404, "no such model"),
    ],
)
def test_an_error_fails_the_job_with_its_status(
    jobs: Jobs, given: Any, status: int, message: str
) -> None:
    result = error(jobs.over(jobs.submit(given)))
    assert result["status"] == status
    assert message in result["message"]


def test_a_moment_without_room_is_waited_out(jobs: Jobs, application: Application) -> None:
    done = jobs.over(jobs.submit(openai({"model": "busy"})))
    assert done["output"][0]["choices"] == [{"text": "whole"}]
    assert application.busy == 2


@pytest.mark.parametrize(("model", "status"), [("broken", 504), ("cut", 502)])
def test_a_stream_that_breaks_is_a_failure_after_what_it_said(
    jobs: Jobs, model: str, status: int
) -> None:
    job = jobs.submit(openai({"model": model, "stream": True}))
    assert error(jobs.over(job))["status"] == status
    assert '{"n": 49}' in job.text


def test_a_cancelled_job_leaves_the_application(jobs: Jobs, application: Application) -> None:
    other = jobs.submit(openai({"model": "held", "stream": True}))
    job = jobs.submit(openai({"model": "endless", "stream": True}))
    assert jobs.wait(lambda: len(job.stream) > 1 and len(other.stream) > 0)
    application.left.clear()
    jobs.cancel(job)
    assert application.left.wait(30)
    assert job.done is None
    # The one beside it goes on.
    application.go.set()
    jobs.over(other)
    assert numbers(other.text) == list(range(100))
    application.go.clear()


def test_pings_name_the_jobs_in_progress(jobs: Jobs, application: Application) -> None:
    job = jobs.submit(openai({"model": "held", "stream": True}))
    jobs.pings.clear()
    assert jobs.wait(lambda: any(f"job_id={job.id}" in ping for ping in jobs.pings))
    application.go.set()
    jobs.over(job)
    application.go.clear()


def test_no_more_at_once_than_there_is_room(application: Application, tmp_path: Path) -> None:
    with (
        job_server.serving(JOBS + 1) as server,
        working(server, tmp_path / "log", SERVE_ROOM="2", MAX_CONCURRENCY="50"),
    ):
        waiting = [server.submit(openai({"model": "held", "stream": True})) for _ in range(5)]
        assert server.wait(lambda: sum(bool(job.stream) for job in waiting) == 2)
        application.go.set()
        for job in waiting:
            server.over(job)
        application.go.clear()
        assert server.most_at_once == 2


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 256),
        ({"SERVE_ROOM": "512"}, 512),
        ({"SERVE_ROOM": "512", "MAX_CONCURRENCY": "30"}, 30),
        ({"SERVE_ROOM": "8", "MAX_CONCURRENCY": "30"}, 8),
        ({"MAX_CONCURRENCY": "0"}, 256),
    ],
)
def test_the_room_is_the_lesser_of_two(environ: dict[str, str], expected: int) -> None:
    assert handler.room(environ) == expected


def test_sigterm_finishes_what_was_taken_and_takes_no_more(
    application: Application, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with job_server.serving(JOBS + 1) as server, working(server, log) as process:
        job = server.submit(openai({"model": "held", "stream": True}))
        assert server.wait(lambda: len(job.stream) > 0)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        application.go.set()
        # Its polls are held open for two minutes: they are not waited for.
        assert process.wait(60) == 0, log.read_text()
        application.go.clear()
        assert numbers("".join(job.done["output"])) == list(range(100))
        late = server.submit(openai({"model": "m"}))
        assert not server.wait(lambda: late.taken, 1)
