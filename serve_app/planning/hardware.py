"""What GPUs there are: on this machine, from the driver; in the cluster, from Ray."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20

# Memory (as nvidia-smi reports it) and compute capability by Ray's name of an accelerator, for
# nodes that only Ray can see. Source: NVIDIA's data sheets and nvidia-smi.
ACCELERATORS = {
    "T4": (15360 * MIB, (7, 5)),
    "V100": (16384 * MIB, (7, 0)),
    "A10G": (23028 * MIB, (8, 6)),
    "L4": (23034 * MIB, (8, 9)),
    "L40S": (46068 * MIB, (8, 9)),
    "A100-40G": (40960 * MIB, (8, 0)),
    "A100": (40960 * MIB, (8, 0)),
    "A100-80G": (81920 * MIB, (8, 0)),
    "H100": (81559 * MIB, (9, 0)),
    "H200": (143771 * MIB, (9, 0)),
    "B200": (183359 * MIB, (10, 0)),
}


class HardwareError(RuntimeError):
    """The driver is there and does not answer."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. `free_bytes` equals `memory_bytes` where only Ray has seen it."""

    name: str
    memory_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    driver_version: str = ""


@dataclass(frozen=True)
class Node:
    """One machine that can hold replicas: its GPUs, all of one kind."""

    gpus: tuple[Gpu, ...]


def local_gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible; none without a driver.

    Raises:
        HardwareError: nvidia-smi is there and fails.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    fields = "index,uuid,name,memory.total,memory.free,compute_cap,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HardwareError(f"nvidia-smi does not answer: {error}") from error
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise HardwareError(f"nvidia-smi failed: {lines[0] if lines else result.returncode}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else [w.strip() for w in visible.split(",") if w.strip()]
    gpus = []
    for line in result.stdout.strip().splitlines():
        index, uuid, name, total, free, capability, driver = (w.strip() for w in line.split(","))
        if (
            wanted is None
            or index in wanted
            or any(uuid.startswith(w) for w in wanted if len(w) > 3)
        ):
            major, minor = capability.split(".")
            memory = (int(total) * MIB, int(free) * MIB)
            gpus.append(Gpu(name, *memory, (int(major), int(minor)), driver))
    return tuple(gpus)


def cluster_nodes() -> tuple[Node, ...]:
    """The machines of the Ray cluster that this process belongs to, those with GPUs only.

    Where there is none yet, what SERVE_APP_NODE_GPUS says will come: KubeRay submits the
    application before any GPU node exists, and only a plan with GPUs makes one come.

    Raises:
        HardwareError: the variable is not NAME:COUNT of a known accelerator.
    """
    import ray

    nodes = []
    for node in ray.nodes():
        count = int(node["Resources"].get("GPU", 0)) if node["Alive"] else 0
        if count == 0:
            continue
        nodes.append(Node((_accelerator(node["Resources"]),) * count))
    return tuple(nodes) or _expected(os.environ.get("SERVE_APP_NODE_GPUS", ""))


def _expected(text: str) -> tuple[Node, ...]:
    """The node that is to come, as NAME:COUNT; none where nothing is said."""
    if not text:
        return ()
    name, _, count = text.partition(":")
    if name not in ACCELERATORS or not count.isdigit() or not int(count):
        raise HardwareError(
            f"SERVE_APP_NODE_GPUS = {text!r}: not NAME:COUNT of one of {', '.join(ACCELERATORS)}"
        )
    memory_bytes, capability = ACCELERATORS[name]
    return (Node((Gpu(name, memory_bytes, memory_bytes, capability),) * int(count)),)


def _accelerator(resources: dict[str, float]) -> Gpu:
    prefix = "accelerator_type:"
    names = [key.removeprefix(prefix) for key in resources if key.startswith(prefix)]
    for name in names:
        if name in ACCELERATORS:
            memory_bytes, capability = ACCELERATORS[name]
            return Gpu(name, memory_bytes, memory_bytes, capability)
    # Ray has no name for it: ask the driver, which is right where the GPUs are this machine's.
    if local := local_gpus():
        return local[0]
    raise HardwareError(f"unknown accelerator {names or '(unnamed)'}: set model and sizes by hand")


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself, or may: what is not known is yes."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "bf16" in flags  # avx512_bf16, amx_bf16; on ARM bf16.
