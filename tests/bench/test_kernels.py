"""Summaries of traces: one in the form that a GPU's has, and real ones of PyTorch's profiler."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bench.hardware import kernels


def kernel(name: str, ts: float, dur: float, request: int, cat: str = "kernel") -> dict[str, Any]:
    args = {"device": 0, "stream": 7, "correlation": request}
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur} | {
        "args": args
    }


def launch(ts: float, request: int, name: str = "cudaLaunchKernel") -> dict[str, Any]:
    shape = {"ph": "X", "cat": "cuda_runtime", "name": name, "pid": 1, "tid": 1, "dur": 2.0}
    return shape | {"ts": ts, "args": {"correlation": request}}


def step(ts: float, name: str, cat: str = "user_annotation") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": 50.0}


# Two steps. A graph of a product, attention and a product with 5 us between the last two; then a
# copy that the host asked for 40 us after the GPU was done.
TRACE = [
    {"ph": "M", "name": "process_name", "pid": 0},
    step(0, "execute_context_1(200)_generation_0(0)"),
    step(0, "execute_context_1(200)_generation_0(0)", "gpu_user_annotation"),
    step(100, "execute_context_0(0)_generation_1(1)"),
    launch(5, 1, "cudaGraphLaunch"),
    kernel("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", 10, 40, 1),
    kernel("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", 45, 15, 1),
    kernel("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", 65, 30, 1),
    launch(135, 2, "cudaMemcpyAsync"),
    kernel("Memcpy DtoH (Device -> Pinned)", 137, 3, 2, "gpu_memcpy"),
]


def test_time_is_shared_out_by_kind_of_kernel() -> None:
    summary = kernels.summarise(TRACE)
    assert summary.device == "gpu"
    assert (summary.steps, summary.context_steps, summary.kernels) == (2, 1, 4)
    shares = {each.family: each for each in summary.families}
    # Shares are of all kernels' time: 40 + 15 + 30 + 3.
    assert shares["GEMM"].share == pytest.approx(70 / 88)
    assert shares["GEMM"].calls == 2
    assert shares["attention"].share == pytest.approx(15 / 88)
    assert shares["copies"].share == pytest.approx(3 / 88)
    assert shares["GEMM"].top[0][0].startswith("nvjet")


def test_a_gap_is_the_host_s_where_nothing_had_been_asked_for() -> None:
    summary = kernels.summarise(TRACE)
    assert summary.wall_s == pytest.approx(130e-6)
    # 10 to 60 (two kernels at once), 65 to 95, 137 to 140.
    assert summary.busy_s == pytest.approx(83e-6)
    assert summary.gaps.count == 2
    assert summary.gaps.total_s == pytest.approx(47e-6)
    assert summary.gaps.host_s == pytest.approx(42e-6)
    assert summary.gaps.longest_s == pytest.approx(42e-6)
    assert summary.launch_bound
    assert summary.text.startswith("launch-bound")


def test_a_gpu_that_is_never_without_work_is_not_launch_bound() -> None:
    # Asked for before the kernel ahead of it had ended: the gap is the GPU's own.
    early = [launch(50, 2, "cudaMemcpyAsync") if event is TRACE[8] else event for event in TRACE]
    summary = kernels.summarise(early)
    assert summary.gaps.total_s == pytest.approx(47e-6)
    assert summary.gaps.host_s == 0
    assert not summary.launch_bound


@pytest.mark.parametrize(
    ("name", "family"),
    [
        (
            "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            "communication",
        ),
        ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>", "communication"),
        ("void vllm::reshape_and_cache_flash_kernel<...>", "attention"),
        ("fmhaSm90Kernel_QkvBfloat16OBfloat16H128PagedKv", "attention"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "GEMM"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "norm, rotary, activation"),
        ("void vllm::act_and_mul_kernel<c10::BFloat16>", "norm, rotary, activation"),
        ("void at::native::reduce_kernel<512, 1, ArgMaxOps<float>>", "sampling"),
        ("_topk_topp_kernel", "sampling"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
        ("Memset (Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<int>>", "copies"),
        ("something_nobody_has_seen", "other"),
    ],
)
def test_kernels_are_known_by_their_names(name: str, family: str) -> None:
    assert kernels.family(name) == family


@pytest.mark.server  # It imports vLLM or torch.
def test_a_real_trace_of_a_cpu_is_read_from_its_file(tmp_path: Path) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    with (
        profile(activities=[ProfilerActivity.CPU]) as recorded,
        record_function("execute_context_0(0)_generation_2(2)"),
    ):
        weights = torch.ones(300, 300)
        for _ in range(20):
            weights = torch.nn.functional.linear(weights, weights)
        torch.softmax(weights, dim=-1)
    path = tmp_path / "a.pt.trace.json"
    recorded.export_chrome_trace(str(path))
    packed = tmp_path / "a.pt.trace.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    summary = kernels.summarise(kernels.read(packed))
    assert summary.device == "cpu"
    assert summary.steps == 1
    assert summary.families[0].family == "GEMM"
    assert sum(each.share for each in summary.families) == pytest.approx(1.0)
    # Own times do not count twice what lies in one another.
    assert sum(each.time_s for each in summary.families) <= summary.busy_s * 1.001
    assert not summary.launch_bound
    assert kernels.summarise(kernels.read(path)) == summary


def test_an_empty_trace_is_a_summary_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "none.pt.trace.json"
    path.write_text(json.dumps({"traceEvents": []}))
    summary = kernels.summarise(kernels.read(path))
    assert summary.kernels == 0
    assert summary.families == []
