"""The Ray head of this one machine, with bounds that suit a server of models.

`serve run` would start a cluster by itself, with an object store of 30% of the memory, which
nothing here uses, in a /dev/shm that vLLM and NCCL do use. Started apart, as a process of its own,
the head can be bounded and its logs found. It is `ray.init` in a process that waits, and not `ray
start`, which would also open a port through which Ray's clients run code.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from health import wait_until
from logs import show
from serve_app import processes

if TYPE_CHECKING:
    from serve_app.settings import Settings

MIB = 2**20
# A deployment's arguments and results are small: requests do not pass through the object store.
_STORE_BYTES = 512 * MIB
_LEAST_STORE_BYTES = 80 * MIB  # Ray refuses less than 75 MiB.
# vLLM's workers exchange outputs, and NCCL its messages, through what Ray leaves.
LEAST_SHM_BYTES = 1024 * MIB
_START_S = 180.0
_STOP_S = 20.0
_STARTED = "[head] "


def object_store_bytes(shm_bytes: int) -> int:
    """The object store's size: at most a quarter of /dev/shm."""
    return max(_LEAST_STORE_BYTES, min(_STORE_BYTES, shm_bytes // 4))


def shm_bytes() -> int:
    return shutil.disk_usage("/dev/shm").total


def environment(settings: "Settings") -> dict[str, str]:
    """What Ray's processes read at import: the launcher's, under whatever is set already."""
    from serve_app.launch import launcher

    # Ray listens beyond loopback, and whoever may speak to it can run code.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ours = {**launcher.ENVIRONMENT, **launcher.haproxy(), **launcher.environment_for(settings)}
    return {**ours, **token, **os.environ}


class Head:
    """A Ray head as a child of this process.

    Args:
        give_up: asked while it starts; once true, the start counts as failed.

    Attributes:
        address: for RAY_ADDRESS of whoever uses it.
        log_folder: where its processes write.

    Raises:
        RuntimeError: it did not start.
    """

    def __init__(self, environ: Mapping[str, str], give_up: Callable[[], bool]) -> None:
        from serve_app.launch import orphans

        self._last_lines: list[str] = []
        self._up = threading.Event()
        self.address, self.log_folder = "", Path()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(object_store_bytes(shm_bytes()))],
            env={**environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        )
        orphans.own.add(self._process.pid)  # Its status is ours to see.
        threading.Thread(target=self._listen, daemon=True).start()
        wait_until(lambda: self._up.is_set() or not self.alive or give_up(), _START_S)
        if not self._up.is_set():
            self.stop()
            for line in [] if give_up() else self._last_lines[-20:]:
                show(f"[ray] {line}")
            raise RuntimeError("the Ray head does not start")

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_STARTED):
                self.address, folder = line.removeprefix(_STARTED).split()
                self.log_folder = Path(folder) / "logs"
                self._up.set()
            elif line.strip():
                self._last_lines.append(line.rstrip())

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """End it and what it started."""
        processes.end(self._process, _STOP_S)


def main(store_bytes: int) -> None:
    """Be the head until SIGTERM; raylet and this process end together."""
    import ray

    context = ray.init(
        "local",
        object_store_memory=store_bytes,
        include_dashboard=True,
        # Whoever reaches the dashboard can run code.
        dashboard_host="127.0.0.1",
        log_to_driver=False,
    )
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    info = context.address_info
    print(f"{_STARTED}{info['gcs_address']} {info['session_dir']}", flush=True)
    # In slices: a signal's handler runs between two of them.
    while not over.wait(0.2):
        pass
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
