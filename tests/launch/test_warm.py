"""`python -m serve_app warm`, with an engine that writes files in place of one that compiles."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app import __main__ as commands
from serve_app.caches import engine as caches
from serve_app.launch import warm
from serve_app.planning.hardware import Gpu
from serve_app.planning.plan import decide_on
from serve_app.settings import Settings

GPU = Gpu("NVIDIA H200", 140 * 2**30, 139 * 2**30, (9, 0), "570.1")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    shape = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "model.safetensors").write_bytes(b"0" * 64)
    return folder


def compile_into(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "kernel").write_bytes(b"compiled")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for variable in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SERVE_APP_COMPILED", str(tmp_path / "here"))
    for module in (caches, warm):
        monkeypatch.setattr(module, "local_gpus", lambda: (GPU,))

    async def start_once(arguments: dict[str, Any]) -> None:
        compile_into(Path(os.environ["TRITON_CACHE_DIR"]))

    monkeypatch.setattr(warm, "_start_once", start_once)
    # What is set for the engine is set in this process.
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def configuration(tmp_path: Path, model: Path, **args: Any) -> Path:
    path = tmp_path / "serve_config.yaml"
    application = {"import_path": "serve_app:build", "args": {"model": str(model), **args}}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def test_replicas_fetch_what_was_compiled_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = configuration(tmp_path, model, engine={"max_num_seqs": 32})
    address = str(tmp_path / "volume")
    assert commands.main(["warm", "--config", str(config), "--to", address]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["found"] == "nothing"
    assert told["to"] == address
    # Another machine, and a replica of the same configuration.
    monkeypatch.setenv("SERVE_APP_COMPILED", str(tmp_path / "there"))
    for variable in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "VLLM_ENABLE_STARTUP_PLAN"):
        monkeypatch.delenv(variable, raising=False)
    settings = Settings.parse({"model": str(model), "engine": {"max_num_seqs": 32}})
    plan = decide_on(settings, [warm.Node((GPU,))])
    arguments = plan.engine_arguments(settings)
    cache = caches.prepare(arguments, plan.placement.num_gpus, address)
    assert cache is not None
    assert cache.origin == "fetched"
    assert (cache.folder / "triton" / "kernel").read_bytes() == b"compiled"
    cache.close()
    # With other arguments there is nothing to fetch.
    other = caches.prepare({**arguments, "max_num_seqs": 64}, 1, address)
    assert other is not None
    assert other.origin == "nothing"
    # Nor where the weights are another process's, which changes what is measured.
    kept = caches.prepare(arguments, 1, address, keep_weights=True)
    assert kept is not None
    assert kept.origin == "nothing"


def test_an_address_is_needed(tmp_path: Path, model: Path, capsys: Any) -> None:
    assert commands.main(["warm", "--config", str(configuration(tmp_path, model))]) == 2
    assert "compiled" in capsys.readouterr().err


def test_the_job_of_kubernetes_warms_what_the_overlay_serves() -> None:
    root = Path(__file__).parent.parent.parent / "kuberay"
    config, job = yaml.safe_load_all((root / "warm.yaml").read_text())
    warmed = yaml.safe_load(config["data"]["serve_config.yaml"])["applications"][0]["args"]
    service = yaml.safe_load((root / "overlays" / "one-gpu" / "serve.yaml").read_text())
    served = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    mine, theirs = Settings.parse(warmed), Settings.parse(served)
    assert mine.model == theirs.model
    assert mine.engine == theirs.engine
    assert mine.tensor_parallel_size == theirs.tensor_parallel_size
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][:4] == ["python", "-m", "serve_app", "warm"]
    mounted = {each["name"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in job["spec"]["template"]["spec"]["volumes"]}


def test_replicas_that_keep_their_weights_fetch_what_was_compiled_for_them(
    tmp_path: Path, model: Path, capsys: Any
) -> None:
    config = configuration(tmp_path, model, keep_weights=True)
    assert commands.main(["warm", "--config", str(config), "--to", str(tmp_path / "volume")]) == 0
    settings = Settings.parse({"model": str(model), "keep_weights": True})
    arguments = decide_on(settings, [warm.Node((GPU,))]).engine_arguments(settings)
    described = caches.description(arguments, 1, settings.keep_weights)
    assert json.loads(capsys.readouterr().out)["key"] == caches.keys.key(described)
