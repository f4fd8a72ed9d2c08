"""The image: its steps, run on this machine, and the Dockerfile that calls them."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.server import ROOT

STEPS = ROOT / "runpod" / "install.sh"
DOCKERFILE = ROOT / "runpod" / "Dockerfile"


def copied() -> list[str]:
    """What the Dockerfile copies of the repository, as it names it."""
    lines = re.findall(r"^COPY (.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    return sorted({word for line in lines for word in line.split()[:-1]})


def copy_to(root: Path) -> None:
    """Copy what the Dockerfile copies."""
    for name in copied():
        source, target = ROOT / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
            shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is in the image: the Dockerfile's files, and the packages of this environment."""
    root = tmp_path_factory.mktemp("image") / "app"
    copy_to(root)
    venv = root.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    # The step before it fetches several GB. These packages, which that step pins, stand for them.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    packages = Path(sysconfig.get_paths()["scripts"])
    for command in ("ray", "serve"):
        script = (packages / command).read_text()
        (venv / "bin" / command).write_text(
            script.replace(script.splitlines()[0], f"#!{venv}/bin/python")
        )
        (venv / "bin" / command).chmod(0o755)
    return root


def run(application: Path, *steps: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    prefix = application.parent
    own = {"PATH": "/usr/bin:/bin", "PREFIX": str(prefix), "LINKS": str(prefix / "bin")}
    return subprocess.run(
        [str(application / "runpod" / "install.sh"), *steps],
        env=own | environ,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_the_application_is_installed_and_checked(application: Path) -> None:
    pytest.importorskip("runpod.serverless", reason="Runpod's SDK is not installed")
    result = run(application, "application", "check")
    assert result.returncode == 0, result.stdout
    assert "BAD" not in result.stdout
    assert "Runpod SDK" in result.stdout
    links = application.parent / "bin"
    # A login shell has no PATH but its own, and still finds Ray.
    process = subprocess.run(
        ["bash", "-lc", f"PATH={links}:/usr/bin:/bin; ray --version && command -v python serve"],
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "2.60.0" in process.stdout
    # The commands import this copy, and the script beside it kept its mode.
    code = "import serve_app; print(serve_app.__file__)"
    command = [str(links / "python"), "-c", code]
    where = subprocess.run(command, cwd="/", env={}, capture_output=True, text=True, check=True)
    assert Path(where.stdout.strip()).parent == application / "serve_app"
    assert (application / "serve_app" / "launch" / "start_haproxy.sh").stat().st_mode & 0o111


def python_of_the_image() -> str:
    """A Python of the version that the image's base has, on this machine."""
    (version,) = re.findall(r"^FROM \S+-ubuntu(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    wanted = {"24.04": "3.12"}[version]
    # pyenv's own command of that name runs only where that version is chosen.
    paths = [
        shutil.which(f"python{wanted}"),
        *Path.home().glob(f".pyenv/versions/{wanted}.*/bin/python"),
    ]
    for path in filter(None, paths):
        if not subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode:
            return str(path)
    pytest.skip(f"Python {wanted} is not on this machine")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_s_packages_install_with_the_image_s_python(tmp_path: Path) -> None:
    """The steps of the Dockerfile after `system`, as they are: about 9 GB, deleted at the end."""
    root = tmp_path / "app"
    copy_to(root)
    # How this machine reaches its package index; nothing else of it is in the image.
    environ = {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
    environ["PYTHON"] = python_of_the_image()
    try:
        for steps in (["python"], ["application", "check"]):
            result = run(root, *steps, **environ)
            assert result.returncode == 0, result.stdout
        assert "BAD" not in result.stdout
    finally:
        shutil.rmtree(tmp_path)


def test_the_packages_of_the_system_step_exist() -> None:
    """Asked of this machine's distribution, which names them as the image's does."""
    if shutil.which("apt-get") is None:
        pytest.skip("no apt-get on this machine")
    (listed,) = re.findall(r"--no-install-recommends \\\n((?:.+\\\n)*.+)\n", STEPS.read_text())
    names = listed.replace("\\", " ").split()
    # What `python -m serve_app doctor` asks for on a GPU machine.
    assert {"gcc", "g++", "python3-dev"} <= set(names)
    command = ["apt-get", "--simulate", "install", "--no-install-recommends", *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Unable to locate package ca-certificates" in result.stderr:
        pytest.skip("this machine has no package lists")
    assert result.returncode == 0, result.stderr


def test_a_check_fails_where_a_package_is_missing(application: Path) -> None:
    (extra,) = application.parent.glob("venv/lib/python*/site-packages/packages.pth")
    content = extra.read_text()
    extra.write_text("")
    try:
        assert run(application, "check").returncode != 0
    finally:
        extra.write_text(content)


def test_an_unknown_step_is_refused(application: Path) -> None:
    result = run(application, "everything")
    assert result.returncode == 2
    assert "no step everything" in result.stdout


def test_every_step_is_in_the_image_and_no_weights_are() -> None:
    text = DOCKERFILE.read_text()
    steps = re.findall(r"^RUN runpod/install\.sh (.+)$", text, re.MULTILINE)
    assert " ".join(steps).split() == ["system", "python", "application", "check"]
    assert not re.search(r"MODEL|huggingface", text)
    # Only the scripts of a step before the layer that they make, so that it is kept.
    assert text.index("constraints-gpu.txt") < text.index("system python") < text.index("serve_app")


def test_every_package_of_the_project_is_in_the_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # A package is copied with those inside it.
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.rstrip("*") for pattern in patterns}
    assert packages <= set(copied())


def test_what_the_image_needs_is_not_ignored() -> None:
    lines = (ROOT / "runpod" / "Dockerfile.dockerignore").read_text().splitlines()
    remaining = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert {name.split("/")[0] for name in copied()} <= remaining
    assert lines[0] == "*"


def test_the_container_is_not_root() -> None:
    user = re.findall(r"^USER (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)[-1]
    assert int(user) > 0
    assert f"useradd --uid {user} --create-home" in STEPS.read_text()


def test_the_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_paths()["scripts"])
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    result = subprocess.run(
        [hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_shell_script_is_clean() -> None:
    result = subprocess.run(["bash", "-n", str(STEPS)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
