"""For which engine a cache is good."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.caches import key as keys
from serve_app.caches.cache import Cache
from serve_app.planning.hardware import Gpu

GPU = Gpu("NVIDIA H200", 140 * 2**30, 139 * 2**30, (9, 0), "570.1")


def key(arguments: dict[str, Any], gpus: Any = (GPU,), environ: Any = None) -> str:
    return keys.key(keys.describe(arguments, gpus, environ or {}))


def test_what_changes_an_engine_changes_the_key(model: Path, monkeypatch: Any) -> None:
    asked = {"model": str(model), "gpu_memory_utilization": 0.5, "max_num_seqs": 256}
    found = {key(asked)}
    found.add(key({**asked, "gpu_memory_utilization": 0.9}))
    found.add(key({**asked, "max_num_seqs": 128}))
    found.add(key({**asked, "quantization": "fp8"}))
    found.add(key(asked, (GPU, GPU)))
    found.add(key(asked, (replace(GPU, name="NVIDIA H100"),)))
    found.add(key(asked, (replace(GPU, memory_bytes=80 * 2**30),)))
    found.add(key(asked, (replace(GPU, driver_version="580.1"),)))
    found.add(key(asked, environ={"VLLM_USE_DEEP_GEMM": "0"}))
    (model / "model.safetensors").write_bytes(b"0" * 101)
    found.add(key(asked))
    (model / "config.json").write_text('{"hidden_size": 128}')
    found.add(key(asked))
    monkeypatch.setattr(keys, "versions", lambda: {"vllm": "0.33.0"})
    found.add(key(asked))
    assert len(found) == 12


def test_what_does_not_leaves_it(model: Path) -> None:
    asked = {"model": str(model), "max_num_seqs": 256}
    same = {**asked, "served_model_name": "other", "tool_call_parser": "hermes"}
    assert key(same) == key(asked)
    assert key(asked, (replace(GPU, free_bytes=1),)) == key(asked)
    assert key(asked, environ={"VLLM_LOGGING_LEVEL": "DEBUG"}) == key(asked)
    moved = model.rename(model.with_name("elsewhere"))
    assert key({**asked, "model": str(moved)}) == key({**asked, "model": str(moved)})


def test_the_same_weights_in_another_folder_are_the_same(model: Path) -> None:
    before = keys.identity(str(model))
    assert keys.identity(str(model.rename(model.with_name("elsewhere")))) == before
    assert keys.identity("s3://bucket/a") != keys.identity("s3://bucket/b")


# --- weights that stay on GPUs --------------------------------------------------------------------


def weights_key(arguments: Any = None, devices: Any = ("0",), environ: Any = None) -> str:
    asked = {"model": "/a", "max_num_seqs": 256, **(arguments or {})}
    return keys.key(keys.describe_weights("content", asked, devices, environ or {}))


def test_what_may_change_weights_changes_their_key(monkeypatch: Any) -> None:
    found = {weights_key()}
    found.add(keys.key(keys.describe_weights("other", {"model": "/a"}, ("0",), {})))
    for arguments in (
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"tensor_parallel_size": 2},
        {"load_format": "dummy"},
        {"max_model_len": 4096},  # Tables of rotary embeddings may depend on it.
        {"an_argument_of_a_later_vllm": 1},
    ):
        found.add(weights_key(arguments))
    found.add(weights_key(devices=("1",)))
    found.add(weights_key(devices=("0", "1")))
    found.add(weights_key(devices=("1", "0")))
    found.add(weights_key(environ={"VLLM_TEST_FORCE_FP8_MARLIN": "1"}))
    monkeypatch.setattr(keys, "versions", lambda: {"vllm": "0.33.0"})
    found.add(weights_key())
    assert len(found) == 13


def test_what_cannot_change_weights_leaves_their_key() -> None:
    same = {
        "model": "/b",
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.5,
        "served_model_name": ["x"],
        "enforce_eager": True,
    }
    # The folder of compiled kernels depends on all arguments.
    environ = {"VLLM_CACHE_ROOT": "/c", "VLLM_ENABLE_STARTUP_PLAN": "1", "HOME": "/d"}
    assert weights_key(same, environ=environ) == weights_key()


# --- the memory for the KV cache, which vLLM keeps in it --------------------------------------


def plan_of(monkeypatch: Any, tmp_path: Path, utilization: float) -> Any:
    """vLLM's startup plan in the cache of an engine with this utilization."""
    from vllm.v1.worker import startup_plan

    name = key({"model": "s3://bucket/model", "gpu_memory_utilization": utilization})
    for variable, value in Cache.prepare(tmp_path, name).environment({}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(startup_plan, "compute_plan_fingerprint", lambda *_: "fingerprint")
    return startup_plan


def worker(free_bytes: int) -> Any:
    return SimpleNamespace(
        vllm_config=None,
        rank=0,
        parallel_config=SimpleNamespace(world_size=1),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None),
        init_snapshot=SimpleNamespace(free_memory=free_bytes),
    )


@pytest.mark.server  # It imports vLLM or torch.
def test_the_kv_cache_is_measured_once(monkeypatch: Any, tmp_path: Path) -> None:
    plan = plan_of(monkeypatch, tmp_path, 0.9)
    first = worker(100)
    plan.maybe_apply_startup_plan(first)
    assert first.cache_config.kv_cache_memory_bytes is None
    plan.maybe_save_startup_plan(first, 77)
    second = worker(100)
    plan.maybe_apply_startup_plan(second)
    assert second.cache_config.kv_cache_memory_bytes == 77


@pytest.mark.server  # It imports vLLM or torch.
def test_with_less_free_memory_it_is_measured_again(monkeypatch: Any, tmp_path: Path) -> None:
    plan = plan_of(monkeypatch, tmp_path, 0.9)
    plan.maybe_save_startup_plan(worker(100), 77)
    second = worker(99)
    plan.maybe_apply_startup_plan(second)
    assert second.cache_config.kv_cache_memory_bytes is None


@pytest.mark.server  # It imports vLLM or torch.
def test_a_size_that_was_measured_for_less_of_the_gpu_is_not_used(
    monkeypatch: Any, tmp_path: Path
) -> None:
    """vLLM's own fingerprint leaves gpu_memory_utilization out."""
    plan_of(monkeypatch, tmp_path, 0.5).maybe_save_startup_plan(worker(100), 30)
    second = worker(100)
    plan_of(monkeypatch, tmp_path, 0.9).maybe_apply_startup_plan(second)
    assert second.cache_config.kv_cache_memory_bytes is None


@pytest.mark.server  # It imports vLLM or torch.
def test_a_damaged_plan_is_not_used(monkeypatch: Any, tmp_path: Path) -> None:
    plan = plan_of(monkeypatch, tmp_path, 0.9)
    plan.maybe_save_startup_plan(worker(100), 77)
    path = Path(plan._plan_path("fingerprint"))
    whole = path.read_text()
    for size in range(len(whole)):
        path.write_text(whole[:size])
        second = worker(100)
        plan.maybe_apply_startup_plan(second)
        assert second.cache_config.kv_cache_memory_bytes is None
