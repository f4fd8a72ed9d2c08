"""Where weights are found: Runpod's cached models, volumes, and folders that are not whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cache
from tests.runpod import hub
from tests.runpod.conftest import FOLDER
from tests.server import ROOT

HUB = 8875
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
COMMIT = "7ae557604adf67be50417f59c2c2f167def9a775"


def cached(hub: Path, model: str = MODEL, shards: int = 1, ref: bool = True) -> Path:
    """A model in the layout of the hub's cache: links into a folder of blobs."""
    repository = hub / f"models--{model.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    names = ["config.json"]
    if shards == 1:
        names.append("model.safetensors")
    else:
        parts = [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
        names += [*parts, "model.safetensors.index.json"]
    for name in names:
        content = "{}"
        if name.endswith("index.json"):
            content = json.dumps({"weight_map": {f"layer.{n}": p for n, p in enumerate(parts)}})
        (blobs / name).write_text(content)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name)
    if ref:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_cached_model_is_found_where_runpod_puts_it(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "huggingface-cache" / "hub")
    folders = cache.caches({"BASE_PATH": str(tmp_path)})
    assert folders[0] == tmp_path / "huggingface-cache" / "hub"
    assert cache.find(MODEL, None, folders) == snapshot
    assert cache.find(MODEL, COMMIT, folders) == snapshot
    assert cache.find(MODEL, "other", folders) is None
    assert cache.find("Qwen/other", None, folders) is None


def test_the_hub_does_not_tell_case_apart(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, model=MODEL.lower())
    assert cache.find(MODEL, None, [tmp_path]) == snapshot


def test_one_snapshot_without_a_ref_is_the_one_that_is_meant(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, ref=False)
    assert cache.find(MODEL, None, [tmp_path]) == snapshot
    (snapshot.parent / "second").mkdir()
    assert cache.find(MODEL, None, [tmp_path]) is None


def test_a_model_that_is_not_whole_is_not_found(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, shards=3)
    assert cache.find(MODEL, None, [tmp_path]) == snapshot
    # A link whose blob is not there, as an interrupted download leaves it.
    (snapshot / "model-00002-of-00003.safetensors").resolve().unlink()
    assert cache.find(MODEL, None, [tmp_path]) is None


def test_an_index_that_is_broken_is_not_whole(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, shards=2)
    (snapshot / "model.safetensors.index.json").resolve().write_text("{")
    assert not cache.whole(snapshot)


def test_weights_are_fetched_to_a_volume_that_can_be_written(tmp_path: Path) -> None:
    environ = {"BASE_PATH": str(tmp_path), "HF_HOME": str(tmp_path / "home")}
    assert cache.writable(environ) == tmp_path / "huggingface-cache" / "hub"
    environ["BASE_PATH"] = "/proc/volume-that-is-none"
    assert cache.writable(environ) == tmp_path / "home" / "hub"
    (tmp_path / "file").write_text("")
    environ["BASE_PATH"] = str(tmp_path / "file")
    assert cache.writable(environ) == tmp_path / "home" / "hub"


def test_size_and_shape_are_asked_before_anything_is_fetched(tmp_path: Path) -> None:
    """The hub's library, against a hub: of the model only config.json is sent."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 7}')
    (model / "model.safetensors").write_bytes(bytes(12345))
    (model / "pytorch_model.bin").write_bytes(bytes(10))
    code = (
        "import sys, json; from pathlib import Path; import cache\n"
        "to = Path(sys.argv[1]); found = cache.configuration('org/m', None, to)\n"
        "shape = json.loads((found / 'config.json').read_text())\n"
        "print([shape, cache.missing_bytes('org/m', None, to), cache.free_bytes(to / 'x') > 0])\n"
        "other = ('org/none', None, to)\n"
        "print(cache.configuration(*other), cache.missing_bytes(*other))"
    )
    with hub.serving(HUB, "org/m", model) as models:
        environ = {**os.environ, "HF_ENDPOINT": models.url, "HF_HOME": str(tmp_path / "home")}
        environ["PYTHONPATH"] = f"{FOLDER}:{ROOT}"
        command = [sys.executable, "-c", code, str(tmp_path / "cache")]
        result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert models.fetched == ["config.json"]
    lines = [line for line in result.stdout.splitlines() if not line.startswith("warning: ")]
    assert lines == ["[{'hidden_size': 7}, 12345, True]", "None None"]
    assert result.stdout.count("warning: ") == 2


@pytest.mark.parametrize("model", ["/models/x", "./x", "~/x", "s3://bucket/x", "auto"])
def test_what_is_no_hub_id(model: str) -> None:
    assert not cache.is_hub_id(model)
    assert cache.is_hub_id(MODEL)


def test_a_second_repository_needs_the_hub() -> None:
    assert cache.offline({"max_model_len": 10})
    assert not cache.offline({"tokenizer": "org/other"})
