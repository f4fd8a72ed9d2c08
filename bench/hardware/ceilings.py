"""`bench roofline`: what a GPU reaches at best, and the least times that follow for a model.

    python -m bench roofline --model FOLDER --measure --out results/roofline
    python -m bench baseline --model FOLDER --roofline results/roofline --out results/engine

The ceilings are those of this machine (`--measure`) or of a data sheet (`--gpu H100`):

    copy    a buffer far larger than the caches, read and written: bytes of both a second
    GEMM    a large square matrix product, and the largest one of the model: operations a second

Both in the type that the engine computes in, and the best of many short runs: a ceiling is what can
be reached, and a data sheet's is not. Without a GPU it is the CPU that is measured, with the
threads that PyTorch takes by itself, so that a rehearsal has figures of the same kind.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from bench import machine, result
from bench.errors import BenchError
from bench.hardware import roofline
from bench.hardware.roofline import Ceilings, Roofline, Shape
from bench.result import Line

_GPU_COPY_BYTES, _CPU_COPY_BYTES = 2 * 2**30, 2**28
_GPU_SIDE, _CPU_SIDE = 8192, 1024
_TOKENS = 8192  # Of the model's own product: a large prefill.
_WARM_UP_S, _MEASURE_S = 0.3, 1.5


# --- the command ----------------------------------------------------------------------------


def command(options: argparse.Namespace) -> Line:
    """What `python -m bench roofline` does with its options; returns its last line."""
    shape = roofline.shape(options.model, **roofline.storage(options.engine))
    if options.measure:
        ceilings = measure(shape)
    elif options.gpu:
        ceilings = roofline.of_gpu(options.gpu)
    else:
        raise BenchError("say --measure, or --gpu with the name of a GPU")
    least = roofline.least(shape, ceilings)
    output = Roofline(
        **result.header(f"{shape.name}, {ceilings.source}"),
        shape=shape,
        ceilings=ceilings,
        least=least,
        weights_bytes=shape.stored_bytes,
        kv_bytes_a_token=shape.token_bytes,
    )
    output = result.write(options.out, output)
    names = ("ceilings", "weights_bytes")
    return result.line(output, options.out, *names, decode_1=least.decode[0])


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench roofline`."""
    add = parser.add_argument
    add("--model", required=True, help="a folder with config.json")
    add("--out", type=Path, required=True, help="folder of the result")
    add("--gpu", help="ceilings of its data sheet, such as H100")
    add("--measure", action="store_true", help="measure the ceilings of this machine")
    add("--engine", type=json.loads, default={}, help="vLLM arguments: dtypes, parallelism")


def shape_and_ceilings(
    folder: Path | None, model: str, engine: Mapping[str, Any]
) -> tuple[Shape, Ceilings] | None:
    """Shape and ceilings: of a result of `bench roofline`, else of the GPU's data sheet.

    None if neither is known, for example on a CPU that was not measured.

    Raises:
        BenchError: the folder holds another kind of result.
    """
    if folder is not None:
        measured = result.read(folder, roofline=Roofline)
        shape = measured.shape
        if engine:
            shape = msgspec.structs.replace(shape, **roofline.storage(engine))
        return shape, measured.ceilings
    gpus = machine.gpus()
    if not gpus or not Path(model).is_dir():
        return None
    with contextlib.suppress(BenchError):
        sheet = roofline.of_gpu(gpus[0].name)
        return roofline.shape(model, **roofline.storage(engine)), sheet
    return None


# --- measuring ------------------------------------------------------------------------------


def measure(shape: Shape | None = None, measure_s: float = _MEASURE_S) -> Ceilings:
    """The ceilings of the first GPU, or of the CPU. Takes some seconds."""
    import torch

    if torch.cuda.is_available():
        device, kind = torch.device("cuda"), torch.bfloat16
        copy_bytes, side, name = _GPU_COPY_BYTES, _GPU_SIDE, torch.cuda.get_device_name()
    else:
        device, kind = torch.device("cpu"), torch.float32
        copy_bytes, side, name = _CPU_COPY_BYTES, _CPU_SIDE, f"{torch.get_num_threads()} CPU cores"
    bytes_per_s = _copy(torch, device, copy_bytes, measure_s)
    sizes = [(side, side, side)]
    if shape is not None and device.type == "cuda":
        sizes.append((_TOKENS, shape.hidden, 2 * shape.intermediate // shape.gpus))
    flops_per_s = max(_product(torch, device, kind, size, measure_s) for size in sizes)
    source = f"measured on {name}: copy of {copy_bytes // 2**20} MiB, {kind} product of {sizes}"
    return Ceilings(flops_per_s=flops_per_s, bytes_per_s=bytes_per_s, source=source)


def _copy(torch: Any, device: Any, size: int, measure_s: float) -> float:
    here = torch.zeros(size, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    least_s = _least(torch, device, lambda: there.copy_(here), measure_s)
    return 2 * size / least_s


def _product(
    torch: Any, device: Any, kind: Any, size: tuple[int, int, int], measure_s: float
) -> float:
    rows, inner, columns = size
    left = torch.randn(rows, inner, dtype=kind, device=device)
    right = torch.randn(inner, columns, dtype=kind, device=device)
    out = torch.empty(rows, columns, dtype=kind, device=device)
    least_s = _least(torch, device, lambda: torch.mm(left, right, out=out), measure_s)
    return 2.0 * rows * inner * columns / least_s


def _least(torch: Any, device: Any, work: Callable[[], object], measure_s: float) -> float:
    """The least time of one `work`, over many of them."""
    _repeat(work, _WARM_UP_S, lambda: _synchronised(torch, device))
    times_s: list[float] = []
    end_s = time.perf_counter() + measure_s
    while time.perf_counter() < end_s or len(times_s) < 3:
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            work()
            after.record()
            after.synchronize()
            times_s.append(before.elapsed_time(after) / 1e3)
        else:
            began_s = time.perf_counter()
            work()
            times_s.append(time.perf_counter() - began_s)
    return min(times_s)


def _repeat(work: Callable[[], object], for_s: float, settle: Callable[[], None]) -> None:
    end_s = time.perf_counter() + for_s
    while time.perf_counter() < end_s:
        work()
        settle()


def _synchronised(torch: Any, device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
