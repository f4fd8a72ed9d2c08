"""Real Ray Serve: neither a deploy nor the controller's end takes a replica away."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PORT = 8826


def until(true: Callable[[], bool], timeout_s: float = 90.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not (ok := true()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return ok


class Application:
    def __init__(self, scratch: Path, minimum: int) -> None:
        self.scratch, self._minimum = scratch, minimum

    def deploy(self, max_queued_requests: int, start_s: float = 2.0) -> None:
        """Deploy; only the limit is in `user_config`."""
        limits = {"limits": {"max_queued_requests": max_queued_requests}}
        application = {
            "name": "llm",
            "route_prefix": "/",
            "import_path": "tests.services.scaled:build",
            "args": {"min": self._minimum, "start_s": start_s},
            "deployments": [{"name": "engine", "user_config": limits}],
        }
        schema = ServeDeploySchema.model_validate({"applications": [application]})
        _get_global_client().deploy_apps(schema)

    def load(self, name: str) -> None:
        (self.scratch / "load").write_text(name)

    def states(self) -> dict[str, int]:
        application = serve.status().applications.get("llm")
        deployment = application and application.deployments.get("engine")
        result: dict[Any, int] = dict(deployment.replica_states) if deployment else {}
        return {str(getattr(state, "value", state)): n for state, n in result.items() if n}

    def running(self) -> int:
        """Replicas that serve; one is UPDATING while it takes new limits, and serves meanwhile."""
        states = self.states()
        return states.get("RUNNING", 0) + states.get("UPDATING", 0)

    def lowest(self, seconds: float) -> int:
        """The fewest replicas that ran at any time from now on."""
        end_s, least = time.monotonic() + seconds, self.running()
        while time.monotonic() < end_s:
            least = min(least, self.running())
            time.sleep(0.05)
        return least

    def decisions(self) -> list[tuple[float, int]]:
        """What each decision took a start for, and the replicas that ran then."""
        lines = (self.scratch / "start_s").read_text().splitlines()
        return [(float(a), int(b)) for a, b in (line.split() for line in lines)]

    def settled(self) -> bool:
        """Whether the last decisions, which are made each second, agree about a start's time."""
        return len(last := self.decisions()[-5:]) == 5 and len(set(last)) == 1 and last[0][1] == 4


@pytest.fixture(params=[1, 0])
def application(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Application]:
    environment = {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "CASE_SCRATCH": str(tmp_path),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        yield Application(tmp_path, request.param)
    finally:
        serve.shutdown()
        ray.shutdown()


def test_neither_a_deploy_nor_the_controllers_end_takes_a_replica(
    application: Application,
) -> None:
    application.load("full")
    application.deploy(256)
    assert until(lambda: application.running() == 4), application.states()
    application.load("steady")
    assert until(application.settled), application.decisions()[-5:]
    before_s, _ = application.decisions()[-1]
    assert before_s < 60.0  # Measured, and not the configured time.

    application.deploy(64)
    assert application.lowest(8.0) == 4, application.states()
    assert application.decisions()[-1] == (before_s, 4)

    decisions = len(application.decisions())
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    ray.kill(controller, no_restart=False)
    assert until(lambda: len(application.decisions()) > decisions + 3)
    assert until(lambda: application.running() == 4)
    assert application.lowest(5.0) == 4, application.states()
    assert {start_s for start_s, _ in application.decisions()[decisions:]} == {before_s}
