"""Memory from config.json: exact parameter counts, and what fits where."""

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ConfigError
from serve_app.planning.hardware import ACCELERATORS, Gpu
from serve_app.planning.plan import parallelism, shape_of
from serve_app.planning.sizing import (
    GIB,
    OVERHEAD_BYTES,
    QWEN25,
    EngineMemory,
    ModelShape,
    choose_model,
    choose_tensor_parallel_size,
    needed_bytes,
    tensor_parallel_sizes,
)
from serve_app.settings import Settings


def gpus(name: str, count: int = 1) -> tuple[Gpu, ...]:
    memory_bytes, capability = ACCELERATORS[name]
    return (Gpu(name, memory_bytes, memory_bytes, capability),) * count


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("0.5B", 494_032_768),
        ("1.5B", 1_543_714_304),
        ("3B", 3_085_938_688),
        ("7B", 7_615_616_512),
        ("14B", 14_770_033_664),
        ("32B", 32_763_876_352),
        ("72B", 72_706_203_648),
    ],
)
def test_parameters_are_the_published_ones(size: str, parameters: int) -> None:
    assert QWEN25[f"Qwen/Qwen2.5-{size}-Instruct"].parameters == parameters


def test_a_llama_has_no_bias() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "dtype": "bfloat16",
    }
    shape = ModelShape.from_config(config)
    assert shape.parameters == 134_515_008
    assert shape.weights_bytes == 2 * shape.parameters
    assert shape.kv_bytes_per_token() == 2 * 30 * 3 * 64 * 2


QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "torch_dtype": "bfloat16",
}
QWEN_32B = QWEN_7B | {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
}
PHI_3_MEDIUM = {
    "model_type": "phi3",
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "vocab_size": 32064,
}


def quantized(config: dict[str, Any], **quantization: Any) -> dict[str, Any]:
    return config | {"quantization_config": quantization}


W4A16 = {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}}
W8A8 = {"group_0": {"weights": {"num_bits": 8, "strategy": "channel", "group_size": None}}}


@pytest.mark.parametrize(
    ("config", "published_gib"),
    [
        (QWEN_7B, 14.2),
        (quantized(QWEN_7B, quant_method="awq", bits=4, group_size=128), 5.2),
        (quantized(QWEN_7B, quant_method="gptq", bits=8, group_size=128), 8.1),
        (quantized(QWEN_7B, quant_method="bitsandbytes", load_in_4bit=True), 5.3),
        (quantized(QWEN_32B, quant_method="fp8", activation_scheme="dynamic"), 31.9),
        (quantized(QWEN_32B, quant_method="compressed-tensors", config_groups=W4A16), 18.0),
        (quantized(QWEN_32B, quant_method="compressed-tensors", config_groups=W8A8), 31.9),
        (quantized(QWEN_32B, quant_method="modelopt", quant_algo="NVFP4"), 19.2),
        (MIXTRAL, 87.0),
        (QWEN3_30B_A3B, 56.9),
        (PHI_3_MEDIUM, 26.0),
    ],
)
def test_weights_are_as_large_as_their_checkpoints(
    config: dict[str, Any], published_gib: float
) -> None:
    result = ModelShape.from_config(config).weights_bytes / GIB
    assert result == pytest.approx(published_gib, rel=0.02)


@pytest.mark.parametrize(
    "config",
    [
        {},
        QWEN_7B | {"model_type": "jamba"},
        {key: value for key, value in QWEN_7B.items() if key != "model_type"},
        quantized(QWEN_7B, quant_method="quark"),
        quantized(QWEN_7B, quant_method="compressed-tensors"),
        quantized(QWEN_7B, quant_method="modelopt", quant_algo="MIXED_PRECISION"),
        QWEN_7B | {"quantization_config": "x"},
        # What is no dimension.
        QWEN_7B | {"hidden_size": "3584"},
        QWEN_7B | {"num_attention_heads": 0},
        QWEN_7B | {"num_hidden_layers": [28]},
        QWEN_7B | {"vocab_size": float("inf")},
        QWEN_7B | {"max_position_embeddings": "32k"},
        QWEN_7B | {"head_dim": {"a": 1}},
        QWEN3_30B_A3B | {"num_experts": 2.5},
        QWEN3_30B_A3B | {"decoder_sparse_step": "x"},
        quantized(QWEN_7B, quant_method="awq", bits="4"),
        quantized(QWEN_7B, quant_method="gptq", bits=float("inf")),
        quantized(QWEN_7B, quant_method="compressed-tensors", config_groups={"g": None}),
    ],
)
def test_what_is_not_known_is_left_to_vllm(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(str(tmp_path)) is None
    # No refusal, whatever the GPU.
    small = (Gpu("small", 2 * GIB, 2 * GIB, (8, 0)),)
    assert parallelism(Settings.parse({}), str(tmp_path), small).tensor_parallel_size == 1


def test_what_fits_is_not_refused() -> None:
    def size(config: dict[str, Any], count: int, memory_gib: int) -> int:
        shape = ModelShape.from_config(config)
        cards = (Gpu("card", memory_gib * GIB, memory_gib * GIB, (9, 0)),) * count
        return choose_tensor_parallel_size("model", shape, cards)

    assert size(quantized(QWEN_32B, quant_method="fp8"), 1, 48) == 1
    w4a16 = quantized(QWEN_32B, quant_method="compressed-tensors", config_groups=W4A16)
    assert size(w4a16, 1, 40) == 1
    assert size(quantized(QWEN_7B, quant_method="awq", bits=4), 1, 8) == 1
    assert size(MIXTRAL, 2, 80) == 2
    assert size(QWEN3_30B_A3B, 4, 24) == 4


@pytest.mark.parametrize(
    ("heads", "kv", "sizes"),
    [(40, 10, [1, 2]), (40, 8, [1, 2, 4, 8]), (28, 4, [1, 2, 4]), (64, 2, [1, 2, 4, 8])],
)
def test_kv_heads_are_divided_or_kept_equally_often(heads: int, kv: int, sizes: list[int]) -> None:
    config = QWEN_7B | {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 128}
    assert tensor_parallel_sizes(ModelShape.from_config(config), 8) == sizes


@pytest.mark.parametrize(
    ("value", "tokens"),
    [("32k", 32_000), ("32K", 32_768), ("1.5k", 1500), ("4096", 4096), (4096.0, 4096)],
)
@pytest.mark.server  # It imports vLLM.
def test_a_length_is_read_as_vllm_reads_it(value: Any, tokens: int) -> None:
    from vllm.utils.argparse_utils import human_readable_int

    assert EngineMemory.of({"max_model_len": value}).max_model_len == tokens
    if isinstance(value, str):
        assert human_readable_int(value) == tokens


@pytest.mark.parametrize("value", ["auto", -1, "-1"])
def test_a_context_that_is_made_to_fit_needs_no_room(value: Any) -> None:
    shape = QWEN25["Qwen/Qwen2.5-7B-Instruct"]
    assert needed_bytes(shape, value) == shape.weights_bytes + OVERHEAD_BYTES


@pytest.mark.parametrize("key", ["max_model_len", "kv_cache_memory_bytes", "cpu_offload_gb"])
@pytest.mark.parametrize("value", ["long", [1], True, {}])
def test_what_is_no_number_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"engine.{key} = .*must be a number"):
        EngineMemory.of({key: value})


def test_a_kv_cache_of_a_set_size_is_not_bound_by_the_share_of_memory() -> None:
    name = "Qwen/Qwen2.5-7B-Instruct"
    engine = {"kv_cache_memory_bytes": "5G", "gpu_memory_utilization": 0.05}
    h200 = gpus("H200")
    memory = EngineMemory.of(engine)
    assert choose_tensor_parallel_size(name, QWEN25[name], h200, memory) == 1
    small = EngineMemory.of({"gpu_memory_utilization": 0.05})
    with pytest.raises(ConfigError):
        choose_tensor_parallel_size(name, QWEN25[name], h200, small)


def test_engine_arguments_change_what_is_needed() -> None:
    shape = QWEN25["Qwen/Qwen2.5-7B-Instruct"]
    online = shape.served({"quantization": "fp8"})
    assert online is not None
    assert online.weights_bytes < 0.65 * shape.weights_bytes
    wide = shape.served({"dtype": "float32"})
    assert wide is not None
    assert wide.weights_bytes == 2 * shape.weights_bytes
    assert shape.served({"quantization": "torchao"}) is None
    assert shape.served({"hf_overrides": {"num_hidden_layers": 2}}) is None
    narrow = EngineMemory.of({"kv_cache_dtype": "fp8", "max_model_len": 4096})
    assert needed_bytes(shape, narrow) < needed_bytes(shape, 4096)


MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "sliding_window": 4096,
}


@pytest.mark.parametrize(
    ("config", "engine", "kv_mib"),
    [
        (MISTRAL_7B, {}, 512),  # 128 KiB a token; no more than the window.
        (MISTRAL_7B | {"sliding_window": None}, {}, 4096),
        (QWEN_7B | {"sliding_window": 4096, "use_sliding_window": False}, {}, 1792),
        (QWEN_7B, {"kv_cache_dtype": "auto"}, 1792),
        (QWEN_7B, {"kv_cache_dtype": "fp8_e5m2"}, 896),
        (QWEN_7B, {"kv_cache_dtype": "int8_per_token_head"}, 896),
        (QWEN_7B, {"kv_cache_dtype": "nvfp4"}, 336),
        (QWEN_7B, {"kv_cache_dtype": "bfloat16"}, 1792),
        (quantized(QWEN_7B, quant_method="fp8", kv_cache_scheme={"num_bits": 8}), {}, 896),
        (
            quantized(
                QWEN_7B,
                quant_method="modelopt",
                quantization={"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
            ),
            {},
            896,
        ),
        (
            quantized(QWEN_7B, quant_method="fp8", kv_cache_scheme={"num_bits": 8}),
            {"kv_cache_dtype": "bfloat16"},
            1792,
        ),
    ],
)
def test_the_kv_cache_needs_no_more_than_the_model_keeps(
    config: dict[str, Any], engine: dict[str, Any], kv_mib: int
) -> None:
    shape, memory = ModelShape.from_config(config), EngineMemory.of(engine)
    kv_bytes = needed_bytes(shape, memory, overhead_bytes=0) - shape.weights_bytes
    assert kv_bytes == kv_mib * 2**20


def test_a_gpu_whose_memory_is_not_known_is_left_to_vllm() -> None:
    unknown = (Gpu("NVIDIA GB10", None, None, (12, 1)),)
    name = "Qwen/Qwen2.5-72B-Instruct"
    assert choose_tensor_parallel_size(name, QWEN25[name], unknown) == 1
    with pytest.raises(ConfigError, match="name the model"):
        choose_model(unknown)


@pytest.mark.parametrize(
    ("gpu", "count", "model"),
    [
        ("H100", 1, "7B"),
        ("A10G", 1, "7B"),
        ("L4", 1, "7B"),
        ("T4", 1, "3B"),
        ("T4", 2, "7B"),
    ],
)
def test_auto_takes_the_largest_that_fits(gpu: str, count: int, model: str) -> None:
    assert choose_model(gpus(gpu, count)) == f"Qwen/Qwen2.5-{model}-Instruct"


@pytest.mark.parametrize(
    ("size", "gpu", "count", "tensor_parallel_size"),
    [("7B", "H100", 8, 1), ("72B", "H100", 8, 4), ("72B", "H200", 8, 2), ("7B", "T4", 4, 2)],
)
def test_the_fewest_gpus_that_hold_it(
    size: str, gpu: str, count: int, tensor_parallel_size: int
) -> None:
    name = f"Qwen/Qwen2.5-{size}-Instruct"
    result = choose_tensor_parallel_size(name, QWEN25[name], gpus(gpu, count))
    assert result == tensor_parallel_size


def test_seven_gpus_are_four_for_a_model_with_28_heads() -> None:
    name = "Qwen/Qwen2.5-7B-Instruct"
    tiny = (Gpu("tiny", 8 * GIB, 8 * GIB, (8, 0)),) * 7
    assert choose_tensor_parallel_size(name, QWEN25[name], tiny) == 4


def test_what_does_not_fit_says_needed_found_and_nearest() -> None:
    name = "Qwen/Qwen2.5-72B-Instruct"
    with pytest.raises(ConfigError) as error:
        choose_tensor_parallel_size(name, QWEN25[name], gpus("A10G", 4))
    message = str(error.value)
    needed = needed_bytes(QWEN25[name], None, 4) / GIB
    assert f"needs {needed:.1f} GiB on each of 4 GPUs" in message
    assert "finds 20.7 GiB (4 x A10G)" in message
    assert "take Qwen/Qwen2.5-32B-Instruct" in message


def test_a_shorter_context_makes_room() -> None:
    name = "Qwen/Qwen2.5-7B-Instruct"
    small = (Gpu("small", 17 * GIB, 17 * GIB, (8, 0)),)
    with pytest.raises(ConfigError, match="max_model_len"):
        choose_tensor_parallel_size(name, QWEN25[name], small)
    short = EngineMemory(max_model_len=8192)
    assert choose_tensor_parallel_size(name, QWEN25[name], small, short) == 1
