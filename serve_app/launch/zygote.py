"""A process that has imported everything, and from which others are forked.

`make serve` starts about ten Python processes on one machine, and each would import Ray, or Ray and
vLLM, for itself: that was most of the CPU time of a start. A zygote imports once. Whoever would
start Python starts `./forked` instead, which asks a zygote for a fork of itself (forked.py). Pages
that nobody writes to are shared, so these processes also take less memory.

There are two: one imports Ray and becomes Ray's own processes; the other imports vLLM at the same
time, on another core, and becomes replicas and the fork servers of their engines. A replica that is
replaced, or added, begins with everything imported.

Only a process without threads can be forked safely, so this module is one loop, and what it imports
must start none. What libraries read from the environment while they are imported must be the same
for whoever asks: a request with other values is refused, and starts Python as usual.

    python -m serve_app.launch.zygote LISTENING MODULE... [--then MODULE...]

LISTENING is the descriptor of a socket that listens: who asks during the imports waits until they
are over.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The socket of the zygote that `./forked` asks.
SOCKET_VARIABLE = "SERVE_APP_ZYGOTE"
# What stands in Python's place.
COMMAND = Path(__file__).with_name("forked")
# Where this is set, a fork begins with the fork server of an engine, which must come before any
# thread: MODULE:FUNCTION, called before the program.
FIRST_VARIABLE = "SERVE_APP_FORK_FIRST"

# Variables that libraries read while they are imported, by how their names begin.
_READ_AT_IMPORT = (
    "CUDA_HOME",
    "HF_",
    "LD_",
    "MKL_",
    "OMP_",
    "OPENBLAS_",
    "PYTHON",
    "PYTORCH_",
    "RAY_SERVE_",
    "TORCH",
    "TRITON_",
    "VLLM_",
    "XDG_CACHE_HOME",
)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True)
class Request:
    """What a forked process is to be, as forked.py asks for it.

    Attributes:
        words: arguments of Python: options, then a script, `-m MODULE` or `-c CODE`.
        files: its open descriptors, by the numbers that they are to have.
        blocked: signals that it blocks.
        group: its process group.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str
    files: tuple[int, ...]
    blocked: tuple[int, ...]
    group: int

    @classmethod
    def read(cls, body: bytes) -> "Request":
        asked = json.loads(body)
        return cls(
            tuple(asked["words"]),
            asked["environment"],
            asked["folder"],
            tuple(asked["files"]),
            tuple(asked["blocked"]),
            asked["group"],
        )


class Unforkable(Exception):
    """The process must be started as any other: a fork would not be the same."""


def check(request: Request, own: Mapping[str, str]) -> None:
    """Whether a fork of a process with the environment `own` can become what is asked for.

    Raises:
        Unforkable: it cannot.
    """
    program(request.words)
    for name in sorted(own.keys() | request.environment.keys()):
        theirs = request.environment.get(name)
        if name.startswith(_READ_AT_IMPORT) and theirs != own.get(name):
            raise Unforkable(f"{name} is {theirs!r}, and was {own.get(name)!r} at the imports")


def program(words: Sequence[str]) -> tuple[str, str, tuple[str, ...]]:
    """Of Python's arguments: "script", "-m" or "-c", which one, and its own arguments.

    Raises:
        Unforkable: an option that a running interpreter cannot take up.
    """
    rest = list(itertools.dropwhile(lambda word: word in ("-u", "-B"), words))
    if len(rest) >= 2 and rest[0] in ("-m", "-c"):
        return rest[0], rest[1], tuple(rest[2:])
    if not rest or rest[0].startswith("-"):
        raise Unforkable(f"the arguments {' '.join(words[:3])!r}")
    return "script", rest[0], tuple(rest[1:])


class Zygote:
    """Serves forks on one socket.

    Args:
        listening: the socket.
        environment: of this process, before it imported anything.
        more: modules to import while nobody asks.
    """

    def __init__(
        self,
        listening: socket.socket,
        environment: Mapping[str, str],
        more: Sequence[str] = (),
    ) -> None:
        self._listening = listening
        self._environment = environment
        self._more = deque(more)
        # By the pid of a forked process: who asked for it, and is told when it ends.
        self._asked: dict[int, socket.socket] = {}

    def serve(self) -> Request | None:
        """Fork for whoever asks, until SIGTERM. Returns in each fork what that is to be."""
        over = False

        def stop(number: int, frame: object) -> None:
            nonlocal over
            over = True

        ended, wakeup = socket.socketpair()
        ended.setblocking(False)
        wakeup.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        with selectors.DefaultSelector() as ready:
            ready.register(self._listening, selectors.EVENT_READ)
            ready.register(ended, selectors.EVENT_READ)
            while not over:
                events = ready.select(0 if self._more else None)
                if not events and self._more:
                    _import(self._more.popleft())
                for key, _ in events:
                    if key.fileobj is ended:
                        with contextlib.suppress(BlockingIOError):
                            ended.recv(4096)
                    elif key.fileobj is self._listening:
                        if (request := self._fork(ready)) is not None:
                            wakeup.close()
                            ended.close()
                            return request
                    else:
                        self._left(ready, key.data)
                self._reap(ready)
        return None

    def _fork(self, ready: selectors.BaseSelector) -> Request | None:
        """Fork for one who asks. Returns the request in the fork, None here."""
        connection, _ = self._listening.accept()
        files: list[int] = []
        try:
            connection.settimeout(5)
            head, files, _, _ = socket.recv_fds(connection, 4, 253)
            request = Request.read(_exactly(connection, int.from_bytes(head, "big")))
            check(request, self._environment)
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
        except (OSError, EOFError, ValueError, KeyError, Unforkable) as error:
            print(f"zygote: not forked: {error}", file=sys.stderr)
            with contextlib.suppress(OSError):
                connection.sendall((0).to_bytes(4, "big"))
            connection.close()
            for file in files:
                os.close(file)
            return None
        if pid == 0:
            ready.close()
            self._listening.close()
            for other in (connection, *self._asked.values()):
                other.close()
            _take(request, files, self._set_by_imports())
            return request
        for file in files:
            os.close(file)
        self._asked[pid] = connection
        connection.settimeout(None)
        ready.register(connection, selectors.EVENT_READ, pid)
        with contextlib.suppress(OSError):  # Who asked has gone: _left sees it.
            connection.sendall(pid.to_bytes(4, "big"))
        return None

    def _set_by_imports(self) -> dict[str, str]:
        """What imports have put into the environment, as vLLM does for torch: a fork has it too."""
        before = self._environment
        return {name: value for name, value in os.environ.items() if before.get(name) != value}

    def _left(self, ready: selectors.BaseSelector, pid: int) -> None:
        """Who asked was killed: so is what was forked for it."""
        ready.unregister(self._asked[pid])
        self._asked.pop(pid).close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _reap(self, ready: selectors.BaseSelector) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (connection := self._asked.pop(pid, None)) is None:
                continue
            ready.unregister(connection)
            with contextlib.suppress(OSError):
                connection.sendall(status.to_bytes(4, "big"))
            connection.close()


def _take(request: Request, files: Sequence[int], besides: Mapping[str, str]) -> None:
    """Make this fork what was asked for, except for its program."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Above all numbers that are wanted, then to these.
    above = max([*request.files, *files, 2]) + 1
    moved = [_duplicate(file, above) for file in files]
    for file, number in zip(moved, request.files, strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update({**request.environment, **besides})
    with contextlib.suppress(OSError):  # Of another session.
        os.setpgid(0, request.group)
    _draw_other_numbers()
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)


def _duplicate(file: int, above: int) -> int:
    import fcntl

    duplicate = fcntl.fcntl(file, fcntl.F_DUPFD, above)
    os.close(file)
    return duplicate


def _draw_other_numbers() -> None:
    """Python's generator is seeded anew in a fork; numpy's is not."""
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(random.getrandbits(32))


def run(request: Request) -> None:
    """Run the program of a fork, as the main module of this interpreter."""
    kind, name, words = program(request.words)
    if (ray := sys.modules.get("ray._raylet")) is not None:
        # Ray's own configuration was read from the environment of the zygote: once more.
        ray.Config.initialize("")
    if first := request.environment.get(FIRST_VARIABLE):
        module, _, function = first.partition(":")
        getattr(importlib.import_module(module), function)()
    if "-u" in request.words[: len(request.words) - len(words)]:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    if (title := sys.modules.get("setproctitle")) is not None:
        title.getproctitle()  # It finds its memory beside the environment's, which has moved.
    if kind == "-m":
        sys.argv = ["-m", *words]
        sys.path[0] = os.getcwd()
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    sys.argv = [name if kind == "script" else "-c", *words]
    sys.path[0] = str(Path(name).parent) if kind == "script" else ""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if kind == "script":
        main.__file__ = name
        exec(compile(Path(name).read_bytes(), name, "exec"), main.__dict__)
    else:
        exec(compile(name, "<string>", "exec"), main.__dict__)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError("who asked has gone")
        data += piece
    return data


def _import(name: str) -> None:
    importlib.import_module(name)
    gc.freeze()
    if threading.active_count() > 1:
        raise RuntimeError(f"importing {name} starts threads: {threading.enumerate()}")


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Objects that imports create are not garbage, and a page that nobody touches is shared."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def main(argv: Sequence[str] | None = None) -> Request | None:
    """Import and serve. Returns in each fork."""
    environment = dict(os.environ)
    parser = argparse.ArgumentParser(prog="python -m serve_app.launch.zygote")
    parser.add_argument("listening", type=int)
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--then", nargs="*", default=[])
    options: Any = parser.parse_args(argv)
    # Its starter's end is its own.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    with socket.socket(fileno=options.listening) as listening:
        with _no_garbage():
            for name in options.modules:
                _import(name)
        return Zygote(listening, environment, options.then).serve()


if __name__ == "__main__":
    if (_request := main()) is not None:
        run(_request)
