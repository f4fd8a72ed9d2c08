"""The application's own deployment options and scaling policy, on replicas without an engine.

The folder CASE_SCRATCH steers the load that they report: `load` holds `full`, `steady` or `idle`.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from serve_app.planning.placement import place
from serve_app.planning.plan import Plan
from serve_app.scaling.autoscaler import Autoscaler, report
from serve_app.scaling.types import ReplicaLoad
from serve_app.settings import Settings
from tests.services.loads import BUSY

_FULL = ReplicaLoad(
    running=64,
    waiting=200,
    queued_tokens=200_000,
    max_running=64,
    decode_tokens_per_s=2000,
    prefill_tokens_per_s=2000,
    steps_per_s=30,
    busy=1.0,
    arrivals_per_s=30,
    finished_per_s=9,
    missed_per_s=9,
    ttft_s=30.0,
    itl_s=0.05,
)
_LOADS = {"full": _FULL, "steady": BUSY, "idle": ReplicaLoad(max_running=64)}


def _scratch() -> Path:
    return Path(os.environ["CASE_SCRATCH"])


class Engine:
    """A replica that takes `start_s` to start."""

    async def __init__(self, start_s: float) -> None:  # type: ignore[misc]
        await asyncio.sleep(start_s)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Any limits will do."""

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return report(_LOADS[(_scratch() / "load").read_text()])

    async def __call__(self) -> str:
        return "x"


class Telling(Autoscaler):
    """The policy, writing down how long it believes that a start takes."""

    def _ask(self, context: Any, now_s: float) -> int:
        wanted = super()._ask(context, now_s)
        with (_scratch() / "start_s").open("a") as file:
            file.write(f"{self._starts.start_s} {context.current_num_replicas}\n")
        return wanted


def build(args: dict[str, Any]) -> Application:
    replicas = {"max": 4, "policy": "slo", "start_s": 60.0, "min": args["min"]}
    settings = Settings.parse({"replicas": replicas, "cpus_per_replica": 0.0})
    options = Plan("m", "m", place(1, 1, 0), 1).deployment_options(settings)
    options["ray_actor_options"] = {"num_cpus": 0}
    options["graceful_shutdown_timeout_s"] = 2
    options["autoscaling_config"]["policy"]["policy_function"] = "tests.services.scaled:Telling"
    return serve.deployment(Engine, name="engine").options(**options).bind(args["start_s"])
