"""What a load uses beside its time: energy of the GPUs, processor time in front of the engine.

    with metered(server.processes, devices) as used:
        ...
    used.joules

In front of the engine of this application are HAProxy and the replica's own Python process. In the
fast lane that process only answers as the door and reads the engine's reports; in the full lane it
also passes the tokens on.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.hardware import gpu

_HAPROXY, _REPLICA = "haproxy", "ray::ServeReplica:"
_PERIOD_S = 0.2


@dataclass
class Used:
    """By a load, from its beginning to its end.

    Attributes:
        joules: of the GPUs; None where they are not counted.
        haproxy_s, door_s: processor time; None for a server without such a process.
    """

    joules: float | None = None
    haproxy_s: float | None = None
    door_s: float | None = None


@contextlib.contextmanager
def metered(
    processes: Callable[[], Iterable[psutil.Process]], devices: Sequence[int]
) -> Iterator[Used]:
    """Measure what is used until the block ends; the figures are there afterwards.

    Args:
        processes: all processes of the server.
        devices: its GPUs, as NVML numbers them.
    """
    used, before = Used(), _cpu_s(processes())
    with gpu.sampling(time.time(), _PERIOD_S) as samples:
        yield used
    after = _cpu_s(processes())
    used.haproxy_s, used.door_s = (_growth_s(before, after, kind) for kind in ("haproxy", "door"))
    energy = gpu.energy([sample for sample in samples if sample.gpu in devices])
    if energy:
        used.joules = energy[-1][1] - energy[0][1]


_Times = dict[psutil.Process, tuple[str, float]]


def _growth_s(before: _Times, after: _Times, kind: str) -> float | None:
    mine = {process: cpu_s for process, (what, cpu_s) in after.items() if what == kind}
    if not mine:
        return None
    return sum(cpu_s - before.get(process, ("", 0.0))[1] for process, cpu_s in mine.items())


def _cpu_s(processes: Iterable[psutil.Process]) -> _Times:
    """Kind and processor time, so far, of each process in front of the engine."""
    times: _Times = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if kind := _kind(process):
                own = process.cpu_times()
                times[process] = kind, own.user + own.system
    return times


def _kind(process: psutil.Process) -> str:
    words = process.cmdline()
    title = words[0] if words else ""
    if Path(title).name == _HAPROXY:
        return "haproxy"
    return "door" if title.startswith(_REPLICA) else ""
