"""What the GPUs do during a run: utilisation and memory, sampled through NVML."""

import contextlib
import threading
import time
from collections.abc import Iterator

import msgspec


class GpuSample(msgspec.Struct, kw_only=True):
    """One sample of one GPU.

    Attributes:
        t_s: seconds since the start of the run.
        gpu: index of the GPU.
        utilisation: share of the last interval in which a kernel ran, 0 to 1.
        memory_gib: memory in use.
    """

    t_s: float
    gpu: int
    utilisation: float
    memory_gib: float


def present() -> bool:
    """Whether there is an NVIDIA GPU with a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return bool(pynvml.nvmlDeviceGetCount())


@contextlib.contextmanager
def sampling(start_s: float, period_s: float = 0.5) -> Iterator[list[GpuSample]]:
    """Sample every GPU until the block ends; the list stays empty where there is none.

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
    devices = range(pynvml.nvmlDeviceGetCount())
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in devices]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(period_s):
            for index, handle in enumerate(handles):
                rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                samples.append(
                    GpuSample(
                        t_s=time.time() - start_s,
                        gpu=index,
                        utilisation=rates.gpu / 100,
                        memory_gib=memory.used / 2**30,
                    )
                )

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        pynvml.nvmlShutdown()
