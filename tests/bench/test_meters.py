"""What a load uses: processor time in front of the engine, and energy."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from bench.engine import meters


@dataclass(frozen=True)
class Process:
    """Stands for a process that uses a part of each second of a clock."""

    title: str
    share: float
    clock_s: list[float] = field(compare=False)

    def cmdline(self) -> list[str]:
        return [self.title]

    def cpu_times(self) -> Any:
        return SimpleNamespace(user=self.share * self.clock_s[0], system=0.0)


def test_processor_time_is_that_of_haproxy_and_the_replicas_own_process() -> None:
    clock_s = [100.0]
    running = [
        Process("/venv/bin/haproxy", 0.1, clock_s),
        Process("ray::ServeReplica:app:Server", 0.3, clock_s),
        Process("ray::ServeReplica:app:Server.answer", 0.2, clock_s),
        Process("VLLM::EngineCore", 1.0, clock_s),
        Process("python", 1.0, clock_s),
    ]
    with meters.metered(lambda: iter(running), [0]) as used:  # type: ignore[arg-type]
        clock_s[0] += 10.0
    assert used.haproxy_s == pytest.approx(1.0)
    assert used.door_s == pytest.approx(5.0)
    assert used.joules is None
    with meters.metered(lambda: iter(running[3:]), [0]) as used:  # type: ignore[arg-type]
        clock_s[0] += 10.0
    assert (used.haproxy_s, used.door_s) == (None, None)


def test_energy_is_that_of_the_devices_of_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counters of a model driver: GPU 0 uses 100 J a reading, GPU 1 1,000 J."""
    counted = {0: 5000.0, 1: 7000.0}

    def energy_mj(handle: int) -> float:
        counted[handle] += (100.0, 1000.0)[handle]
        return counted[handle] * 1e3

    for name, value in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=50),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=2**30),
        "nvmlDeviceGetTotalEnergyConsumption": energy_mj,
    }.items():
        monkeypatch.setattr(pynvml, name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    # However short the block is, there is a reading before and after it.
    with meters.metered(lambda: [], [1]) as used:
        pass
    assert used.joules is not None
    assert used.joules >= 1000.0
    assert used.joules % 1000.0 == 0.0
