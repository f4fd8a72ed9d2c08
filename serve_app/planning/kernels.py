"""The kernels that a GPU engine compiles while it starts, and the ones to turn off without a
compiler.

Triton compiles in every start: it needs a C compiler and Python's headers. FlashInfer and DeepGEMM
compile with nvcc. Without nvcc vLLM 0.32 does not use most of their kernels, but the first use of
the ones below ends the engine (vllm#49497). If they cannot be compiled, this module turns them off,
and vLLM's own kernels are used. The image has no CUDA toolkit: it is smaller, and a new worker does
not compile CUDA code for minutes.

`settle` is called wherever an engine starts: in a replica, on EKS and Runpod as with `make serve`,
and in bench.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

# What ends an engine that cannot compile it. The names are vLLM's; tests/test_upstream.py has them.
_WITHOUT_NVCC: Mapping[str, str] = {
    # Top-k and top-p: vLLM's Triton kernel does them.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # The all-reduce of tensor parallelism: vLLM's own, or NCCL's.
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    # Weights in 8 bits with a scale for each block: CUTLASS, which is compiled already.
    "VLLM_USE_DEEP_GEMM": "0",
}
# FlashInfer's kernels, already compiled; a package of its own. It has none of DeepGEMM's.
_PREBUILT = "flashinfer_jit_cache"
_FLASHINFER = ("VLLM_USE_FLASHINFER_SAMPLER", "VLLM_ALLREDUCE_USE_FLASHINFER")
# vLLM takes FlashInfer's attention on these (B200), and FlashAttention on all others.
_FLASHINFER_ATTENTION_MAJOR = 10
_CUDA = "/usr/local/cuda"


@dataclass(frozen=True)
class Tools:
    """What there is to compile with; an empty path is a tool that is not there.

    Attributes:
        prebuilt: whether FlashInfer's kernels are installed compiled.
    """

    c_compiler: str = ""
    cxx_compiler: str = ""
    python_headers: bool = False
    nvcc: str = ""
    ninja: str = ""
    prebuilt: bool = False

    @property
    def compile_triton(self) -> bool:
        return bool(self.c_compiler and self.python_headers)

    @property
    def compile_cuda(self) -> bool:
        return bool(self.nvcc and self.ninja and self.cxx_compiler)


def tools(
    environ: Mapping[str, str] = os.environ,
    which: Callable[[str], str | None] = shutil.which,
    has_package: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
) -> Tools:
    """The tools of this machine, looked for where Triton, FlashInfer and vLLM look."""

    def first(*names: str) -> str:
        return next((path for name in names if name and (path := which(name))), "")

    cuda = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return Tools(
        c_compiler=first(environ.get("CC", "")) if environ.get("CC") else first("gcc", "clang"),
        cxx_compiler=first(environ.get("CXX") or "c++"),
        python_headers=headers.is_file(),
        nvcc=first(f"{cuda}/bin/nvcc") if cuda else first("nvcc", f"{_CUDA}/bin/nvcc"),
        ninja=first("ninja"),
        prebuilt=has_package(_PREBUILT),
    )


def turned_off(tools: Tools, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that turn these kernels off, without those that are set already."""
    if tools.compile_cuda:
        return {}
    spared = _FLASHINFER if tools.prebuilt else ()
    return {
        name: value
        for name, value in _WITHOUT_NVCC.items()
        if name not in environ and name not in spared
    }


def insisted_on(tools: Tools, environ: Mapping[str, str]) -> list[str]:
    """The variables that ask for what cannot be compiled here: an engine would end at them."""
    return [name for name in turned_off(tools, {}) if environ.get(name, "0") != "0"]


def settle(environ: MutableMapping[str, str] = os.environ) -> None:
    """Turn off, in this process and those it starts, what cannot be compiled. Before vLLM loads."""
    environ.update(turned_off(tools(environ), environ))


def engine_defaults(tools: Tools, compute_capability: tuple[int, int] | None) -> dict[str, str]:
    """vLLM's arguments for the same reason: those for which it has no variable."""
    major = compute_capability[0] if compute_capability else 0
    if major != _FLASHINFER_ATTENTION_MAJOR or tools.compile_cuda or tools.prebuilt:
        return {}
    return {"attention_backend": "FLASH_ATTN"}
