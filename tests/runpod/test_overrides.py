"""Runpod's environment convention: what each variable becomes, and what is said of the others."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import engine_arguments
import overrides
from serve_app.errors import ConfigError
from serve_app.settings import Settings
from tests.server import ROOT

ARGS: dict[str, Any] = {"model": "auto", "engine": {"tool_call_parser": "hermes"}}


def applied(**environ: str) -> dict[str, Any]:
    result, warnings = overrides.apply(ARGS, environ)
    assert warnings == []
    Settings.parse(result)
    return result


def warned(**environ: str) -> list[str]:
    result, warnings = overrides.apply(ARGS, environ)
    assert result == ARGS
    return warnings


def test_nothing_changes_nothing() -> None:
    assert applied() == ARGS


def test_names_of_their_own() -> None:
    args = applied(
        MODEL_NAME="org/model",
        MODEL_REVISION="abc",
        OPENAI_SERVED_MODEL_NAME_OVERRIDE="mine",
        TENSOR_PARALLEL_SIZE="2",
        REPLICAS="3",
    )
    assert args["model"] == "org/model"
    assert args["served_model_name"] == "mine"
    assert (args["tensor_parallel_size"], args["replicas"]) == (2, 3)
    assert args["engine"] == {"tool_call_parser": "hermes", "revision": "abc"}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MAX_MODEL_LEN", "8192", 8192),
        ("MAX_MODEL_LEN", "32k", 32000),
        ("MAX_MODEL_LEN", "32K", 32768),
        ("GPU_MEMORY_UTILIZATION", "0.85", 0.85),
        ("MAX_NUM_SEQS", " 64 ", 64),
        ("ENFORCE_EAGER", "true", True),
        ("ENABLE_PREFIX_CACHING", "0", False),
        ("DTYPE", "bfloat16", "bfloat16"),
        ("SPECULATIVE_CONFIG", '{"method": "ngram"}', {"method": "ngram"}),
        ("LORA_MODULES", '{"name": "a", "path": "o/a"}', [{"name": "a", "path": "o/a"}]),
        ("LORA_MODULES", '[{"name": "a", "path": "o/a"}]', [{"name": "a", "path": "o/a"}]),
    ],
)
def test_any_engine_argument_in_capitals(name: str, text: str, value: object) -> None:
    assert applied(**{name: text})["engine"][name.lower()] == value


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ADAPTERS = [{"name": "a", "path": "o/a"}, {"name": "b", "path": "o/b"}]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        # A text stays a text, whatever it looks like.
        ("CUSTOM_CHAT_TEMPLATE", TEMPLATE, TEMPLATE),
        ("CUSTOM_CHAT_TEMPLATE", "[INST] {{ messages[0]['content'] }} [/INST]", None),
        ("CUSTOM_CHAT_TEMPLATE", "{{ messages }}\n{%- if true %}", None),
        ("MODEL_REVISION", "1234567", "1234567"),
        ("MODEL_REVISION", "2e10", "2e10"),
        ("TOKENIZER_NAME", "0", "0"),
        ("KV_CACHE_DTYPE", "fp8", "fp8"),
        # What vLLM reads itself.
        ("MAX_MODEL_LEN", "auto", "auto"),
        ("MAX_MODEL_LEN", "-1", -1),
        ("HF_OVERRIDES", '{"rope_theta": 1e6}', {"rope_theta": 1e6}),
        ("COMPILATION_CONFIG", "3", "3"),
        ("MAX_MODEL_LEN", "8192.0", 8192),
        ("LIMIT_MM_PER_PROMPT", "image=1,video=0", {"image": 1, "video": 0}),
        ("LIMIT_MM_PER_PROMPT", '{"image": 1}', {"image": 1}),
        ("HF_OVERRIDES", "package.module", "package.module"),
        ("MAX_NUM_BATCHED_TOKENS", "8k", 8000),
        # A 0 that says something.
        ("SEED", "0", 0),
        ("CPU_OFFLOAD_GB", "0", 0),
        ("MM_PROCESSOR_CACHE_GB", "0", 0),
        ("MAX_LOGPROBS", "0", 0),
        ("GPU_MEMORY_UTILIZATION", "1e-1", 0.1),
        # Lists, however they are written.
        ("LORA_MODULES", "a=o/a b=o/b", ["a=o/a", "b=o/b"]),
        ("LORA_MODULES", "a=o/a,b=o/b", ["a=o/a", "b=o/b"]),
        ("LORA_MODULES", "a=o/a", ["a=o/a"]),
        ("LORA_MODULES", json.dumps(ADAPTERS), ADAPTERS),
        ("LORA_MODULES", " ".join(map(json.dumps, ADAPTERS)), ADAPTERS),
        ("LORA_MODULES", ",\n".join(map(json.dumps, ADAPTERS)), ADAPTERS),
        ("LORA_MODULES", json.dumps(ADAPTERS[0]) + " b=o/b", [ADAPTERS[0], "b=o/b"]),
        ("CUDAGRAPH_CAPTURE_SIZES", "1 2,4", ["1", "2", "4"]),
    ],
)
def test_values_as_users_of_runpods_worker_write_them(name: str, text: str, value: Any) -> None:
    path = overrides.ALIASES.get(name, ("engine", name.lower()))
    expected = text if value is None else value
    assert applied(**{name: text})["engine"][path[-1]] == expected


@pytest.mark.parametrize(
    "name",
    [
        *("MAX_NUM_BATCHED_TOKENS", "MAX_MODEL_LEN", "MAX_NUM_SEQS", "MAX_CPU_LORAS", "BLOCK_SIZE"),
        *("TENSOR_PARALLEL_SIZE", "REPLICAS", "MAX_PARALLEL_LOADING_WORKERS", "STREAM_INTERVAL"),
    ],
)
def test_a_zero_where_none_can_be_leaves_the_value_unset(name: str) -> None:
    assert warned(**{name: "0"}) == [f"{name}=0 leaves it unset"]


@pytest.mark.parametrize("text", ["None", "none", "null", " None "])
@pytest.mark.parametrize(
    "name", ["QUANTIZATION", "MAX_MODEL_LEN", "LORA_MODULES", "MODEL_REVISION"]
)
def test_none_leaves_the_value_unset(name: str, text: str) -> None:
    assert warned(**{name: text}) == []


@pytest.mark.server  # It imports vLLM or torch.
def test_what_a_template_of_runpods_worker_fills_in() -> None:
    """The defaults of its catalog entry: nothing of them stops a start, and vLLM takes the rest."""
    environ = dict(pair.split("=", 1) for pair in WORKER_DEFAULTS.split("\n") if pair)
    args, warnings = overrides.apply(ARGS, environ)
    Settings.parse(args)
    unset = {warning for warning in warnings if warning.endswith("leaves it unset")}
    assert len(unset) == 3
    assert [warning for warning in warnings if warning not in unset] == [
        "DEFAULT_BATCH_SIZE is ignored: tokens travel together only under load "
        "(SERVE_ARGS: stream_gap_ms)",
        "DEFAULT_BATCH_SIZE_GROWTH_FACTOR is ignored: see DEFAULT_BATCH_SIZE",
        "DEFAULT_MIN_BATCH_SIZE is ignored: see DEFAULT_BATCH_SIZE",
        "DEVICE is ignored: gone from vLLM",
        "DISTRIBUTED_EXECUTOR_BACKEND is ignored: it follows from the parallel sizes",
        "RAW_OPENAI_OUTPUT is ignored: streams are always OpenAI's events",
    ]
    # As the server reads it again, and as vLLM does.
    engine = yaml.safe_load(yaml.safe_dump(args["engine"]))
    arguments = pytest.importorskip("serve_app.replica.arguments")
    parsed = arguments.parse({**engine, "chat_template": TEMPLATE, "max_model_len": "auto"})
    assert parsed.chat_template == TEMPLATE
    assert (parsed.seed, parsed.max_num_seqs, parsed.enable_prefix_caching) == (0, 256, False)


WORKER_DEFAULTS = """
TOKENIZER_MODE=auto
SKIP_TOKENIZER_INIT=false
TRUST_REMOTE_CODE=False
DTYPE=auto
KV_CACHE_DTYPE=auto
MAX_MODEL_LEN=auto
DISTRIBUTED_EXECUTOR_BACKEND=mp
RAY_WORKERS_USE_NSIGHT=false
PIPELINE_PARALLEL_SIZE=1
TENSOR_PARALLEL_SIZE=1
MAX_PARALLEL_LOADING_WORKERS=0
MAX_NUM_BATCHED_TOKENS=0
ENABLE_PREFIX_CACHING=false
DISABLE_SLIDING_WINDOW=false
SEED=0
MAX_NUM_SEQS=256
MAX_LOGPROBS=20
DISABLE_LOG_STATS=false
QUANTIZATION=None
ENABLE_LORA=false
MAX_LORAS=1
MAX_LORA_RANK=16
LORA_DTYPE=auto
MAX_CPU_LORAS=0
FULLY_SHARDED_LORAS=false
DEVICE=auto
SCHEDULER_DELAY_FACTOR=0
ENABLE_CHUNKED_PREFILL=true
SPECULATIVE_METHOD=
NUM_SPECULATIVE_TOKENS=0
NGRAM_PROMPT_LOOKUP_MAX=0
ENABLE_LOG_REQUESTS=false
GPU_MEMORY_UTILIZATION=0.95
BLOCK_SIZE=16
ENFORCE_EAGER=false
DISABLE_CUSTOM_ALL_REDUCE=false
DEFAULT_BATCH_SIZE=50
DEFAULT_MIN_BATCH_SIZE=1
DEFAULT_BATCH_SIZE_GROWTH_FACTOR=3
RAW_OPENAI_OUTPUT=1
OPENAI_RESPONSE_ROLE=assistant
MAX_CONCURRENCY=30
ENABLE_EXPERT_PARALLEL=false
BASE_PATH=/runpod-volume
ENABLE_AUTO_TOOL_CHOICE=false
TOOL_CALL_PARSER=
REASONING_PARSER=
PYTORCH_ALLOC_CONF=expandable_segments:True
VLLM_USE_DEEP_GEMM=0
"""


def test_words_of_a_command_line_come_last() -> None:
    extra = (
        "--max-model-len 4096 --seed=3 --no-enable-prefix-caching --trust-remote-code "
        "--override-generation-config '{\"max_new_tokens\": 512}' --lora-modules a=o/a b=o/b "
        "--tensor-parallel-size 2 --uvicorn-log-level warning"
    )
    args = applied(VLLM_EXTRA_ARGS=extra, MAX_MODEL_LEN="8192", TENSOR_PARALLEL_SIZE="1")
    assert args["tensor_parallel_size"] == 2
    assert args["engine"] == {
        "tool_call_parser": "hermes",
        "max_model_len": 4096,
        "seed": 3,
        "enable_prefix_caching": False,
        "trust_remote_code": True,
        "override_generation_config": {"max_new_tokens": 512},
        "lora_modules": ["a=o/a", "b=o/b"],
        "uvicorn_log_level": "warning",
    }


def test_a_configuration_file_of_vllm_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: o/m\nmax-model-len: 8192\ntensor_parallel_size: 2\nseed: 1\n")
    args = applied(VLLM_CONFIG_FILE=str(file), SEED="2")
    assert (args["model"], args["tensor_parallel_size"]) == ("o/m", 2)
    assert args["engine"] == {"tool_call_parser": "hermes", "max_model_len": 8192, "seed": 2}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("VLLM_EXTRA_ARGS", "--max-model-length 1", "max_model_length.*did you mean"),
        ("VLLM_EXTRA_ARGS", "--port 9000", "port.*not an argument that can be set here"),
        ("VLLM_EXTRA_ARGS", "--api-key k", "use API_KEYS"),
        ("VLLM_EXTRA_ARGS", "4096", "must be an argument"),
        ("VLLM_EXTRA_ARGS", "--enforce-eager false", "takes no value"),
        ("VLLM_EXTRA_ARGS", "--seed", "takes one value"),
        ("VLLM_EXTRA_ARGS", "--seed 1 2", "takes one value"),
        ("VLLM_EXTRA_ARGS", "--model 'o", "is no command line"),
        ("VLLM_CONFIG_FILE", "/nowhere.yaml", "cannot be read"),
        ("OPENAI_SERVED_MODEL_NAME_OVERRIDE", "a,b", "must be one name"),
        ("LORA_MODULES", '{"name": "a"', "is not JSON"),
        ("LORA_MODULES", "adapter", "must be name=path"),
        ("LORA_MODULES", '{"name": "a"}', "must be name=path"),
        ("SPECULATIVE_CONFIG", "ngram", "is not JSON"),
        ("LIMIT_MM_PER_PROMPT", "one image", "is not JSON"),
        ("MAX_MODEL_LEN", "8,192", "must be a number"),
        ("MAX_NUM_SEQS", "many", "must be a number"),
        ("GPU_MEMORY_UTILIZATION", "95%", "must be a number"),
        ("REPLICAS", "two", "must be a number"),
        # Five minutes, and not five million seconds.
        ("REQUEST_TIMEOUT", "5m", "must be a number"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_its_name(name: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{problem}"):
        overrides.apply(ARGS, {name: text})


def test_names_of_worker_vllm_win_over_those_of_vllm() -> None:
    names = applied(OPENAI_SERVED_MODEL_NAME_OVERRIDE="theirs", SERVED_MODEL_NAME="vllms")
    assert names["served_model_name"] == "theirs"
    assert applied(MODEL_REVISION="theirs", REVISION="vllms")["engine"]["revision"] == "theirs"


def test_the_rest_of_the_configuration_as_one_mapping() -> None:
    args = applied(SERVE_ARGS="{limits: {max_tokens: 64}, engine: {seed: 1}}", SEED="2")
    assert args["limits"] == {"max_tokens": 64}
    assert args["engine"] == {"tool_call_parser": "hermes", "seed": 2}


def test_an_empty_variable_is_none() -> None:
    assert applied(MAX_MODEL_LEN="", MODEL_NAME=" ") == ARGS


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("SWAP_SPACE", "SWAP_SPACE is ignored: use KV_OFFLOADING_SIZE (GiB)"),
        ("ROPE_THETA", "ROPE_THETA is ignored: use HF_OVERRIDES"),
        (
            "MAX_MODEL_LENGTH",
            "MAX_MODEL_LENGTH is ignored: no engine argument of that name; "
            "did you mean MAX_MODEL_LEN?",
        ),
        (
            "GPU_MEMORY_UTILISATION",
            "GPU_MEMORY_UTILISATION is ignored: no engine argument of that name; "
            "did you mean GPU_MEMORY_UTILIZATION?",
        ),
        (
            "MODEL_NAMES",
            "MODEL_NAMES is ignored: no engine argument of that name; did you mean MODEL_NAME?",
        ),
        (
            "MAX_CONCURENCY",
            "MAX_CONCURENCY is ignored: no engine argument of that name; "
            "did you mean MAX_CONCURRENCY?",
        ),
        ("API_KEY", "API_KEY is ignored: use API_KEYS"),
        ("MODEL", "MODEL is ignored: use MODEL_NAME"),
        ("SOMETHING_ELSE", "not engine arguments, unchanged: SOMETHING_ELSE"),
    ],
)
def test_what_is_unknown_or_gone_is_said_by_name(name: str, sentence: str) -> None:
    assert warned(**{name: "4"}) == [sentence]


def test_what_a_container_has_anyway_is_left_alone() -> None:
    names = "PATH HOME HOSTNAME PWD TERM LANG LC_ALL PORT PORT_HEALTH HOST API_KEYS HF_TOKEN"
    names += (
        " HF_HOME RUNPOD_POD_ID RUNPOD_GPU_COUNT CUDA_VERSION NVIDIA_VISIBLE_DEVICES PYTHONPATH"
    )
    names += " NCCL_VERSION LD_LIBRARY_PATH TOKENIZERS_PARALLELISM MASTER_ADDR MASTER_PORT SHLVL"
    names += " SSL_CERT_FILE OMP_NUM_THREADS MAX_CONCURRENCY BASE_PATH SERVE_MODE PUBLIC_KEY"
    assert warned(**dict.fromkeys(names.split(), "1")) == []


def test_lower_case_is_not_spoken_to_us() -> None:
    assert applied(seed="1") == ARGS


@pytest.mark.parametrize(
    ("name", "text"), [("ENFORCE_EAGER", "maybe"), ("HF_OVERRIDES", "{a"), ("SERVE_ARGS", "[1]")]
)
def test_a_value_that_makes_no_sense_is_an_error(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name):
        overrides.apply(ARGS, {name: text})


def test_no_argument_is_both_known_and_removed() -> None:
    expected = {name.upper() for name in engine_arguments.engine_arguments()}
    # vLLM has them; here they follow from other settings, or have another name.
    both = {"API_KEY", "DISTRIBUTED_EXECUTOR_BACKEND", "MODEL"}
    assert expected & overrides._REMOVED.keys() == both


@pytest.mark.server  # It imports vLLM or torch.
def test_the_list_is_that_of_the_installed_vllm() -> None:
    listed = (ROOT / "runpod" / "engine_arguments.txt").read_text(encoding="utf-8")
    assert engine_arguments.ask_vllm() == listed
