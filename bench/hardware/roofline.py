"""The least time that hardware needs for a step of an engine, and how far from it a measurement is.

    bytes   = the weights, once a step, and the KV cache of every sequence in it
    flops   = 2 * weights * tokens, and attention
    least_s = the greater of bytes / bytes_per_s and flops / flops_per_s

Pure. The sizes come from a model's config.json, the two ceilings from a data sheet (`of_gpu`) or,
better, from this machine (`ceilings.py`: copy bandwidth and the rate of a large matrix product).
Left out, as a lower bound may: activations, the rows of the embedding table, launches, what GPUs
tell each other. So a step never takes less, and the difference is somebody's:

    MBU = bytes / (measured time * bytes_per_s)     the figure for decode, which reads
    MFU = flops / (measured time * flops_per_s)     the figure for prefill, which computes

A step is memory-bound, compute-bound or host-bound by which of the three takes most of its time:
reading, computing, or the rest, which is the host's where a profile says that the GPU was idle,
and otherwise the host's or that of kernels that are far from their ceiling.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import msgspec

from bench.errors import BenchError, nearest
from bench.measure import Measures
from bench.result import Result
from bench.simulation.enginemodel import GPUS
from bench.traffic.workload import Cell

Bound = Literal["memory-bound", "compute-bound", "host-bound"]
_CONFIG = "config.json"
# What `bench roofline` shows: sequences at once, tokens of each in the cache; tokens of a prompt.
BATCHES = (1, 8, 32, 128, 256)
CONTEXTS = (200, 1000, 4000)
PROMPTS = (200, 1000, 2000, 8000)


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """What one GPU can do at best, and where that was found."""

    flops_per_s: float
    bytes_per_s: float
    source: str


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a dense decoder, and the bytes of its weights and KV cache.

    Attributes:
        tied: the output layer is the embedding table.
        weight_bytes, kv_bytes: of one weight of a layer, of one number in the KV cache. The output
            layer is kept in `head_bytes`: quantisation leaves it as it is.
        gpus: that share each layer; figures are those of one of them.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    weight_bytes: float = 2.0
    head_bytes: float = 2.0
    kv_bytes: float = 2.0
    gpus: int = 1

    @property
    def layer_weights(self) -> float:
        """Weights of all layers on one GPU. Small vectors are left out."""
        # Fewer key and value heads than GPUs: each GPU keeps one.
        kv_heads = max(self.kv_heads, self.gpus)
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) / self.gpus

    @property
    def head_weights(self) -> float:
        return self.vocab * self.hidden / self.gpus

    @property
    def stored_bytes(self) -> float:
        """Of all weights on one GPU, the embedding table among them."""
        tables = self.head_weights * (1 if self.tied else 2)
        return self.layer_weights * self.weight_bytes + tables * self.head_bytes

    @property
    def read_bytes(self) -> float:
        """Of the weights that every step reads: all but the embedding table."""
        return self.layer_weights * self.weight_bytes + self.head_weights * self.head_bytes

    @property
    def token_bytes(self) -> float:
        """Of one token in the KV cache, on one GPU."""
        kv_heads = max(self.kv_heads, self.gpus) / self.gpus
        return 2 * self.layers * kv_heads * self.head_dim * self.kv_bytes


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a step has to do at least, on one GPU."""

    flops: float
    bytes: float

    def least_s(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.flops_per_s, self.bytes / ceilings.bytes_per_s)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A measured step beside the least it could take.

    Attributes:
        took_s, least_s: measured, and at least.
        mbu, mfu: shares of the ceilings that were used.
        memory_s, compute_s, host_s: what reading, computing and the rest take of it.
        bound: which of the three is the greatest; `times`: how many times the next one.
        text: the same in words.
    """

    took_s: float
    least_s: float
    mbu: float
    mfu: float
    memory_s: float
    compute_s: float
    host_s: float
    bound: Bound
    times: float
    text: str


class Allowed(msgspec.Struct, frozen=True, kw_only=True):
    """A load beside the limits of the hardware; unknown values are None.

    Attributes:
        decode, prefill: of a batch; `step`: the average one of a load.
    """

    shape: Shape | None = None
    ceilings: Ceilings | None = None
    decode: Verdict | None = None
    prefill: Verdict | None = None
    step: Verdict | None = None


class Least(msgspec.Struct, frozen=True, kw_only=True):
    """The least time of a step.

    Attributes:
        seqs, context: of decode: sequences at once, and tokens of each in the cache.
        prompt: of prefill: tokens of the prompt.
        bound: what takes the time, memory or compute.
    """

    seqs: int = 0
    context: int = 0
    prompt: int = 0
    least_s: float
    tokens_per_s: float
    bound: Bound


class LeastTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The least times of steps that decode, and of steps that read prompts."""

    decode: list[Least]
    prefill: list[Least]


class Roofline(Result, frozen=True, kw_only=True):
    """The result of `bench roofline`; sizes are those on one GPU."""

    benchmark: str = "roofline"
    shape: Shape
    ceilings: Ceilings
    least: LeastTimes
    weights_bytes: float
    kv_bytes_a_token: float


# --- the sizes ------------------------------------------------------------------------------


def shape(folder: str | Path, **storage: Any) -> Shape:
    """The sizes in the config.json of a model folder; `kept` are attributes of Shape.

    Raises:
        BenchError: there is none, or it is not of a dense decoder.
    """
    path = Path(folder) / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        heads = int(config["num_attention_heads"])
        return Shape(
            name=Path(folder).name,
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            **storage,
        )
    except OSError as error:
        raise BenchError(f"model = {str(folder)!r}: {_CONFIG}: {error.strerror}") from None
    except (KeyError, ValueError) as error:
        raise BenchError(f"model = {str(folder)!r}: {_CONFIG} lacks a size: {error}") from None


def storage(engine: Mapping[str, Any]) -> dict[str, Any]:
    """How a model is kept under these engine arguments, as attributes of Shape."""
    wide = 4.0 if engine.get("dtype") == "float32" else 2.0
    cache = str(engine.get("kv_cache_dtype", "auto"))
    return {
        "weight_bytes": 1.0 if engine.get("quantization") == "fp8" else wide,
        "head_bytes": wide,
        "kv_bytes": 1.0 if cache.startswith("fp8") else wide,
        "gpus": int(engine.get("tensor_parallel_size", 1)),
    }


def of_gpu(name: str) -> Ceilings:
    """The ceilings of a data sheet, by a name that holds that of a GPU: "NVIDIA H100 80GB HBM3".

    Raises BenchError for one that is not known.
    """
    for gpu_name, gpu in GPUS.items():
        if gpu_name.lower() in name.lower():
            source = f"data sheet of {gpu_name}"
            return Ceilings(flops_per_s=gpu.flops, bytes_per_s=gpu.bandwidth, source=source)
    hint = nearest(name, GPUS)
    raise BenchError.of("gpu", name, "no such GPU", [hint] if hint else GPUS)


# --- the least ------------------------------------------------------------------------------


def decode(shape: Shape, seqs: float, context: float) -> Work:
    """A step in which `seqs` sequences of `context` tokens each get one more."""
    return mixed(shape, seqs=seqs, context=context, read=0.0, prompt=0.0)


def prefill(shape: Shape, prompt: float, prompts: float = 1.0) -> Work:
    """A step that reads `prompts` whole prompts of `prompt` tokens each."""
    return mixed(shape, seqs=0.0, context=0.0, read=prompt * prompts, prompt=prompt)


def mixed(shape: Shape, *, seqs: float, context: float, read: float, prompt: float) -> Work:
    """A step that does both: `read` tokens of prompts that are `prompt` tokens long.

    A token of a prompt looks at those before it: half the prompt, on average. The output layer is
    needed for the last token of a prompt only, and for each sequence that is written.
    """
    sampled = seqs + (read / prompt if prompt else 0.0)
    pairs = seqs * context + read * prompt / 2
    attention = 4 * shape.layers * shape.heads * shape.head_dim / shape.gpus
    flops = 2 * (shape.layer_weights * (seqs + read) + shape.head_weights * sampled)
    cache_bytes = shape.token_bytes * (seqs * context + seqs + read)
    return Work(flops=flops + attention * pairs, bytes=shape.read_bytes + cache_bytes)


def judge(work: Work, took_s: float, ceilings: Ceilings, busy: float | None = None) -> Verdict:
    """What bounds a step that took `took_s`.

    Args:
        busy: share of the time in which the GPU ran a kernel, where a profile said so. Without it
            all that the ceilings do not explain counts as the host's.
    """
    memory_s = work.bytes / ceilings.bytes_per_s
    compute_s = work.flops / ceilings.flops_per_s
    least_s = max(memory_s, compute_s)
    host_s = max(0.0, took_s - least_s) if busy is None else took_s * (1 - busy)
    parts: dict[Bound, float] = {
        "memory-bound": memory_s,
        "compute-bound": compute_s,
        "host-bound": host_s,
    }
    bound = max(parts, key=lambda name: parts[name])
    second = max(value for name, value in parts.items() if name != bound)
    times = parts[bound] / second if second > 0 else float("inf")
    return Verdict(
        took_s=took_s,
        least_s=least_s,
        mbu=memory_s / took_s,
        mfu=compute_s / took_s,
        memory_s=memory_s,
        compute_s=compute_s,
        host_s=host_s,
        bound=bound,
        times=min(times, 1e6),
        text=_words(bound, times, took_s, least_s, busy),
    )


def _words(bound: Bound, times: float, took_s: float, least_s: float, busy: float | None) -> str:
    share = f"{least_s / took_s:.0%} of what the hardware allows"
    who = {
        "memory-bound": "reading weights and KV cache",
        "compute-bound": "computing",
        "host-bound": "an idle GPU" if busy is not None else "the host, or slow kernels,",
    }[bound]
    by = f"{times:.1f} times" if times < 1000 else "over 1000 times"
    return f"{bound}: {who} takes {by} what comes next; {share}"


# --- results --------------------------------------------------------------------------------


def of_batch(shape: Shape, ceilings: Ceilings, cell: Cell, repeats: Sequence[Measures]) -> Allowed:
    """A cell of the matrix whose users sent together, as a batch in process does."""
    context = cell.input_tokens + cell.output_tokens / 2
    prompt = _mean(_per_request(repeat, repeat.input_tokens) for repeat in repeats) or 0.0
    prompt -= _mean(_per_request(repeat, repeat.cached_tokens) for repeat in repeats) or 0.0
    decoded = read = None
    if tpot_s := _mean(repeat.tpot_mean_s for repeat in repeats):
        decoded = judge(decode(shape, cell.users, context), tpot_s, ceilings)
    if prompt > 0 and (ttft_s := _mean(repeat.ttft_mean_s for repeat in repeats)):
        read = judge(prefill(shape, prompt, cell.users), ttft_s, ceilings)
    return Allowed(shape=shape, ceilings=ceilings, decode=decoded, prefill=read)


def of_run(shape: Shape, ceilings: Ceilings, repeats: Sequence[Measures]) -> Allowed:
    """A run under load, from its rates: what an average step wrote and read beside it."""
    tpot_s = _mean(repeat.tpot_mean_s for repeat in repeats)
    written = _mean(repeat.output_tokens_per_s for repeat in repeats)
    requests = _mean(repeat.requests_per_s for repeat in repeats)
    prompt = _mean(_per_request(repeat, repeat.input_tokens) for repeat in repeats)
    answer = _mean(_per_request(repeat, repeat.output_tokens) for repeat in repeats)
    cached = _mean(_per_request(repeat, repeat.cached_tokens) for repeat in repeats) or 0.0
    if not (tpot_s and written and requests and prompt and answer):
        return Allowed(shape=shape, ceilings=ceilings)
    # The first token of an answer is of its prompt's step.
    seqs = written * tpot_s * max(0.0, 1 - 1 / answer)
    read = max(0.0, prompt - cached) * requests * tpot_s
    work = mixed(shape, seqs=seqs, context=prompt + answer / 2, read=read, prompt=prompt)
    return Allowed(shape=shape, ceilings=ceilings, step=judge(work, tpot_s, ceilings))


def least(shape: Shape, ceilings: Ceilings) -> LeastTimes:
    """The least times of decode at each batch and length, and of prefill at each length."""

    def of(work: Work, tokens: int, **about: int) -> Least:
        least_s = work.least_s(ceilings)
        bound = _by_least(work, ceilings)
        return Least(least_s=least_s, tokens_per_s=tokens / least_s, bound=bound, **about)

    return LeastTimes(
        decode=[
            of(decode(shape, seqs, context), seqs, seqs=seqs, context=context)
            for seqs in BATCHES
            for context in CONTEXTS
        ],
        prefill=[of(prefill(shape, prompt), prompt, prompt=prompt) for prompt in PROMPTS],
    )


def _by_least(work: Work, ceilings: Ceilings) -> Bound:
    memory_s = work.bytes / ceilings.bytes_per_s
    return "memory-bound" if memory_s >= work.flops / ceilings.flops_per_s else "compute-bound"


def _per_request(measures: Measures, amount: int | None) -> float | None:
    return amount / measures.ok if measures.ok and amount is not None else None


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None
