"""The version is the tag's in a checkout, and the release's elsewhere."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from serve_app import __version__
from serve_app.version import RELEASE, from_description

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("described", "version"),
    [
        ("v1.2.3", "1.2.3"),
        ("v1.2.3-dirty", "1.2.3+dirty"),
        ("v1.2.3-12-g047b457", "1.2.3+12.g047b457"),
        ("v1.2.3rc1-12-g047b457-dirty", "1.2.3rc1+12.g047b457.dirty"),
        ("047b457", f"{RELEASE}+g047b457"),
        ("047b457-dirty", f"{RELEASE}+g047b457.dirty"),
        ("", RELEASE),
        ("what nobody expects", RELEASE),
    ],
)
def test_a_version_states_its_tag_and_its_commit(described: str, version: str) -> None:
    assert from_description(described) == version
    assert str(Version(version)) == version


def shown(folder: Path) -> str:
    """What `python -m serve_app --version` prints in a copy of the package."""
    command = [sys.executable, "-m", "serve_app", "--version"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_copy_shows_its_release_and_a_checkout_shows_its_tag(tmp_path: Path) -> None:
    package = tmp_path / "serve_app"
    package.mkdir()
    for name in ("__init__.py", "__main__.py", "errors.py", "version.py"):
        shutil.copy(ROOT / "serve_app" / name, package)
    assert shown(tmp_path) == f"qwen-ray-serve {RELEASE}"

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@localhost")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init")
    git("add", "serve_app/version.py")
    git("commit", "-m", "first")
    assert shown(tmp_path).startswith(f"qwen-ray-serve {RELEASE}+g")
    git("tag", "v7.0.1")
    assert shown(tmp_path) == "qwen-ray-serve 7.0.1"
    # As in an environment that lies within the repository of somebody else.
    inner = tmp_path / "elsewhere"
    shutil.copytree(package, inner / "serve_app")
    assert shown(inner) == f"qwen-ray-serve {RELEASE}"


def test_the_package_has_the_version_of_its_release() -> None:
    assert __version__ == RELEASE
