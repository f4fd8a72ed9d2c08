"""The phases of a start, from spans of time. Pure.

Spans nest: an engine process starts within the start of its replica. Some overlap: the workers of
one engine start at the same time. Each moment counts once, for the innermost span, which began last
before it. So the phases of a start add up to its duration.

Times are Unix time in seconds: the spans of a start come from several processes.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

# In the order in which a start meets them.
PHASES: Mapping[str, str] = {
    "process": "from the creation of the replica's process to its constructor",
    "download": "fetching the weights to this machine",
    "caches": "fetching and checking compiled kernels",
    "imports": "importing vLLM and its libraries",
    "configuration": "reading the engine's arguments and the model's configuration",
    "inspection": "finding out what the model's class can do",
    "engine process": "starting the engine's processes",
    "turn": "waiting for a GPU on which another model is awake",
    "device": "initialising the device and its communication",
    "weights": "loading the weights",
    "profile": "measuring how much memory is left for the KV cache",
    "compile": "torch.compile",
    "KV cache": "allocating the KV cache",
    "kernels": "compiling and warming up kernels",
    "CUDA graphs": "capturing CUDA graphs",
    "front ends": "building the HTTP application, starting vllm-rs",
    "warm-up": "the first answers",
    "other": "what none of the others covers",
}

# Names of vLLM's own spans, by phase (docs/upstream.md).
VLLM_SPANS: Mapping[str, str] = {
    "EngineCoreProc init": "engine process",
    "Executor init": "engine process",
    "Worker init": "device",
    "Init device": "device",
    "Load model": "weights",
    "Loading (GPU)": "weights",
    "Loading (CPU)": "weights",
    "Initialize model": "weights",
    "Load weights": "weights",
    "Download weights - HF": "weights",
    "Prepare model": "profile",
    "Dynamo bytecode transform": "compile",
    "Inductor compilation": "compile",
    "Compile graph": "compile",
    "Allocate KV cache": "KV cache",
    "Warmup (GPU)": "kernels",
    "Warmup (CPU)": "kernels",
    "DeepGemm warmup": "kernels",
    "CuTeDSL warmup": "kernels",
    "Capture model": "CUDA graphs",
}


@dataclass(frozen=True)
class Span:
    """A phase, from when to when."""

    phase: str
    began_s: float
    ended_s: float


def segments(spans: Iterable[Span]) -> list[Span]:
    """The spans cut into pieces that do not overlap, in order; neighbours of one phase are one."""
    nonempty = [span for span in spans if span.ended_s > span.began_s]
    bounds = sorted({s for span in nonempty for s in (span.began_s, span.ended_s)})
    merged: list[Span] = []
    for began_s, ended_s in itertools.pairwise(bounds):
        over = [span for span in nonempty if span.began_s <= began_s and span.ended_s >= ended_s]
        if not over:
            continue
        # Of those that began together, the one that ended first is inside the others.
        phase = max(over, key=lambda span: (span.began_s, -span.ended_s)).phase
        if merged and merged[-1].phase == phase and merged[-1].ended_s == began_s:
            merged[-1] = Span(phase, merged[-1].began_s, ended_s)
        else:
            merged.append(Span(phase, began_s, ended_s))
    return merged


def durations(pieces: Sequence[Span]) -> dict[str, float]:
    """Seconds of each phase, in the order of PHASES; of pieces that do not overlap."""
    sums: dict[str, float] = {}
    for piece in pieces:
        sums[piece.phase] = sums.get(piece.phase, 0.0) + piece.ended_s - piece.began_s
    return {phase: sums[phase] for phase in PHASES if phase in sums}


def sentence(kind: str, took_s: Mapping[str, float]) -> str:
    """One line for people: the total, and the phases that took a tenth of a second or more."""
    parts = [f"{phase} {seconds:.1f}" for phase, seconds in took_s.items() if seconds >= 0.05]
    return f"{kind}: {sum(took_s.values()):.1f} s: {', '.join(parts)}"


def of_vllm(name: str, began_ns: int, ended_ns: int) -> Span | None:
    """A span of vLLM's own, or a phase by its name; None: it is not about a start."""
    phase = VLLM_SPANS.get(name, name if name in PHASES else None)
    return None if phase is None else Span(phase, began_ns / 1e9, ended_ns / 1e9)


class Logged(msgspec.Struct, frozen=True):
    """A span as the log has it. Its beginning is in Unix time."""

    phase: str
    began_s: float
    took_s: float

    @classmethod
    def of(cls, span: Span) -> "Logged":
        return cls(span.phase, round(span.began_s, 3), round(span.ended_s - span.began_s, 3))

    def span(self) -> Span:
        return Span(self.phase, self.began_s, self.began_s + self.took_s)
