"""Servers under test: how each is started beside the others, and stopped with all that it started.

A bare vLLM ("bare"; "apis4" with four Python front ends, "bare-si4" sending four tokens at a time,
"rust" with vLLM's Rust front end), this application as it is and with parts of it changed ("ours",
"ours-..."), the same on Ray Serve's own proxy ("classic"), and Ray Serve's LLM application
("ray-serve-llm", and "ray-serve-llm-direct" with what its guide sets for the highest throughput).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from bench.engine import deployment
from bench.hardware import gpu
from serve_app import processes

NAME = "bench"
# Environment variable with the API keys that this application asks for, where it is set.
KEYS_VARIABLE = "BENCH_API_KEYS"
# Engine arguments of every system, unless --engine says others: a small KV cache, and one thread,
# since the engine, its front end and the client share the machine.
ENGINE: Mapping[str, Any] = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**28,
    "block_size": 32,
    "dtype": "float32",
    "max_model_len": 2048,
}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
# This application: the settings that differ from its defaults.
_OURS: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "ours-fast": {"lane": "auto"},
    "ours-python": {"lane": "python"},
    "ours-gateway": {"gateway": {"enabled": True}, "lane": "python"},
    "ours-gateway-fast": {"gateway": {"enabled": True}, "lane": "auto"},
    "ours-gateway-every-token": {
        "gateway": {"enabled": True},
        "lane": "auto",
        "stream_gap_ms": 0.0,
    },
    "ours-asleep": {"replicas": {"min": 0, "max": 1, "idle_s": 5.0}},
    "ours-dozing": {"sleep": {"after_s": 2.0}},
    "ours-template": {"template": True},
    "ours-no-template": {"template": False},
    "ours-unmeasured": {"observe": {"metrics": False}},
    "ours-every-token": {"stream_gap_ms": 0.0},
}
# Arguments of a bare vLLM that its name stands for.
_PEERS: Mapping[str, list[str]] = {
    "bare": [],
    "bare-si4": ["--stream-interval=4"],
    "apis4": ["--api-server-count=4"],
    "rust": [],
}
_OTHERS = ("classic", "ray-serve-llm", "ray-serve-llm-direct")
NAMES = (*_PEERS, *_OURS, *_OTHERS)
# Environment that a system needs to be what its name says, or that its own guide has set for it.
_GUIDED = {
    "rust": {"VLLM_USE_RUST_FRONTEND": "1"},
    # https://docs.ray.io/en/master/kuberay/user-guides/serve-high-throughput.html
    "ray-serve-llm-direct": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
        "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1",
    },
}


@dataclass
class System:
    """A server under test: its process tree and where it listens."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    started_s: float
    ready_s: float = 0.0

    def family(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_s(self) -> float:
        """Processor time of all its processes so far."""
        total_s = 0.0
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total_s += times.user + times.system
        return total_s

    def signal(self, number: signal.Signals) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _bare(engine: Mapping[str, Any], model: str, port: int) -> list[str]:
    arguments = [_flag(name, value) for name, value in engine.items()]
    words = [sys.executable, "-W", "ignore", "-m", "bench.engine.vllm_serve"]
    words += ["--model", model, "--served-model-name", NAME, "--host", "127.0.0.1"]
    return [*words, "--port", str(port), "--disable-uvicorn-access-log", *arguments]


def _flag(name: str, value: Any) -> str:
    """An argument on vLLM's command line: JSON for objects, --no-x for False."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    text = json.dumps(value) if isinstance(value, dict | list) else value
    return f"--{option}={text}"


def _configuration(
    engine: Mapping[str, Any], model: str, port: int, folder: Path, **args: Any
) -> str:
    config = yaml.safe_load(deployment.TEMPLATE.read_text())
    config["http_options"]["port"] = port
    application = config["applications"][0]["args"]
    application |= {"model": model, "served_model_name": NAME, **args}
    if os.environ.get(KEYS_VARIABLE):
        application["api_keys"] = {"env": KEYS_VARIABLE}
    own = {name: value for name, value in engine.items() if name in deployment.OWN}
    application |= own
    application["engine"] = {name: engine[name] for name in engine if name not in own}
    path = folder / f"{port}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def _ray_serve_llm(
    engine: Mapping[str, Any], model: str, port: int, folder: Path, direct: bool
) -> str:
    llm: dict[str, Any] = {
        "model_loading_config": {"model_id": NAME, "model_source": model},
        "engine_kwargs": dict(engine),
        "deployment_config": {"num_replicas": 1},
    }
    if not gpu.present():
        llm["accelerator_config"] = {"kind": "cpu"}
    args: dict[str, Any] = {"llm_configs": [llm]}
    if not direct:
        # Its ingress wants two CPUs reserved, which a small host does not have left.
        args["ingress_deployment_config"] = {"ray_actor_options": {"num_cpus": 0}}
    application = {
        "name": "llm",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": args,
    }
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
    path = folder / f"{port}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def command(
    name: str,
    engine: Mapping[str, Any],
    model: str,
    port: int,
    folder: Path,
    changes: Mapping[str, Any] | None = None,
) -> list[str]:
    """What starts a system; its configuration is written into `folder`.

    Args:
        changes: other settings of this application, beside those that its name stands for.
    """
    serve = [sys.executable, "-m", "ray.serve.scripts", "run"]
    if name in _PEERS:
        return [*_bare(engine, model, port), *_PEERS[name]]
    if name in _OURS:
        ours = [sys.executable, "-m", "serve_app", "serve", "--config"]
        settings = {**_OURS[name], **(changes or {})}
        return [*ours, _configuration(engine, model, port, folder, **settings)]
    if name == "classic":
        # Without the launcher HAProxy is off.
        return [*serve, _configuration(engine, model, port, folder)]
    if name in ("ray-serve-llm", "ray-serve-llm-direct"):
        direct = name == "ray-serve-llm-direct"
        return [*serve, _ray_serve_llm(engine, model, port, folder, direct)]
    raise SystemExit(f"unknown system {name!r}: {', '.join(NAMES)}")


def is_ours(name: str) -> bool:
    """Whether a system is this application."""
    return name in _OURS


def changed(name: str) -> dict[str, Any]:
    """The settings of this application that a system's name stands for."""
    return dict(_OURS.get(name, {}))


def guided(name: str) -> dict[str, str]:
    """The environment variables that a system's name stands for."""
    return dict(_GUIDED.get(name, {}))


def apart(port: int) -> dict[str, str]:
    """Environment that keeps the Ray cluster and HAProxy of `port` apart from any other's."""
    folder = f"/tmp/haproxy-{port}"
    return {
        "RAY_TMPDIR": f"/tmp/ray-{port}",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(port + 1001),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(port + 1002),
        # Two clusters of one machine would share the port, and each answer for the other.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port + 1003),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port + 22000),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 22050),
    }


@contextlib.contextmanager
def running(
    name: str,
    engine: Mapping[str, Any],
    model: str,
    port: int,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Iterator[System]:
    """Start a system, and stop it in the end, with all it started.

    Args:
        environment: besides what each system needs.
        changes: as in `command`.
    """
    words = command(name, engine, model, port, folder, changes)
    log = open(folder / f"{name}.log", "wb")  # noqa: SIM115
    started_s = time.perf_counter()
    process = subprocess.Popen(
        words,
        env={
            **os.environ,
            **QUIET,
            **apart(port),
            **guided(name),
            **(environment or {}),
        },
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    system = System(name, port, process, Path(log.name), started_s)
    try:
        yield system
    finally:
        log.close()
        _stop(system)


def key_header() -> dict[str, str]:
    """The header that this application asks for where the keys' variable is set; none otherwise.

    A file with several keys, one a line or separated by commas: the first.
    """
    keys = os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split()
    return {"authorization": f"Bearer {keys[0]}"} if keys else {}


def wait(
    system: System, timeout_s: float = 400.0, headers: Mapping[str, str] | None = None
) -> None:
    """Return once a system answers.

    Args:
        headers: that let a request in; by default `key_header()`.
    """
    deadline_s = time.perf_counter() + timeout_s
    while time.perf_counter() < deadline_s:
        if system.process.poll() is not None:
            raise SystemExit(f"{system.name} ended: {system.log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            request = urllib.request.Request(
                f"http://127.0.0.1:{system.port}/v1/models", headers=dict(headers or key_header())
            )
            urllib.request.urlopen(request, timeout=5).close()
            system.ready_s = time.perf_counter() - system.started_s
            print(f"{system.name} is ready after {system.ready_s:.1f} s", file=sys.stderr)
            return
        time.sleep(0.2)
    log = system.log.read_text()[-2000:]
    raise SystemExit(f"{system.name} is not ready after {timeout_s:g} s: {log}")


def _stop(system: System) -> None:
    if system.process.poll() is not None:
        return
    system.signal(signal.SIGCONT)
    processes.end_family(system.process, 90)
