"""The process that an engine's processes are forked from.

Importing vllm takes longer than all the rest of a start, and both a replica and its engine need
it. `vllm serve` imports once and forks. A Ray worker must not be forked, since its gRPC threads
would be missing in the child, so vLLM spawns there and imports again, afterwards. The fork server
imports at the same time as the replica, on another core, and an engine then starts at once.
"""

import contextlib
import gc
import multiprocessing.forkserver as stdlib
import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess

import psutil
import setproctitle

from serve_app.replica import startup


def start() -> None:
    """Start the server, which then imports preload.py by itself; returns at once."""
    stdlib.set_forkserver_preload(["serve_app.replica.preload"])
    stdlib.ensure_running()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Import vllm within this: what that makes stays, and nobody looks for garbage among it.

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
        # It finds the title's memory beside the environment's, which moves when that is changed.
        setproctitle.getproctitle()
        os.environ.update(self._environment | {"VLLM_WORKER_MULTIPROC_METHOD": "fork"})
        startup.record()
        super().run()


class Context(ForkServerContext):
    """What `multiprocessing.get_context("forkserver")` returns, with these processes."""

    Process = _Process
