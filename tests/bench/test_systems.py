"""Each system gets the same model and engine arguments, by its own way of saying them."""

import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.engine import systems
from bench.experiments import overhead
from serve_app.settings import Settings

ENGINE = {"max_model_len": 512, "enforce_eager": True}


def written(name: str, folder: Path) -> dict[str, Any]:
    """The configuration that a system is started with."""
    path = systems.command(name, ENGINE, "/model", 8123, folder)[-1]
    result: dict[str, Any] = yaml.safe_load(Path(path).read_text())
    assert result["http_options"]["port"] == 8123
    return result["applications"][0]["args"] | {
        "import_path": result["applications"][0]["import_path"]
    }


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("ours", {}),
        ("ours-fast", {"lane": "auto"}),
        ("ours-python", {"lane": "python"}),
        ("ours-gateway", {"gateway": {"enabled": True}, "lane": "python"}),
        ("ours-gateway-fast", {"gateway": {"enabled": True}, "lane": "auto"}),
        (
            "ours-gateway-every-token",
            {"gateway": {"enabled": True}, "lane": "auto", "stream_gap_ms": 0.0},
        ),
        ("ours-template", {"template": True}),
        ("ours-no-template", {"template": False}),
        ("ours-unmeasured", {"observe": {"metrics": False}}),
        ("ours-every-token", {"stream_gap_ms": 0.0}),
        ("classic", {}),
    ],
)
def test_ours_is_the_configuration_that_comes_but_for_what_its_name_says(
    name: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    comes = yaml.safe_load(Path("serve_config.yaml").read_text())["applications"][0]
    same = {"model": "/model", "served_model_name": systems.NAME, "engine": ENGINE}
    expected = comes["args"] | same | changed | {"import_path": comes["import_path"]}
    assert written(name, tmp_path) == expected


def test_ours_asks_for_keys_where_the_environment_has_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(systems.KEYS_VARIABLE, "secret")
    assert written("ours", tmp_path)["api_keys"] == {"env": systems.KEYS_VARIABLE}


def test_a_server_that_asks_for_keys_is_ready_when_it_answers_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Keyed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("authorization"))
            self.send_response(200 if asked[-1] == "Bearer first" else 401)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Keyed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        process = subprocess.Popen(["sleep", "60"])
        system = systems.System("ours", server.server_port, process, tmp_path / "log", 0.0)
        system.log.write_text("")
        try:
            with pytest.raises(SystemExit, match="not ready"):
                systems.wait(system, 0.3)
            monkeypatch.setenv(systems.KEYS_VARIABLE, "first,second")
            systems.wait(system, 30)
        finally:
            process.kill()
            process.wait()
            server.shutdown()
    assert asked[-1] == "Bearer first"


@pytest.mark.parametrize("name", ["ray-serve-llm", "ray-serve-llm-direct"])
def test_the_peer_has_the_same_engine_and_one_replica(name: str, tmp_path: Path) -> None:
    args = written(name, tmp_path)
    assert args["import_path"] == "ray.serve.llm:build_openai_app"
    (llm,) = args["llm_configs"]
    assert llm["engine_kwargs"] == ENGINE
    assert llm["model_loading_config"] == {"model_id": systems.NAME, "model_source": "/model"}
    assert llm["deployment_config"] == {"num_replicas": 1}
    # With direct streaming it has no ingress, and refuses to start where one is configured.
    assert ("ingress_deployment_config" in args) == (name == "ray-serve-llm")


def test_bare_is_told_by_flags(tmp_path: Path) -> None:
    words = systems.command("bare", ENGINE, "/model", 8123, tmp_path)
    assert {"--max-model-len=512", "--enforce-eager", "/model", "8123"} <= set(words)


def test_every_kind_of_engine_argument_reaches_every_system(tmp_path: Path) -> None:
    engine = {
        "tensor_parallel_size": 2,
        "enable_prefix_caching": False,
        "compilation_config": {"compile_sizes": [1]},
    }
    words = systems.command("rust", engine, "/model", 8123, tmp_path)
    assert words[-3:] == [
        "--tensor-parallel-size=2",
        "--no-enable-prefix-caching",
        '--compilation-config={"compile_sizes": [1]}',
    ]
    changes = {"replicas": {"min": 2, "max": 2}}
    path = systems.command("ours", engine, "/model", 8123, tmp_path, changes)[-1]
    settings = Settings.parse(yaml.safe_load(Path(path).read_text())["applications"][0]["args"])
    assert (settings.tensor_parallel_size, settings.replicas.min) == (2, 2)
    assert settings.engine == {
        "enable_prefix_caching": False,
        "compilation_config": {"compile_sizes": [1]},
    }


@pytest.mark.parametrize(
    ("name", "word"),
    [("apis4", "--api-server-count=4"), ("bare-si4", "--stream-interval=4"), ("rust", None)],
)
def test_a_peer_is_bare_vllm_but_for_what_its_name_says(
    name: str, word: str | None, tmp_path: Path
) -> None:
    bare = systems.command("bare", ENGINE, "/model", 8123, tmp_path)
    words = systems.command(name, ENGINE, "/model", 8123, tmp_path)
    assert words == [*bare, *([word] if word else [])]
    assert ("VLLM_USE_RUST_FRONTEND" in systems._GUIDED.get(name, {})) == (name == "rust")


def test_an_unknown_system_is_refused_with_the_names_of_all(tmp_path: Path) -> None:
    names = r"'ur'.*bare, .*rust, ours, .*classic, ray-serve-llm, ray-serve"
    with pytest.raises(SystemExit, match=names):
        systems.command("ur", ENGINE, "/model", 8123, tmp_path)


@pytest.mark.parametrize("installed", [True, False])
def test_the_rust_front_end_is_the_reference_where_it_is_installed(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "vllm-rs"
    if installed:
        program.touch(0o755)
    monkeypatch.setattr(overhead.rust_frontend, "destination", lambda: program)
    names = overhead.default_systems()
    assert names[0] == ("rust" if installed else "bare")
    assert {"ours", "apis4", "bare", "bare-si4"} <= set(names)
    for name in names:
        assert systems.command(name, ENGINE, "/model", 8123, tmp_path)
