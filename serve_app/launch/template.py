"""Starts the template that replicas of a node are forked from (serve_app/replica/template.py).

`python -m serve_app serve` starts one for its own Ray cluster, and ends it. For clusters that
others start, `python -m serve_app template` runs on each node, beside `ray start`.
"""

import argparse
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app import processes
from serve_app.planning.plan import Plan, cpu_threads, environment
from serve_app.progress import say
from serve_app.replica import worker
from serve_app.settings import Settings

_COMMAND = (sys.executable, "-m", "serve_app.replica.template")
_END_S = 5.0
# Keys of a `runtime_env` that leave a replica its Python and its packages.
_HARMLESS = frozenset(("env_vars", "config", "_ray_commit"))
# Ray starts it in place of Python.
_PYTHON = shlex.join([sys.executable, "-I", "-S", worker.__file__])


def wanted(
    settings: Settings, application: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> bool:
    """Whether the launcher is to start a template.

    Not if replicas run in a cluster that others started, or with packages of their own.
    """
    foreign = bool(application.get("runtime_env")) or "RAY_ADDRESS" in environ
    return settings.template is not False and not foreign


def runtime_env(settings: Settings, plan: Plan, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Ray's `runtime_env` of a replica that is to come from the template of its node.

    Args:
        beside: the application's own `runtime_env`.
    """
    enabled = settings.template
    if enabled == "auto":
        enabled = worker.NAME_VARIABLE in os.environ
    # The workers of an engine on several nodes would inherit it.
    if not enabled or plan.placement.executor is not None:
        return {}
    ours = ("py_executable", _PYTHON)
    if other := sorted(key for key in beside.keys() - _HARMLESS if (key, beside[key]) != ours):
        say(f"warning: replicas use no template, as the runtime_env has {', '.join(other)}")
        return {}
    return _env({**plan.environment, worker.FORK_SERVER_VARIABLE: "1"})


def _env(env_vars: Mapping[str, str]) -> dict[str, Any]:
    return {"py_executable": _PYTHON, "env_vars": dict(env_vars)}


def variables(settings: Settings) -> dict[str, str]:
    """What the libraries of a replica on this node read when they are imported."""
    return environment(None if shutil.which("nvidia-smi") else cpu_threads(settings))


def run(argv: Sequence[str]) -> int:
    """`python -m serve_app template`: be the template of this node, until the last raylet that
    used it ends, or a signal arrives."""
    parser = argparse.ArgumentParser(prog="python -m serve_app template", description=run.__doc__)
    parser.parse_args(argv)
    command = [*_COMMAND, worker.node_name()]
    ours = {**variables(Settings()), **worker.RAY_ENVIRONMENT}
    os.execve(command[0], command, {**os.environ, **ours})


class Template:
    """The launcher's template, from its start to `end`.

    Args:
        environ: of Ray's processes; the template adds its name.
        command: of the template, without its name.

    Attributes:
        environ: in which Ray finds it.
        runtime_env: of Ray Serve's own actors and tasks, which then come from it as well.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        settings: Settings,
        command: Sequence[str] = (*_COMMAND, "--ends-with-stdin"),
    ) -> None:
        name = f"serve-app-template-{secrets.token_hex(8)}"
        self.environ = {**environ, worker.NAME_VARIABLE: name}
        self.runtime_env = _env(variables(settings))
        self.process = subprocess.Popen(
            [*command, name],
            env={**self.environ, **variables(settings), **worker.RAY_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    def end(self) -> None:
        """End it; the workers that it forked are not touched."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        processes.end(self.process, _END_S)
