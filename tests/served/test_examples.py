"""Every script of examples/ runs against the served application and prints an answer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import Server

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs(server: Server, script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "BASE_URL": server.url},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_page_lists_every_example() -> None:
    page = (SCRIPTS[0].parent / "README.md").read_text()
    assert [script for script in SCRIPTS if f"({script.name})" not in page] == []
