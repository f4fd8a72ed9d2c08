"""The configuration that tuning writes is one that the application takes."""

from pathlib import Path

import pytest
import yaml

from bench.engine import deployment, knobs
from bench.errors import BenchError
from serve_app.settings import Settings

WHY = "Found by `bench tune` for throughput, 1.20 times the defaults:"


def test_what_was_found_is_what_the_application_reads(tmp_path: Path) -> None:
    tuned = {
        "max_num_seqs": 128,
        "enable_chunked_prefill": False,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4},
        "tensor_parallel_size": 2,
    }
    path = deployment.write(
        tmp_path / "tuned.yaml",
        model="/models/it's a folder",
        engine={"max_model_len": 4096, "dtype": "bfloat16"},
        tuned=tuned,
        why=WHY,
    )
    text = path.read_text()
    config = yaml.safe_load(text)
    shipped = yaml.safe_load(deployment.TEMPLATE.read_text())
    args = config["applications"][0]["args"]
    settings = Settings.parse(args)
    assert settings.model == "/models/it's a folder"
    assert settings.tensor_parallel_size == 2
    assert settings.engine["max_num_seqs"] == 128
    assert settings.engine["enable_chunked_prefill"] is False
    assert settings.engine["speculative_config"] == tuned["speculative_config"]
    assert settings.engine["max_model_len"] == 4096
    # What was not tuned stays as it is shipped.
    assert settings.engine["tool_call_parser"] == "hermes"
    assert args["limits"] == shipped["applications"][0]["args"]["limits"]
    assert config["http_options"] == shipped["http_options"]
    # Each knob is explained, and each comment of the shipped file is still there.
    assert WHY in text
    for name in ("max_num_seqs", "enable_chunked_prefill", "speculative_config"):
        assert knobs.BY_NAME[name].meaning.split(":")[0] in " ".join(
            line.strip().removeprefix("# ") for line in text.splitlines()
        )
    lines = text.splitlines()
    assert all(
        line.partition(" # ")[2] in text for line in deployment.TEMPLATE.read_text().splitlines()
    )
    assert max(len(line) for line in lines if line.strip().startswith("#")) <= 120


def test_a_template_that_has_changed_is_an_error_and_not_a_wrong_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.yaml").write_text("applications: []\n")
    monkeypatch.setattr(deployment, "TEMPLATE", tmp_path / "other.yaml")
    with pytest.raises(BenchError, match="has no line like"):
        deployment.text(model="m", engine={}, tuned={}, why="")


def test_knobs_are_those_of_the_machine_or_those_that_were_asked_for() -> None:
    names = [
        knob.name
        for knob in knobs.space([], on_gpu=False, lossy=True, dummy=True, fixed={"max_num_seqs": 4})
    ]
    assert "max_num_seqs" not in names  # Fixed.
    assert "quantization" not in names  # Not of the CPU engine.
    assert "speculative_config" not in names  # Dummy weights repeat themselves.
    on_gpu = knobs.space([], on_gpu=True, lossy=False, dummy=False, fixed={})
    assert not any(knob.lossy for knob in on_gpu)
    assert any(knob.real for knob in on_gpu)
    given = knobs.space(
        ["max_num_seqs=8,64", "kv_cache_dtype=fp8,auto", 'x=[1],{"a":2}'],
        on_gpu=False,
        lossy=False,
        dummy=False,
        fixed={},
    )
    assert [knob.values for knob in given] == [
        (None, 8, 64),
        (None, "fp8", "auto"),
        (None, [1], {"a": 2}),
    ]
    assert given[0].live
    for wrong in ("max_num_seqs", "max_num_seqs="):
        with pytest.raises(BenchError, match="not NAME=VALUE"):
            knobs.space([wrong], on_gpu=False, lossy=False, dummy=False, fixed={})
    with pytest.raises(BenchError, match="also fixed"):
        knobs.space(["a=1"], on_gpu=False, lossy=False, dummy=False, fixed={"a": 1})
    assert len(knobs.points(given[:2])) == 9
    assert {} in knobs.points(given)
