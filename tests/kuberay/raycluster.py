"""A Ray cluster of several raylets on this machine, which an operator's requests reach."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from bench.engine.systems import apart
from serve_app.launch import launcher

# Of this folder's tests: 8840 to 8859.
PORT, DASHBOARD, GCS, AGENT = 8840, 8841, 8842, 8843


class RayCluster:
    """A head that runs no work, and workers, each of them a raylet of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._processes = folder, list[subprocess.Popen[bytes]]()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = {
            **inherited,
            **environment,
            **apart(PORT),
            **launcher.haproxy(),  # As the image has it, but where this machine has it.
            # A short path: sockets have a hundred letters.
            "RAY_TMPDIR": f"/tmp/ray-{PORT}",
            "RAY_AUTH_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "RAY_raylet_start_wait_time_s": "60",
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, workers: int) -> None:
        head = ("--head", f"--port={GCS}", "--num-cpus=0", f"--dashboard-port={DASHBOARD}",
                f"--ray-client-server-port={PORT + 19}", "--include-dashboard=true")  # fmt: skip
        self._join("head", AGENT, head, 1)
        self.start_workers(workers)

    def start_workers(self, workers: int) -> None:
        # One at a time: raylets of one machine name their sockets by how many there are.
        for number in range(workers):
            words = (f"--address=127.0.0.1:{GCS}", "--num-cpus=1")
            self._join(f"worker-{number}", AGENT + 1 + number, words, 2 + number)

    def _join(self, name: str, agent_port: int, words: tuple[str, ...], nodes: int) -> None:
        # A raylet whose agents start late, beside other tests, gives up: so once more.
        for _ in range(3):
            self._ray(name, agent_port, *words)
            if self._joined(self._processes[-1], nodes):
                return
            self.end(self._processes.pop())
        raise AssertionError(self.log(name))

    def _joined(self, process: "subprocess.Popen[bytes]", nodes: int) -> bool:
        self.until(lambda: process.poll() is not None or self.nodes() == nodes, 120)
        return self.nodes() == nodes

    def _ray(self, name: str, agent_port: int, *words: str) -> None:
        command = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
                   f"--dashboard-agent-listen-port={agent_port}", "--disable-usage-stats",
                   "--object-store-memory=100000000",
                   "--node-ip-address=127.0.0.1", *words)  # fmt: skip
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, process_group=0,
            )  # fmt: skip
        self._processes.append(process)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def nodes(self) -> int:
        """How many are alive, as the dashboard knows."""
        try:
            result = self.ask("/nodes?view=summary")["data"]["summary"]
        except (OSError, ValueError, KeyError):
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in result)

    def ask(self, path: str, body: object = None, method: str = "GET") -> Any:
        """The dashboard's answer, as the operator asks it."""
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{DASHBOARD}{path}"
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def application(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = self.ask("/api/serve/applications/")["applications"].get(name, {})
        return result

    def running(self, name: str, timeout_s: float) -> bool:
        return self.until(lambda: self.application(name).get("status") == "RUNNING", timeout_s)

    def until(self, condition: Any, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            with contextlib.suppress(OSError, ValueError):
                if condition():
                    return True
            time.sleep(0.2)
        return False

    def end(self, *processes: "subprocess.Popen[bytes]") -> None:
        """These with all that is below them, or every process of it; and no other."""
        chosen = processes or tuple(self._processes)
        family = []
        for process in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                family += [*parent.children(recursive=True), parent]
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family, 10)
        for process in chosen:
            process.wait(10)


@contextlib.contextmanager
def cluster(folder: Path, environment: Mapping[str, str], workers: int) -> Iterator[RayCluster]:
    made = RayCluster(folder, environment)
    try:
        made.start(workers)
        yield made
    finally:
        made.end()
