"""The process that an engine's processes are forked from.

Importing vllm takes longer than all the rest of a start, and both a replica and its engine need
it. `vllm serve` imports once and forks. A Ray worker must not be forked, since its gRPC threads
would be missing in the child, so vLLM spawns there and imports again, afterwards. The fork server
imports at the same time as the replica, on another core, and an engine then starts at once.
"""

import multiprocessing.forkserver as stdlib
import os
from multiprocessing.context import ForkServerContext, ForkServerProcess

import setproctitle

# What an engine process imports. Names, so that nothing is imported here. Ray is what the main
# module of a Ray worker imports, which a child of it does again.
_PRELOAD = ["ray", "vllm.v1.engine.async_llm", "vllm.v1.worker.gpu_worker"]


def start() -> None:
    """Start the server, which then imports by itself; returns at once."""
    stdlib.set_forkserver_preload(_PRELOAD)
    stdlib.ensure_running()


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
        super().run()


class Context(ForkServerContext):
    """What `multiprocessing.get_context("forkserver")` returns, with these processes."""

    Process = _Process
