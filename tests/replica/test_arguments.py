"""Every value of `engine:` is read by vLLM's own type, or refused in one sentence at once."""

import contextlib
import io
import json
import runpy
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import ConfigError

BASE = {"model": "m", "enable_auto_tool_choice": True, "tool_call_parser": "hermes"}


def read(key: str, value: Any) -> Any:
    from serve_app.replica.arguments import parse

    return getattr(parse({**BASE, key: value}), key)


@pytest.mark.parametrize("text", ["false", "False", "no", "off", "0", 0, False])
@pytest.mark.parametrize("key", ["enforce_eager", "disable_log_stats", "enable_prefix_caching"])
def test_a_false_in_any_spelling_is_false(key: str, text: Any) -> None:
    assert read(key, text) is False


@pytest.mark.parametrize("text", ["true", "TRUE", "yes", "on", "1", 1, True])
@pytest.mark.parametrize("key", ["enforce_eager", "disable_log_stats", "enable_prefix_caching"])
def test_a_true_in_any_spelling_is_true(key: str, text: Any) -> None:
    assert read(key, text) is True


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("allowed_origins", ["*"], ["*"]),
        ("allowed_origins", ["https://a", "https://b"], ["https://a", "https://b"]),
        ("allowed_origins", "https://a", ["https://a"]),
        ("allowed_origins", '["https://a"]', ["https://a"]),
        ("max_model_len", "32k", 32000),
        ("max_model_len", "32K", 32768),
        ("max_model_len", "auto", -1),
        ("max_model_len", -1, -1),
        ("max_model_len", 4096.0, 4096),
        ("max_num_seqs", "64", 64),
        ("kv_cache_memory_bytes", "4G", 2**32),
        ("gpu_memory_utilization", "0.5", 0.5),
        ("gpu_memory_utilization", 1, 1.0),
        ("cudagraph_capture_sizes", [1, 2], [1, 2]),
        ("cudagraph_capture_sizes", 8, [8]),
        ("ignore_patterns", [], []),
        ("middleware", ["a.b", "c.d"], ["a.b", "c.d"]),
        ("override_generation_config", {"temperature": 0.5}, {"temperature": 0.5}),
        ("override_generation_config", '{"temperature": 0.5}', {"temperature": 0.5}),
        ("hf_token", True, True),
        ("hf_token", False, None),
        ("tool_strict_level", "parameter", "parameter"),
        ("quantization", "fp8", "fp8"),
        ("served_model_name", "x", ["x"]),
        ("chat_template", None, None),
        ("revision", 1.0, "1.0"),
        ("revision", 123, "123"),
        ("device_ids", [0, 1], [0, 1]),
        ("device_ids", ["GPU-1", "GPU-2"], ["GPU-1", "GPU-2"]),
        ("max_lora_rank", "64", 64),
        ("limit_mm_per_prompt", {"image": 2}, {"image": 2}),
        ("hf_overrides", {"num_hidden_layers": 2}, {"num_hidden_layers": 2}),
    ],
)
def test_a_value_is_what_vllm_makes_of_it(key: str, value: Any, expected: Any) -> None:
    assert read(key, value) == expected


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("enforce_eager", "maybe", "must be true or false"),
        ("enforce_eager", 2, "must be true or false"),
        ("enforce_eager", [True], "must be true or false"),
        ("max_num_seqs", "many", "must be a whole number"),
        ("max_num_seqs", True, "must be a whole number"),
        ("max_model_len", "long", "or auto"),
        ("max_model_len", [4096], "or auto"),
        ("gpu_memory_utilization", "most", "must be a number"),
        ("tool_call_parser", "hermess", "did you mean 'hermes'?"),
        ("tool_call_parser", ["hermes"], "must be one value"),
        ("tool_call_parser", True, "must be a text"),
        ("reasoning_parser", "qwen33", "did you mean 'qwen3'?"),
        ("load_format", "dumy", "did you mean 'dummy'?"),
        ("quantization", "awk", "did you mean 'awq'?"),
        ("attention_backend", "FLASH_ATTNN", "did you mean 'FLASH_ATTN'?"),
        ("tokenizer_mode", "mistrall", "did you mean 'mistral'?"),
        ("dtype", "bfloat17", "did you mean 'bfloat16'?"),
        ("tool_strict_level", "params", "did you mean 'parameter'?"),
        ("compilation_config", {"nope": 0}, "nope: Unexpected keyword argument"),
        ("chat_template", "no/such.jinja", "doesn't exist"),
        ("tool_parser_plugin", "no/such.py", "cannot be imported"),
        ("enfore_eager", True, "did you mean 'enforce_eager'?"),
        ("max_lora_rank", "x", "not one of 1, 8, 16"),
        ("gpu_memory_utilization", float("nan"), "must be a number that is finite"),
        ("cpu_offload_gb", float("inf"), "must be a number that is finite"),
        ("max_log_len", 0.5, "must be a whole number"),
        ("revision", True, "must be a text"),
        ("served_model_name", ["m", True], "must be a text"),
        ("served_model_name", {"a": 1}, "must be a list of texts"),
        ("middleware", [["a"]], "must be a list of texts"),
        ("allowed_origins", True, "must be a list"),
        ("allowed_origins", {"a": 1}, "must be a list"),
        ("default_chat_template_kwargs", ["a"], "must be a mapping"),
        ("override_generation_config", 1, "must be a mapping"),
        ("model_loader_extra_config", "x", "must be a mapping"),
        ("speculative_config", ["ngram"], "must be a mapping"),
        ("kv_transfer_config", 1, "Input should be an object"),
    ],
)
def test_what_vllm_cannot_honour_is_one_sentence(key: str, value: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(key, value)
    text = str(refused.value)
    assert text.startswith(f"engine.{key} = ")
    assert problem in text
    assert "\n" not in text


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(max_examples=25, deadline=None)
@given(
    key=st.sampled_from(
        ["enforce_eager", "max_model_len", "max_num_seqs", "allowed_origins", "compilation_config"]
    ),
    value=values,
)
def test_whatever_yaml_gives_it_is_read_or_refused_by_name(key: str, value: Any) -> None:
    with contextlib.suppress(ConfigError):
        read(key, value)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_check_is_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python -m` runs it, in this process: vLLM takes 17 s of CPU time to import."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"tool_call_parser": "hermess"})))
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("serve_app.replica.arguments", run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("did you mean 'hermes'?")
