"""What a GPU engine compiles: what there is to compile with, and what is turned off without it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.planning import kernels
from serve_app.planning.kernels import Tools

ALL = Tools("/usr/bin/gcc", "/usr/bin/c++", True, "/usr/local/cuda/bin/nvcc", "/usr/bin/ninja")
SAMPLER, ALLREDUCE = "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_ALLREDUCE_USE_FLASHINFER"
DEEP_GEMM = "VLLM_USE_DEEP_GEMM"


def machine(*paths: str) -> Callable[[str], str | None]:
    """`shutil.which` of a machine with these programs: found by name, or by whole path."""

    def which(name: str) -> str | None:
        return next((path for path in paths if name in (path, path.rsplit("/", 1)[1])), None)

    return which


def tools(*paths: str, packages: tuple[str, ...] = (), **environ: str) -> Tools:
    return kernels.tools(environ, machine(*paths), packages.__contains__)


def test_tools_are_found_where_vllm_and_triton_look() -> None:
    nvcc = "/usr/local/cuda/bin/nvcc"
    assert tools("/usr/bin/gcc", "/usr/bin/clang").c_compiler == "/usr/bin/gcc"
    assert tools("/usr/bin/clang").c_compiler == "/usr/bin/clang"
    assert tools("/usr/bin/gcc", CC="icx").c_compiler == ""
    assert tools("/usr/bin/c++").cxx_compiler == "/usr/bin/c++"
    assert tools("/usr/bin/c++", "/opt/g++-14", CXX="g++-14").cxx_compiler == "/opt/g++-14"
    assert tools(nvcc).nvcc == nvcc
    assert tools("/opt/bin/nvcc").nvcc == "/opt/bin/nvcc"
    # CUDA_HOME is taken at its word, as vLLM and FlashInfer do.
    assert tools(nvcc, CUDA_HOME="/nowhere").nvcc == ""
    assert tools(nvcc, "/x/bin/nvcc", CUDA_PATH="/x").nvcc == "/x/bin/nvcc"
    assert tools(packages=("flashinfer_jit_cache",)).prebuilt


@pytest.mark.parametrize("missing", ["nvcc", "ninja", "cxx_compiler"])
def test_what_cannot_be_compiled_is_turned_off(missing: str) -> None:
    result = replace(ALL, **{missing: ""})
    assert kernels.turned_off(result, {}) == {SAMPLER: "0", ALLREDUCE: "0", DEEP_GEMM: "0"}


def test_with_all_tools_vllm_decides() -> None:
    assert kernels.turned_off(ALL, {}) == {}
    assert kernels.engine_defaults(ALL, (10, 0)) == {}


def test_compiled_kernels_need_no_compiler() -> None:
    assert kernels.turned_off(Tools(prebuilt=True), {}) == {DEEP_GEMM: "0"}
    assert kernels.engine_defaults(Tools(prebuilt=True), (10, 0)) == {}


def test_what_somebody_set_is_kept_and_reported() -> None:
    environ = {SAMPLER: "1", "PATH": "/bin"}
    assert SAMPLER not in kernels.turned_off(Tools(), environ)
    assert kernels.insisted_on(Tools(), environ) == [SAMPLER]
    assert kernels.insisted_on(Tools(), {SAMPLER: "0"}) == []
    assert kernels.insisted_on(ALL, environ) == []


def test_settling_twice_changes_nothing_more() -> None:
    environ = {"CUDA_HOME": "/nowhere", "PATH": "/nowhere", ALLREDUCE: "1"}
    kernels.settle(environ)
    first = dict(environ)
    assert (first[SAMPLER], first[ALLREDUCE], first[DEEP_GEMM]) == ("0", "1", "0")
    kernels.settle(environ)
    assert environ == first


@given(
    st.builds(
        Tools,
        *(st.sampled_from(["", "/usr/bin/tool"]) for _ in range(2)),
        st.booleans(),
        *(st.sampled_from(["", "/usr/bin/tool"]) for _ in range(2)),
        st.booleans(),
    )
)
def test_no_engine_is_left_with_a_kernel_that_nothing_can_compile(expected: Tools) -> None:
    off = kernels.turned_off(expected, {})
    flashinfer = expected.prebuilt or bool(
        expected.nvcc and expected.ninja and expected.cxx_compiler
    )
    assert (SAMPLER in off) == (ALLREDUCE in off) == (not flashinfer)
    assert (DEEP_GEMM in off) == (not expected.compile_cuda)
    for capability in ((8, 9), (9, 0), (12, 0), None):
        assert kernels.engine_defaults(expected, capability) == {}
    assert bool(kernels.engine_defaults(expected, (10, 0))) == (not flashinfer)


@pytest.mark.server  # It imports vLLM.
def test_vllm_has_these_variables_and_this_backend() -> None:
    """They are vLLM's own names: a new version may rename one, and would ignore the old."""
    envs = pytest.importorskip("vllm.envs")
    assert set(kernels.turned_off(Tools(), {})) <= set(envs.environment_variables)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    (name,) = kernels.engine_defaults(Tools(), (10, 0)).values()
    assert name in AttentionBackendEnum.__members__
