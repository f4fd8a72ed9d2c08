"""constraints-gpu.txt resolves, to exactly its pins, for every Python that installs it."""

import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.server import ROOT

UV = Path(sysconfig.get_paths()["scripts"]) / "uv"
CONSTRAINTS = ROOT / "constraints-gpu.txt"
# The extras that `make serve` installs on a GPU machine; the image takes some of them.
EXTRAS = ("gpu", "bench", "eks", "dev")
PYTHONS = ("3.11", "3.12")


def pins(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def resolve(version: str, constraints: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    """What the resolver finds on Linux with this Python; only metadata is fetched."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    build = folder / "build.in"
    build.write_text("\n".join(project["build-system"]["requires"]))
    command = [
        *(str(UV), "pip", "compile", str(ROOT / "pyproject.toml"), str(build)),
        *(word for extra in EXTRAS for word in ("--extra", extra)),
        *("--constraint", str(constraints), "--python-version", version),
        *("--python-platform", "x86_64-manylinux_2_28"),
        *("--no-header", "--no-annotate", "--quiet"),
    ]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode and "No solution found" not in result.stderr:
        pytest.skip(f"the package index cannot be asked: {result.stderr.strip()[-300:]}")
    return result


@pytest.mark.parametrize("version", PYTHONS)
def test_the_gpu_constraints_resolve(version: str, tmp_path: Path) -> None:
    result = resolve(version, CONSTRAINTS, tmp_path)
    assert result.returncode == 0, result.stderr
    # Nothing is left to the day of the installation.
    assert sorted(pins(result.stdout)) == sorted(pins(CONSTRAINTS.read_text()))


def test_a_pin_that_one_python_refuses_is_noticed(tmp_path: Path) -> None:
    """What broke the image once: vLLM allows no such setuptools on Python 3.12."""
    broken = tmp_path / "constraints.txt"
    lines = pins(CONSTRAINTS.read_text())
    remaining = [line for line in lines if not line.startswith("setuptools==")]
    broken.write_text("\n".join([*remaining, "setuptools==84.2.1"]))
    result = resolve("3.12", broken, tmp_path)
    assert result.returncode != 0
    assert "setuptools" in result.stderr


def test_both_environments_have_the_same_checkers() -> None:
    """Format and types are judged alike on a machine with a GPU and on one without."""
    cpu = set(pins((ROOT / "constraints-cpu.txt").read_text()))
    gpu = set(pins(CONSTRAINTS.read_text()))
    for name in ("mypy", "ruff", "pytest", "uv"):
        (pin,) = [line for line in cpu if line.startswith(f"{name}==")]
        assert pin in gpu
