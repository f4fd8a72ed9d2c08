"""The template: a process that has imported everything, from which replicas are forked.

    python -m serve_app.replica.template [--ends-with-stdin] NAME [MODULE ...]

The imports of a replica take longer than all else in its start. This process is started before Ray
(launch/template.py), so that they are done while Ray starts, and once for all replicas of the node.
A replica's Ray worker is then forked from it (worker.py), and from that worker, before Ray has any
threads there, the fork server of its engine (forkserver.py).

It has one thread, has not initialised CUDA and is in no Ray cluster; where that does not hold, it
forks nothing. It forks only for its own user, and only workers whose environment is its own, since
libraries read theirs when they are imported. It serves any job of any Ray cluster on this node. It
ends with its launcher, or where it has none, with the last raylet that it forked a worker for;
workers that it forked are not touched.
"""

import argparse
import ctypes
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from serve_app.replica import forkserver
from serve_app.replica.worker import FORK_SERVER_VARIABLE, RAY_ENVIRONMENT, distrust_reason

MODULES = (
    "ray._private.workers.default_worker",
    "ray.serve._private.controller",
    "ray.serve._private.proxy",
    "ray.serve._private.replica",
    "serve_app.app",
    "serve_app.replica.engine",
    "vllm.v1.worker.gpu_worker",
)
# Given to each worker anew, and read after the imports: torch gets its threads in forkserver.py.
_OF_A_WORKER = frozenset(
    [
        *("RAY_AUTH_MODE", "RAY_LD_PRELOAD_ON_WORKERS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
        *("SPT_NOENV", "PWD", "OLDPWD", "SHLVL", "_", FORK_SERVER_VARIABLE, *RAY_ENVIRONMENT),
    ]
)
# Set by an import. The cache of compiled kernels would take it for the operator's choice.
_NOT_INHERITED = frozenset(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"))
# The driver's answer to any question before CUDA is initialised.
_CUDA_NOT_INITIALISED = 3
# The longest that a stand-in may take to say what it wants.
_REQUEST_S = 5.0


@dataclass(frozen=True)
class Request:
    """What a worker is to run.

    Attributes:
        argv: a script of Python and its arguments.
        max_files: files and connections that it may have open.
        descriptors: its standard input, output and error.
    """

    argv: list[str]
    folder: str
    environment: dict[str, str]
    max_files: int
    descriptors: list[int]

    @classmethod
    def read(cls, connection: socket.socket) -> "Request":
        """What a stand-in asks for.

        Raises:
            OSError, ValueError: it did not ask in time, or not as worker.py does.
        """
        connection.settimeout(_REQUEST_S)
        header, descriptors, *_ = socket.recv_fds(connection, 4, 3)
        with connection.makefile("rb") as file:
            payload = json.loads(file.read(struct.unpack("!I", header)[0]))
        return cls(**payload, descriptors=descriptors)


@dataclass(frozen=True)
class _Worker:
    """A worker that was forked: `descriptor` is readable once it has ended."""

    pid: int
    descriptor: int
    connection: socket.socket


class Template:
    """Forks workers, one at a time.

    Args:
        listener: where stand-ins ask.
        owner: becomes readable when its owner ends; None: it ends with the last raylet.
        given: the environment that this process started with.
    """

    def __init__(
        self, listener: socket.socket, owner: int | None, given: Mapping[str, str]
    ) -> None:
        self._listener, self._owner = listener, owner
        self._given = given
        self._workers: list[_Worker] = []
        # Descriptors of the raylets that workers were forked for, by pid.
        self._raylets: dict[int, int] = {}

    def serve(self) -> Request | None:
        """Fork a worker for each request. Returns the request in the worker, and None in the
        template at its end.
        """
        while True:
            watched = {worker.descriptor: worker for worker in self._workers}
            left = {worker.connection.fileno(): worker for worker in self._workers}
            asked = self._listener.fileno()
            owner = [] if self._owner is None else [self._owner]
            raylets = self._raylets.values()
            readable, _, _ = select.select([*owner, *raylets, asked, *watched, *left], [], [])
            if self._owner in readable or self._last_raylet_ended(readable):
                return None
            for descriptor in readable:
                if descriptor in watched:
                    self._reap(watched[descriptor])
                elif descriptor in left and left[descriptor] in self._workers:
                    # Ray has killed the stand-in. It is reaped next.
                    os.kill(left[descriptor].pid, signal.SIGKILL)
            if asked in readable and (request := self._answer()) is not None:
                return request

    def _last_raylet_ended(self, readable: Sequence[int]) -> bool:
        """Forget the raylets that have ended. Returns whether no owner and no other is left."""
        ended = [pid for pid, descriptor in self._raylets.items() if descriptor in readable]
        for pid in ended:
            os.close(self._raylets.pop(pid))
        return bool(ended) and not self._raylets and self._owner is None

    def _answer(self) -> Request | None:
        """Fork for one stand-in. Returns its request in the worker, None in the template."""
        connection, _ = self._listener.accept()
        try:
            request = Request.read(connection)
        except (OSError, ValueError, TypeError, struct.error):
            connection.close()
            return None
        if (why := self._obstacle(connection, request)) is not None:
            _send(connection, {"refused": why})
            connection.close()
        else:
            pid = os.fork()
            if pid == 0:
                self._leave(connection)
                return request
            self._workers.append(_Worker(pid, os.pidfd_open(pid), connection))
            self._watch_raylet(request.environment.get("RAY_RAYLET_PID", ""))
            _send(connection, {"pid": pid})
        for descriptor in request.descriptors:
            os.close(descriptor)
        return None

    def _obstacle(self, connection: socket.socket, request: Request) -> str | None:
        """Why no worker can be forked for this request; None: one can."""
        if (why := distrust_reason(connection) or unforkable()) is not None:
            return why
        if names := differing(self._given, os.environ, request.environment):
            return f"its environment differs in {', '.join(names)}"
        return None

    def _watch_raylet(self, pid: str) -> None:
        if pid.isdecimal() and int(pid) not in self._raylets:
            try:
                self._raylets[int(pid)] = os.pidfd_open(int(pid))
            except ProcessLookupError:
                return  # It has ended, and the stand-in ends its worker.

    def _reap(self, worker: _Worker) -> None:
        _, status = os.waitpid(worker.pid, 0)
        self._workers.remove(worker)
        _send(worker.connection, {"status": os.waitstatus_to_exitcode(status)})
        worker.connection.close()
        os.close(worker.descriptor)

    def _leave(self, connection: socket.socket) -> None:
        """In a worker: close what belongs to the template, and leave its process group.

        Ray kills the group of a worker that has ended, to end what the worker has started.
        """
        os.setpgid(0, 0)
        self._listener.close()
        connection.close()
        for worker in self._workers:
            worker.connection.close()
            os.close(worker.descriptor)
        for descriptor in self._raylets.values():
            os.close(descriptor)


def differing(
    given: Mapping[str, str], now: Mapping[str, str], wanted: Mapping[str, str]
) -> list[str]:
    """The variables whose values would require a new import of the libraries.

    Args:
        given: the template's environment before its imports.
        now: the same, with what the imports have set.
        wanted: the environment of a worker.
    """
    names = (given.keys() | wanted.keys()) - _OF_A_WORKER
    return sorted(
        name for name in names if wanted.get(name) not in (given.get(name), now.get(name))
    )


def environment(
    given: Mapping[str, str], now: Mapping[str, str], wanted: Mapping[str, str]
) -> dict[str, str]:
    """The environment of a worker: its own variables and those that imports have set."""
    imported = {
        name: value
        for name, value in now.items()
        if given.get(name) != value and name not in _NOT_INHERITED
    }
    return imported | dict(wanted)


def unforkable(driver: Callable[[], Any] | None = None) -> str | None:
    """Why this process must not be forked; None: it may be.

    Args:
        driver: returns CUDA's driver library, or None where this process has not loaded it.
    """
    if threading.active_count() > 1:
        return f"it has {threading.active_count()} threads"
    library = (driver or _cuda_driver)()
    if library is None:
        return None
    # vLLM asks NVML for the GPUs as it is imported, which a fork may follow.
    status = library.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    return None if status == _CUDA_NOT_INITIALISED else "an import has initialised CUDA in it"


def close_nvml(library: Callable[[], Any] | None = None) -> None:
    """Close NVML, which imports leave open. The kernel refuses what a fork asks through it; a fork
    that finds it closed opens its own.

    Args:
        library: returns NVML's library, or None where this process has not loaded it.
    """
    nvml = (library or _nvml)()
    # It counts how often it was opened.
    while nvml is not None and nvml.nvmlShutdown() == 0:
        pass


def _cuda_driver() -> ctypes.CDLL | None:
    return _loaded("libcuda.so.1")


def _nvml() -> ctypes.CDLL | None:
    return _loaded("libnvidia-ml.so.1")


def _loaded(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None


def _send(connection: socket.socket, message: Mapping[str, object]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # The stand-in is gone.


def become(request: Request, given: Mapping[str, str]) -> None:
    """Run the request's script in this process, as if Python had been started for it."""
    for number, descriptor in enumerate(request.descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request.folder)
    # A pod raises it for `ray start`, after the start of the template.
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(request.max_files, hard_limit), hard_limit))
    # A shell ignores it for what it starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    variables = environment(given, os.environ, request.environment)
    if (ray := sys.modules.get("ray")) is None:
        forkserver.change_environment(variables)
    else:
        ray._raylet.setproctitle("ray::IDLE")  # Before: it has a setproctitle of its own.
        forkserver.change_environment(variables)
        ray._raylet.Config.initialize("")  # Ray has read the template's environment.
    if FORK_SERVER_VARIABLE in variables:
        forkserver.fork()
    sys.argv = request.argv
    sys.path[0] = str(Path(request.argv[0]).parent)
    runpy.run_path(request.argv[0], run_name="__main__")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ends-with-stdin", action="store_true")
    parser.add_argument("name")
    parser.add_argument("modules", nargs="*", default=MODULES)
    arguments = parser.parse_args(argv)
    given, began_s = dict(os.environ), time.monotonic()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Without a traceback.
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind("\0" + arguments.name)
        except OSError:
            print("error: this node has a template of this user already", file=sys.stderr)
            return 1
        # Before the imports: a stand-in that comes early waits for them.
        listener.listen(64)
        with forkserver.undisturbed():
            for module in arguments.modules:
                importlib.import_module(module)
        close_nvml()
        took_s, gigabytes = time.monotonic() - began_s, psutil.Process().memory_info().rss / 1e9
        print(f"template: imported in {took_s:.1f} s, takes {gigabytes:.1f} GB", flush=True)
        owner = sys.stdin.fileno() if arguments.ends_with_stdin else None
        request = Template(listener, owner, given).serve()
    if request is not None:
        become(request, given)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
