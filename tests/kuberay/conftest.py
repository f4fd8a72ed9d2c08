"""An account and a folder of commands, new for each test."""

import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kuberay import programs
from tests.kuberay.cloud import Cloud

# Without site-packages, which would double the time of a start; only PyYAML is taken from there,
# and last. Bytecode is kept, also where the environment says that none is to be.
_TOOL = """\
#!{python} -SE
import sys
sys.pycache_prefix = {cache!r}
sys.path[:] = [{here!r}, *sys.path[1:], {packages!r}]
import fake_tool
sys.exit(fake_tool.main({tool!r}))
"""


@pytest.fixture(scope="session")
def aws_server() -> Iterator[Cloud]:
    cloud = Cloud()
    yield cloud
    cloud.close()


@pytest.fixture
def cloud(aws_server: Cloud, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """An empty account, which this process and its children take for AWS."""
    aws_server.reset()
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for key, value in aws_server.environment.items():
        monkeypatch.setenv(key, value)
    return aws_server


class Commands:
    """The commands on PATH: what they were called with, what they are to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def calls(self, *words: str) -> list[str]:
        """The calls so far that have these words, each as one line."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        output = [json.loads(line) for line in lines]
        results = [" ".join([call["tool"], *call["argv"]]) for call in output]
        return [line for line in results if set(words) <= set(line.split())]

    def inputs(self, *words: str) -> list[str]:
        """Their standard input."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        output = [json.loads(line) for line in lines]
        return [call["stdin"] for call in output if set(words) <= {call["tool"], *call["argv"]}]

    def objects(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads((self.folder / "objects.json").read_text())
        return body

    def hold(self, **objects: list[dict[str, Any]]) -> None:
        """The cluster's objects by kind; `__` in a name stands for a dot."""
        named = {kind.replace("__", "."): items for kind, items in objects.items()}
        (self.folder / "objects.json").write_text(json.dumps(named))

    def rule(self, *words: str, **what: Any) -> None:
        """Let the calls with these words fail (`says`, `status`, `times`) or `hang`."""
        path = self.folder / "rules.json"
        rules = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*rules, {"words": words, **what}]))


@pytest.fixture
def commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Commands:
    """eksctl, kubectl, helm and aws, first on PATH."""
    folder, programs = tmp_path / "fake", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    for tool in ("eksctl", "kubectl", "helm", "aws"):
        path = programs / tool
        text = _TOOL.format(
            tool=tool,
            python=sys.executable,
            cache=str(tmp_path_factory.getbasetemp() / "bytecode"),
            here=str(Path(__file__).parent),
            packages=sysconfig.get_path("purelib"),
        )
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_TOOLS", str(folder))
    return Commands(folder)


@pytest.fixture
def kustomize(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """The same, with the real kubectl behind `kubectl kustomize`."""
    monkeypatch.setenv("REAL_KUBECTL", str(programs.folder() / "kubectl"))
    return commands
