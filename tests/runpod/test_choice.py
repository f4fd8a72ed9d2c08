"""What a machine is made to serve: parallelism, keys in the three modes, ports, time limits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import choice
from choice import Choice
from serve_app.errors import ConfigError
from serve_app.planning.hardware import Gpu
from serve_app.settings import Settings
from tests.runpod.test_cache import cached
from tests.server import ROOT

# The dimensions of Qwen2.5-72B.
LARGE = {
    "model_type": "qwen2",
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}
CONFIG = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
L4 = Gpu("NVIDIA L4", 23034 * 2**20, 23034 * 2**20, (8, 9))
H100 = Gpu("NVIDIA H100", 81559 * 2**20, 81559 * 2**20, (9, 0))


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No model hub; a volume in a folder."""

    def fetch(model: str, revision: str | None, folder: Path) -> Path:
        return cached(folder, model)

    monkeypatch.setattr(choice.cache, "fetch", fetch)
    monkeypatch.setattr(choice.cache, "configuration", lambda *words: None)
    monkeypatch.setattr(choice.cache, "missing_bytes", lambda *words: None)
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


def chosen(hub: Path, gpus: tuple[Gpu, ...] = (), **environ: str) -> Choice:
    environ = {"BASE_PATH": str(hub), "API_KEYS": "k1,k2", **environ}
    return choice.choose(CONFIG, environ, gpus)


def args(expected: Choice) -> Mapping[str, Any]:
    result: Mapping[str, Any] = expected.config["applications"][0]["args"]
    Settings.parse(result)
    return result


@pytest.mark.parametrize(
    ("model", "gpus", "parallel", "replicas"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 1, 1, 1),
        ("Qwen/Qwen2.5-7B-Instruct", 8, 1, 8),
        ("Qwen/Qwen2.5-14B-Instruct", 4, 2, 2),
        # 14 heads: 4 and 8 do not divide them, and one holds it.
        ("Qwen/Qwen2.5-0.5B-Instruct", 4, 1, 4),
        ("Qwen/Qwen2.5-32B-Instruct", 8, 4, 2),
        ("Qwen/Qwen2.5-32B-Instruct", 6, 4, 1),
    ],
)
def test_the_fewest_gpus_that_hold_it_and_as_many_replicas_as_fit(
    hub: Path, model: str, gpus: int, parallel: int, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The configurations of the published models; the folder of the test has none.
    from serve_app.planning import plan

    monkeypatch.setattr(plan, "shape_of", lambda folder, engine: plan.QWEN25[model])
    selected = chosen(hub, (L4,) * gpus, MODEL_NAME=model)
    assert args(selected)["tensor_parallel_size"] == parallel
    assert selected.settings.replicas.max == replicas


def test_a_model_that_does_not_fit_is_refused_with_the_nearest(hub: Path) -> None:
    small = Gpu("small", 2**29, 2**29, (8, 0))
    with pytest.raises(ConfigError, match=r"needs .* GiB on each of"):
        chosen(hub, (small, small))


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"MODEL_NAME": "Qwen/Qwen2.5-32B-Instruct"}, "needs .* GiB on each of"),
        # What is asked for is not believed either.
        (
            {"MODEL_NAME": "Qwen/Qwen2.5-32B-Instruct", "TENSOR_PARALLEL_SIZE": "1"},
            "TENSOR_PARALLEL_SIZE = 1: Qwen/Qwen2.5-32B-Instruct needs .* GiB on each of 1 GPU",
        ),
        (
            {"MODEL_NAME": "Qwen/Qwen2.5-7B-Instruct", "MAX_MODEL_LEN": "200k"},
            "needs .* GiB on each of",
        ),
        (
            {"MODEL_NAME": "org/its-config-is-fetched", "TENSOR_PARALLEL_SIZE": "1"},
            "org/its-config-is-fetched needs .* GiB on each of",
        ),
    ],
)
def test_what_the_gpus_cannot_hold_is_not_fetched(
    hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    problem: str,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    monkeypatch.setattr(choice.cache, "configuration", lambda *words: tmp_path)
    monkeypatch.setattr(choice.cache, "fetch", lambda *words: pytest.fail("it was fetched"))
    with pytest.raises(ConfigError, match=problem):
        chosen(hub, (L4,), **variables)


@pytest.mark.parametrize(
    "variables",
    [
        # In fewer bits, or partly in main memory: how much stays is for vLLM to say.
        {"QUANTIZATION": "bitsandbytes", "TENSOR_PARALLEL_SIZE": "1"},
        {"CPU_OFFLOAD_GB": "60", "TENSOR_PARALLEL_SIZE": "1"},
        {"MODEL_NAME": "org/of-unknown-size", "TENSOR_PARALLEL_SIZE": "1"},
        {"MODEL_NAME": "Qwen/Qwen2.5-7B-Instruct", "MAX_MODEL_LEN": "auto"},
        {"MODEL_NAME": "Qwen/Qwen2.5-7B-Instruct", "MAX_MODEL_LEN": "32K"},
    ],
)
def test_what_may_fit_is_fetched(hub: Path, variables: dict[str, str]) -> None:
    request = {"MODEL_NAME": "Qwen/Qwen2.5-32B-Instruct", **variables}
    assert args(chosen(hub, (L4,), **request))["tensor_parallel_size"] == 1


def test_what_the_disk_cannot_hold_is_not_fetched(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice.cache, "missing_bytes", lambda *words: 15 * 10**9)
    monkeypatch.setattr(choice.cache, "free_bytes", lambda folder: 10**10)
    monkeypatch.setattr(choice.cache, "fetch", lambda *words: pytest.fail("it was fetched"))
    with pytest.raises(ConfigError, match=r"15\.0 GB are to be fetched and .* has room for 10\.0"):
        chosen(hub, MODEL_NAME="org/model")


def test_a_model_that_is_here_needs_no_disk(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.cache, "missing_bytes", lambda *words: pytest.fail("asked"))
    cached(hub / "huggingface-cache" / "hub", "org/model")
    assert chosen(hub, MODEL_NAME="org/model").served_model_name == "org/model"


def test_what_is_asked_for_stays(hub: Path) -> None:
    selected = chosen(hub, (H100,) * 8, MODEL_NAME="o/m", REPLICAS="2", TENSOR_PARALLEL_SIZE="4")
    assert args(selected)["tensor_parallel_size"] == 4
    assert selected.settings.replicas.max == 2


def test_a_replica_that_needs_two_machines_is_refused(hub: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit one machine with 2"):
        chosen(
            hub,
            (H100, H100),
            MODEL_NAME="o/m",
            PIPELINE_PARALLEL_SIZE="2",
            TENSOR_PARALLEL_SIZE="2",
        )


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"TENSOR_PARALLEL_SIZE": "4"}, "4 GPUs does not fit one machine with 3"),
        ({"TENSOR_PARALLEL_SIZE": "3"}, "does not divide the 28 attention heads"),
        (
            {"GPU_MEMORY_UTILIZATION": "95"},
            "gpu_memory_utilization = 95.*must be above 0, and 1 at most",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_a_download(
    hub: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], problem: str
) -> None:
    monkeypatch.setattr(choice.cache, "fetch", lambda *words: pytest.fail("it was fetched"))
    with pytest.raises(ConfigError, match=problem):
        chosen(hub, (H100,) * 3, MODEL_NAME="Qwen/Qwen2.5-7B-Instruct", **environ)


# --- keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [None, "", " , "])
def test_a_pod_without_keys_does_not_start(hub: Path, keys: str | None) -> None:
    environ = {"BASE_PATH": str(hub)} | ({} if keys is None else {"API_KEYS": keys})
    with pytest.raises(ConfigError, match="a pod's address is public"):
        choice.choose(CONFIG, environ, ())


def test_no_setting_opens_a_pod(hub: Path) -> None:
    with pytest.raises(ConfigError, match="a pod's address is public"):
        chosen(hub, API_KEYS="", SERVE_ARGS="{allow_unauthenticated_network: true}")


def test_a_pod_with_keys_asks_for_them(hub: Path) -> None:
    selected = chosen(hub)
    assert selected.mode == "pod"
    assert args(selected)["api_keys"]["env"] == "API_KEYS"
    assert selected.key == "k1"
    assert selected.config["http_options"]["host"] == "0.0.0.0"


def test_keys_can_be_in_a_file(hub: Path) -> None:
    file = hub / "keys"
    file.write_text("# ours\nfrom-file\n")
    environ = {"BASE_PATH": str(hub), "SERVE_ARGS": f"{{api_keys: {{file: {file}}}}}"}
    assert choice.choose(CONFIG, environ, ()).key == "from-file"


def test_a_load_balancer_may_go_without_and_says_so(hub: Path) -> None:
    environ = {"BASE_PATH": str(hub), "SERVE_MODE": "load_balancer"}
    selected = choice.choose(CONFIG, environ, ())
    assert args(selected)["allow_unauthenticated_network"] is True
    assert any("no API_KEYS" in line for line in selected.lines)
    selected = choice.choose(CONFIG, {**environ, "API_KEYS": "k"}, ())
    assert args(selected)["api_keys"]["env"] == "API_KEYS"
    assert args(selected)["allow_unauthenticated_network"] is False
    # Named and empty: nobody gets in, rather than everybody.
    selected = choice.choose(CONFIG, {**environ, "API_KEYS": ""}, ())
    assert args(selected)["api_keys"]["env"] == "API_KEYS"
    assert args(selected)["allow_unauthenticated_network"] is False


def test_a_queue_is_reached_from_its_machine_alone(hub: Path) -> None:
    selected = chosen(hub, SERVE_MODE="queue")
    assert selected.config["http_options"]["host"] == "127.0.0.1"
    assert "api_keys" not in args(selected)
    assert selected.key is None


# --- the rest -------------------------------------------------------------------------------


def test_the_name_of_a_cached_model_is_its_hub_id(hub: Path) -> None:
    folder = cached(hub / "huggingface-cache" / "hub", "org/model")
    selected = chosen(hub, MODEL_NAME="org/model")
    assert args(selected)["model"] == str(folder)
    assert selected.served_model_name == "org/model"
    assert selected.offline
    assert not chosen(hub, MODEL_NAME="org/model", TOKENIZER_NAME="org/other").offline


def test_a_folder_is_left_where_it_is(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    selected = chosen(hub, MODEL_NAME=str(tmp_path / "mine"))
    assert args(selected)["model"] == str(tmp_path / "mine")
    assert selected.served_model_name == "mine"


def test_a_stop_fits_into_its_grace(hub: Path) -> None:
    assert args(chosen(hub, STOP_GRACE_S="30"))["drain_s"] == 15
    assert args(chosen(hub, SERVE_ARGS="{drain_s: 3.0}"))["drain_s"] == 3


def test_an_answer_ends_before_the_balancer_cuts_it(hub: Path) -> None:
    selected = chosen(hub, SERVE_MODE="load_balancer")
    assert selected.settings.limits.request_timeout_s == 320
    assert chosen(hub).settings.limits.request_timeout_s == 600


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"SERVE_MODE": "podd"}, "SERVE_MODE = 'podd'.* did you mean 'pod'"),
        ({"PORT": "8001"}, "PORT_HEALTH = 8001: must differ from PORT"),
        ({"PORT": "http"}, "PORT = 'http': must be a port"),
        ({"MAX_CONCURRENCY": "many"}, "MAX_CONCURRENCY = 'many': must be a number of jobs"),
        ({"VLLM_STARTUP_TIMEOUT": "soon"}, "VLLM_STARTUP_TIMEOUT = 'soon': must be a number"),
        ({"STOP_GRACE_S": "5"}, "STOP_GRACE_S = '5': must be"),
        ({"MAX_MODEL_LEN": "8192", "SERVE_ARGS": "{limit: {}}"}, "did you mean 'limits'"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    hub: Path, environ: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        chosen(hub, **environ)
