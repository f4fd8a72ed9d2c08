"""Runpod's environment convention: what each variable becomes, and what is said of the others."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
        ("SOMETHING_ELSE", "no engine arguments, and left alone: SOMETHING_ELSE"),
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
    known = {name.upper() for name in overrides.engine_arguments()}
    # vLLM has them; here they follow from other settings, or have another name.
    both = {"API_KEY", "DISTRIBUTED_EXECUTOR_BACKEND", "MODEL"}
    assert known & overrides._REMOVED.keys() == both


def test_the_list_is_that_of_the_installed_vllm() -> None:
    code = "import overrides; print(overrides.ask_vllm(), end='')"
    folder = str(Path(overrides.__file__).parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kept = (ROOT / "runpod" / "engine_arguments.txt").read_text(encoding="utf-8")
    assert result.stdout.splitlines()[-kept.count("\n") :] == kept.splitlines()
