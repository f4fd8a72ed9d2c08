"""From this machine's environment to what will be served: mode, configuration, parallelism.

Decided before anything is started, said in a few lines, and refused where it would be wrong: a
pod without keys, a health port that is also the application's, a variable that makes no sense.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cache
import overrides
from logs import show
from serve_app.errors import ConfigError, nearest
from serve_app.planning import embedded
from serve_app.planning.hardware import Gpu
from serve_app.planning.plan import find, parallelism, shape_of
from serve_app.planning.sizing import (
    GIB,
    MIN_OVERHEAD_BYTES,
    EngineMemory,
    ModelShape,
    choose_tensor_parallel_size,
    needed_bytes,
    usable_bytes,
)
from serve_app.settings import ApiKeys, Settings

Mode = Literal["load_balancer", "queue", "pod"]
MODES = get_args(Mode)
KEYS = "API_KEYS"
# Runpod cuts a request through its load balancer after 330 s. One that hears of it from us before
# knows why, and its engine has stopped working for it.
_BALANCER_S = 320.0
# From SIGTERM to SIGKILL. Runpod states no number; this is what a stop of ours takes at most.
_GRACE_S = 60.0
# What is left of it for everything but the requests in flight.
_END_S = 15.0
# From the launch of the server to its first answer, once the weights are here.
_START_S = 3600.0


@dataclass(frozen=True)
class Ports:
    application: int
    health: int
    health_path: str


@dataclass(frozen=True)
class Choice:
    """What will be served.

    Attributes:
        config: serve_config.yaml with everything that was decided here.
        served_model_name: what a request must ask for.
        key: one accepted API key, or None where none is asked for.
        start_s: how long a start may take, from the launch of the server to its first answer.
        offline: whether the model hub is left alone.
        said: one line for each thing worth knowing.
    """

    mode: Mode
    ports: Ports
    config: dict[str, Any]
    settings: Settings
    served_model_name: str
    key: str | None
    start_s: float
    offline: bool
    lines: tuple[str, ...]


def mode_of(environ: Mapping[str, str]) -> Mode:
    """SERVE_MODE; without it a pod, which is the mode that asks for keys.

    Raises:
        ConfigError: no such mode.
    """
    text = environ.get("SERVE_MODE") or "pod"
    for mode in MODES:
        if text == mode:
            return mode  # type: ignore[no-any-return]
    raise ConfigError("SERVE_MODE", text, f"not one of {', '.join(MODES)}", nearest(text, MODES))


def ports_of(environ: Mapping[str, str]) -> Ports:
    """PORT, PORT_HEALTH and HEALTH_CHECK_PATH, as Runpod names them.

    Raises:
        ConfigError: not two different ports.
    """
    numbers = []
    for name, default in (("PORT", "8000"), ("PORT_HEALTH", "8001")):
        text = environ.get(name) or default
        if not text.isdigit() or not 0 < int(text) < 65536:
            raise ConfigError(name, text, "must be a port")
        numbers.append(int(text))
    if numbers[0] == numbers[1]:
        problem = "must differ from PORT, which is closed while the model loads"
        raise ConfigError("PORT_HEALTH", numbers[1], problem)
    return Ports(numbers[0], numbers[1], environ.get("HEALTH_CHECK_PATH") or "/ping")


def grace_s(environ: Mapping[str, str]) -> float:
    """How long a stop may take, from STOP_GRACE_S."""
    return _seconds(environ, "STOP_GRACE_S", _GRACE_S, _END_S)


def _seconds(environ: Mapping[str, str], name: str, default_s: float, above_s: float) -> float:
    text = environ.get(name) or str(default_s)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not above_s < value < math.inf:
        raise ConfigError(name, text, f"must be a number of seconds above {above_s:g}")
    return value


def _concurrency(environ: Mapping[str, str]) -> None:
    """Refuse a MAX_CONCURRENCY that handler.py could not read."""
    text = environ.get("MAX_CONCURRENCY") or "0"
    if not text.isdecimal():
        raise ConfigError("MAX_CONCURRENCY", text, "must be a number of jobs")


def choose(config: Mapping[str, Any], environ: Mapping[str, str], gpus: tuple[Gpu, ...]) -> Choice:
    """Everything, from the shipped configuration and this machine. Fetches weights if it must.

    Raises:
        ConfigError: something that no second try mends.
        RuntimeError: weights that could not be fetched this time.
    """
    mode, ports = mode_of(environ), ports_of(environ)
    start_s = _seconds(environ, "VLLM_STARTUP_TIMEOUT", _START_S, 0.0)
    _concurrency(environ)
    result = deepcopy(dict(config))
    application = result["applications"][0]
    shipped = application.get("args") or {}
    args, warnings = overrides.apply(shipped, environ)
    lines = [f"warning: {warning}" for warning in warnings]
    _defaults_of(mode, args, shipped, environ)
    key = _keys(mode, args, environ, lines)

    settings = Settings.parse(args)
    _require_gpus(settings, gpus)
    name = find(settings, gpus)
    model = _weights(name, settings, gpus, environ, lines)
    args["model"] = model
    args["served_model_name"] = settings.served_model_name or _spoken(name)
    settings = Settings.parse(args)
    placement = parallelism(settings, model, gpus)
    args["tensor_parallel_size"] = placement.tensor_parallel_size
    explicit = "REPLICAS" in environ or shipped.get("replicas") != args.get("replicas")
    # How several models share the GPUs is not for us to guess.
    if gpus and not explicit and not args.get("models"):
        args["replicas"] = max(1, len(gpus) // placement.num_gpus)
    settings = Settings.parse(args)

    application["args"] = args
    http = dict(result.get("http_options") or {})
    # A queue's requests come from handler.py, on this machine.
    http |= {"host": "127.0.0.1" if mode == "queue" else "0.0.0.0", "port": ports.application}
    result["http_options"] = http
    gpu_text = f"{len(gpus)} x {gpus[0].name}" if gpus else "no GPU"
    lines.append(
        f"{mode}: {args['served_model_name']} on {gpu_text}: {settings.replicas.max} replica(s), "
        f"tensor_parallel_size {placement.tensor_parallel_size}"
    )
    offline = Path(model).is_dir() and cache.offline(settings.engine)
    return Choice(
        mode=mode,
        ports=ports,
        config=result,
        settings=settings,
        served_model_name=str(args["served_model_name"]),
        key=key,
        start_s=start_s,
        offline=offline or model == embedded.NAME,
        lines=tuple(lines),
    )


def _require_gpus(settings: Settings, gpus: tuple[Gpu, ...]) -> None:
    """Refuse a replica of more GPUs than this machine has.

    Raises:
        ConfigError: says how many it has.
    """
    tp, pp = settings.tensor_parallel_size or 1, settings.pipeline_parallel_size or 1
    if gpus and tp * pp > len(gpus):
        problem = f"a replica of {tp * pp} GPUs does not fit one machine with {len(gpus)}"
        if pp > 1:
            raise ConfigError("PIPELINE_PARALLEL_SIZE", pp, problem)
        raise ConfigError("TENSOR_PARALLEL_SIZE", tp, problem)


def _defaults_of(
    mode: Mode, args: dict[str, Any], shipped: Mapping[str, Any], environ: Mapping[str, str]
) -> None:
    """What Runpod's limits make of the shipped values, where the environment says nothing."""
    limits = dict(args.get("limits") or {})
    if mode == "load_balancer" and limits == (shipped.get("limits") or {}):
        limits["request_timeout_s"] = min(limits.get("request_timeout_s", 600.0), _BALANCER_S)
        args["limits"] = limits
    if args.get("drain_s") == shipped.get("drain_s"):
        args["drain_s"] = grace_s(environ) - _END_S


def _keys(
    mode: Mode, args: dict[str, Any], environ: Mapping[str, str], lines: list[str]
) -> str | None:
    """Where keys come from, and who is let in without one. Returns a key to ask with."""
    configured = args.get("api_keys") or {}
    if environ.get(KEYS) is not None and not any(configured.values()):
        args["api_keys"] = configured = {**configured, "env": KEYS}
    source = Settings.parse({"api_keys": configured}).api_keys
    accepted = _accepted(source, environ)
    if mode == "queue":
        # Runpod's gateway checks its own key, and only this machine can reach the application.
        args.pop("api_keys", None)
        return None
    if mode == "pod" and not accepted:
        raise ConfigError(
            KEYS,
            environ.get(KEYS, ""),
            "a pod's address is public, and no API keys are set: set API_KEYS to one or more, "
            "separated by commas",
        )
    if not source.configured:
        args["allow_unauthenticated_network"] = True
        lines.append(
            "warning: no API_KEYS: whoever has a Runpod key for this endpoint can use it. With "
            "API_KEYS set, clients send one of them as x-api-key; Authorization is Runpod's"
        )
        return None
    return accepted[0] if accepted else None


def _accepted(source: ApiKeys, environ: Mapping[str, str]) -> list[str]:
    """The keys themselves: serve_app keeps digests only, and the warm-up has to send one."""
    words = environ.get(source.env, "").split(",") if source.env else []
    if source.file and Path(source.file).is_file():
        lines = Path(source.file).read_text(encoding="utf-8").splitlines()
        words += [line for line in lines if not line.lstrip().startswith("#")]
    return [word.strip() for word in words if word.strip()]


def _weights(
    name: str,
    settings: Settings,
    gpus: tuple[Gpu, ...],
    environ: Mapping[str, str],
    lines: list[str],
) -> str:
    """The model's folder, fetched if need be; anything but a hub id is left as it is.

    Raises:
        ConfigError: the GPUs or the disk cannot hold it; nothing of it was fetched.
    """
    if name == embedded.NAME or not cache.is_hub_id(name):
        _require_memory(name, shape_of(name, settings.engine), settings, gpus)
        return name
    revision = settings.engine.get("revision")
    folder = cache.find(name, revision, cache.caches(environ))
    if folder is not None:
        lines.append(f"{name}: in the cache, {folder}")
        _require_memory(name, shape_of(str(folder), settings.engine), settings, gpus)
        return str(folder)
    target = cache.writable(environ)
    if not any(target.is_relative_to(volume) for volume in cache.volumes(environ)):
        lines.append(
            "warning: no volume that can be written: weights are fetched anew by every worker"
        )
    show(f"{name}: not here; asking the hub")
    shape = shape_of(name, settings.engine)
    if shape is None and (config := cache.configuration(name, revision, target)) is not None:
        shape = shape_of(str(config), settings.engine)
    _require_memory(name, shape, settings, gpus)
    _require_disk(name, cache.missing_bytes(name, revision, target), target)
    show(f"{name}: fetching to {target}")
    return str(cache.fetch(name, revision, target))


def _require_memory(
    name: str, shape: ModelShape | None, settings: Settings, gpus: tuple[Gpu, ...]
) -> None:
    """Refuse what the GPUs cannot hold, where its size is known.

    Raises:
        ConfigError: says what is needed and found.
    """
    if shape is None or not gpus:
        return
    memory = EngineMemory.of(settings.engine)
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size or 1
    if tp is None:
        choose_tensor_parallel_size(name, shape, gpus, memory, pp)
        return
    if shape.num_attention_heads % tp:
        problem = f"does not divide the {shape.num_attention_heads} attention heads of {name}"
        raise ConfigError("TENSOR_PARALLEL_SIZE", tp, problem)
    usable = usable_bytes(gpus, memory)
    if usable is not None and needed_bytes(shape, memory, tp, pp, MIN_OVERHEAD_BYTES) > usable:
        needed = needed_bytes(shape, memory, tp, pp)
        problem = (
            f"{name} needs {needed / GIB:.1f} GiB on each of {tp * pp} GPU(s), and "
            f"{gpus[0].name} gives {usable / GIB:.1f}: raise it, lower MAX_MODEL_LEN, or take "
            "larger GPUs"
        )
        raise ConfigError("TENSOR_PARALLEL_SIZE", tp, problem)


def _require_disk(name: str, missing: int | None, folder: Path) -> None:
    """Refuse what the disk cannot hold, where its size is known.

    Raises:
        ConfigError: says what is needed and found.
    """
    if missing is None:
        return
    free = cache.free_bytes(folder)
    if missing > free:
        problem = (
            f"{missing / 1e9:.1f} GB are to be fetched and {folder} has room for "
            f"{free / 1e9:.1f}: give the container a larger disk, or a volume"
        )
        raise ConfigError("MODEL_NAME", name, problem)


def _spoken(model: str) -> str:
    """The name that clients ask for: a hub id as it is, of a folder or an address its last part."""
    return model if cache.is_hub_id(model) else model.rstrip("/").rsplit("/", 1)[-1]
