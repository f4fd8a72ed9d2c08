"""Where the time of an engine's steps goes: a summary of a trace of PyTorch's profiler.

    summarise(read(Path("decode-1_rank0.pt.trace.json.gz")))

Pure but for `read`. A trace holds what the GPU ran (cat `kernel`, `gpu_memcpy`, `gpu_memset`, each
with its stream), what the host called to have it run (`cuda_runtime`, joined by `correlation`) and
the steps of the engine, which vLLM names `execute_context_N(T)_generation_M(U)`. The GPU is busy
while any stream runs something; what lies between is a gap. A gap is the host's where the kernel
after it was only asked for when the GPU was already idle: nothing was queued. It is the GPU's own
where the kernel had been asked for before, as between the kernels of one CUDA graph.

The profiler slows the host and hardly the kernels, so that the idle share of a trace is an upper
bound; `busy_s` of a step beside a step's time without the profiler is the better figure, and
`profile.py` works that out. A trace without a GPU is summarised by the operations of the CPU and
their own time, so that everything can be rehearsed; it has no gaps.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

Event = Mapping[str, Any]
_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cuda_runtime", "cuda_driver")
_STEP = re.compile(r"execute_context_(\d+)\((\d+)\)_generation_(\d+)\((\d+)\)")
# Shorter gaps are how kernels follow each other on a stream.
_LEAST_GAP_US = 1.0
_LAUNCH_BOUND = 0.1
_TOP = 3
# The first that matches; fused kernels of Triton are named after all that they do, so they come
# before what is named after one thing.
_FAMILIES: Sequence[tuple[str, str]] = (
    ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter|cross_device|multimem|symm"),
    ("attention", r"flash|fmha|attention|attn|paged|reshape_and_cache|mha_|_sdpa"),
    ("GEMM", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|gemv|scaled_mm|matmul|\bmm\b"),
    ("GEMM", r"::mm|addmm|linear|onednn|mkldnn|::bmm|::dot\b"),
    ("norm, rotary, activation", r"^triton_|rms_?norm|layer_?norm|rotary|silu|gelu|act_and_mul"),
    ("sampling", r"sampl|top_?[kp]|softmax|argmax|argmin|sort|gumbel|multinomial|philox"),
    ("sampling", r"exponential|random|penalt|logit|distribution|bernoulli|cumsum|scan"),
    ("copies", r"memcpy|memset|copy|cat(array|::|\b)|fill|clone|index|gather|scatter|embedding"),
    ("copies", r"zero_|empty|resize|::to\b|pin_memory|slot_mapping|prepare_inputs"),
    ("norm, rotary, activation", r"elementwise|vectorized|reduce|::add|::mul|quant"),
)
_COMPILED = [(family, re.compile(pattern, re.IGNORECASE)) for family, pattern in _FAMILIES]
OTHER = "other"


class Family(msgspec.Struct, kw_only=True):
    """Kernels of one kind: their time, its share of that of all, and the largest of them."""

    family: str
    time_s: float
    share: float
    calls: int
    top: list[tuple[str, float]]


class Gaps(msgspec.Struct, kw_only=True):
    """Times at which no stream ran anything, between the first kernel and the last.

    Attributes:
        host_s: before kernels that were asked for when the GPU was idle already.
    """

    count: int = 0
    total_s: float = 0.0
    host_s: float = 0.0
    longest_s: float = 0.0
    median_s: float = 0.0


class Summary(msgspec.Struct, kw_only=True):
    """The summary of a trace.

    Attributes:
        device: "gpu", or "cpu" for a trace without one.
        steps: of the engine; `context_steps` of them read prompts.
        wall_s: from the first kernel to the end of the last; busy_s: of it, while one ran.
        kernels: how many.
        idle_share: 1 - busy_s / wall_s, an upper bound under the profiler.
        launch_bound: a tenth of the time or more is lost because the host asks too late.
        text: the same in a sentence.
    """

    device: str
    steps: int
    context_steps: int
    wall_s: float
    busy_s: float
    kernels: int
    idle_share: float
    families: list[Family]
    gaps: Gaps
    launch_bound: bool
    text: str


def read(path: Path) -> list[Event]:
    """The events of a trace file, gzipped or not."""
    raw = path.read_bytes()
    text = gzip.decompress(raw) if path.suffix == ".gz" else raw
    # Names hold what a user's prompt or a file system says, in any encoding.
    trace = json.loads(text.decode(errors="replace"))
    events: list[Event] = trace["traceEvents"] if isinstance(trace, dict) else trace
    return events


def family(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), OTHER)


def summarise(events: Sequence[Event]) -> Summary:
    """Summarise a trace, as this module's docstring describes."""
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = [step for event in complete if (step := _step(event))]
    gpu = [event for event in complete if event.get("cat") in _GPU]
    reading = sum(int(step.group(1)) > 0 for step in steps)
    if not gpu:
        return _of_cpu(complete, len(steps), reading)
    busy = _union((event["ts"], event["ts"] + event["dur"], event) for event in gpu)
    wall_us = busy[-1][1] - busy[0][0]
    busy_us = sum(end - start for start, end, _ in busy)
    gaps = _gaps(busy, complete)
    idle = 1 - busy_us / wall_us if wall_us > 0 else 0.0
    waiting = gaps.host_s / (wall_us / 1e6) if wall_us > 0 else 0.0
    bound = waiting >= _LAUNCH_BOUND
    text = (
        f"{'launch-bound' if bound else 'not launch-bound'}: of the time under the profiler the "
        f"GPU is idle {idle:.0%}, and waits for the host {waiting:.0%}"
    )
    return Summary(
        device="gpu",
        steps=len(steps),
        context_steps=reading,
        wall_s=wall_us / 1e6,
        busy_s=busy_us / 1e6,
        kernels=len(gpu),
        idle_share=idle,
        families=_families((str(event["name"]), event["dur"]) for event in gpu),
        gaps=gaps,
        launch_bound=bound,
        text=text,
    )


def _step(event: Event) -> re.Match[str] | None:
    """The engine's step that an event of the host marks; the GPU repeats these names."""
    return _STEP.match(str(event["name"])) if event.get("cat") == "user_annotation" else None


def _union(spans: Iterable[tuple[float, float, Event]]) -> list[tuple[float, float, Event]]:
    """Spans that overlap made one, in order; each with the event that began it."""
    merged: list[tuple[float, float, Event]] = []
    for start, end, event in sorted(spans, key=lambda span: (span[0], span[1])):
        if merged and start <= merged[-1][1]:
            before = merged[-1]
            merged[-1] = (before[0], max(before[1], end), before[2])
        else:
            merged.append((start, end, event))
    return merged


def _gaps(busy: Sequence[tuple[float, float, Event]], events: Sequence[Event]) -> Gaps:
    asked_us = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _HOST and "correlation" in event.get("args", {})
    }
    lengths_us: list[float] = []
    host_us = 0.0
    for (_, idle_from, _), (idle_to, _, event) in pairwise(busy):
        if idle_to - idle_from < _LEAST_GAP_US:
            continue
        lengths_us.append(idle_to - idle_from)
        at_us = asked_us.get(event.get("args", {}).get("correlation"))
        if at_us is not None and at_us >= idle_from:
            host_us += idle_to - idle_from
    if not lengths_us:
        return Gaps()
    return Gaps(
        count=len(lengths_us),
        total_s=sum(lengths_us) / 1e6,
        host_s=host_us / 1e6,
        longest_s=max(lengths_us) / 1e6,
        median_s=median(lengths_us) / 1e6,
    )


def _families(timed: Iterable[tuple[str, float]]) -> list[Family]:
    by_family: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    calls: dict[str, int] = defaultdict(int)
    for name, took_us in timed:
        kind = family(name)
        by_family[kind][name] += took_us
        calls[kind] += 1
    total_us = sum(sum(names.values()) for names in by_family.values()) or 1.0
    families = []
    for kind, names in by_family.items():
        top = sorted(names.items(), key=lambda item: -item[1])[:_TOP]
        time_us = sum(names.values())
        families.append(
            Family(
                family=kind,
                time_s=time_us / 1e6,
                share=time_us / total_us,
                calls=calls[kind],
                top=[(name[:120], took_us / 1e6) for name, took_us in top],
            )
        )
    return sorted(families, key=lambda each: -each.time_s)


def _of_cpu(events: Sequence[Event], steps: int, reading: int) -> Summary:
    """Operations of the CPU by their own time: what they took but for what they called."""
    by_thread: dict[tuple[Any, Any], list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            by_thread[event.get("pid"), event.get("tid")].append(event)
    own: list[tuple[str, float]] = []
    spans: list[tuple[float, float, Event]] = []
    for thread in by_thread.values():
        own += _own_time(thread)
        spans += [(event["ts"], event["ts"] + event["dur"], event) for event in thread]
    busy = _union(spans)
    wall_us = busy[-1][1] - busy[0][0] if busy else 0.0
    busy_us = sum(end - start for start, end, _ in busy)
    return Summary(
        device="cpu",
        steps=steps,
        context_steps=reading,
        wall_s=wall_us / 1e6,
        busy_s=busy_us / 1e6,
        kernels=len(own),
        idle_share=1 - busy_us / wall_us if wall_us else 0.0,
        families=_families(own),
        gaps=Gaps(),
        launch_bound=False,
        text="a trace of a CPU: shares are of the operations' own time; no GPU waits",
    )


def _own_time(thread: Sequence[Event]) -> list[tuple[str, float]]:
    """(name, own time) of the operations of one thread, which lie in one another."""
    own_times: list[tuple[str, float]] = []
    open_: list[list[Any]] = []  # [end, name, own time] of those around the present one
    for event in sorted(thread, key=lambda each: (each["ts"], -each["dur"])):
        while open_ and event["ts"] >= open_[-1][0]:
            _, name, own_us = open_.pop()
            own_times.append((name, max(0.0, own_us)))
        if open_:
            open_[-1][2] -= event["dur"]
        open_.append([event["ts"] + event["dur"], str(event["name"]), event["dur"]])
    return own_times + [(name, max(0.0, own_us)) for _, name, own_us in open_]
