"""What the GPUs do during a run: utilisation and memory, sampled through NVML."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np


class GpuSample(msgspec.Struct, kw_only=True):
    """One sample of one GPU.

    Attributes:
        t_s: seconds since the start of the run.
        gpu: index of the GPU.
        utilisation: share of the last interval in which a kernel ran, 0 to 1.
        memory_gib: memory in use.
        joules: energy used since the driver was loaded, or where the GPU does not count it, since
            the first sample by its power; None where it says neither.
    """

    t_s: float
    gpu: int
    utilisation: float
    memory_gib: float
    joules: float | None = None


def energy(samples: Sequence[GpuSample]) -> list[tuple[float, float]]:
    """Times, and the joules that all GPUs together had used until then, from 0.

    Empty where a GPU does not say. GPUs are sampled one after another: each is read at the times
    of the first.
    """
    every: dict[int, list[tuple[float, float]]] = {}
    for sample in samples:
        if sample.joules is None:
            return []
        every.setdefault(sample.gpu, []).append((sample.t_s, sample.joules))
    if not every:
        return []
    times = [t_s for t_s, _ in every[min(every)]]
    total = np.zeros(len(times))
    for each in every.values():
        at_s, joules = np.array(each).T
        total += np.interp(times, at_s, joules - joules[0])
    return list(zip(times, total.tolist(), strict=True))


def present() -> bool:
    """Whether there is an NVIDIA GPU with a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return bool(pynvml.nvmlDeviceGetCount())


def visible() -> list[int]:
    """Indices, in NVML, of the GPUs that this process may use: the others may work for others.

    All of them where `CUDA_VISIBLE_DEVICES` is not set. It names GPUs by index or by the beginning
    of their UUID; as CUDA does, the first name that is no GPU ends the list. NVML must be open.
    """
    import pynvml

    count = int(pynvml.nvmlDeviceGetCount())
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not named:
        return list(range(count))
    uuids = [
        pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)
    ]
    indices: list[int] = []
    for name in map(str.strip, named.split(",")):
        if name.isdecimal():
            matches = [int(name)] if int(name) < count else []
        else:
            matches = [index for index, uuid in enumerate(uuids) if name and uuid.startswith(name)]
        if len(matches) != 1:
            break
        indices.append(matches[0])
    return indices


@contextlib.contextmanager
def sampling(start_s: float, period_s: float = 0.5) -> Iterator[list[GpuSample]]:
    """Sample every visible GPU until the block ends; the list stays empty where there is none.

    The first sample is taken before the block and the last one after it, so that the energy of the
    whole block is known.

    Args:
        start_s: start of the run, on `time.time()`.
    """
    import pynvml

    samples: list[GpuSample] = []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield samples
        return
    handles = {index: pynvml.nvmlDeviceGetHandleByIndex(index) for index in visible()}
    done = threading.Event()
    meters = {index: _Meter(handle) for index, handle in handles.items()}

    def sample() -> None:
        for index, handle in handles.items():
            rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            samples.append(
                GpuSample(
                    t_s=time.time() - start_s,
                    gpu=index,
                    utilisation=rates.gpu / 100,
                    memory_gib=memory.used / 2**30,
                    joules=meters[index].joules(),
                )
            )

    def sample_often() -> None:
        while not done.wait(period_s):
            sample()

    sample()
    thread = threading.Thread(target=sample_often, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        sample()
        pynvml.nvmlShutdown()


class _Meter:
    """The energy of one GPU: its own counter, or where it has none its power over time."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._counted = True
        self._joules, self._at_s = 0.0, time.monotonic()

    def joules(self) -> float | None:
        import pynvml

        if self._counted:
            try:
                return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
            except pynvml.NVMLError:
                self._counted = False  # Before Volta, and in some virtual machines.
        try:
            watts = float(pynvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3
        except pynvml.NVMLError:
            return None
        now_s = time.monotonic()
        self._joules += watts * (now_s - self._at_s)
        self._at_s = now_s
        return self._joules
