"""The folder runpod/ and the SDK of the same name do not get into each other's way."""

import subprocess
import sys

import pytest

from tests.runpod.conftest import FOLDER, SDK
from tests.server import ROOT


def test_the_folder_is_no_package() -> None:
    assert not list(FOLDER.glob("**/__init__.py"))


@pytest.mark.skipif(not SDK, reason="Runpod's SDK is not installed")
@pytest.mark.parametrize("words", [["-c"], ["-m", "timeit", "-n", "1", "-r", "1"]])
def test_in_the_repository_import_runpod_is_the_sdk(words: list[str]) -> None:
    code = "from importlib import util; print(util.find_spec('runpod').origin)"
    command = [sys.executable, *words, code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "site-packages/runpod/__init__.py" in result.stdout


def test_no_name_hides_a_module_of_python() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert not names & sys.stdlib_module_names
