"""The Ray head, started for real: its bounds, who can reach it, and that nothing of it stays."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from bench.engine.systems import apart
from tests.runpod.conftest import FOLDER
from tests.server import ROOT, wait

PORT = 8878
# A process of its own, as start.py is: a head is a child, and what is left of it is seen there.
CODE = """
import os, sys
sys.path.insert(0, {folder!r})
from serve_app.launch import orphans
from serve_app.settings import Settings
import head
orphans.adopt()
running = head.Head(head.environment(Settings()), lambda: False)
print("up", running.address, running.log_folder, flush=True)
sys.stdin.readline()
running.stop()
print("left", [p.name() for p in orphans.wait(10)], flush=True)
"""


@dataclass
class Running:
    process: "subprocess.Popen[str]"
    log_folder: Path

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE.format(folder=str(FOLDER))],
        cwd=ROOT,
        env=inherited | apart(PORT) | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("up "):
                break
        else:
            pytest.fail("the head did not start")
        yield Running(process, Path(line.split()[2]))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def test_its_object_store_is_bounded(running: Running) -> None:
    words = [word for p in running.family() if p.name() == "raylet" for word in p.cmdline()]
    (bytes_,) = [re.sub(r"\D", "", w) for w in words if w.startswith("--object_store_memory=")]
    assert 80 * 2**20 <= int(bytes_) <= 512 * 2**20


def test_the_dashboard_listens_on_loopback_alone(running: Running) -> None:
    """Its own port; Ray's metrics have others."""

    def listening() -> set[str]:
        for process in running.family():
            words = process.cmdline()
            if any(word.endswith("dashboard/dashboard.py") for word in words):
                (port,) = [word[len("--port=") :] for word in words if word.startswith("--port=")]
                return {
                    c.laddr.ip
                    for c in process.net_connections()
                    if c.status == "LISTEN" and c.laddr.port == int(port)
                }
        return set()

    assert wait(lambda: bool(listening()), 30)
    assert listening() == {"127.0.0.1"}


def test_whoever_reaches_it_needs_its_token(running: Running) -> None:
    (raylet,) = [p for p in running.family() if p.name() == "raylet"]
    environ = raylet.environ()
    assert environ["RAY_AUTH_MODE"] == "token"
    assert len(environ["RAY_AUTH_TOKEN"]) == 64


def test_its_logs_are_where_it_says(running: Running) -> None:
    assert (running.log_folder / "raylet.out").is_file()


def test_nothing_of_it_is_left(running: Running) -> None:
    family = running.family()
    assert len(family) > 3
    output, _ = running.process.communicate("\n", timeout=90)
    assert "left []" in output
    assert not [process for process in family if process.is_running()]
