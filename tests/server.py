"""A real server for the tests: `python -m serve_app serve`, with its own Ray and HAProxy."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from bench.engine.systems import apart

ROOT = Path(__file__).parent.parent
# One client: each new one reads the system's certificates, which takes 60 ms of CPU time.
CLIENT = httpx.Client(verify=False)
# Two cores hold the engine, its front end, Ray and the test: small caches, one thread.
ENGINE = {"block_size": 32, "kv_cache_memory_bytes": 2**28, "max_model_len": 2048}


def configuration(port: int, **args: Any) -> dict[str, Any]:
    """The shipped serve_config.yaml on another port, with some args replaced."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port
    application = config["applications"][0]["args"]
    engine = {**application["engine"], **ENGINE, **args.pop("engine", {})}
    config["applications"][0]["args"] = {**application, **args, "engine": engine}
    return config


def wait(until: Callable[[], bool], timeout_s: float = 60) -> bool:
    """Whether `until` comes true in time."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if until():
            return True
        time.sleep(0.1)
    return False


@dataclass
class Server:
    """A running server. `output()` is what its launcher has printed."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def output(self) -> str:
        return self.log.read_text()

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def named(self, part: str) -> list[psutil.Process]:
        """Its processes whose command line holds `part`, in order of their start."""
        collected = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(part in word for word in process.cmdline()):
                    collected.append(process)
        return sorted(collected, key=lambda process: process.create_time())

    def metric(self, name: str, **headers: str) -> float:
        """The sum of a metric of vLLM over its labels."""
        answer = CLIENT.get(f"{self.url}/metrics", headers=headers, timeout=30)
        lines = answer.raise_for_status().text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def ready(self, timeout_s: float = 240) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and self.process.poll() is None:
            if "serving http" in self.output():
                return True
            time.sleep(0.2)
        return False

    def answers(self, timeout_s: float) -> bool:
        """Whether it generates an answer within `timeout_s`. Until then it must say why not."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            with contextlib.suppress(httpx.HTTPError):
                answer = CLIENT.get(f"{self.url}/v1/models", timeout=5)
                if answer.is_success:
                    name = answer.json()["data"][0]["id"]
                    body = {"model": name, "prompt": "x", "max_tokens": 1}
                    answer = CLIENT.post(f"{self.url}/v1/completions", json=body, timeout=5)
                if answer.is_success:
                    return True
                assert answer.json()["error"]["message"], answer.text
            time.sleep(0.2)
        return False

    def stop(self, timeout_s: float = 120) -> int:
        """SIGTERM, then the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def launched(config: dict[str, Any], folder: Path, **environment: str) -> Iterator[Server]:
    """Start a server; on the way out, stop it if the test did not."""
    port = config["http_options"]["port"]
    path, log = folder / f"{port}.yaml", folder / f"{port}.log"
    path.write_text(yaml.safe_dump(config))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "serve_app", "serve", "--config", str(path)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **apart(port)}
            | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, port, log)
    try:
        yield server
    finally:
        if process.poll() is None:
            try:
                server.stop()
            except subprocess.TimeoutExpired:
                process.kill()
                raise
