"""Processes that are called as those of a Ray Serve application are, and do nothing else.

    python -m tests.services.fleet --replicas 2 --start-s 0.5

Each replica has an engine below it, listens once it has started, ends when its engine ends (with
--restart it starts another and listens on another port), and is replaced by the process that was
started. What it answers is 404, as a replica with a secret does.
"""

import argparse
import contextlib
import http.server
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from setproctitle import setproctitle

ROOT = Path(__file__).parents[2]
REPLICA, ENGINE = "ray::ServeReplica:llm:engine", "VLLM::EngineCore"
_LOOK_S = 0.05


@contextlib.contextmanager
def running(
    replicas: int = 2,
    start_s: float = 0.0,
    session: str = "",
    title: str = REPLICA,
    restart: bool = False,
    forked: bool = False,
) -> Iterator[psutil.Process]:
    """A fleet; with a session, below a process that looks like the raylet of it.

    Args:
        forked: the raylet has a stand-in for the fleet, which is not below it.
    """
    words = ["--replicas", str(replicas), "--start-s", str(start_s), "--title", title]
    words += ["--restart"] if restart else []
    command = [sys.executable, "-m", "tests.services.fleet", *words]
    started = []
    if forked:
        started.append(subprocess.Popen(command, cwd=ROOT))
        command = ["sh", "-c", f"printf 'for %d' {started[0].pid} > /proc/$$/comm; sleep 1000; :"]
    if session:
        # A shell that is called raylet, and whose arguments are those of one.
        script = f"{shlex.join(command)}; :"
        arguments = [f"--session-name={session}", "--node_id=0123456789abcdef", "--node-name=one"]
        shell = ["raylet", "-c", script, *arguments]
        started.append(subprocess.Popen(shell, executable="/bin/sh", cwd=ROOT))
    else:
        started.append(subprocess.Popen(command, cwd=ROOT))
    roots = [psutil.Process(process.pid) for process in started]
    try:
        yield roots[-1]
    finally:
        members = list(roots)
        for root in roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                members += root.children(recursive=True)
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for process in started:
            process.wait(10)


class _Nothing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _start(role: str, options: argparse.Namespace) -> "subprocess.Popen[bytes]":
    words = ["--role", role, "--start-s", str(options.start_s), "--title", options.title]
    words += ["--restart"] if options.restart else []
    # Told, not looked up: by the time it looks, its parent may be gone.
    words += ["--parent", str(os.getpid())]
    return subprocess.Popen([sys.executable, "-m", "tests.services.fleet", *words])


def _fleet(options: argparse.Namespace) -> None:
    running = [_start("replica", options) for _ in range(options.replicas)]
    while os.getppid() == options.parent:
        time.sleep(_LOOK_S)
        running = [p if p.poll() is None else _start("replica", options) for p in running]


def _listen() -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Nothing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _replica(options: argparse.Namespace) -> None:
    setproctitle(options.title)
    engine = _start("engine", options)
    time.sleep(options.start_s)
    server = _listen()
    while os.getppid() == options.parent:
        if engine.poll() is not None:
            if not options.restart:
                break
            engine = _start("engine", options)
            before, server = server, _listen()
            before.shutdown()
            before.server_close()
        time.sleep(_LOOK_S)
    engine.kill()


def _engine(options: argparse.Namespace) -> None:
    setproctitle(ENGINE)
    while os.getppid() == options.parent:
        time.sleep(_LOOK_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", default="fleet")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--start-s", type=float, default=0.0)
    parser.add_argument("--title", default=REPLICA)
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--parent", type=int, default=os.getppid())
    options = parser.parse_args()
    if options.role == "replica":
        _replica(options)
    elif options.role == "engine":
        _engine(options)
    else:
        _fleet(options)


if __name__ == "__main__":
    main()
