"""The available GPUs: of this machine, from the driver; of the cluster, from Ray."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
# Names that say too little about the memory: of 40 GB and of 80 GB alike.
_AMBIGUOUS = frozenset({"A100"})
# How long the driver of another node may take to answer, the start of a Ray worker there included.
_NODE_ANSWER_S = 60.0
# "  MIG 1g.10gb     Device  0: (UUID: MIG-c7384736-...)", with the memory in GB.
_MIG = re.compile(r"^\s+MIG \S*?(\d+)gb\S*\s.*\(UUID: (MIG-[^)]+)\)", re.MULTILINE)


class HardwareError(RuntimeError):
    """The driver does not answer, or a requested GPU does not exist."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG slice of one.

    Attributes:
        memory_bytes, free_bytes: None where the driver does not report them, as for memory that
            is shared with the CPU. They are equal where only Ray has seen the GPU.
        compute_capability: None where the driver does not report it.
    """

    name: str
    memory_bytes: int | None
    free_bytes: int | None
    compute_capability: tuple[int, int] | None
    driver_version: str = ""


@dataclass(frozen=True)
class Node:
    """One machine that can hold replicas: its GPUs, all of one kind.

    Attributes:
        kind: Ray's name of them; empty where Ray has none.
    """

    gpus: tuple[Gpu, ...]
    kind: str = ""


def local_gpus(visible: str | None = None) -> tuple[Gpu, ...]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible; none without a driver.

    Args:
        visible: in place of that variable; "all" for all of them.

    Raises:
        HardwareError: nvidia-smi is there and fails, or has no device that is named by its UUID.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    if visible is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    wanted = None if visible == "all" else [w.strip() for w in visible.split(",") if w.strip()]
    fields = "index,uuid,name,memory.total,memory.free,compute_cap,driver_version"
    listing = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    # A worn board makes it print a warning among its answers.
    lines = [line for line in listing.splitlines() if line.strip()]
    devices = [_device(line) for line in lines if not line.upper().startswith("WARNING")]
    slices = _slices(devices)
    if wanted is None:
        # CUDA sees the slices of a GPU that is divided, and not the GPU.
        return tuple(gpu for _, gpu in slices) or tuple(gpu for _, _, gpu in devices)
    gpus: list[Gpu] = []
    for word in wanted:
        if word.startswith("MIG-"):
            chosen = [gpu for uuid, gpu in slices if uuid.startswith(word)]
        else:
            chosen = [
                gpu
                for index, uuid, gpu in devices
                if word == index or (len(word) > 3 and uuid.startswith(word))
            ]
        if not chosen and word.startswith(("MIG-", "GPU-")):
            raise HardwareError(f"CUDA_VISIBLE_DEVICES = {word!r}: nvidia-smi has no such device")
        gpus += chosen
    return tuple(gpus)


def _nvidia_smi(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HardwareError(f"nvidia-smi does not answer: {error}") from error
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise HardwareError(f"nvidia-smi failed: {lines[0] if lines else result.returncode}")
    return result.stdout


def _device(line: str) -> tuple[str, str, Gpu]:
    """Index, UUID and GPU of one line. A value in brackets, such as [N/A], is unknown."""
    words = [word.strip() for word in line.split(",")]
    if len(words) < 7:
        raise HardwareError(f"nvidia-smi printed a line that cannot be parsed: {line!r}")
    index, uuid, *names, total, free, capability, driver = words
    name = ", ".join(names)
    major, _, minor = capability.partition(".")
    version = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    return index, uuid, Gpu(name, _mib(total), _mib(free), version, driver)


def _mib(text: str) -> int | None:
    return int(text) * MIB if text.isdigit() else None


def _slices(devices: Sequence[tuple[str, str, Gpu]]) -> list[tuple[str, Gpu]]:
    """UUID and GPU of each MIG slice. The query above knows only whole GPUs."""
    slices: list[tuple[str, Gpu]] = []
    whole: Gpu | None = None
    try:
        listing = _nvidia_smi("-L")
    except HardwareError:
        return []  # The driver answered before: one that lists nothing else has no slices.
    for line in listing.splitlines():
        for _, uuid, gpu in devices:
            if uuid in line:
                whole = gpu
        if (match := _MIG.match(line)) and whole is not None:
            size = int(match[1]) * 10**9
            name = f"{whole.name} MIG {match[1]}gb"
            part = replace(whole, name=name, memory_bytes=size, free_bytes=size)
            slices.append((match[2], part))
    return slices


def cluster_nodes() -> tuple[Node, ...]:
    """The machines of the Ray cluster that this process belongs to, those with GPUs only.

    Where there is none yet, what SERVE_APP_NODE_GPUS says will come: KubeRay submits the
    application before any GPU node exists, and only a plan with GPUs makes one come.

    Raises:
        HardwareError: the variable is not NAME:COUNT of a known accelerator, or no driver
            describes GPUs that Ray has no name for.
    """
    import ray

    nodes = []
    for node in ray.nodes():
        count = int(node["Resources"].get("GPU", 0)) if node["Alive"] else 0
        if count:
            nodes.append(_node(node, count))
    return tuple(nodes) or _expected(os.environ.get("SERVE_APP_NODE_GPUS", ""))


def _expected(text: str) -> tuple[Node, ...]:
    """The expected node, given as NAME:COUNT; none without it."""
    if not text:
        return ()
    name, _, count = text.partition(":")
    if name not in ACCELERATORS or not count.isdigit() or not int(count):
        raise HardwareError(
            f"SERVE_APP_NODE_GPUS = {text!r}: not NAME:COUNT of one of {', '.join(ACCELERATORS)}"
        )
    return (Node((_named(name),) * int(count), name),)


def _named(name: str) -> Gpu:
    memory_bytes, capability = ACCELERATORS[name]
    stated_bytes = None if name in _AMBIGUOUS else memory_bytes
    return Gpu(name, stated_bytes, stated_bytes, capability)


def _node(node: dict[str, Any], count: int) -> Node:
    """What one node of Ray holds: what its driver reports, else what Ray's name of it means."""
    prefix = "accelerator_type:"
    names = [key.removeprefix(prefix) for key in node["Resources"] if key.startswith(prefix)]
    kind = names[0] if names else ""
    if reported := _reported(node["NodeID"]):
        # Ray may offer fewer GPUs than there are, or more, where they are shared.
        return Node((reported * count)[:count], kind)
    if kind in ACCELERATORS:
        return Node((_named(kind),) * count, kind)
    raise HardwareError(f"unknown accelerator {kind or '(unnamed)'}: set model and sizes by hand")


def _reported(node_id: str) -> tuple[Gpu, ...]:
    """The GPUs that the driver of a node reports; none where it cannot be asked in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if ray.get_runtime_context().get_node_id() == node_id:
        return local_gpus("all")
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    ask = ray.remote(local_gpus).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)
    try:
        gpus: tuple[Gpu, ...] = ray.get(ask.remote("all"), timeout=_NODE_ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError):
        return ()  # Ray's name of the accelerator has to do.
    return gpus


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself, or may: what is not known is yes."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "bf16" in flags  # avx512_bf16, amx_bf16; on ARM bf16.
