"""The cost of an engine's steps, and its limits.

    step = step_s + prefill_token_s * prompt tokens read in it
                  + decode_seq_s    * sequences that get a token in it
                  + kv_token_s      * tokens of those sequences in the KV cache

`batch.py` simulates the requests of an engine with these costs. The constants come from `roofline`
(a GPU and a model on paper) or from `enginefit.py` (measurements of a real engine).
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchError


@dataclass(frozen=True)
class Costs:
    """Seconds; see the formula above. `request_s` is what a request spends outside of the engine,
    before it can be let in: HTTP, checks, the tokenizer, the way to the engine and back."""

    step_s: float
    prefill_token_s: float
    decode_seq_s: float
    kv_token_s: float
    request_s: float = 0.0


@dataclass(frozen=True)
class Engine:
    """An engine: what it costs and what it holds.

    Attributes:
        costs: of a step.
        max_num_seqs: sequences of one batch.
        token_budget: tokens of one step (`max_num_batched_tokens`).
        kv_blocks, block_tokens: the KV cache.
        prefix_caching: prompts that begin like an earlier one are not read again.
        accept_s: what the server's front end needs for a request, one at a time. However small, it
            makes the first of many that come at once begin alone, and the others a step later.
        schedules_ahead: a step is scheduled when the one before it begins (`async_scheduling`).
        gpus: of one replica.
        name: what it is, in reports.
    """

    costs: Costs
    max_num_seqs: int = 256
    token_budget: int = 2048
    kv_blocks: int = 4096
    block_tokens: int = 16
    prefix_caching: bool = False
    accept_s: float = 0.0
    schedules_ahead: bool = False
    gpus: int = 1
    name: str = "an engine"

    def __post_init__(self) -> None:
        for key in ("max_num_seqs", "token_budget", "kv_blocks", "block_tokens", "gpus"):
            if getattr(self, key) < 1:
                raise BenchError.of(key, getattr(self, key), "must be at least 1")
        if self.token_budget < self.max_num_seqs:
            problem = f"must be at least max_num_seqs, {self.max_num_seqs}, as in vLLM"
            raise BenchError.of("token_budget", self.token_budget, problem)
        if self.costs.step_s <= 0:
            raise BenchError.of("step_s", self.costs.step_s, "must be above 0")

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def step_time_s(self, prefill_tokens: float, seqs: float, kv_tokens: float) -> float:
        costs = self.costs
        return (
            costs.step_s
            + costs.prefill_token_s * prefill_tokens
            + costs.decode_seq_s * seqs
            + costs.kv_token_s * kv_tokens
        )


# --- on paper -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Of the data sheet: dense bfloat16 operations a second, bytes a second, bytes."""

    flops: float
    bandwidth: float
    memory: float


@dataclass(frozen=True)
class Model:
    """Of config.json; `params` with embeddings, `body` without."""

    params: float
    body: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def kv_bytes(self) -> int:
        """Of one token, in bfloat16: a key and a value."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


GPUS: Mapping[str, Gpu] = {
    "H100": Gpu(989e12, 3.35e12, 80e9),
    "A100": Gpu(312e12, 2.04e12, 80e9),
    "A10G": Gpu(70e12, 600e9, 24e9),
    "L4": Gpu(121e12, 300e9, 24e9),
}
MODELS: Mapping[str, Model] = {
    "Qwen2.5-0.5B": Model(0.49e9, 0.36e9, 24, 2, 64),
    "Qwen2.5-1.5B": Model(1.54e9, 1.31e9, 28, 2, 128),
    "Qwen2.5-3B": Model(3.09e9, 2.77e9, 36, 2, 128),
    "Qwen2.5-7B": Model(7.61e9, 6.53e9, 28, 4, 128),
    "Qwen2.5-14B": Model(14.7e9, 13.1e9, 48, 8, 128),
    "Qwen2.5-32B": Model(32.5e9, 31.0e9, 64, 8, 128),
    "Qwen2.5-72B": Model(72.7e9, 70.0e9, 80, 8, 128),
}
# What kernels reach of the data sheet, and what does not shrink with the model: the host's share of
# a step, of a sequence in it (sampling, detokenizing, sending), and of a request.
_FLOPS_SHARE, _BANDWIDTH_SHARE = 0.55, 0.8
_HOST_STEP_S, _HOST_SEQ_S, _HOST_REQUEST_S, _ACCEPT_S = 1.5e-3, 2e-5, 5e-3, 5e-4
_ALL_REDUCE_S = 1.5e-5  # Two a layer, with tensor parallelism.
_MEMORY_SHARE, _WORKSPACE_BYTES = 0.92, 2e9
# vLLM's own limits for a server: larger ones from 70 GB on, but not for an A100.
_LARGE, _SMALL = (1024, 8192), (256, 2048)


def roofline(gpu: str, model: str, gpus: int = 1) -> Engine:
    """The engine that `gpus` GPUs and a model should make, from their data sheets.

    A step reads all weights once (`step_s`), computes what its prompt tokens need, and reads the KV
    cache of its sequences. The three are added, as if none hid behind another: too slow by up to
    the weights' part where much of a prompt is read. What the tokens that are written compute does
    hide behind the weights, up to some 150 sequences, and is left out.

    Raises BenchError for a GPU or model that is not known, or a model that does not fit.
    """
    if gpu not in GPUS:
        raise BenchError.of("gpu", gpu, "no such GPU", GPUS)
    if model not in MODELS:
        raise BenchError.of("model", model, "no such model", MODELS)
    card, shape = GPUS[gpu], MODELS[model]
    room = gpus * (card.memory * _MEMORY_SHARE - _WORKSPACE_BYTES) - 2 * shape.params
    flops = gpus * card.flops * _FLOPS_SHARE
    bandwidth = gpus * card.bandwidth * _BANDWIDTH_SHARE
    together_s = 2 * shape.layers * _ALL_REDUCE_S if gpus > 1 else 0.0
    seqs, budget = _LARGE if card.memory >= 70e9 and gpu != "A100" else _SMALL
    blocks = int(room / shape.kv_bytes / 16)
    if blocks < budget // 16:
        need = f"{2 * shape.params / 1e9:.0f} GB of weights leave no room for a KV cache"
        raise BenchError.of("model", model, f"does not fit {gpus} {gpu}: {need}")
    costs = Costs(
        step_s=2 * shape.params / bandwidth + _HOST_STEP_S + together_s,
        prefill_token_s=2 * shape.body / flops,
        decode_seq_s=_HOST_SEQ_S,
        kv_token_s=shape.kv_bytes / bandwidth,
        request_s=_HOST_REQUEST_S,
    )
    name = f"{model} on {f'{gpus} ' if gpus > 1 else ''}{gpu}, by roofline"
    limits = (seqs, budget, blocks, 16)
    return Engine(costs, *limits, accept_s=_ACCEPT_S, gpus=gpus, name=name)


# Former names, for programs outside of the project, such as scripts that simulate a queue.
_MOVED = {"Batch": "bench.simulation.batch", "Job": "bench.simulation.job"}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MOVED[name]), name)
