"""Starts the template, from which the replicas of this machine are forked, and ends it.

It is there only where `python -m serve_app serve` starts Ray; elsewhere each replica imports.
"""

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
from serve_app.replica import worker
from serve_app.settings import Settings

# For the launcher: 1 to have a template. Ray's processes find its name there.
NAME_VARIABLE = worker.NAME_VARIABLE
_PREFIX = "serve-app-template-"
_END_S = 5.0


def wanted(application: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether replicas of this application are to come from a template of this process.

    Not if they run in a cluster that others started, or with packages of their own.
    """
    ours = "RAY_ADDRESS" not in environ and not application.get("runtime_env")
    return ours and environ.get(NAME_VARIABLE) == "1"


def runtime_env(plan: Plan, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Ray's `runtime_env` of a replica: where there is a template, its process comes from there.

    Args:
        environ: of the process that builds the application, which Ray started.
    """
    # The workers of an engine on several nodes would inherit it.
    name = environ.get(NAME_VARIABLE, "")
    if not name.startswith(_PREFIX) or plan.placement.executor is not None:
        return {}
    command = [sys.executable, "-I", "-S", worker.__file__]
    return {"py_executable": shlex.join(command), "env_vars": plan.environment}


def variables(settings: Settings) -> dict[str, str]:
    """What the libraries of a replica on this machine read when they are imported."""
    return environment(None if shutil.which("nvidia-smi") else cpu_threads(settings))


class Template:
    """The process, from its start to `end`.

    Args:
        environ: of Ray's processes; the template adds its name.
        command: of the template, without its name.

    Attributes:
        environ: in which Ray finds it.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        settings: Settings,
        command: Sequence[str] = (sys.executable, "-m", "serve_app.replica.template"),
    ) -> None:
        name = _PREFIX + secrets.token_hex(8)
        self.environ = {**environ, NAME_VARIABLE: name}
        self.process = subprocess.Popen(
            [*command, name],
            env={**self.environ, **variables(settings), **worker.ray_environment(os.getpid())},
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
