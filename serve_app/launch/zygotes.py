"""The two zygotes of `make serve`: one for Ray's processes, one for replicas and their engines."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError
from serve_app.launch import orphans
from serve_app.launch.zygote import COMMAND, FIRST_VARIABLE, SOCKET_VARIABLE
from serve_app.planning import kernels
from serve_app.planning.hardware import HardwareError, local_gpus
from serve_app.planning.plan import cpu_threads, environment
from serve_app.settings import Settings

# 1: `make serve` has zygotes.
SWITCH_VARIABLE = "SERVE_APP_ZYGOTES"
# Where the driver finds the zygote of engines.
ENGINE_SOCKET_VARIABLE = "SERVE_APP_ENGINE_ZYGOTE"
# What the driver of `serve run` imports, then what its workers do: Serve's controller and proxies.
_RAY_MODULES = ("ray.serve.scripts", "serve_app.launch.zygote")
_WORKER_MODULES = ("ray.serve._private.controller", "ray.serve._private.haproxy", "serve_app.app")
_ENGINE_MODULES = ("serve_app.replica.prepared",)
# Called in a fork before it has a thread.
_FIRST = "serve_app.replica.forkserver:start_forked"


@contextlib.contextmanager
def running(environ: Mapping[str, str], settings: Settings) -> Iterator[dict[str, str]]:
    """Start both, and end them. Yields what the environment of `serve run` needs besides.

    Args:
        environ: the environment of `serve run`. There are none unless it says so.
    """
    if environ.get(SWITCH_VARIABLE) != "1":
        yield {}
        return
    folder = Path(tempfile.mkdtemp(prefix="serve_app.zygotes."))
    ray, engine = folder / "ray", folder / "engine"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with open(folder / "log", "wb") as log:
            processes.append(
                _start(engine, _ENGINE_MODULES, (), engine_environment(environ, settings), log)
            )
            processes.append(_start(ray, _RAY_MODULES, _WORKER_MODULES, environ, log))
        yield {
            SOCKET_VARIABLE: str(ray),
            ENGINE_SOCKET_VARIABLE: str(engine),
            "SERVE_APP_PYTHON": sys.executable,
            # A node's agents end where the raylet is not their parent, unless they hold a pipe.
            "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
        }
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
            orphans.own.discard(process.pid)
        shutil.rmtree(folder, ignore_errors=True)


def engine_environment(environ: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """The environment of a replica of these settings on this machine, as far as it is known."""
    try:
        threads = None if local_gpus() else cpu_threads(settings)
    except (HardwareError, ConfigError):
        threads = None
    return _with_engine(environ, threads, settings)


def _with_engine(
    environ: Mapping[str, str], threads: int | None, settings: Settings
) -> dict[str, str]:
    found = {**environ, **environment(threads)}
    if threads is None:
        kernels.settle(found)
        # What Ray sets for a worker that has reserved so many, once it runs.
        found.setdefault("OMP_NUM_THREADS", str(max(1, int(settings.cpus_per_replica))))
    return found


def runtime_env(threads: int | None, settings: Settings) -> dict[str, Any]:
    """Ray's `runtime_env` of a replica that is forked from the zygote of engines.

    Empty where this machine has none.
    """
    socket_path = os.environ.get(ENGINE_SOCKET_VARIABLE)
    if not socket_path:
        return {}
    needed = _with_engine(os.environ, threads, settings)
    changed = {name: value for name, value in needed.items() if os.environ.get(name) != value}
    return {
        "py_executable": str(COMMAND),
        "env_vars": {**changed, SOCKET_VARIABLE: socket_path, FIRST_VARIABLE: _FIRST},
    }


def _start(
    path: Path,
    modules: Sequence[str],
    then: Sequence[str],
    environ: Mapping[str, str],
    log: Any,
) -> "subprocess.Popen[bytes]":
    """A zygote on a socket that is there from now on."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(64)
        words = [sys.executable, "-m", "serve_app.launch.zygote", str(listening.fileno())]
        process = subprocess.Popen(
            [*words, *modules, *(["--then", *then] if then else [])],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listening.fileno()],
            process_group=0,
        )
    orphans.own.add(process.pid)
    return process
