"""Whether a model fits the GPUs and the disk that are asked for, before anything bills.

Needs Python alone: the sizes are those that the server reckons with (serve_app/planning/sizing.py).
What is not known is not refused: a model whose config.json cannot be had, or one that variables
make smaller than its files say.
"""

import json
import os
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from deployment import Deployment, Refused

sys.path.append(str(Path(__file__).resolve().parent.parent))

from serve_app.errors import ConfigError
from serve_app.planning import sizing
from serve_app.planning.hardware import Gpu
from serve_app.planning.sizing import GIB, QWEN25, EngineMemory, ModelShape

_HUB = "https://huggingface.co"
_HUB_S = 10.0
# What a driver says of a card that is sold as so many GB, in MiB: of several, the least.
MIB = {16: 16376, 24: 23034, 48: 46068, 80: 81559, 141: 143771}
# Of a size that is not listed. The server asks the driver, and is right in any case.
_SOLD_MIB = 954
# Engine arguments that change what a GPU must hold.
_SIZING = (
    *("max_model_len", "gpu_memory_utilization", "kv_cache_memory_bytes", "kv_cache_dtype"),
    *("cpu_offload_gb", "dtype", "quantization", "hf_overrides", "speculative_config"),
)
# Variables that only the server reads.
_UNKNOWING = ("SERVE_ARGS", "VLLM_EXTRA_ARGS", "VLLM_CONFIG_FILE")
# Beside the weights: logs, compiled kernels, tokenizers.
_OTHER_BYTES = 2 * 10**9


def require(wanted: Deployment, gpus: Sequence[Mapping[str, Any]]) -> str:
    """Refuse what does not fit any one of these types of GPU, or the disk. Returns what was found.

    Raises:
        Refused: says what is needed and found, and the word that mends it.
    """
    env = wanted.environment()
    model = env.get("MODEL_NAME", "").strip()
    if not model:
        return "the model: as large as the GPU of a worker holds"
    shape = shape_of(model, env)
    if shape is None:
        return f"{model}: whether it fits is not known"
    fixed = not any(env.get(name, "").strip() for name in _UNKNOWING)
    for gpu in gpus if fixed else ():
        _require_memory(wanted, model, shape, gpu, env)
    _require_disk(wanted, model, shape)
    size = f"{model}: {shape.weights_bytes / GIB:.1f} GiB of weights"
    return size if fixed else f"{size}; whether they fit the GPUs is for the server to say"


def shape_of(model: str, env: Mapping[str, str]) -> ModelShape | None:
    """The model's dimensions: of a Qwen2.5 known, of others from the hub's config.json."""
    if model in QWEN25:
        return QWEN25[model]
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        return None
    hub = (env.get("HF_ENDPOINT") or os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/")
    revision = env.get("MODEL_REVISION") or "main"
    request = urllib.request.Request(f"{hub}/{model}/resolve/{revision}/config.json")
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_S) as response:
            return ModelShape.from_config(json.load(response))
    except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError):
        return None


def _require_memory(
    wanted: Deployment,
    model: str,
    shape: ModelShape,
    gpu: Mapping[str, Any],
    env: Mapping[str, str],
) -> None:
    memory = MIB.get(gpu["memory"], gpu["memory"] * _SOLD_MIB) * 2**20
    cards = (Gpu(str(gpu["name"]), memory, memory, (9, 0)),) * wanted.gpu_count
    mend = "a larger --gpu, or a higher --gpu-count"
    engine = {name: env[name.upper()].strip() for name in _SIZING if env.get(name.upper())}
    try:
        budget = EngineMemory.of(engine)
        served = shape.served(engine)
        tp, pp = _count(env, "TENSOR_PARALLEL_SIZE"), _count(env, "PIPELINE_PARALLEL_SIZE") or 1
        if served is None:
            return
        if tp is None:
            sizing.choose_tensor_parallel_size(model, served, cards, budget, pp)
            return
    except ConfigError as error:
        raise Refused(f"{error}. Mend: {mend}") from None
    except ValueError as error:
        raise Refused(f"--env: {error}") from None
    needed, usable = (
        sizing.needed_bytes(served, budget, tp, pp),
        sizing.usable_bytes(cards, budget) or 0,
    )
    least = sizing.needed_bytes(served, budget, tp, pp, sizing.MIN_OVERHEAD_BYTES)
    if tp * pp > wanted.gpu_count or least > usable:
        raise Refused(
            f"{model} with TENSOR_PARALLEL_SIZE={tp} needs {needed / GIB:.1f} GiB on each of "
            f"{tp * pp} GPUs; there are {wanted.gpu_count} x {gpu['name']} with "
            f"{usable / GIB:.1f} GiB to use. Mend: {mend}"
        )


def _count(env: Mapping[str, str], name: str) -> int | None:
    return int(env.get(name, "").strip() or 0) or None


def _require_disk(wanted: Deployment, model: str, shape: ModelShape) -> None:
    word, given = ("--volume-gb", wanted.volume_gb)
    if not wanted.volume_gb:
        word, given = "--disk-gb", wanted.disk_gb
    needed = -(-(shape.weights_bytes + _OTHER_BYTES) // 10**9)
    if needed > given:
        raise Refused(
            f"{model} is {shape.weights_bytes / 1e9:.0f} GB, and {word} {given} holds less: "
            f"{word} {needed}"
        )
