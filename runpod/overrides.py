"""Runpod's environment convention, applied to serve_config.yaml.

On Runpod an image is configured by environment variables alone: MODEL_NAME names the model, and any
argument of `vllm serve` is set by its name in capitals (MAX_MODEL_LEN=8192). Templates live longer
than versions of vLLM, so an unknown variable is never an error: the log names it and the variable
to use instead. Templates also set values that mean "unset": an empty text, `None`, and 0 for a
number that must be positive leave the argument unset.

Later sources take precedence: VLLM_CONFIG_FILE, SERVE_ARGS, single variables, VLLM_EXTRA_ARGS.
"""

import difflib
import shlex
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from engine_arguments import engine_arguments
from serve_app.errors import ConfigError
from values import FLAGS, UNSET, mapping, value_of

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
    "REQUEST_TIMEOUT": ("limits", "request_timeout_s"),
}
# Of those that are no argument of vLLM's, or not vLLM's alone, the kind; the others are texts.
_ALIAS_KINDS: Mapping[str, str] = {
    "SERVED_MODEL_NAME": "name",
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "name",
    "TENSOR_PARALLEL_SIZE": "count",
    "PIPELINE_PARALLEL_SIZE": "count",
    "REPLICAS": "count",
    "REQUEST_TIMEOUT": "seconds",
}
# Any other key of `args`, as a YAML or JSON mapping.
ARGS = "SERVE_ARGS"
# Arguments of `vllm serve` as its command line and its --config file have them.
EXTRA, FILE = "VLLM_EXTRA_ARGS", "VLLM_CONFIG_FILE"
# Arguments that `args` has itself.
_OWN = ("model", "served_model_name", "tensor_parallel_size", "pipeline_parallel_size")


# Arguments whose names mean something else in an environment.
_RESERVED = frozenset(
    {"HOST", "PORT", "CONFIG", "HELP", "HF_TOKEN", "HEADLESS", "UDS"}
    | {"MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "ROOT_PATH"}
)
# What Runpod's own workers understood, or still do, and this one does not.
_REMOVED: Mapping[str, str] = {
    "API_KEY": "use API_KEYS",
    "BLOCK_MANAGER": "gone from vLLM",
    "CUDA_GRAPH_SIZES": "use CUDAGRAPH_CAPTURE_SIZES",
    "DEFAULT_BATCH_SIZE": "tokens travel together only under load (SERVE_ARGS: stream_gap_ms)",
    "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": "see DEFAULT_BATCH_SIZE",
    "DEFAULT_MIN_BATCH_SIZE": "see DEFAULT_BATCH_SIZE",
    "DEVICE": "gone from vLLM",
    "DISABLE_FRONTEND_MULTIPROCESSING": "gone from vLLM",
    "DISABLE_LOG_REQUESTS": "use ENABLE_LOG_REQUESTS=false",
    "DISABLE_LOGGING_REQUEST": "use ENABLE_LOG_REQUESTS=false",
    "DISTRIBUTED_EXECUTOR_BACKEND": "it follows from the parallel sizes",
    "DISABLE_MM_PREPROCESSOR_CACHE": "use MM_PROCESSOR_CACHE_GB=0",
    "ENABLE_LORA_BIAS": "gone from vLLM",
    "ENABLE_MULTIMODAL_ENCODER_DATA_PARALLEL": "use MM_ENCODER_TP_MODE=data",
    "ENABLE_PROMPT_ADAPTER": "gone from vLLM",
    "EPLB_LOG_BALANCEDNESS": "use EPLB_CONFIG",
    "EPLB_STEP_INTERVAL": "use EPLB_CONFIG",
    "EPLB_WINDOW_SIZE": "use EPLB_CONFIG",
    "GUIDED_DECODING_BACKEND": "use STRUCTURED_OUTPUTS_CONFIG",
    "GUIDED_DECODING_DISABLE_ADDITIONAL_PROPERTIES": "use STRUCTURED_OUTPUTS_CONFIG",
    "GUIDED_DECODING_DISABLE_ANY_WHITESPACE": "use STRUCTURED_OUTPUTS_CONFIG",
    "GUIDED_DECODING_DISABLE_FALLBACK": "use STRUCTURED_OUTPUTS_CONFIG",
    "LOGITS_PROCESSOR_PATTERN": "use LOGITS_PROCESSORS",
    "LONG_LORA_SCALING_FACTORS": "gone from vLLM",
    "LORA_EXTRA_VOCAB_SIZE": "gone from vLLM",
    "MODEL": "use MODEL_NAME",
    "MAX_CONTEXT_LEN_TO_CAPTURE": "gone from vLLM; see COMPILATION_CONFIG",
    "MAX_LONG_PARTIAL_PREFILLS": "gone from vLLM",
    "MAX_NUM_PARTIAL_PREFILLS": "gone from vLLM",
    "MAX_PROMPT_ADAPTERS": "gone from vLLM",
    "MAX_PROMPT_ADAPTER_TOKEN": "gone from vLLM",
    "MAX_SEQ_LEN_TO_CAPTURE": "gone from vLLM; see COMPILATION_CONFIG",
    "NUM_LOOKAHEAD_SLOTS": "use SPECULATIVE_CONFIG",
    "NUM_REDUNDANT_EXPERTS": "use EPLB_CONFIG",
    "NUM_SPECULATIVE_TOKENS": "use SPECULATIVE_CONFIG",
    "NGRAM_PROMPT_LOOKUP_MAX": "use SPECULATIVE_CONFIG",
    "NGRAM_PROMPT_LOOKUP_MIN": "use SPECULATIVE_CONFIG",
    "OVERRIDE_POOLER_CONFIG": "use POOLER_CONFIG",
    "PREEMPTION_CHECK_PERIOD": "gone from vLLM",
    "PREEMPTION_CPU_CAPACITY": "gone from vLLM",
    "PREEMPTION_MODE": "gone from vLLM",
    "QUANTIZATION_PARAM_PATH": "gone from vLLM",
    "RAW_OPENAI_OUTPUT": "streams are always OpenAI's events",
    "ROPE_SCALING": "use HF_OVERRIDES",
    "ROPE_THETA": "use HF_OVERRIDES",
    "SCHEDULER_DELAY_FACTOR": "gone from vLLM",
    "SPECULATIVE_METHOD": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_MODEL": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_MODEL_REVISION": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_QUANTIZATION": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_ENFORCE_EAGER": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_MAX_MODEL_LEN": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_DISABLE_BY_BATCH_SIZE": "use SPECULATIVE_CONFIG",
    "SPEC_DECODING_ACCEPTANCE_METHOD": "use SPECULATIVE_CONFIG",
    "SWAP_SPACE": "use KV_OFFLOADING_SIZE (GiB)",
    "TASK": "use RUNNER or CONVERT",
    "TOKENIZER_POOL_EXTRA_CONFIG": "gone from vLLM",
    "TOKENIZER_POOL_SIZE": "gone from vLLM",
    "TOKENIZER_POOL_TYPE": "gone from vLLM",
    "TRANSFORMERS_VERSION": "the image has the version that vLLM was tested with",
    "TYPICAL_ACCEPTANCE_SAMPLER_POSTERIOR_ALPHA": "use SPECULATIVE_CONFIG",
    "TYPICAL_ACCEPTANCE_SAMPLER_POSTERIOR_THRESHOLD": "use SPECULATIVE_CONFIG",
    "USE_V2_BLOCK_MANAGER": "gone from vLLM",
    "VLLM_API_KEY": "use API_KEYS",
    "VLLM_ATTENTION_BACKEND": "use ATTENTION_BACKEND",
    "WORKER_USE_RAY": "it follows from the parallel sizes",
}
# What else is read here, and by start.py, handler.py and the modules beside them.
_OURS = frozenset(
    {
        ARGS,
        EXTRA,
        FILE,
        "VLLM_STARTUP_TIMEOUT",
        "API_KEYS",
        "SERVE_MODE",
        "SERVE_CONFIG",
        "BASE_PATH",
        "MAX_CONCURRENCY",
    }
    | {"PORT_HEALTH", "HEALTH_CHECK_PATH", "STOP_GRACE_S", "MAX_START_FAILURES"}
)
# Who begins like this is spoken to by somebody else.
_FOREIGN = (
    *("RUNPOD_", "RAY_", "VLLM_", "HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "TORCH"),
    *("CUDA_", "NVIDIA_", "NV_", "NCCL_", "GLOO_", "TRITON_", "FLASHINFER_", "OMP_", "MKL_"),
    *("LC_", "LD_", "SSL_CERT_", "SSH_", "XDG_", "AWS_", "KUBERNETES_", "OTEL_", "JUPYTER_"),
    *("PYTHON", "PYTORCH_", "PIP_", "UV_", "TINI_", "BASH_"),
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


def apply(args: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The `args` of serve_config.yaml with this environment's values, and warnings.

    Raises:
        ConfigError: a value that its variable cannot have.
    """
    types = engine_arguments()
    result = deepcopy(dict(args))
    warnings: list[str] = []
    unknown: list[str] = []
    # Mappings come first, because a single variable is more specific.
    if path := environ.get(FILE, "").strip():
        _from_file(result, path, types)
    if text := environ.get(ARGS, "").strip():
        _merge(result, mapping(ARGS, text))
    # worker-vllm's own names come after vLLM's for the same argument, so that they take precedence.
    for name in sorted(
        environ, key=lambda name: (name in ALIASES and name.lower() not in types, name)
    ):
        text = environ[name].strip()
        if not text or name in (ARGS, EXTRA, FILE):
            continue  # Templates leave unused variables empty.
        argument = name.lower()
        if name in ALIASES:
            path_in_args = ALIASES[name]
            kind = _ALIAS_KINDS.get(name) or types.get(path_in_args[-1], "text")
            _set(result, path_in_args, name, text, kind, warnings)
        elif name in _REMOVED:
            if text.lower() not in (*UNSET, "0"):
                warnings.append(f"{name} is ignored: {_REMOVED[name]}")
        elif argument in types and name == name.upper() and name not in _RESERVED:
            _set(result, _place(argument), name, text, types[argument], warnings)
        elif near := _misspelt(name, types):
            warnings.append(
                f"{name} is ignored: no engine argument of that name; did you mean {near}?"
            )
        elif _may_be_ours(name):
            unknown.append(name)
    if text := environ.get(EXTRA, "").strip():
        _from_command_line(result, text, types)
    if unknown:
        warnings.append(f"not engine arguments, unchanged: {', '.join(unknown)}")
    return result, warnings


def _place(argument: str) -> tuple[str, ...]:
    """Where an argument of vLLM's is in `args`."""
    return (argument,) if argument in _OWN else ("engine", argument)


def _set(
    args: dict[str, Any],
    path: tuple[str, ...],
    name: str,
    text: str,
    kind: str,
    warnings: list[str],
) -> None:
    value = value_of(name, text, kind)
    if value is not None:
        _put(args, path, value)
    elif text == "0" and kind not in FLAGS:
        warnings.append(f"{name}=0 leaves it unset")


# --- vLLM's own formats of arguments -----------------------------------------------------------


def _from_file(args: dict[str, Any], path: str, types: Mapping[str, str]) -> None:
    """The file of `vllm serve --config`: its keys are arguments, with - or _ in them."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(FILE, path, f"cannot be read: {error}") from None
    for key, value in mapping(FILE, text).items():
        argument = str(key).replace("-", "_")
        _require_known(FILE, argument, types)
        if value is not None:
            _put(args, _place(argument), value)


def _from_command_line(args: dict[str, Any], text: str, types: Mapping[str, str]) -> None:
    """Words of a command line of `vllm serve`."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(EXTRA, text, f"is no command line: {error}") from None
    while words:
        option, equals, text_of = words.pop(0).partition("=")
        if not option.startswith("--"):
            raise ConfigError(EXTRA, option, "must be an argument of vllm serve, such as --seed 1")
        argument = option[2:].replace("-", "_")
        negated = argument.startswith("no_") and types.get(argument[3:]) == "flag"
        argument = argument[3:] if negated else argument
        _require_known(EXTRA, argument, types)
        values = [text_of] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        if types[argument] in FLAGS:
            if values:
                raise ConfigError(EXTRA, option, "takes no value")
            _put(args, _place(argument), not negated)
        elif not values or (len(values) > 1 and types[argument] != "list"):
            raise ConfigError(EXTRA, option, "takes one value")
        elif (value := value_of(EXTRA, " ".join(values), types[argument])) is not None:
            _put(args, _place(argument), value)


def _require_known(name: str, argument: str, types: Mapping[str, str]) -> None:
    if argument in ("api_key", "distributed_executor_backend"):
        raise ConfigError(name, argument, f"cannot be set here: {_REMOVED[argument.upper()]}")
    if argument not in types or argument.upper() in _RESERVED - {"HF_TOKEN"}:
        near = difflib.get_close_matches(argument, types, n=1, cutoff=_NEAR)
        problem = "not an argument that can be set here"
        raise ConfigError(name, argument, problem, repr(near[0]) if near else None)


# --- names and values ---------------------------------------------------------------------------


def _may_be_ours(name: str) -> bool:
    """Whether a variable may have been meant for this server."""
    if name != name.upper() or name.startswith(_FOREIGN):
        return False
    return name not in _RESERVED | _OURS | _ORDINARY


def _misspelt(name: str, names: Iterable[str]) -> str | None:
    if not _may_be_ours(name):
        return None
    words = (*(argument.upper() for argument in names), *ALIASES, *_OURS)
    choices = [word for word in words if word not in _RESERVED]
    matches = difflib.get_close_matches(name, choices, n=1, cutoff=_NEAR)
    return matches[0] if matches else None


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
