"""Runpod's environment convention, applied to serve_config.yaml. Pure.

On Runpod an image is configured by environment variables alone: MODEL_NAME names the model, and
any argument of `vllm serve` is set by its name in capitals (MAX_MODEL_LEN=8192). Templates live
longer than versions of vLLM, so a variable that this version does not know is never an error: it
is said by name, with what to use instead, and left out.

Which names are arguments is kept in engine_arguments.txt, because asking vLLM takes ten seconds of
every cold start. A test compares the file with vLLM; `python runpod/overrides.py` writes it anew.
"""

import difflib
import importlib
import json
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from serve_app.errors import ConfigError

_LIST = Path(__file__).with_name("engine_arguments.txt")

# Variables with names of their own, and where they go in `args`. The first word of a pair is a
# key of serve_config.yaml, the second one below it.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "MODEL_NAME": ("model",),
    "SERVED_MODEL_NAME": ("served_model_name",),
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": ("served_model_name",),
    "TENSOR_PARALLEL_SIZE": ("tensor_parallel_size",),
    "PIPELINE_PARALLEL_SIZE": ("pipeline_parallel_size",),
    "REPLICAS": ("replicas",),
    "MODEL_REVISION": ("engine", "revision"),
    "TOKENIZER_NAME": ("engine", "tokenizer"),
    "CUSTOM_CHAT_TEMPLATE": ("engine", "chat_template"),
    "OPENAI_RESPONSE_ROLE": ("engine", "response_role"),
}
# Any other key of `args`, as a YAML or JSON mapping.
ARGS = "SERVE_ARGS"

# Arguments whose names mean something else in an environment.
_RESERVED = frozenset(
    {"HOST", "PORT", "CONFIG", "HELP", "HF_TOKEN", "HEADLESS", "UDS"}
    | {"MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "ROOT_PATH"}
)
# What Runpod's own workers understood, or still do, and this one does not.
_REMOVED: Mapping[str, str] = {
    "API_KEY": "use API_KEYS",
    "BLOCK_MANAGER": "gone from vLLM",
    "DEFAULT_BATCH_SIZE": "tokens travel together only under load (SERVE_ARGS: stream_gap_ms)",
    "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": "see DEFAULT_BATCH_SIZE",
    "DEFAULT_MIN_BATCH_SIZE": "see DEFAULT_BATCH_SIZE",
    "DISABLE_LOG_REQUESTS": "use ENABLE_LOG_REQUESTS=false",
    "DISABLE_LOGGING_REQUEST": "use ENABLE_LOG_REQUESTS=false",
    "DISTRIBUTED_EXECUTOR_BACKEND": "it follows from the parallel sizes",
    "GUIDED_DECODING_BACKEND": "use STRUCTURED_OUTPUTS_CONFIG",
    "LONG_LORA_SCALING_FACTORS": "gone from vLLM",
    "LORA_EXTRA_VOCAB_SIZE": "gone from vLLM",
    "MODEL": "use MODEL_NAME",
    "MAX_CONTEXT_LEN_TO_CAPTURE": "gone from vLLM; see COMPILATION_CONFIG",
    "MAX_SEQ_LEN_TO_CAPTURE": "gone from vLLM; see COMPILATION_CONFIG",
    "NUM_LOOKAHEAD_SLOTS": "use SPECULATIVE_CONFIG",
    "NUM_SPECULATIVE_TOKENS": "use SPECULATIVE_CONFIG",
    "NGRAM_PROMPT_LOOKUP_MAX": "use SPECULATIVE_CONFIG",
    "NGRAM_PROMPT_LOOKUP_MIN": "use SPECULATIVE_CONFIG",
    "PREEMPTION_CHECK_PERIOD": "gone from vLLM",
    "PREEMPTION_CPU_CAPACITY": "gone from vLLM",
    "PREEMPTION_MODE": "gone from vLLM",
    "QUANTIZATION_PARAM_PATH": "gone from vLLM",
    "RAW_OPENAI_OUTPUT": "streams are always OpenAI's events",
    "ROPE_SCALING": "use HF_OVERRIDES",
    "ROPE_THETA": "use HF_OVERRIDES",
    "SCHEDULER_DELAY_FACTOR": "gone from vLLM",
    "SPECULATIVE_MODEL": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_MAX_MODEL_LEN": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_DISABLE_BY_BATCH_SIZE": "use SPECULATIVE_CONFIG",
    "SPEC_DECODING_ACCEPTANCE_METHOD": "use SPECULATIVE_CONFIG",
    "SWAP_SPACE": "use KV_OFFLOADING_SIZE (GiB)",
    "TOKENIZER_POOL_EXTRA_CONFIG": "gone from vLLM",
    "TOKENIZER_POOL_SIZE": "gone from vLLM",
    "TOKENIZER_POOL_TYPE": "gone from vLLM",
    "TYPICAL_ACCEPTANCE_SAMPLER_POSTERIOR_ALPHA": "use SPECULATIVE_CONFIG",
    "TYPICAL_ACCEPTANCE_SAMPLER_POSTERIOR_THRESHOLD": "use SPECULATIVE_CONFIG",
    "USE_V2_BLOCK_MANAGER": "gone from vLLM",
    "VLLM_ATTENTION_BACKEND": "use ATTENTION_BACKEND",
    "VLLM_EXTRA_ARGS": "name each argument in capitals, or use SERVE_ARGS: {engine: {...}}",
    "VLLM_CONFIG_FILE": "use SERVE_ARGS: {engine: {...}}",
    "WORKER_USE_RAY": "it follows from the parallel sizes",
}
# What else is read here, and by start.py, handler.py and the modules beside them.
_OURS = frozenset(
    {ARGS, "API_KEYS", "SERVE_MODE", "SERVE_CONFIG", "BASE_PATH", "MAX_CONCURRENCY"}
    | {"PORT_HEALTH", "HEALTH_CHECK_PATH", "STOP_GRACE_S", "MAX_START_FAILURES"}
)
# Who begins like this is spoken to by somebody else.
_FOREIGN = (
    *("RUNPOD_", "RAY_", "VLLM_", "HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "TORCH"),
    *("CUDA_", "NVIDIA_", "NV_", "NCCL_", "GLOO_", "TRITON_", "FLASHINFER_", "OMP_", "MKL_"),
    *("LC_", "LD_", "SSL_CERT_", "SSH_", "XDG_", "AWS_", "KUBERNETES_", "OTEL_", "JUPYTER_"),
    *("PYTHON", "PIP_", "UV_", "TINI_", "BASH_"),
)
# What a container or a shell has anyway.
_ORDINARY = frozenset(
    {"PATH", "HOME", "HOSTNAME", "PWD", "OLDPWD", "TERM", "LANG", "LANGUAGE", "SHLVL", "SHELL"}
    | {"USER", "LOGNAME", "_", "TZ", "TMPDIR", "DEBIAN_FRONTEND", "VIRTUAL_ENV", "PUBLIC_KEY"}
    | {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
    | {"LIBRARY_PATH", "GPG_KEY", "LESSOPEN", "LESSCLOSE", "LS_COLORS", "MAIL"}
)
# From here on a name is a misspelling of another: MAX_MODEL_LENGTH, GPU_MEMORY_UTILISATION.
_NEAR = 0.85
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_HUMAN = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def engine_arguments() -> dict[str, str]:
    """The arguments of `vllm serve` and their kinds: flag, list or value."""
    lines = _LIST.read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#"))
    return {name: kind for name, kind in pairs}


def apply(args: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The `args` of serve_config.yaml with this environment's values, and what there is to say.

    Raises:
        ConfigError: a value that cannot be what its variable stands for.
    """
    known = engine_arguments()
    result, warnings, strangers = deepcopy(dict(args)), [], []
    # The mapping first: a variable of its own is the more particular of the two.
    if text := environ.get(ARGS, "").strip():
        _merge(result, _mapping(text))
    for name in sorted(environ):
        text = environ[name].strip()
        if not text or name == ARGS:
            continue  # Templates leave variables empty that nobody filled in.
        argument = name.lower()
        if name in ALIASES:
            path = ALIASES[name]
            kind = known.get(path[-1], "value") if path[0] == "engine" else "value"
            _put(result, path, _value(name, text, kind))
        elif name in _REMOVED:
            warnings.append(f"{name} is ignored: {_REMOVED[name]}")
        elif argument in known and name == name.upper() and name not in _RESERVED:
            _put(result, ("engine", argument), _value(name, text, known[argument]))
        elif near := _misspelt(name, known):
            warnings.append(
                f"{name} is ignored: no engine argument of that name; did you mean {near}?"
            )
        elif _spoken_to_us(name):
            strangers.append(name)
    if strangers:
        warnings.append(f"no engine arguments, and left alone: {', '.join(strangers)}")
    return result, warnings


def _spoken_to_us(name: str) -> bool:
    """Whether a variable may have been meant for this server."""
    if name != name.upper() or name.startswith(_FOREIGN):
        return False
    return name not in _RESERVED | _OURS | _ORDINARY


def _misspelt(name: str, known: Iterable[str]) -> str | None:
    if not _spoken_to_us(name):
        return None
    words = (*(argument.upper() for argument in known), *ALIASES, *_OURS)
    choices = [word for word in words if word not in _RESERVED]
    found = difflib.get_close_matches(name, choices, n=1, cutoff=_NEAR)
    return found[0] if found else None


def _value(name: str, text: str, kind: str) -> Any:
    """The text of a variable as what it stands for."""
    if kind == "flag":
        word = text.lower()
        if word not in _TRUE + _FALSE:
            raise ConfigError(name, text, "must be true or false")
        return word in _TRUE
    if text[0] in "[{":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ConfigError(name, text, f"is not JSON: {error}") from None
        # A mapping for a list, as LORA_MODULES is often given.
        return [value] if kind == "list" and isinstance(value, dict) else value
    if kind == "list":
        return [word.strip() for word in text.split(",")]
    return _number(text)


def _number(text: str) -> Any:
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG])", text):
        # As vLLM reads it: 32k is 32000, 32K is 32768. Sizing needs the number.
        return int(float(match[1]) * _HUMAN[match[2]])
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?", text):
        return float(text)
    return text


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(ARGS, text, f"is neither YAML nor JSON: {problem}") from None
    if not isinstance(value, dict):
        raise ConfigError(ARGS, text, "must be a mapping, as `args` of serve_config.yaml is")
    return value


def _put(args: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *parents, last = path
    for key in parents:
        args = args.setdefault(key, {})
    args[last] = value


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def ask_vllm() -> str:
    """What engine_arguments.txt should say about the vLLM that is installed."""
    # It imports vLLM's parser for its own use: only serve_app/replica imports vLLM.
    arguments: Any = importlib.import_module("serve_app.replica.arguments")
    parser = arguments.make_arg_parser(arguments.FlexibleArgumentParser(add_help=False))
    lines = []
    for action in parser._actions:
        kind = "flag" if action.nargs == 0 else "list" if action.nargs in ("+", "*") else "value"
        lines.append(f"{action.dest} {kind}")
    head = "# The arguments of `vllm serve` 0.32.0. Written by `python runpod/overrides.py`.\n"
    return head + "\n".join(sorted(set(lines))) + "\n"


if __name__ == "__main__":
    _LIST.write_text(ask_vllm(), encoding="utf-8")
