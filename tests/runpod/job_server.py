"""Runpod's job server for one worker, as the SDK talks to it: take, stop, stream, done and ping.

Jobs are put in by the test; what the worker posts is kept with its job. Polls are held open for a
while, as Runpod holds them, unless there is something to say.
"""

import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.runpod import web

POD = "worker-1"
_HOLD_S = 120.0


@dataclass
class Job:
    """One job, and what came back. `done` is None until the worker says that it is over."""

    id: str
    input: Any
    taken: bool = False
    stream: list[Any] = field(default_factory=list)
    done: Any = None
    streamed: bool | None = None

    @property
    def text(self) -> str:
        return "".join(str(part["output"]) for part in self.stream)


class Jobs(web.Server):
    """The server and its jobs."""

    def __init__(self, port: int) -> None:
        super().__init__(port, _Handler)
        self.changed = threading.Condition()
        self.jobs: dict[str, Job] = {}
        self.to_stop: list[str] = []
        self.pings: list[str] = []
        self.most_at_once = 0
        self.open = True

    def environment(self) -> dict[str, str]:
        """What Runpod sets in a queue worker."""
        base = f"{self.url}/v2/endpoint"
        return {
            "RUNPOD_POD_ID": POD,
            "RUNPOD_ENDPOINT_ID": "endpoint",
            "RUNPOD_AI_API_KEY": "worker-key",
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_PING_INTERVAL": "1000",
            # Of a GPU machine on the internet.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def submit(self, input: Any) -> Job:
        with self.changed:
            job = Job(f"job-{len(self.jobs)}", input)
            self.jobs[job.id] = job
            self.changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        with self.changed:
            self.to_stop.append(job.id)
            self.changed.notify_all()

    def wait(self, until: Callable[[], bool], timeout_s: float = 60) -> bool:
        """Whether `until` comes true in time; looked at whenever the worker said something."""
        with self.changed:
            return self.changed.wait_for(until, timeout_s)

    def over(self, job: Job, timeout_s: float = 60) -> Any:
        """What the worker said of the job at its end."""
        assert self.wait(lambda: job.done is not None, timeout_s), f"{job.id} is not done: {job}"
        return job.done


class _Handler(web.Handler):
    server: Jobs

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        verb = path.split("/")[3]
        if verb == "ping":
            with self.server.changed:
                self.server.pings.append(query)
                self.server.changed.notify_all()
            self._send(200, {})
        elif verb == "job-stop":
            self._send_held(self._stops)
        else:
            size = re.search(r"batch_size=(\d+)", query)
            maximum = int(size[1]) if size else 1
            self._send_held(lambda: self._take(maximum, verb == "job-take-batch"))

    def do_POST(self) -> None:
        path, _, query = self.path.partition("?")
        verb, worker, number = path.split("/")[3:6]
        assert worker == POD
        data = self.body()
        with self.server.changed:
            job = self.server.jobs[number]
            if verb == "job-stream":
                job.stream.append(data)
            else:
                job.done, job.streamed = data, "isStream=true" in query
            self.server.changed.notify_all()
        self._send(200, {})

    def _take(self, maximum: int, as_list: bool) -> Any:
        waiting = [job for job in self.server.jobs.values() if not job.taken][:maximum]
        if not waiting:
            return None
        for job in waiting:
            job.taken = True
        self.server.most_at_once = max(self.server.most_at_once, self._in_progress())
        results = [{"id": job.id, "input": job.input} for job in waiting]
        return results if as_list else results[0]

    def _in_progress(self) -> int:
        return sum(job.taken and job.done is None for job in self.server.jobs.values())

    def _stops(self) -> Any:
        stops, self.server.to_stop = self.server.to_stop, []
        return {"jobsToStop": stops} if stops else None

    def _send_held(self, answer: Callable[[], Any]) -> None:
        """An answer as soon as there is one; 204 if there is none for long."""
        deadline_s = time.monotonic() + _HOLD_S
        result = None
        with self.server.changed:
            while self.server.open and not self._left() and time.monotonic() < deadline_s:
                if (result := answer()) is not None:
                    break
                self.server.changed.wait(0.1)
        self._send(204 if result is None else 200, result)

    def _left(self) -> bool:
        """Whether the worker has closed the connection: it must not be given a job any more."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _send(self, status: int, body: Any) -> None:
        try:
            self.send_json(status, body)
        except OSError:
            self.close_connection = True  # The worker is gone.


@contextmanager
def serving(port: int) -> Iterator[Jobs]:
    """The server, in threads of this process, while the block runs."""
    with web.running(Jobs(port)) as server:
        try:
            yield server
        finally:
            with server.changed:
                server.open = False
                server.changed.notify_all()
