"""Runpod's environment convention, applied to serve_config.yaml.

On Runpod an image is configured by environment variables alone: MODEL_NAME names the model, and
any argument of `vllm serve` is set by its name in capitals (MAX_MODEL_LEN=8192). Templates live
longer than versions of vLLM, so a variable that this version does not know is never an error: it
is named in the log, with what to use instead, and left out. Templates also fill in what they do not
mean: an empty text, `None`, and 0 for a number that must be positive leave the argument unset.

What comes later wins: VLLM_CONFIG_FILE, SERVE_ARGS, each variable of its own, VLLM_EXTRA_ARGS.

Which names are arguments, and of which kind, is kept in engine_arguments.txt, because asking vLLM
takes ten seconds of every cold start. A test compares the file with vLLM; `python
runpod/overrides.py` writes it anew.
"""

import contextlib
import difflib
import importlib
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from decimal import Decimal
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
# Numbers of which 0 makes no sense, beside those of which vLLM's own definition says so.
_POSITIVE = frozenset(
    {"max_model_len", "max_cpu_loras", "max_lora_rank", "num_gpu_blocks_override"}
    | {"kv_cache_memory_bytes", "api_server_count", "max_num_queued_reqs", "max_num_queued_tokens"}
    | {"max_cudagraph_capture_size", "spec_tokens"}
)

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
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_NOTHING = ("none", "null")
# As vLLM reads numbers: 32k is 32,000 and 32K is 32,768.
_WHOLE = re.compile(r"([+-]?\d+)()")
_SUFFIXED = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT])")
_SUFFIXES = {letter: 1000**power for power, letter in enumerate("kmgt", 1)}
_SUFFIXES |= {letter: 1024**power for power, letter in enumerate("KMGT", 1)} | {"": 1}
_FLAGS = ("flag", "switch")
_BETWEEN = re.compile(r"[\s,]+")


def engine_arguments() -> dict[str, str]:
    """The arguments of `vllm serve` and their kinds.

    flag: true or false. switch: true, or unset. text: as it is, whatever it looks like. number.
    count: a positive number. json: an object or a list. either: an object, or a text that is none.
    list: texts or objects.
    """
    lines = _LIST.read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#"))
    return {name: kind for name, kind in pairs}


def apply(args: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The `args` of serve_config.yaml with this environment's values, and what there is to say.

    Raises:
        ConfigError: a value that cannot be what its variable stands for.
    """
    types = engine_arguments()
    result = deepcopy(dict(args))
    warnings: list[str] = []
    strangers: list[str] = []
    # The mappings first: a variable of its own is the more particular of the two.
    if path := environ.get(FILE, "").strip():
        _from_file(result, path, types)
    if text := environ.get(ARGS, "").strip():
        _merge(result, _mapping(ARGS, text))
    # Names of worker-vllm's own come after vLLM's for the same argument, and win as they do there.
    for name in sorted(
        environ, key=lambda name: (name in ALIASES and name.lower() not in types, name)
    ):
        text = environ[name].strip()
        if not text or name in (ARGS, EXTRA, FILE):
            continue  # Templates leave variables empty that nobody filled in.
        argument = name.lower()
        if name in ALIASES:
            path_in_args = ALIASES[name]
            kind = _ALIAS_KINDS.get(name) or types.get(path_in_args[-1], "text")
            _set(result, path_in_args, name, text, kind, warnings)
        elif name in _REMOVED:
            if text.lower() not in (*_NOTHING, "0"):
                warnings.append(f"{name} is ignored: {_REMOVED[name]}")
        elif argument in types and name == name.upper() and name not in _RESERVED:
            _set(result, _place(argument), name, text, types[argument], warnings)
        elif near := _misspelt(name, types):
            warnings.append(
                f"{name} is ignored: no engine argument of that name; did you mean {near}?"
            )
        elif _spoken_to_us(name):
            strangers.append(name)
    if text := environ.get(EXTRA, "").strip():
        _from_command_line(result, text, types)
    if strangers:
        warnings.append(f"no engine arguments, and left alone: {', '.join(strangers)}")
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
    value = _value(name, text, kind)
    if value is not None:
        _put(args, path, value)
    elif text == "0" and kind not in _FLAGS:
        warnings.append(f"{name}=0 is taken for unset")


# --- vLLM's own ways to say arguments -----------------------------------------------------------


def _from_file(args: dict[str, Any], path: str, types: Mapping[str, str]) -> None:
    """The file of `vllm serve --config`: its keys are arguments, with - or _ in them."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(FILE, path, f"cannot be read: {error}") from None
    for key, value in _mapping(FILE, text).items():
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
        if types[argument] in _FLAGS:
            if values:
                raise ConfigError(EXTRA, option, "takes no value")
            _put(args, _place(argument), not negated)
        elif not values or (len(values) > 1 and types[argument] != "list"):
            raise ConfigError(EXTRA, option, "takes one value")
        elif (value := _value(EXTRA, " ".join(values), types[argument])) is not None:
            _put(args, _place(argument), value)


def _require_known(name: str, argument: str, types: Mapping[str, str]) -> None:
    if argument in ("api_key", "distributed_executor_backend"):
        raise ConfigError(name, argument, f"cannot be set here: {_REMOVED[argument.upper()]}")
    if argument not in types or argument.upper() in _RESERVED - {"HF_TOKEN"}:
        near = difflib.get_close_matches(argument, types, n=1, cutoff=_NEAR)
        problem = "not an argument that can be set here"
        raise ConfigError(name, argument, problem, repr(near[0]) if near else None)


# --- names and values ---------------------------------------------------------------------------


def _spoken_to_us(name: str) -> bool:
    """Whether a variable may have been meant for this server."""
    if name != name.upper() or name.startswith(_FOREIGN):
        return False
    return name not in _RESERVED | _OURS | _ORDINARY


def _misspelt(name: str, names: Iterable[str]) -> str | None:
    if not _spoken_to_us(name):
        return None
    words = (*(argument.upper() for argument in names), *ALIASES, *_OURS)
    choices = [word for word in words if word not in _RESERVED]
    matches = difflib.get_close_matches(name, choices, n=1, cutoff=_NEAR)
    return matches[0] if matches else None


def _value(name: str, text: str, kind: str) -> Any:
    """The text of a variable as what it stands for; None where it stands for nothing."""
    if text.lower() in _NOTHING:
        return None
    if kind in _FLAGS:
        word = text.lower()
        if word not in _TRUE + _FALSE:
            raise ConfigError(name, text, "must be true or false")
        return word in _TRUE or (None if kind == "switch" else False)
    if kind == "list":
        return _lora_modules(text) if name == "LORA_MODULES" else _list(name, text)
    if kind == "name":
        if len(values := _list(name, text)) != 1:
            raise ConfigError(name, text, "must be one name: a model is served under one")
        return values[0]
    if kind == "json":
        value = _pairs(text) or _json(name, text)
        return value if isinstance(value, dict | list) else text
    if kind == "either":
        return _json(name, text) if text.startswith("{") else text
    if kind in ("number", "count", "seconds"):
        number = _number(name, text, suffixed=kind != "seconds")
        return None if number == 0 and kind != "number" else number
    return text


def _pairs(text: str) -> dict[str, int] | None:
    """`image=1,video=0`, as templates of worker-vllm 1 and 2 have it; None of any other text."""
    pairs = [re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", each) for each in text.split(",")]
    return {pair[1]: int(pair[2]) for pair in pairs if pair} if all(pairs) else None


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(name, text, f"is not JSON: {error}") from None


def _list(name: str, text: str) -> list[Any]:
    """A JSON list; or words and JSON objects, with spaces or commas between them.

    So LORA_MODULES can be `[{...}, {...}]`, `{...} {...}`, or pairs: `a=org/a b=org/b`.
    """
    if text.startswith("["):
        value = _json(name, text)
        return value if isinstance(value, list) else [value]
    values: list[Any] = []
    decoder = json.JSONDecoder()
    while text:
        if text.startswith("{"):
            try:
                value, end = decoder.raw_decode(text)
            except ValueError as error:
                raise ConfigError(name, text, f"is not JSON: {error}") from None
            values.append(value)
        else:
            end = match.start() if (match := _BETWEEN.search(text)) else len(text)
            values.append(text[:end])
        text = text[end:].lstrip(", \t\r\n")
    return values


def _number(name: str, text: str, suffixed: bool) -> Any:
    """A number, also as 32k or 32K; `auto` is for whoever reads the argument."""
    if match := _WHOLE.fullmatch(text) or (_SUFFIXED.fullmatch(text) if suffixed else None):
        return int(Decimal(match[1]) * _SUFFIXES[match[2]])
    if text.lower() == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(name, text, "must be a number")
    return int(value) if value.is_integer() else value


def _lora_modules(text: str) -> list[Any]:
    """Adapters, as vLLM reads them.

    Raises:
        ConfigError: one without a name or a path.
    """
    modules = _list("LORA_MODULES", text)
    for module in modules:
        if not _is_adapter(module):
            problem = 'must be name=path, or {"name": ..., "path": ...}'
            raise ConfigError("LORA_MODULES", module, problem)
    return modules


def _is_adapter(module: Any) -> bool:
    if isinstance(module, dict):
        return bool(module.get("name") and module.get("path"))
    name, _, path = str(module).partition("=")
    return bool(name and path)


def _mapping(name: str, text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(name, text, f"is neither YAML nor JSON: {problem}") from None
    if not isinstance(value, dict):
        raise ConfigError(name, text, "must be a mapping, as `args` of serve_config.yaml is")
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
    # For its own use: beside it only serve_app/replica imports vLLM.
    arguments: Any = importlib.import_module("serve_app.replica.arguments")
    parser = arguments.make_arg_parser(arguments.FlexibleArgumentParser(add_help=False))
    positive = _POSITIVE | _positive_numbers(importlib.import_module("vllm.config"))
    lines = [f"{action.dest} {_kind(action, positive)}" for action in parser._actions]
    head = "# The arguments of `vllm serve` 0.32.0. Written by `python runpod/overrides.py`.\n"
    return head + "\n".join(sorted(set(lines))) + "\n"


def _positive_numbers(config: Any) -> set[str]:
    """Fields of vLLM's configuration whose definition says that they are above 0."""
    numbers = set()
    for part in vars(config).values():
        for name, field in getattr(part, "__pydantic_fields__", {}).items():
            least = [getattr(limit, "ge", None) == 1 for limit in field.metadata]
            above = [getattr(limit, "gt", None) == 0 for limit in field.metadata]
            if any(least + above):
                numbers.add(name)
    return numbers


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    """What an argument's own parser makes of a text; None where it refuses it."""
    with contextlib.suppress(Exception):  # Each parser refuses in its own way.
        return parse(text)
    return None


def _kind(action: Any, positive: Iterable[str]) -> str:
    """What a value of an argument is, from how vLLM parses it."""
    if action.nargs == 0:
        return (
            "flag" if any(word.startswith("--no-") for word in action.option_strings) else "switch"
        )
    if action.nargs in ("+", "*"):
        return "list"
    if action.type is None:
        return "text"
    if any(_parsed(action.type, text) not in (None, text) for text in ("{}", "[]", '{"a": 1}')):
        return "either" if _parsed(action.type, "text") == "text" else "json"
    if isinstance(_parsed(action.type, "7"), int | float):
        return "count" if action.dest in positive else "number"
    return "text"


if __name__ == "__main__":
    _LIST.write_text(ask_vllm(), encoding="utf-8")
