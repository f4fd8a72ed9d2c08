"""serve_config.yaml's args: what is accepted, and the sentence that refuses the rest."""

from pathlib import Path

import pytest
import yaml

from serve_app.errors import ConfigError
from serve_app.settings import Settings

CONFIG = Path(__file__).parent.parent / "serve_config.yaml"


def test_the_shipped_configuration_states_the_defaults() -> None:
    args = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]
    shipped = Settings.parse(args)
    assert shipped.model_copy(update={"engine": {}}) == Settings.parse({})


def test_every_line_of_the_shipped_configuration_is_commented() -> None:
    lines = CONFIG.read_text().splitlines()
    bare = [
        line
        for number, line in enumerate(lines)
        if line.strip()
        and "#" not in line
        # A comment on the line above speaks for a value, and a list's first line for the list.
        and not lines[number - 1].strip().startswith("#")
        and line.strip() not in ("http_options:", "logging_config:", "applications:", "args:")
    ]
    assert bare == []


def test_a_number_of_replicas_is_a_range_of_one() -> None:
    replicas = Settings.parse({"replicas": 3}).replicas
    assert (replicas.min, replicas.max, replicas.fixed) == (3, 3, True)
    assert not Settings.parse({"replicas": {"min": 0, "max": 2}}).replicas.fixed


def test_auto_and_numbers_are_parallel_sizes() -> None:
    settings = Settings.parse({"tensor_parallel_size": "auto", "pipeline_parallel_size": 2})
    assert (settings.tensor_parallel_size, settings.pipeline_parallel_size) == (None, 2)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.parse({}).model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"modell": "x"}, "modell = 'x': unknown key; did you mean 'model'?"),
        (
            {"limits": {"max_body_byte": 1}},
            "limits.max_body_byte = 1: unknown key; did you mean 'max_body_bytes'?",
        ),
        ({"replicas": {"mim": 3}}, "replicas.mim = 3: unknown key; did you mean 'min'?"),
        (
            {"tensor_parallel_size": "aut"},
            "tensor_parallel_size = 'aut': neither a number nor 'auto'; did you mean 'auto'?",
        ),
        (
            {"tensor_parallel_size": 0},
            "tensor_parallel_size = 0: must be greater than or equal to 1",
        ),
        (
            {"replicas": {"min": 3, "max": 2}},
            "replicas = {'min': 3, 'max': 2}: min (3) is above max (2)",
        ),
        ({"limits": {"max_n": "3"}}, "limits.max_n = '3': must be a integer"),
        ({"drain_s": 0}, "drain_s = 0: must be greater than 0"),
        (
            {"sleep": {"after_s": 300.0}, "replicas": {"min": 0}},
            "sleep.after_s = 300.0: must be below replicas.idle_s (300), as replicas.min is 0",
        ),
        (
            {"sleep": {"models_per_gpu": 2}, "replicas": 2},
            "sleep.models_per_gpu = 2: replicas of one model would take turns on a GPU; "
            "set replicas.max to 1",
        ),
        (
            {"sleep": {"after_s": 1.0}, "engine": {"load_format": "ipc_cache"}},
            "engine.load_format = 'ipc_cache': has its weights in another process, so it cannot "
            "sleep; leave out 'sleep'",
        ),
        (
            {"keep_weights": True, "sleep": {"after_s": 1.0}},
            "keep_weights = True: an engine whose weights are another process's cannot sleep; "
            "set either 'sleep' or 'keep_weights'",
        ),
        (
            {"keep_weights": True, "model": "s3://bucket/model"},
            "keep_weights = True: only for a model with files on this machine: a hub id or a "
            "folder",
        ),
        (
            {"keep_weights": True, "engine": {"load_format": "ipc_cache"}},
            "engine.load_format = 'ipc_cache': with keep_weights it can only be auto or "
            "safetensors or dummy",
        ),
        (
            {"keep_weights": True, "engine": {"cpu_offload_gb": 4}},
            "engine.cpu_offload_gb = 4: with keep_weights it can only be 0 or 0.0",
        ),
        (
            {"keep_weights": True, "engine": {"enable_eplb": True}},
            "engine.enable_eplb = True: with keep_weights it can only be false",
        ),
        (
            {"engine": {"model": "m"}},
            "engine.model = 'm': set the top-level key 'model' instead",
        ),
    ],
)
def test_a_bad_value_is_one_sentence(args: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        Settings.parse(args)
    assert str(error.value) == sentence


def test_kept_weights_go_with_what_does_not_touch_them() -> None:
    engine = {"load_format": "dummy", "cpu_offload_gb": 0, "enable_eplb": False}
    assert Settings.parse({"keep_weights": True, "engine": engine}).keep_weights
    assert Settings.parse({"engine": {"load_format": "ipc_cache"}})
