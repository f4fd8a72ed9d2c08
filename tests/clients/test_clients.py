"""`make test-clients`: what users' libraries find here, beside what they find at a bare vLLM.

Each library has an environment of its own and runs one program of checks against both servers,
which serve the same model with the same engine arguments. A check that fails only here fails.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.engine import systems
from tests.clients.environments import CLIENTS, Client

pytestmark = pytest.mark.slow

ENGINE = {
    **systems.ENGINE,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "max_num_seqs": 32,
}


@pytest.fixture(scope="module")
def ours(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _serving("ours", 8770, smollm, tmp_path_factory)


@pytest.fixture(scope="module")
def bare(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _serving("bare", 8775, smollm, tmp_path_factory)


def _serving(name: str, port: int, model: Path, folders: pytest.TempPathFactory) -> Iterator[str]:
    folder = folders.mktemp(name)
    with systems.running(name, ENGINE, str(model), port, folder) as system:
        systems.wait(system)
        yield f"http://127.0.0.1:{port}"


def results(client: Client, url: str) -> dict[str, str | None]:
    """By check: its error, or None where it passed."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "SERVER_URL": url,
        "SERVER_MODEL": systems.NAME,
        "NO_PROXY": "127.0.0.1",
    }
    ran = subprocess.run(
        client.command(), env=environment, capture_output=True, text=True, timeout=900
    )
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"check"')]
    assert lines, ran.stdout + ran.stderr
    return {line["check"]: line["error"] for line in lines}


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: Path(client.program).stem)
def test_a_client_finds_here_what_it_finds_at_a_bare_vllm(
    client: Client, ours: str, bare: str
) -> None:
    if client.program.endswith(".mjs") and shutil.which("npm") is None:
        pytest.skip("no Node.js here")
    here, there = results(client, ours), results(client, bare)
    failing = {check: error for check, error in here.items() if error is not None}
    only_here = {check: error for check, error in failing.items() if there.get(check) is None}
    passing = len(here) - len(failing)
    print(f"{client.program}: {passing} of {len(here)} pass here, only here fail {only_here}")
    assert not only_here
    assert here.keys() == there.keys()
    assert passing > len(here) / 2, failing
