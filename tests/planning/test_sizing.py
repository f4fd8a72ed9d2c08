"""Memory from config.json: exact parameter counts, and what fits where."""

import pytest

from serve_app.errors import ConfigError
from serve_app.planning.hardware import ACCELERATORS, Gpu
from serve_app.planning.sizing import (
    GIB,
    QWEN25,
    ModelShape,
    choose_model,
    choose_tensor_parallel_size,
    needed_bytes,
)


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


def test_quantized_weights_count_their_bits() -> None:
    config = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "quantization_config": {"bits": 4},
    }
    shape = ModelShape.from_config(config)
    assert shape.weights_bytes == shape.parameters // 2


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
    found = choose_tensor_parallel_size(name, QWEN25[name], gpus(gpu, count))
    assert found == tensor_parallel_size


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
    small = (Gpu("small", 19 * GIB, 19 * GIB, (8, 0)),)
    with pytest.raises(ConfigError, match="max_model_len"):
        choose_tensor_parallel_size(name, QWEN25[name], small)
    assert choose_tensor_parallel_size(name, QWEN25[name], small, max_model_len=8192) == 1
