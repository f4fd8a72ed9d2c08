"""What a replica is told, from settings and hardware."""

from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ConfigError
from serve_app.planning import kernels, plan
from serve_app.planning.hardware import Gpu, Node
from serve_app.planning.kernels import Tools
from serve_app.planning.placement import place
from serve_app.planning.plan import Plan, decide_on
from serve_app.planning.sizing import GIB
from serve_app.settings import Settings


def on_cpu(model: Path) -> Plan:
    return Plan(str(model), "tiny", place(1, 1, 0, 1.0), cpu_threads=3)


@pytest.mark.parametrize(("has", "dtype"), [(True, None), (False, "float32")])
def test_a_processor_without_bfloat16_gets_float32(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, has: bool, dtype: str | None
) -> None:
    monkeypatch.setattr(plan, "has_bfloat16", lambda: has)
    assert on_cpu(tiny_config).engine_arguments(Settings.parse({})).get("dtype") == dtype
    # What the user says comes first.
    request = Settings.parse({"engine": {"dtype": "bfloat16"}})
    assert on_cpu(tiny_config).engine_arguments(request)["dtype"] == "bfloat16"


def test_on_the_cpu_the_engine_is_one_process_that_compiles_nothing(tiny_config: Path) -> None:
    what = on_cpu(tiny_config)
    assert what.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert what.environment["TORCHDYNAMO_DISABLE"] == "1"
    assert what.environment["OMP_NUM_THREADS"] == "3"
    assert what.engine_arguments(Settings.parse({}))["enforce_eager"] is True
    on_gpu = Plan(str(tiny_config), "tiny", place(1, 1, 1, 1.0), cpu_threads=None)
    assert on_gpu.environment == {}
    assert "enforce_eager" not in on_gpu.engine_arguments(Settings.parse({}))


def test_attention_that_cannot_be_compiled_is_replaced(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "tools", Tools)
    blackwell = Plan(str(tiny_config), "tiny", place(1, 1, 1), None, compute_capability=(10, 0))
    assert blackwell.engine_arguments(Settings.parse({}))["attention_backend"] == "FLASH_ATTN"
    request = Settings.parse({"engine": {"attention_backend": "TRITON_ATTN"}})
    assert blackwell.engine_arguments(request)["attention_backend"] == "TRITON_ATTN"


GPU = Gpu("L4", 24 * GIB, 24 * GIB, (8, 9))


def sleeping(models: int = 1, **args: Any) -> Settings:
    return Settings.parse({"sleep": {"after_s": 60.0, "models_per_gpu": models}, **args})


def test_an_engine_that_may_sleep_has_the_gpu_and_vllms_sleep_mode(tiny_config: Path) -> None:
    settings = sleeping(model=str(tiny_config))
    plan = decide_on(settings, [Node((GPU,))])
    arguments = plan.engine_arguments(settings)
    assert arguments["enable_sleep_mode"] is True
    assert "gpu_memory_utilization" not in arguments
    assert plan.deployment_options(settings)["ray_actor_options"]["num_gpus"] == 1
    assert "enable_sleep_mode" not in plan.engine_arguments(Settings.parse({}))


@pytest.mark.parametrize(("models", "share", "utilization"), [(2, 0.5, 0.875), (6, 0.1666, 0.375)])
def test_models_that_share_a_gpu_leave_room_for_those_that_sleep(
    tiny_config: Path, models: int, share: float, utilization: float
) -> None:
    settings = sleeping(models, model=str(tiny_config))
    plan = decide_on(settings, [Node((GPU,))])
    assert plan.deployment_options(settings)["ray_actor_options"]["num_gpus"] == share
    assert plan.engine_arguments(settings)["gpu_memory_utilization"] == utilization
    own = sleeping(models, engine={"gpu_memory_utilization": 0.3})
    assert plan.engine_arguments(own)["gpu_memory_utilization"] == 0.3


def test_a_model_fits_only_beside_those_that_sleep() -> None:
    model = {"model": "Qwen/Qwen2.5-7B-Instruct", "tensor_parallel_size": "auto"}
    room = {"engine": {"max_model_len": 4096}}
    assert decide_on(sleeping(2, **model, **room), [Node((GPU,))]).placement.num_gpus == 1
    with pytest.raises(ConfigError, match=r"needs .* GiB on each"):
        decide_on(sleeping(6, **model, **room), [Node((GPU,))])


def test_kept_weights_need_an_engine_on_one_node(tiny_config: Path) -> None:
    settings = Settings.parse(
        {"keep_weights": True, "model": str(tiny_config), "pipeline_parallel_size": 2}
    )
    assert decide_on(settings, [Node((GPU, GPU))]).placement.num_gpus == 2
    assert decide_on(settings, []).placement.num_gpus == 0  # It has no effect there.
    with pytest.raises(ConfigError, match="keep_weights = True: an engine on several nodes"):
        decide_on(settings, [Node((GPU,))] * 2)


@pytest.mark.parametrize(
    ("models", "nodes", "sizes", "sentence"),
    [
        (1, [], {}, "vLLM has no sleep mode without a GPU"),
        (2, [Node((GPU, GPU))], {"tensor_parallel_size": 2}, "an engine of this model takes 2"),
        (1, [Node((GPU,))] * 2, {"pipeline_parallel_size": 2}, "an engine on several nodes"),
    ],
)
def test_engines_that_cannot_sleep_are_refused(
    tiny_config: Path, models: int, nodes: list[Node], sizes: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        decide_on(sleeping(models, model=str(tiny_config), **sizes), nodes)
