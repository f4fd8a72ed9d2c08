"""serveConfigV2 as an operator would submit it, on a real Ray cluster of several raylets."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from kuberay import render
from tests.kuberay.raycluster import GCS, PORT, RayCluster, cluster
from tests.server import ENGINE

# Seconds on an idle machine; several times as long beside other tests.
pytestmark = pytest.mark.slow

HERE = Path(render.__file__).parent
DRAIN = HERE / "base" / "pod" / "drain.py"
KEY = "sk-of-the-secret"
BASE = f"http://127.0.0.1:{PORT}"
HEADERS = {"authorization": f"Bearer {KEY}"}


def serve_config(tiny: Path, keys: Path) -> dict[str, Any]:
    """one-gpu's, with what a machine without GPUs must have otherwise."""
    manifest = yaml.safe_load((HERE / "overlays" / "one-gpu" / "serve.yaml").read_text())
    config: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    config["http_options"]["port"] = PORT
    config["proxy_location"] = "HeadOnly"  # Raylets of one machine share its ports.
    args = config["applications"][0]["args"]
    args |= {"model": str(tiny), "replicas": 1, "engine": {**args["engine"], **ENGINE}}
    args["api_keys"] = {"file": str(keys)}
    return config


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A replica on a worker of its own, and a worker to spare."""
    folder = tmp_path_factory.mktemp("deploy")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    manifest = yaml.safe_load((HERE / "base" / "rayservice.yaml").read_text())
    pod = manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    # Those without a value are of a Secret: that of the fast lane.
    environment = {e["name"]: e.get("value", "a secret") for e in pod["containers"][0]["env"]}
    with cluster(folder, environment, workers=2) as running:
        # What the operator does: the YAML as JSON, to the head's dashboard.
        running.ask("/api/serve/applications/", serve_config(tiny, keys), "PUT")
        assert running.running("llm", 300), running.application("llm")
        yield running


def stream(body: dict[str, Any]) -> tuple[str, str | None]:
    """The text of a streamed answer and why it ended."""
    text, reason = "", None
    with httpx.stream(
        "POST", f"{BASE}/v1/completions", json=body, headers=HEADERS, timeout=120
    ) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text, reason = text + choice["text"], choice.get("finish_reason") or reason
    return text, reason


def request(tokens: int) -> dict[str, Any]:
    return {
        "model": "Qwen2.5-7B-Instruct", "prompt": "a", "max_tokens": tokens, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip


def wait_for_haproxy() -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        try:
            if httpx.get(f"{BASE}/-/healthz", timeout=5).text.strip() == "success":
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError("HAProxy does not answer /-/healthz with success")


def test_the_application_answers_to_who_has_a_key(served: RayCluster) -> None:
    wait_for_haproxy()  # What the workers' readiness asks.
    models = httpx.get(f"{BASE}/v1/models", headers=HEADERS, timeout=30).json()
    assert [model["id"] for model in models["data"]] == ["Qwen2.5-7B-Instruct"]
    text, reason = stream(request(8))
    assert (bool(text), reason) == (True, "length")
    assert httpx.get(f"{BASE}/v1/models", timeout=30).status_code == 401
    assert httpx.get(f"{BASE}/health", timeout=30).status_code == 200


def test_the_replica_is_on_a_worker_and_not_on_the_head(served: RayCluster) -> None:
    assert len(nodes_of(served)) == 1
    nodes = served.ask("/nodes?view=summary")["data"]["summary"]
    (head,) = [n["raylet"]["nodeId"] for n in nodes if n["raylet"].get("isHeadNode")]
    assert head not in nodes_of(served)


def nodes_of(served: RayCluster, any_state: bool = False) -> set[str]:
    """Nodes with a replica that runs, or is on its way in or out."""
    (deployment,) = served.application("llm")["deployments"].values()
    results = [each for each in deployment["replicas"] if any_state or each["state"] == "RUNNING"]
    return {str(each.get("node_id")) for each in results}


def test_a_worker_that_drains_cuts_no_stream(served: RayCluster) -> None:
    wait_for_haproxy()
    (leaving,) = nodes_of(served)
    ended: list[tuple[str, str | None]] = []
    long = threading.Thread(target=lambda: ended.append(stream(request(1500))))
    long.start()
    # The deadline is longer than a replica may take to leave, as that of the pods' hook is.
    command = [sys.executable, str(DRAIN), "840", "--node-id", leaving, "--ports", "1"]
    environment = {**served.environment, "RAY_ADDRESS": f"127.0.0.1:{GCS}"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    assert f"drains node {leaving}" in done.stdout, done.stdout + done.stderr
    deadline_s = time.monotonic() + 400
    # Until a replica elsewhere has taken over, and the old one is gone.
    while (there := nodes_of(served, any_state=True)) & {leaving} or not there:
        assert time.monotonic() < deadline_s, served.application("llm")
        ended.append(stream(request(4)))
        time.sleep(1)
    ended.append(stream(request(4)))
    long.join(60)
    assert nodes_of(served) == there
    assert {reason for _, reason in ended} == {"length"}
    assert max(len(text) for text, _ in ended) > 500


# --- the hook, without Ray ------------------------------------------------------------------


def drain_module() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("drain", DRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_hook_waits_for_the_last_connection() -> None:
    drain = drain_module()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ports = drain.parsed(f"1,{port}-{port}")
        assert drain.connections(ports) == 0
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        assert drain.connections(ports) == 1
        # At the deadline it says what is left, and Kubernetes goes on.
        assert drain.wait(ports, time.monotonic()) == 1

        def close() -> None:
            accepted.close()
            client.close()

        threading.Timer(0.5, close).start()
        assert drain.wait(ports, time.monotonic() + 60) == 0


def test_the_hook_waits_for_streams_also_where_ray_does_not_answer() -> None:
    # -S: a Python that knows no Ray.
    command = [sys.executable, "-S", str(DRAIN), "30", "--ports", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Ray was not told" in done.stdout
    assert "nothing is left to do here" in done.stdout
