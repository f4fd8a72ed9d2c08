"""The process that an engine's processes are forked from.

Importing vllm takes longer than all the rest of a start, and both a replica and its engine need
it. `vllm serve` imports once and forks. A Ray worker must not be forked, since its gRPC threads
would be missing in the child, so vLLM spawns there and imports again, afterwards. A replica that
comes from the template (template.py) forks this server before Ray has any threads in it. Elsewhere
the server imports at the same time as the replica, on another core.
"""

import contextlib
import gc
import multiprocessing.forkserver as stdlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import TypeVar

import cloudpickle
import psutil
import setproctitle

from serve_app.replica import startup

T = TypeVar("T")


def start() -> None:
    """Start the server, which then imports preload.py by itself; returns at once."""
    stdlib.set_forkserver_preload(["serve_app.replica.preload"])
    stdlib.ensure_running()


def fork() -> None:
    """Make a fork of this process the server, so that nothing is imported again.

    Only while this process has one thread.
    """
    resource_tracker.ensure_running()  # It has a Python of its own.
    spawn = util.spawnv_passfds
    util.spawnv_passfds = _fork_server
    try:
        stdlib.ensure_running()
    finally:
        util.spawnv_passfds = spawn


def _fork_server(path: object, args: object, passfds: Sequence[int]) -> int:
    """In place of a new Python that runs `stdlib.main`. Returns the server's pid."""
    if pid := os.fork():
        return pid
    inherited = {0, 1, 2, *passfds}
    try:
        # Ray has a copy of setproctitle, and only the copy that was used first can set a title.
        # vLLM titles the engine's processes with the other one.
        if (ray := sys.modules.get("ray._raylet")) is not None:
            setproctitle.setproctitle = ray.setproctitle
        setproctitle.setproctitle("serve_app fork server")
        stdlib._forkserver.__init__()  # type: ignore[misc]  # Its lock is taken.
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor not in inherited:
                with contextlib.suppress(OSError):  # The one of this listing.
                    os.close(descriptor)
        listener, alive = passfds
        stdlib.main(listener, alive, preload=[])
    finally:
        os._exit(1)


def change_environment(environment: Mapping[str, str]) -> None:
    """Give this process another environment, after its imports."""
    # setproctitle finds the title's memory beside the environment's, which moves with a change.
    setproctitle.getproctitle()
    os.environ.clear()
    os.environ.update(environment)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Import vllm inside this block: objects it creates are frozen, so the garbage collector never
    scans them.

    A million objects are made, and the collector would go through them again and again, which takes
    a sixth of the import. Afterwards it never looks at them, also for the sake of those that are
    forked: a page that nobody touches is shared.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def children() -> list[psutil.Process]:
    """The processes that it forked, and theirs."""
    try:
        server = psutil.Process(stdlib._forkserver._forkserver_pid)  # type: ignore[attr-defined]
        return server.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def stop() -> None:
    """End the server; those that it forked are not touched."""
    # Without this it ends with its parent, which a test or an orderly stop cannot wait for.
    stdlib._forkserver._stop()  # type: ignore[attr-defined]


class _Process(ForkServerProcess):
    """A process with the environment of its creator, as a spawned one has.

    A fork server's children have its own environment, which is older. The engine's workers are
    forked in turn: what vLLM sets for a parent with threads of its own does not hold here.
    """

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        change_environment(
            {**os.environ, **self._environment, "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
        )
        _set_threads()
        startup.record()
        super().run()


def call(function: Callable[[], T]) -> T:
    """What the function returns in a process of its own, which has imported everything.

    Raises:
        RuntimeError: the function raised, or its process ended without an answer.
    """
    receiver, sender = Context().Pipe(duplex=False)
    process = _Process(target=_call, args=(cloudpickle.dumps(function), sender))
    process.start()
    sender.close()
    try:
        returned, value = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with status {process.exitcode}") from None
    finally:
        receiver.close()
    process.join()
    if not returned:
        raise RuntimeError(value)
    return value  # type: ignore[no-any-return]


def _call(function: bytes, sender: Connection) -> None:
    try:
        sender.send((True, cloudpickle.loads(function)()))
    except Exception:
        sender.send((False, traceback.format_exc()))


def _set_threads() -> None:
    """Have torch use OMP_NUM_THREADS, which a template's OpenMP read before Ray set it."""
    threads, torch = os.environ.get("OMP_NUM_THREADS", ""), sys.modules.get("torch")
    if torch is not None and threads.isdecimal() and torch.get_num_threads() != int(threads):
        torch.set_num_threads(int(threads))


class Context(ForkServerContext):
    """What `multiprocessing.get_context("forkserver")` returns, with these processes."""

    Process = _Process
