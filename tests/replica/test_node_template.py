"""`python -m serve_app template` beside `ray start`: replicas of a cluster that others started."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from serve_app.launch import launcher
from serve_app.settings import Settings
from tests.kuberay.raycluster import DASHBOARD, GCS, PORT, RayCluster, cluster
from tests.server import ROOT, configuration, wait

pytestmark = pytest.mark.slow

# The applications, and where each begins.
NAMES = {"a": "/", "b": "/b"}
# The first job of the cluster is not that of the replicas.
_JOB = f"import ray; ray.init('127.0.0.1:{GCS}'); print(ray.get_runtime_context().get_job_id())"


@dataclass
class Node:
    """A cluster with one worker node, and the template there."""

    cluster: RayCluster
    template: "subprocess.Popen[bytes]"
    output: Path

    def replica(self, application: str) -> psutil.Process | None:
        """The replica of an application that was forked from the template."""
        for child in psutil.Process(self.template.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if f"ServeReplica:{application}:" in " ".join(child.cmdline()):
                    return child
        return None

    def answers(self) -> bool:
        """Whether application `a` does."""
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        body = {"model": "a", "prompt": "x", "max_tokens": 4, "ignore_eos": True}
        try:
            answer = httpx.post(url, json=body, timeout=30)
            return answer.is_success and answer.json()["usage"]["completion_tokens"] == 4
        except httpx.HTTPError:
            return False


def applications(tiny: Path) -> dict[str, Any]:
    """Two of them in one configuration, as `serve deploy` takes it."""
    config = configuration(PORT, model=str(tiny), cpus_per_replica=0.4, template=True)
    config["proxy_location"] = "HeadOnly"  # Raylets of one machine share its ports.
    (application,) = config["applications"]
    config["applications"] = [
        {
            **application,
            "name": name,
            "route_prefix": prefix,
            "args": {**application["args"], "served_model_name": name},
        }
        for name, prefix in NAMES.items()
    ]
    return config


@pytest.fixture(scope="module")
def node(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("node")
    variables = {**launcher.ENVIRONMENT, **launcher.environment_for(Settings())}
    path, output = folder / "applications.yaml", folder / "template.log"
    path.write_text(yaml.safe_dump(applications(tiny)))
    with cluster(folder, variables, workers=0) as ray:
        with output.open("wb") as log:
            template = subprocess.Popen(
                [sys.executable, "-m", "serve_app", "template"],
                env=ray.environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            ray.start_workers(1)
            job = subprocess.check_output([sys.executable, "-c", _JOB], env=ray.environment)
            assert job.strip() == b"01000000"
            command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(path)]
            command += ["--address", f"http://127.0.0.1:{DASHBOARD}"]
            subprocess.run(command, env=ray.environment, cwd=ROOT, check=True)
            for name in NAMES:
                assert ray.running(name, 300), ray.application(name)
            yield Node(ray, template, output)
        finally:
            template.kill()
            template.wait()


def _is_stand_in(process: psutil.Process) -> bool:
    return any(word.endswith("replica/worker.py") for word in process.info["cmdline"] or [])


def test_replicas_of_both_applications_are_forked_and_answer(node: Node) -> None:
    for name in NAMES:
        assert node.replica(name) is not None
    assert wait(node.answers, 120)
    assert "template: imported in" in node.output.read_text()


def test_the_replica_after_a_killed_one_is_forked_too(node: Node) -> None:
    replica = node.replica("a")
    assert replica is not None
    replica.kill()
    assert wait(lambda: (new := node.replica("a")) is not None and new != replica, 120)
    assert wait(node.answers, 120)


def test_the_end_of_the_raylet_ends_replicas_and_template(node: Node) -> None:
    replicas = [replica for name in NAMES if (replica := node.replica(name)) is not None]
    assert len(replicas) == len(NAMES)
    stand_ins = [p for p in psutil.process_iter(["cmdline"]) if _is_stand_in(p)]
    (raylet,) = {parent for p in stand_ins if (parent := p.parent()) is not None}
    assert raylet.name() == "raylet"
    raylet.kill()
    assert node.template.wait(60) == 0
    assert wait(lambda: not any(replica.is_running() for replica in replicas))
