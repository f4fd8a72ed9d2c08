"""The folder runpod/ and the SDK of the same name do not get into each other's way."""

import subprocess
import sys

import pytest

from tests.runpod.conftest import FOLDER
from tests.server import ROOT


def test_the_folder_is_no_package() -> None:
    assert not list(FOLDER.glob("**/__init__.py"))


@pytest.mark.parametrize("words", [["-c"], ["-m", "timeit", "-n", "1", "-r", "1"]])
def test_in_the_repository_import_runpod_is_the_sdk(words: list[str]) -> None:
    pytest.importorskip("runpod.serverless", reason="Runpod's SDK is not installed")
    code = "import runpod; print(runpod.__file__, runpod.serverless.start)"
    command = [sys.executable, *words, code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "site-packages" in result.stdout


def test_no_name_hides_a_module_of_python() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert not names & sys.stdlib_module_names
