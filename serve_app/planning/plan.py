"""Derives from settings and hardware what one replica is: its model, parallelism and placement.

Decided once, where the application is built, so that every replica is the same and a start that
cannot succeed fails before anything is loaded.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError
from serve_app.planning import embedded, kernels
from serve_app.planning.hardware import Gpu, Node, cluster_nodes, has_bfloat16
from serve_app.planning.placement import Placement, place
from serve_app.planning.sizing import (
    DEFAULT_UTILIZATION,
    GIB,
    QWEN25,
    EngineMemory,
    ModelShape,
    choose_model,
    choose_tensor_parallel_size,
)
from serve_app.scaling.types import Goal
from serve_app.settings import CORS_ARGUMENTS, Settings

# The CPU build of vLLM 0.32 compiles wrong code, so without a GPU it always runs eagerly. The KV
# cache is bounded because vLLM would otherwise take half of the machine for each replica.
CPU_DEFAULTS = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}


# What an engine that sleeps keeps of a GPU: its CUDA context, its CUDA graphs, its libraries'
# buffers.
_ASLEEP_BYTES = 3 * GIB

# How long the answer to a request takes that exceeded its time limit.
_ANSWER_S = 10.0


@dataclass(frozen=True)
class Plan:
    """What every replica of the deployment is.

    Attributes:
        model: hub id, local folder or s3:// address; `embedded.NAME` is the packaged model.
        served_model_name: the name that clients ask for.
        placement: processes, GPUs and nodes of one replica.
        cpu_threads: OpenMP threads of an engine worker; None with GPUs.
        compute_capability: of the GPUs.
        accelerator: Ray's name of the kind of GPU that a replica must get; empty where all GPUs of
            the cluster are of one kind, or Ray has no name for them.
        gpu_memory_utilization: where other models sleep on the same GPU; None: vLLM's own.
    """

    model: str
    served_model_name: str
    placement: Placement
    cpu_threads: int | None
    compute_capability: tuple[int, int] | None = None
    accelerator: str = ""
    gpu_memory_utilization: float | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a replica, read when its libraries are loaded."""
        return environment(self.cpu_threads)

    @property
    def gpus(self) -> int:
        """GPUs of one replica; 1 on a CPU."""
        return self.placement.tensor_parallel_size * self.placement.pipeline_parallel_size

    @staticmethod
    def shutdown_s(settings: Settings) -> float:
        """How long a removed replica may take to finish its requests."""
        return max(settings.drain_s, settings.limits.request_timeout_s + _ANSWER_S)

    def deployment_options(self, settings: Settings) -> dict[str, Any]:
        """Options of the Ray Serve deployment."""
        options: dict[str, Any] = {
            # The queue is ours (admission.py): Serve's would answer in plain text, and count
            # health checks and streams alike.
            "max_ongoing_requests": 100_000,
            "max_queued_requests": -1,
            # A replica that is not needed any more, or is replaced by one of a new version, ends
            # what it has: that is as long as its longest request. When everything stops, run.py
            # waits `drain_s`.
            "graceful_shutdown_timeout_s": self.shutdown_s(settings),
            "graceful_shutdown_wait_loop_s": 0.5,
            "health_check_period_s": 2.0,
            "health_check_timeout_s": 10.0,
            "ray_actor_options": {
                "num_cpus": settings.cpus_per_replica,
                "num_gpus": self._num_gpus(settings),
            },
        }
        if self.placement.bundles is not None:
            options["placement_group_bundles"] = self._bundles(settings)
        elif self._kind:
            options["ray_actor_options"]["resources"] = self._kind
            options["placement_group_strategy"] = self.placement.strategy
        replicas = settings.replicas
        if replicas.fixed:
            options["num_replicas"] = replicas.min
        else:
            options["autoscaling_config"] = self._autoscaling(settings)
        return options

    def _num_gpus(self, settings: Settings) -> float:
        """What Ray reserves for a replica on one node: a share of a GPU where models share it."""
        if not settings.sleep.shared:
            return self.placement.num_gpus
        # Ray counts ten-thousandths, and rounds: six sixths would not fit.
        return 10_000 // settings.sleep.models_per_gpu / 10_000

    @property
    def _kind(self) -> dict[str, float]:
        """The resource that only nodes with the right kind of GPU have. Ray takes a thousandth of
        it for an actor that names its accelerator."""
        return {f"accelerator_type:{self.accelerator}": 0.001} if self.accelerator else {}

    def _bundles(self, settings: Settings) -> list[dict[str, float]]:
        """Resources of one replica, one mapping for each part that must be on one node."""
        whole = {"CPU": settings.cpus_per_replica, "GPU": float(self._num_gpus(settings))}
        return [{**bundle, **self._kind} for bundle in self.placement.bundles or (whole,)]

    def _autoscaling(self, settings: Settings) -> dict[str, Any]:
        """Ray Serve's autoscaling_config."""
        replicas = settings.replicas
        # Without initial_replicas, which Serve applies again whenever anything of the deployment
        # changes: four that run would become one. A new deployment begins with min_replicas.
        config: dict[str, Any] = {"min_replicas": replicas.min, "max_replicas": replicas.max}
        if not replicas.follow_slo:
            config["target_ongoing_requests"] = replicas.target_ongoing_requests
            if replicas.min == 0:
                config["policy"] = {
                    "policy_function": "serve_app.scaling.autoscaler:OngoingRequests"
                }
            return config
        goal = Goal(
            ttft_s=replicas.ttft_s,
            itl_s=replicas.itl_s,
            percentile=replicas.percentile,
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            idle_s=replicas.idle_s,
        )
        arguments = {
            "goal": asdict(goal),
            "start_s": replicas.start_s,
            "bundles": self._bundles(settings),
            "release": self.release(settings),
        }
        # Patience is the policy's own. Each replica reports once a second, and the report holds its
        # own look back.
        return config | {
            "metrics_interval_s": 1.0,
            "look_back_period_s": 5.0,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "downscale_to_zero_delay_s": 0.0,
            "policy": {
                "policy_function": "serve_app.scaling.autoscaler:Autoscaler",
                "policy_kwargs": arguments,
            },
        }

    def release(self, settings: Settings) -> str:
        """A name for what decides how fast one replica is: model, hardware, engine arguments."""
        parts = [self.model, asdict(self.placement), self.cpu_threads, settings.engine]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def engine_arguments(self, settings: Settings) -> dict[str, Any]:
        """vLLM's arguments for one replica, with the weights on this machine (or in S3)."""
        arguments: dict[str, Any] = {
            "model": self._weights(),
            "served_model_name": [self.served_model_name],
            "tensor_parallel_size": self.placement.tensor_parallel_size,
            "pipeline_parallel_size": self.placement.pipeline_parallel_size,
        }
        if self.cpu_threads is not None:
            arguments |= CPU_DEFAULTS
            if not has_bfloat16():
                # Emulated, it reads a prompt three times slower.
                arguments["dtype"] = "float32"
        else:
            arguments |= kernels.engine_defaults(kernels.tools(), self.compute_capability)
        if settings.sleep.enabled:
            arguments["enable_sleep_mode"] = True
        if self.gpu_memory_utilization is not None:
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization
        if self.placement.executor is not None:
            arguments["distributed_executor_backend"] = self.placement.executor
        if self.model.startswith("s3://"):
            arguments["load_format"] = "runai_streamer"
        if (endpoint := settings.observe.traces_endpoint) is not None:
            arguments["otlp_traces_endpoint"] = endpoint
        if settings.engine.get("tool_call_parser") == "hermes":
            arguments["tool_parser_plugin"] = "serve_app.replica.hermes"
        # CORS is the front gate's, which answers before vLLM does.
        engine = {key: v for key, v in settings.engine.items() if key not in CORS_ARGUMENTS}
        return arguments | engine

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


def environment(cpu_threads: int | None) -> dict[str, str]:
    """Environment of a replica with this many OpenMP threads; None if its engine runs on GPUs."""
    if cpu_threads is None:
        return {}
    return {
        # vLLM would bind the workers of every replica to the same first cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(cpu_threads),
        # A worker process would be there to set these two. Beside it the engine's core spins
        # on the cores that the front end needs: without this, one process is the engine.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM compiles one line of its log probabilities at the first request for them, also
        # where it runs eagerly. All streams of the engine stood still for 20 s meanwhile.
        "TORCHDYNAMO_DISABLE": "1",
    }


def cpu_threads(settings: Settings) -> int:
    """OpenMP threads of an engine without a GPU: one core of each replica is its front end's."""
    return max(1, len(os.sched_getaffinity(0)) // settings.replicas.max - 1)


def decide(settings: Settings) -> Plan:
    """The plan for these settings on this Ray cluster.

    Raises:
        ConfigError: for a model that is not there or does not fit, needed and found stated.
    """
    return decide_on(settings, cluster_nodes())


def decide_on(settings: Settings, nodes: Sequence[Node]) -> Plan:
    """The plan for these settings on these GPU nodes.

    Raises:
        ConfigError: for a model that is not there or does not fit, needed and found stated.
    """
    kinds = _kinds(nodes)
    kind, gpus, model, placement = _fitting(settings, kinds or [("", ())])
    _check_sleep(settings, placement)
    if settings.keep_weights and placement.bundles is not None:
        problem = "an engine on several nodes cannot keep them; leave it out, or use fewer GPUs"
        raise ConfigError("keep_weights", True, problem)
    return Plan(
        model=model,
        served_model_name=settings.served_model_name or _short_name(model),
        placement=placement,
        cpu_threads=None if gpus else cpu_threads(settings),
        compute_capability=gpus[0].compute_capability if gpus else None,
        accelerator=kind if len(kinds) > 1 else "",
        gpu_memory_utilization=_beside_sleepers(settings, gpus),
    )


def _check_sleep(settings: Settings, placement: Placement) -> None:
    """Refuse engines that cannot sleep.

    Raises:
        ConfigError: there is no GPU, or an engine has several where models share one.
    """
    sleep = settings.sleep
    if not sleep.enabled:
        return
    if placement.bundles is not None:
        problem = "an engine on several nodes cannot sleep; leave it out, or use fewer GPUs"
        raise ConfigError("sleep", sleep.model_dump(), problem)
    if not placement.num_gpus:
        problem = "vLLM has no sleep mode without a GPU; leave it out"
        raise ConfigError("sleep", sleep.model_dump(), problem)
    if sleep.shared and placement.num_gpus > 1:
        problem = f"models share one GPU, and an engine of this model takes {placement.num_gpus}"
        raise ConfigError("sleep.models_per_gpu", sleep.models_per_gpu, problem)


def _beside_sleepers(settings: Settings, gpus: Sequence[Gpu]) -> float | None:
    """The share of a GPU's memory for the model that is awake; None: no other model sleeps there,
    or the memory is not known."""
    sizes = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes]
    if not settings.sleep.shared or not sizes:
        return None
    others_bytes = (settings.sleep.models_per_gpu - 1) * _ASLEEP_BYTES
    return round(max(0.0, min(DEFAULT_UTILIZATION, 1 - others_bytes / min(sizes))), 3)


def _fitting(
    settings: Settings, kinds: Sequence[tuple[str, tuple[Gpu, ...]]]
) -> tuple[str, tuple[Gpu, ...], str, Placement]:
    """The first kind of GPU that holds the model, its GPUs, the model, and a replica's placement.

    Raises:
        ConfigError: none does; says why the first does not.
    """
    failures = []
    for kind, gpus in kinds:
        try:
            share = _beside_sleepers(settings, gpus)
            engine = {"gpu_memory_utilization": share, **settings.engine}
            beside = settings.model_copy(update={"engine": engine} if share is not None else {})
            model = find(beside, gpus)
            return kind, gpus, model, parallelism(beside, model, gpus)
        except ConfigError as error:
            failures.append(error)
    raise failures[0]


def _kinds(nodes: Sequence[Node]) -> list[tuple[str, tuple[Gpu, ...]]]:
    """Each kind of GPU in the cluster, with the GPUs of its largest node; the largest kind first.

    Replicas are alike, so all of them are sized for one kind.
    """
    largest: dict[str, tuple[Gpu, ...]] = {}
    for node in nodes:
        if len(node.gpus) > len(largest.get(node.kind, ())):
            largest[node.kind] = node.gpus
    return sorted(
        largest.items(),
        key=lambda each: (len(each[1]), sum(gpu.memory_bytes or 0 for gpu in each[1])),
        reverse=True,
    )


def find(settings: Settings, gpus: tuple[Gpu, ...]) -> str:
    """The model to serve: the configured one, or for 'auto' the largest that fits.

    Raises:
        ConfigError: the folder is not there, or nothing fits.
    """
    model = settings.model
    if model == "auto":
        return choose_model(gpus, EngineMemory.of(settings.engine)) if gpus else embedded.NAME
    if model.startswith(("/", ".", "~")):
        model = str(Path(model).expanduser().resolve())
        if not (Path(model) / "config.json").is_file():
            raise ConfigError("model", settings.model, "no such folder, or it has no config.json")
    return model


def parallelism(settings: Settings, model: str, gpus: tuple[Gpu, ...]) -> Placement:
    """How many GPUs a replica takes and where.

    Raises:
        ConfigError: the model does not fit them, or they do not fit the nodes.
    """
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size or 1
    if tp is None:
        tp = 1
        shape = shape_of(model, settings.engine) if gpus else None
        if shape is not None:
            memory = EngineMemory.of(settings.engine)
            tp = choose_tensor_parallel_size(model, shape, gpus, memory, pp)
    return place(tp, pp, len(gpus), settings.cpus_per_replica)


def shape_of(model: str, engine: Mapping[str, Any] | None = None) -> ModelShape | None:
    """The model's dimensions, as these engine arguments have it served; None where they are not
    known without fetching anything, or their size is not: vLLM will measure it."""
    config = Path(model) / "config.json"
    try:
        if model in QWEN25:
            shape = QWEN25[model]
        elif config.is_file():
            shape = ModelShape.from_config(json.loads(config.read_text(encoding="utf-8")))
        else:
            return None
    except (KeyError, TypeError, AttributeError, ArithmeticError):
        return None  # Another architecture or quantization, or what is no dimension.
    except ValueError as error:
        raise ConfigError("model", model, f"its config.json is not JSON: {error}") from None
    return shape.served(engine or {})


def _short_name(model: str) -> str:
    """A hub id as it is; of a folder or an address, its last part."""
    is_path = model.startswith(("/", "s3://"))
    return model.rstrip("/").rsplit("/", 1)[-1] if is_path else model
