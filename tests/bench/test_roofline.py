"""The least times, against figures worked out by hand for the published Qwen2.5-7B."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.errors import BenchError
from bench.hardware import roofline
from bench.hardware.roofline import Ceilings
from bench.matrix import Matrix, Measured, with_roofline
from bench.measure import Measures
from bench.traffic.workload import Cell

QWEN_7B = {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
CEILINGS = Ceilings(flops_per_s=700e12, bytes_per_s=3e12, source="a test")


def of(folder: Path, **changed: Any) -> roofline.Shape:
    (folder / "config.json").write_text(json.dumps(QWEN_7B | changed))
    return roofline.shape(folder)


def test_the_sizes_of_a_model_are_those_it_was_published_with(tmp_path: Path) -> None:
    shape = of(tmp_path)
    # 7.62 billion weights, of which the embedding table is not read in a step.
    assert shape.stored_bytes / 2 == pytest.approx(7.615e9, rel=2e-3)
    assert shape.read_bytes / 2 == pytest.approx(7.615e9 - 152064 * 3584, rel=2e-3)
    assert shape.token_bytes == 28 * 4 * 128 * 2 * 2  # 56 KiB
    tied = of(tmp_path, tie_word_embeddings=True)
    assert shape.stored_bytes - tied.stored_bytes == 152064 * 3584 * 2
    assert tied.read_bytes == shape.read_bytes


def test_tensor_parallelism_shares_weights_and_no_more_key_heads_than_there_are(
    tmp_path: Path,
) -> None:
    shape = of(tmp_path)
    two, eight = (msgspec.structs.replace(shape, gpus=gpus) for gpus in (2, 8))
    assert two.read_bytes == pytest.approx(shape.read_bytes / 2)
    assert two.token_bytes == shape.token_bytes / 2
    # Four key and value heads on eight GPUs: each keeps one, so half as many bytes as four would.
    assert eight.token_bytes == shape.token_bytes / 4
    assert eight.layer_weights > shape.layer_weights / 8


def test_decode_reads_and_prefill_computes(tmp_path: Path) -> None:
    shape = of(tmp_path)
    first = roofline.decode(shape, 1, 0)
    assert first.least_s(CEILINGS) == pytest.approx(shape.read_bytes / 3e12, rel=1e-4)
    assert first.flops == pytest.approx(shape.read_bytes)  # Two operations for two bytes.
    full = roofline.decode(shape, 256, 4000)
    kv_bytes = 256 * 4001 * shape.token_bytes
    assert full.bytes == pytest.approx(shape.read_bytes + kv_bytes)
    prompt = roofline.prefill(shape, 2000)
    # Weights, and attention to half of 2000 tokens from each of them; one token is sampled.
    attention = 4 * 28 * 28 * 128 * 2000 * 1000
    weights = 2 * 2000 * shape.layer_weights + 2 * shape.head_weights
    assert prompt.flops == pytest.approx(weights + attention)
    assert prompt.flops / 700e12 > prompt.bytes / 3e12


def test_what_is_kept_in_fewer_bytes_is_read_sooner(tmp_path: Path) -> None:
    shape = of(tmp_path)
    remaining = roofline.storage(
        {"quantization": "fp8", "kv_cache_dtype": "fp8", "dtype": "bfloat16"}
    )
    small = msgspec.structs.replace(shape, **remaining)
    assert small.token_bytes == shape.token_bytes / 2
    assert small.read_bytes == pytest.approx(shape.read_bytes / 2 + shape.head_weights)
    assert roofline.storage({"dtype": "float32"})["weight_bytes"] == 4.0
    assert roofline.storage({"tensor_parallel_size": 4})["gpus"] == 4


def test_what_bounds_a_step_is_what_takes_most_of_it(tmp_path: Path) -> None:
    shape = of(tmp_path)
    work = roofline.decode(shape, 1, 200)
    least_s = work.least_s(CEILINGS)
    near = roofline.judge(work, least_s * 1.25, CEILINGS)
    assert near.bound == "memory-bound"
    assert near.mbu == pytest.approx(0.8)
    assert near.times == pytest.approx(4.0)
    assert "80%" in near.text
    far = roofline.judge(work, least_s * 4, CEILINGS)
    assert far.bound == "host-bound"
    assert far.times == pytest.approx(3.0)
    # A profile that saw the GPU busy all the time knows better: its kernels are slow.
    assert roofline.judge(work, least_s * 4, CEILINGS, busy=1.0).bound == "memory-bound"
    prompt = roofline.prefill(shape, 2000)
    read = roofline.judge(prompt, prompt.least_s(CEILINGS) * 1.5, CEILINGS)
    assert read.bound == "compute-bound"
    assert read.mfu == pytest.approx(1 / 1.5)


def test_results_get_their_shares(tmp_path: Path) -> None:
    shape = of(tmp_path)
    step_s = 2 * roofline.decode(shape, 4, 225).least_s(CEILINGS)
    repeat = Measures(
        ok=4,
        input_tokens=800,
        output_tokens=200,
        tpot_mean_s=step_s,
        ttft_mean_s=0.05,
        output_tokens_per_s=4 / step_s,
        requests_per_s=4 / step_s / 50,
        cached_tokens=0,
    )
    cell = Cell(name="", workload="", users=4, input_tokens=200, output_tokens=50)
    alone = Matrix(
        benchmark="baseline",
        cells=[Measured(cell=cell, repeats=[repeat], whole=[repeat], summary={})],
    )
    alone = with_roofline(alone, shape, CEILINGS)
    allowed = alone.cells[0].roofline
    assert allowed is not None
    assert allowed.decode.mbu == pytest.approx(0.5, rel=1e-3)
    assert allowed.prefill.mfu == pytest.approx(
        roofline.prefill(shape, 200, 4).flops / 700e12 / 0.05
    )
    assert allowed.step is None
    # Under load a step also reads its share of a prompt: it does more in the same time.
    served = with_roofline(Matrix(cells=alone.cells), shape, CEILINGS)
    step = roofline.of_run(shape, CEILINGS, [repeat]).step
    assert step.mfu > allowed.decode.mfu
    assert served.cells[0].roofline.step == step
    assert roofline.of_run(shape, CEILINGS, []).step is None


def test_a_data_sheet_is_found_by_what_the_driver_calls_the_gpu() -> None:
    assert roofline.of_gpu("NVIDIA H100 80GB HBM3").bytes_per_s == 3.35e12
    with pytest.raises(BenchError, match="H100"):
        roofline.of_gpu("H10")
    with pytest.raises(BenchError, match="no such GPU"):
        roofline.of_gpu("Voodoo")


def test_a_folder_without_sizes_is_an_error_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"config\.json"):
        roofline.shape(tmp_path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    with pytest.raises(BenchError, match="lacks a size"):
        roofline.shape(tmp_path)
