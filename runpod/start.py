"""`python runpod/start.py`: what runs in a container on Runpod, from its first second to its last.

    gpus -> environment -> configuration -> weights -> Ray head -> application -> health port

The application is started as `make serve` starts it, on a Ray head of ours. A start that fails is
tried again a few times and then given up, because Runpod starts an ended container anew for as
long as there is a balance. On SIGTERM the health port says 503, streams finish within the grace
there is, and no process is left.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from types import FrameType

import psutil
import yaml

import logs
import rest
from choice import Choice, choose, grace_s, ports_of
from head import LEAST_SHM_BYTES, Head, environment, object_store_bytes, shm_bytes
from health import Health, ask
from logs import show
from serve_app.errors import ConfigError
from serve_app.launch import doctor, launcher, orphans
from serve_app.launch.template import Template
from serve_app.planning.hardware import HardwareError, local_gpus

ROOT = Path(__file__).resolve().parent.parent
# A replica that cannot start is tried this often: a GPU or a hub may have a bad moment.
_TRIES = 3
_PAUSE_S = 5.0
_WELL_S = 600.0
# A load balancer learns of a 503 at its next look.
_NOTICE_S = 3.0
_SERVING = "serving http"
# serve_app's launcher ends with it when no second try can succeed.
_TO_MEND = 2
# One try to stop the pod a minute, while it may bill.
_STOP_AGAIN_S = 60.0


def main() -> int:
    """Run until told to stop. Returns the exit status: 0 stopped, 1 failed, 2 a value to mend."""
    # Bars are for terminals; in a log each step of one is a line.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with _signals() as stop:
        try:
            orphans.adopt()
            ports, grace, tries = ports_of(os.environ), grace_s(os.environ), _tries()
            with Health(ports.health, ports.health_path) as health:
                if (failure := _serve(health, stop, grace, tries)) is None:
                    return 0
                health.unavailable()
                _give_up(stop)
                return failure
        except (ConfigError, OSError) as error:
            # Without a health port there is nothing to wait for.
            show(f"error: {error}")
            _give_up(stop)
            return _TO_MEND
        except Exception:
            # Whatever it is: an end by itself would be a new start, and bill like one.
            show(f"failed: {traceback.format_exc()}")
            _give_up(stop)
            return 1


def _serve(health: Health, stop: "_Stop", grace: float, tries: int) -> int | None:
    """Start, and start again what fails. Returns None when told to stop, else an exit status."""
    failed = 0
    while failed < tries:
        health.loading()
        ran = Run(health, stop, grace)
        try:
            choice = _choose()
            status = ran(choice)
        except (ConfigError, HardwareError) as error:
            show(f"error: {error}")
            return _TO_MEND
        except (RuntimeError, OSError) as error:
            if not stop.is_set():
                show(f"failed: {error}")
            status = 1
        except Exception:
            # A mistake of this program, and a failed start like any other.
            show(f"failed: {traceback.format_exc()}")
            status = 1
        if stop.is_set():
            return None
        if status == _TO_MEND:
            return status
        # A server that was well is started again as often as a new one. One that answers and soon
        # dies, time and again, is as broken as one that never answers, and bills as much.
        failed = 1 if ran.served_s > _WELL_S else failed + 1
        show(f"start {failed} of {tries} failed")
        if failed < tries and stop.wait(_PAUSE_S * failed):
            return None
    return 1


def _tries() -> int:
    text = os.environ.get("MAX_START_FAILURES") or str(_TRIES)
    if not text.isdigit() or int(text) == 0:
        raise ConfigError("MAX_START_FAILURES", text, "must be a number of starts, 1 or more")
    return int(text)


def _choose() -> Choice:
    gpus = local_gpus()
    expected = os.environ.get("RUNPOD_GPU_COUNT", "")
    if expected.isdigit() and int(expected) != len(gpus):
        show(f"warning: Runpod says {expected} GPU(s), the driver shows {len(gpus)}")
    config = launcher.load(Path(os.environ.get("SERVE_CONFIG") or ROOT / "serve_config.yaml"))
    choice = choose(config, os.environ, gpus)
    for line in choice.lines:
        show(line)
    shm = doctor.shared_memory(shm_bytes())
    store = object_store_bytes(shm_bytes())
    show(f"/dev/shm: {shm.found}, of which {store / 2**20:.0f} MiB for Ray's object store")
    if not shm.ok:
        show(f"warning: /dev/shm below {LEAST_SHM_BYTES / 2**30:g} GiB: {shm.mend}")
    return choice


class Run:
    """One start: a Ray head, the application on it, and the queue's handler where there is one.

    Attributes:
        served: whether it came to answering.
        served_s: for how long it did, once it is over.
    """

    def __init__(self, health: Health, stop: "_Stop", grace: float) -> None:
        self._health, self._stop, self._grace = health, stop, grace
        self._template: Template | None = None
        self._head: Head | None = None
        self._server: subprocess.Popen[str] | None = None
        self._handler: subprocess.Popen[bytes] | None = None
        self._ready = threading.Event()
        self.served = False
        self.served_s = 0.0
        self._ready_s = 0.0

    def __call__(self, choice: Choice) -> int:
        """Serve until told to stop, or until something ends by itself. Returns its status."""
        self._stop.idle = False
        with tempfile.TemporaryDirectory(prefix="runpod.") as folder:
            follower = logs.Follower(lambda: self._log_files(Path(folder)))
            follower.start()
            try:
                return self._attend(choice, Path(folder))
            finally:
                self.served_s = time.monotonic() - self._ready_s if self.served else 0.0
                self._end(choice)
                follower.stop()
                self._stop.idle = not self._stop.is_set()

    def _log_files(self, folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
        files: list[tuple[Path, tuple[str, ...]]] = [(folder, logs.SERVE_FILES)]
        if self._head is not None:
            files.append((self._head.log_folder, logs.RAY_FILES))
            files.append((self._head.log_folder / "serve_app", logs.REQUEST_FILES))
        return files

    def _attend(self, choice: Choice, folder: Path) -> int:
        environ = environment(choice.settings)
        environ.pop("VLLM_API_KEY", None)  # vLLM would ask for it, and know no other key.
        if choice.offline:
            environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if choice.settings.template is True:  # Before Ray: it imports while Ray starts.
            # As the head and its replicas have it.
            self._template = Template({**environ, "PYTHONUNBUFFERED": "1"}, choice.settings)
            environ = self._template.environ
            orphans.own.add(self._template.process.pid)
        self._head = Head(environ, self._stop.is_set)
        environ["RAY_ADDRESS"] = self._head.address
        config = folder / "serve_config.yaml"
        config.write_text(yaml.safe_dump(choice.config), encoding="utf-8")
        self._server = _launch(config, {**environ, "TMPDIR": str(folder)})
        orphans.own.add(self._server.pid)
        threading.Thread(target=self._show, args=(self._server,), daemon=True).start()

        prefix = launcher.prefix_of(choice.config)
        url = f"http://127.0.0.1:{choice.ports.application}{prefix}"
        deadline_s = time.monotonic() + choice.start_s
        while not self._stop.wait(0.2):
            if (status := self._server.poll()) is not None:
                return status or 1
            if not self._head.alive:
                show("failed: the Ray head ended")
                return 1
            if self._handler is not None and self._handler.poll() is not None:
                show(f"failed: the queue handler ended with status {self._handler.returncode}")
                return 1
            if not self.served and time.monotonic() > deadline_s:
                show(f"failed: no answer was generated within {choice.start_s:g} s")
                return 1
            if self._ready.is_set() and not self.served:
                if not _generates(url, choice):
                    continue
                self.served, self._ready_s = True, time.monotonic()
                if choice.mode == "queue":
                    self._handler = _handle(url, choice)
                    orphans.own.add(self._handler.pid)
                self._health.ready(lambda: ask(url + "/health"))
                show("ready: an answer was generated")
        return 0

    def _show(self, server: "subprocess.Popen[str]") -> None:
        assert server.stdout is not None
        for line in server.stdout:
            show(line.rstrip())
            if line.startswith(_SERVING):
                self._ready.set()

    def _end(self, choice: Choice) -> None:
        """Stop in the order in which nothing is lost; what is not done in time is killed."""
        deadline_s = time.monotonic() + self._grace
        if self._stop.is_set():
            self._health.unavailable()
            if self.served and choice.mode == "load_balancer":
                time.sleep(_NOTICE_S)
        drained_s = deadline_s - _kill_s(self._grace)
        for process in (self._handler, self._server):
            if process is not None and process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(1.0, drained_s - time.monotonic()))
        if self._head is not None:
            self._head.stop()
        if self._template is not None:
            self._template.end()
        for child in orphans.wait(_kill_s(self._grace) / 2):
            with contextlib.suppress(psutil.NoSuchProcess):
                show(f"killing process {child.pid} ({child.name()})")
                child.kill()
        orphans.wait(5)


def _kill_s(grace: float) -> float:
    """How much of the grace is kept for ending what did not end by itself."""
    return min(10.0, grace / 4)


def _launch(config: Path, environ: Mapping[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "serve_app", "serve", "--config", str(config)],
        cwd=ROOT,
        env={**environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Only start.py says when to stop: a Ctrl-C in a terminal would reach every child at once.
        process_group=0,
    )


def _handle(url: str, choice: Choice) -> "subprocess.Popen[bytes]":
    settings = choice.settings
    # The least that vLLM batches where nothing is said; a worker takes no job that would wait.
    per_replica = settings.limits.max_running_requests or settings.engine.get("max_num_seqs", 256)
    room = int(per_replica) * settings.replicas.max
    environ = {**os.environ, "SERVE_URL": url, "SERVE_ROOM": str(room)}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("handler.py"))],
        env={**environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        process_group=0,
    )


def _generates(url: str, choice: Choice) -> bool:
    """Whether a token comes out at the front door."""
    body = {"model": choice.served_model_name, "prompt": "Hello", "max_tokens": 1}
    headers = {"content-type": "application/json"}
    if choice.key is not None:
        headers["x-api-key"] = choice.key
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), headers, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return bool(response.status == 200 and json.load(response)["choices"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return False


class _Stop(threading.Event):
    """Set by SIGTERM or SIGINT.

    Attributes:
        idle: whether nothing was started yet. Then a signal ends this process at once: a download
            of hours does not look at events, and goes on where it was the next time.
    """

    idle = True


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.idle and not stop.is_set():
            os.write(1, b"stopped before anything was started\n")
            os._exit(0)
        stop.set()

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _give_up(stop: _Stop) -> None:
    """See to it that what cannot start does not bill on.

    A pod is stopped with the key that Runpod gives it for itself, and this process stays until it
    is: ending would only have the container started again. A serverless worker may not stop its
    endpoint, whose other workers may be well: it ends, and Runpod may start another.
    `runpod-up` takes the endpoint's workers away where no completion comes.
    """
    stop.idle = False
    show("giving up: see the lines above")
    pod, key = os.environ.get("RUNPOD_POD_ID"), os.environ.get("RUNPOD_API_KEY")
    if os.environ.get("RUNPOD_ENDPOINT_ID") or not pod or not key:
        return
    client = rest.Client(key, os.environ.get("RUNPOD_API_URL") or rest.URL)
    while not stop.is_set():
        try:
            client.post(f"/v2/pods/{pod}/action", {"action": "stop"})
            show("this pod is told to stop")
        except Exception as error:  # It is tried again as long as the pod bills.
            show(f"this pod bills on: it cannot be stopped: {error!r}")
        stop.wait(_STOP_AGAIN_S)


if __name__ == "__main__":
    sys.exit(main())
