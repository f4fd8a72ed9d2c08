"""eksctl, kubectl and helm: found on PATH, shown while they run, ended with us.

They are told which account and cluster through their own means (AWS_PROFILE, a kubeconfig of a
temporary folder), so that nobody's current context is changed or used by accident.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kuberay.errors import ToolError
from kuberay.target import Target
from serve_app import processes

# The least version of each: eksctl's file format, Kubernetes' skew of one minor version, and a helm
# that knows the charts' schemas.
LEAST: Mapping[str, tuple[int, int]] = {"eksctl": (0, 230), "kubectl": (1, 34), "helm": (3, 16)}
_ASK_VERSION: Mapping[str, tuple[str, ...]] = {
    "eksctl": ("version",),
    "kubectl": ("version", "--client", "--output", "json"),
    "helm": ("version", "--template", "{{.Version}}"),
}
# And where each is had.
WHERE: Mapping[str, str] = {
    "eksctl": "eksctl 0.230 or later (https://eksctl.io/installation)",
    "kubectl": "kubectl 1.34 or later (https://kubernetes.io/docs/tasks/tools)",
    "helm": "helm 3.16 or later (https://helm.sh/docs/intro/install)",
    "aws": "the AWS CLI 2 (https://aws.amazon.com/cli), which kubectl signs in with",
}
# How long a child that was told to end may take.
_END_S = 30


def find(name: str) -> str:
    """The path of a command.

    Raises:
        ToolError: it is not on PATH.
    """
    path = shutil.which(name)
    if path is None:
        raise ToolError(f"{name} is not on PATH: install {WHERE[name]}")
    return path


def version(name: str) -> tuple[int, int]:
    """Major and minor version of a command.

    Raises:
        ToolError: it is not on PATH, or says no version.
    """
    answer = ask([name, *_ASK_VERSION[name]], {})
    if name == "kubectl":
        with contextlib.suppress(ValueError, KeyError):
            answer = json.loads(answer)["clientVersion"]["gitVersion"]
    match = re.search(r"v?(\d+)\.(\d+)", answer)
    if match is None:
        raise ToolError(
            f"`{name} {_ASK_VERSION[name][0]}` says no version: {answer.strip()[:80]!r}"
        )
    return int(match[1]), int(match[2])


def run(argv: Sequence[str], environment: Mapping[str, str], stdin: str | None = None) -> None:
    """Run a command and show what it says, line by line.

    Raises:
        ToolError: it is absent, or failed; with its last line.
    """
    process = subprocess.Popen(
        [find(argv[0]), *argv[1:]],
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    last: deque[str] = deque(maxlen=1)
    with _ended(process):
        if stdin is not None and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(stdin)
            process.stdin.close()
        for line in process.stdout or ():
            print(f"    {line.rstrip()}", file=sys.stderr, flush=True)
            if line.strip():
                last.append(line.strip())
        status = process.wait()
    if status != 0:
        message = last[0] if last else f"status {status}"
        raise ToolError(f"`{' '.join(argv[:3])}` failed: {message}")


def ask(argv: Sequence[str], environment: Mapping[str, str], timeout_s: float = 60) -> str:
    """What a command prints.

    Raises:
        ToolError: it is absent, failed, or did not answer in time.
    """
    try:
        result = subprocess.run(
            [find(argv[0]), *argv[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"`{' '.join(argv[:3])}` did not answer in {timeout_s:.0f} s") from error
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        message = lines[-1].strip() if lines else f"status {result.returncode}"
        raise ToolError(f"`{' '.join(argv[:3])}` failed: {message}")
    return result.stdout


@contextlib.contextmanager
def _ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    """Leave no child behind, however the block ends."""
    try:
        yield
    finally:
        processes.end(process, _END_S)
        if process.stdout is not None:
            process.stdout.close()


class Tools:
    """The three commands, for one cluster."""

    def __init__(self, target: Target, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self._target = target
        self.environment = {
            "KUBECONFIG": str(kubeconfig),
            "AWS_REGION": target.owner.region,
            **({"AWS_PROFILE": target.profile} if target.profile else {}),
        }

    def eksctl(self, *argv: str, stdin: str | None = None) -> None:
        run(["eksctl", *argv], self.environment, stdin)

    def helm(self, *argv: str) -> None:
        run(["helm", *argv], self.environment)

    def kubectl(self, *argv: str, stdin: str | None = None) -> None:
        run(["kubectl", *argv], self.environment, stdin)

    def ask(self, *argv: str, timeout_s: float = 60) -> str:
        return ask(argv, self.environment, timeout_s)

    @contextlib.contextmanager
    def started(self, *argv: str) -> Iterator["subprocess.Popen[str]"]:
        """A command that runs as long as the block, with its output to be read."""
        process = subprocess.Popen(
            [find(argv[0]), *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment},
        )
        with _ended(process):
            yield process

    def items(self, kind: str) -> list[dict[str, Any]]:
        """Every object of a kind, in all namespaces; none where the cluster has no such kind."""
        try:
            answer = self.ask("kubectl", "get", kind, "--all-namespaces", "--output", "json")
        except ToolError as error:
            if "doesn't have a resource type" in str(error) or "no matches for kind" in str(error):
                return []
            raise
        entries: list[dict[str, Any]] = json.loads(answer)["items"]
        return entries

    def connect(self) -> None:
        """Write the kubeconfig, and see that the API server answers.

        Raises:
            ToolError: it does not.
        """
        owner = self._target.owner
        where = ("--region", owner.region, "--kubeconfig", str(self.kubeconfig))
        self.ask("eksctl", "utils", "write-kubeconfig", "--cluster", owner.name, *where)
        self.ask("kubectl", "version", "--request-timeout", "30s")


@contextlib.contextmanager
def tools(target: Target) -> Iterator[Tools]:
    """The commands, with a kubeconfig that lasts as long as the block.

    Raises:
        ToolError: one is not on PATH.
    """
    for name in ("eksctl", "kubectl", "helm"):
        find(name)
    with tempfile.TemporaryDirectory(prefix="qwen-ray-serve-") as folder:
        yield Tools(target, Path(folder) / "kubeconfig")
