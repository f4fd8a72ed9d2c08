"""From settings and hardware to what one replica is: its model, its parallelism, its place.

Decided once, where the application is built, so that every replica is the same and a start that
cannot succeed fails before anything is loaded.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app import embedded
from serve_app.errors import ConfigError
from serve_app.placement import Placement, place
from serve_app.settings import Settings


@dataclass(frozen=True)
class Plan:
    """What every replica of the deployment is.

    Attributes:
        model: hub id, local folder or s3:// address; `embedded.NAME` is the packaged model.
        served_model_name: the name that clients ask for.
        placement: processes, GPUs and nodes of one replica.
        cpu_threads: OpenMP threads of an engine worker; None with GPUs.
    """

    model: str
    served_model_name: str
    placement: Placement
    cpu_threads: int | None

    def deployment_options(self, settings: Settings) -> dict[str, Any]:
        """Options of the Ray Serve deployment."""
        options: dict[str, Any] = {
            # The queue is ours (admission.py): Serve's would answer in plain text, and count
            # health checks and streams alike.
            "max_ongoing_requests": 100_000,
            "max_queued_requests": -1,
            "graceful_shutdown_timeout_s": settings.drain_s,
            "graceful_shutdown_wait_loop_s": 0.5,
            "health_check_period_s": 2.0,
            "health_check_timeout_s": 10.0,
            "ray_actor_options": {
                "num_cpus": settings.cpus_per_replica,
                "num_gpus": self.placement.num_gpus,
            },
        }
        if self.placement.bundles is not None:
            options["placement_group_bundles"] = [dict(b) for b in self.placement.bundles]
            options["placement_group_strategy"] = self.placement.strategy
        replicas = settings.replicas
        if replicas.fixed:
            options["num_replicas"] = replicas.min
        else:
            options["autoscaling_config"] = {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "target_ongoing_requests": replicas.target_ongoing_requests,
            }
        return options

    def engine_arguments(self, settings: Settings) -> dict[str, Any]:
        """vLLM's arguments for one replica, with the weights on this machine (or in S3)."""
        arguments: dict[str, Any] = {
            "model": self._weights(),
            "served_model_name": [self.served_model_name],
            "tensor_parallel_size": self.placement.tensor_parallel_size,
            "pipeline_parallel_size": self.placement.pipeline_parallel_size,
        }
        if self.placement.executor is not None:
            arguments["distributed_executor_backend"] = self.placement.executor
        if self.model.startswith("s3://"):
            arguments["load_format"] = "runai_streamer"
        if settings.limits.max_tokens is not None:
            # vLLM takes this as the bound of every request that names no max_tokens of its own.
            arguments["override_generation_config"] = {"max_new_tokens": settings.limits.max_tokens}
        return arguments | dict(settings.engine)

    def _weights(self) -> str:
        if self.model == embedded.NAME:
            return str(embedded.path())
        if self.model.startswith("s3://") or Path(self.model).is_dir():
            return self.model
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
            return str(snapshot_download(self.model, allow_patterns=patterns))
        except Exception as error:
            # The hub's own errors run over many lines; the first says which it was.
            problem = str(error).strip().splitlines()[0]
            raise ConfigError("model", self.model, f"cannot be fetched: {problem}") from error


def decide(settings: Settings) -> Plan:
    """The plan for these settings on this cluster.

    Raises:
        ConfigError: for a model that is not there or does not fit, needed and found stated.
    """
    model = settings.model if settings.model != "auto" else embedded.NAME
    if model.startswith(("/", ".", "~")):
        model = str(Path(model).expanduser())
        if not (Path(model) / "config.json").is_file():
            raise ConfigError("model", model, "no such folder, or it holds no config.json")
    cores = len(os.sched_getaffinity(0))
    return Plan(
        model=model,
        served_model_name=settings.served_model_name or _short_name(model),
        placement=place(
            tensor_parallel_size=settings.tensor_parallel_size or 1,
            pipeline_parallel_size=settings.pipeline_parallel_size or 1,
            gpus_per_node=0,
        ),
        cpu_threads=max(1, cores // max(1, settings.replicas.max)),
    )


def _short_name(model: str) -> str:
    """A hub id as it is; of a folder or an address, its last part."""
    is_path = model.startswith(("/", "s3://"))
    return model.rstrip("/").rsplit("/", 1)[-1] if is_path else model


