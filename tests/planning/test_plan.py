"""What a replica is told, from settings and hardware."""

from pathlib import Path

import pytest

from serve_app.planning import kernels, plan
from serve_app.planning.kernels import Tools
from serve_app.planning.placement import place
from serve_app.planning.plan import Plan
from serve_app.settings import Settings


def on_cpu(model: Path) -> Plan:
    return Plan(str(model), "tiny", place(1, 1, 0, 1.0), cpu_threads=3)


@pytest.mark.parametrize(("has", "dtype"), [(True, None), (False, "float32")])
def test_a_processor_without_bfloat16_gets_float32(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, has: bool, dtype: str | None
) -> None:
    monkeypatch.setattr(plan, "has_bfloat16", lambda: has)
    assert on_cpu(tiny).engine_arguments(Settings.parse({})).get("dtype") == dtype
    # What the user says comes first.
    request = Settings.parse({"engine": {"dtype": "bfloat16"}})
    assert on_cpu(tiny).engine_arguments(request)["dtype"] == "bfloat16"


def test_on_the_cpu_the_engine_is_one_process_that_compiles_nothing(tiny: Path) -> None:
    what = on_cpu(tiny)
    assert what.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert what.environment["TORCHDYNAMO_DISABLE"] == "1"
    assert what.environment["OMP_NUM_THREADS"] == "3"
    assert what.engine_arguments(Settings.parse({}))["enforce_eager"] is True
    on_gpu = Plan(str(tiny), "tiny", place(1, 1, 1, 1.0), cpu_threads=None)
    assert on_gpu.environment == {}
    assert "enforce_eager" not in on_gpu.engine_arguments(Settings.parse({}))


def test_attention_that_cannot_be_compiled_is_replaced(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "tools", Tools)
    blackwell = Plan(str(tiny), "tiny", place(1, 1, 1), None, compute_capability=(10, 0))
    assert blackwell.engine_arguments(Settings.parse({}))["attention_backend"] == "FLASH_ATTN"
    request = Settings.parse({"engine": {"attention_backend": "TRITON_ATTN"}})
    assert blackwell.engine_arguments(request)["attention_backend"] == "TRITON_ATTN"
