"""How much GPU memory a model needs, from its config.json alone. Pure arithmetic.

Needed per GPU, with tensor parallelism over `tp` and pipeline parallelism over `pp` of them:

    weights / (tp * pp)  +  KV cache  +  overhead

compared with `gpu_memory_utilization` of its memory. The KV cache is that of one sequence of
`max_model_len`, the least that vLLM starts with, or `kv_cache_memory_bytes`, which vLLM takes
instead of its share of the memory.

If the size cannot be calculated (another architecture, another quantization, a GPU whose driver
does not report its memory), vLLM measures it at its start. A start is refused only if it cannot
succeed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.errors import ConfigError
from serve_app.planning.hardware import Gpu

GIB = 2**30
# vLLM 0.32: CacheConfig.gpu_memory_utilization.
DEFAULT_UTILIZATION = 0.92
# CUDA context, NCCL buffers, CUDA graphs and the activations of a step. Between 1.2 and 2.5 GiB
# for models of this family; the engine itself measures the exact figure when it starts. A size is
# chosen with it. A start is refused only where not even a CUDA context has room.
OVERHEAD_BYTES = 2 * GIB
MIN_OVERHEAD_BYTES = GIB // 4
_BYTES = {"float32": 4.0, "float": 4.0, "bfloat16": 2.0, "float16": 2.0, "half": 2.0}
# Decoders whose parameters are those counted by `ModelShape.parameters`.
_KNOWN_TYPES = frozenset(
    {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "llama", "mistral", "mixtral"}
)
_FUSED_TYPES = frozenset({"phi3"})  # The same matrices, stored as fewer.
# Quantizations by the bits of a weight of a linear layer, with its share of the scales. Embeddings
# and the output layer keep the type of the checkpoint.
_QUANTIZED_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "ptpc_fp8": 8.0, "mxfp8": 8.25, "mxfp4": 4.25}
_MODELOPT_BITS = {"FP8": 8.0, "NVFP4": 4.5}


@dataclass(frozen=True)
class EngineMemory:
    """What the engine arguments say about memory.

    Attributes:
        max_model_len: tokens of one sequence; None for the model's own.
        fitted: vLLM takes as long a context as fits (`max_model_len: auto`).
        utilization: share of the GPU memory that the engine may use.
        kv_cache_bytes: of the KV cache, where that is set.
        kv_value_bytes: of one value in it, at least; None: as the model has it.
        offload_bytes: of the weights that stay in the machine's memory, for each GPU.
    """

    max_model_len: int | None = None
    fitted: bool = False
    utilization: float = DEFAULT_UTILIZATION
    kv_cache_bytes: int | None = None
    kv_value_bytes: float | None = None
    offload_bytes: int = 0

    @classmethod
    def of(cls, engine: Mapping[str, Any]) -> "EngineMemory":
        """Read as vLLM reads them.

        Raises:
            ConfigError: a value that is no number, or a share of the memory above 1.
        """
        length = engine.get("max_model_len")
        fitted = str(length).strip().lower() in ("auto", "-1")
        kv_bytes = _number("kv_cache_memory_bytes", engine, None)
        utilization = _number("gpu_memory_utilization", engine, DEFAULT_UTILIZATION)
        if utilization is not None and not 0 < utilization <= 1:
            raise ConfigError(
                "engine.gpu_memory_utilization", utilization, "must be above 0, and 1 at most"
            )
        tokens = None if fitted else _number("max_model_len", engine, None)
        return cls(
            max_model_len=None if tokens is None else int(tokens),
            fitted=fitted,
            utilization=DEFAULT_UTILIZATION if utilization is None else utilization,
            kv_cache_bytes=None if kv_bytes is None else int(kv_bytes),
            kv_value_bytes=_kv_value_bytes(str(engine.get("kv_cache_dtype") or "auto")),
            offload_bytes=int((_number("cpu_offload_gb", engine, 0.0) or 0.0) * GIB),
        )


def _kv_value_bytes(dtype: str) -> float | None:
    """Of a value in a KV cache of this type, at least; None: as the model has it."""
    if dtype == "auto":
        return None
    if dtype in _BYTES:
        return _BYTES[dtype]
    # fp8_e4m3, int8_per_token_head; nvfp4, int4_per_token_head, turboquant_3bit_nc.
    return 1.0 if dtype.startswith(("fp8", "int8")) else 3 / 8


_READABLE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)")
_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SUFFIX |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _number(key: str, engine: Mapping[str, Any], default: float | None) -> float | None:
    """A number as vLLM reads it: 32768, "32768", "32k" (32,000), "32K" (32,768)."""
    value = engine.get(key)
    if value is None or value in ("", "None"):
        return default
    match = _READABLE.fullmatch(str(value).strip())
    if isinstance(value, bool) or match is None:
        raise ConfigError(f"engine.{key}", value, "must be a number")
    return float(match[1]) * _SUFFIX[match[2]]


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder (Qwen2, Llama, mixtures of experts) that decide about memory.

    Attributes:
        intermediate_size: of the MLP of a dense layer.
        bytes_per_weight: of embeddings, norms and, unless quantized, all weights.
        linear_bits: of a weight of a linear layer; None where that is `bytes_per_weight`.
        experts, expert_size, shared_size: of a layer that is a mixture of experts: how many, the
            width of each, and of those that every token passes.
        dense_layers: layers that are not.
        window: tokens that attention looks back at most; None: all.
        kv_value_bytes: of one value of the KV cache.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    max_position_embeddings: int = 32768
    bytes_per_weight: float = 2.0
    linear_bits: float | None = None
    experts: int = 0
    expert_size: int = 0
    shared_size: int = 0
    dense_layers: int = 0
    window: int | None = None
    kv_value_bytes: float = 2.0

    def __post_init__(self) -> None:
        sizes = [self.hidden_size, self.num_attention_heads, self.num_key_value_heads]
        sizes += [self.num_hidden_layers, self.vocab_size, self.head_dim, self.intermediate_size]
        sizes += [self.max_position_embeddings]
        optional = [self.experts, self.expert_size, self.shared_size, self.window or 1]
        for size in [*sizes, *(each for each in optional if each != 0)]:
            if type(size) is not int or size < 1:
                raise TypeError(f"{size!r} is no dimension")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """The shape that a Hugging Face config.json describes.

        Raises:
            KeyError: it lacks a dimension, or is of an architecture or quantization whose size is
                not known here.
        """
        if config["model_type"] not in _KNOWN_TYPES | _FUSED_TYPES:
            raise KeyError(config["model_type"])
        heads = config["num_attention_heads"]
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        layers = config["num_hidden_layers"]
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            vocab_size=config["vocab_size"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            # Qwen2 has a bias on q, k and v, and no key for it; Llama has the key.
            attention_bias=config.get(
                "attention_bias", config["model_type"] in ("qwen2", "qwen2_moe")
            ),
            max_position_embeddings=config.get("max_position_embeddings", 32768),
            bytes_per_weight=_BYTES.get(dtype.removeprefix("torch."), 2.0),
            linear_bits=_linear_bits(config),
            experts=experts,
            expert_size=config.get("moe_intermediate_size") or config["intermediate_size"],
            shared_size=config.get("shared_expert_intermediate_size") or 0,
            dense_layers=_dense_layers(config, layers) if experts else layers,
            # Qwen's configs have a window that is not in use.
            window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
            kv_value_bytes=1.0 if _has_narrow_kv(config) else 2.0,
        )

    def served(self, engine: Mapping[str, Any]) -> "ModelShape | None":
        """The shape as these engine arguments have it served; None where they leave it open."""
        if engine.get("hf_overrides") or engine.get("speculative_config"):
            return None
        shape = self
        if (wide := _BYTES.get(str(engine.get("dtype")))) is not None:
            shape = replace(shape, bytes_per_weight=wide)
        online = engine.get("quantization")
        if shape.linear_bits is not None or online in (None, "", "None"):
            return shape
        if online not in _QUANTIZED_BITS:
            return None
        return replace(shape, linear_bits=_QUANTIZED_BITS[online])

    @property
    def _linear(self) -> int:
        """Parameters of the linear layers, which are what a quantization makes smaller."""
        query = self.num_attention_heads * self.head_dim
        key_value = 2 * self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (query + key_value) + query * self.hidden_size
        dense = 3 * self.hidden_size * self.intermediate_size
        width = self.experts * self.expert_size + self.shared_size
        mixed_layers = self.num_hidden_layers - self.dense_layers if self.experts else 0
        dense_layers = self.num_hidden_layers - mixed_layers
        mixed = 3 * self.hidden_size * width
        return self.num_hidden_layers * attention + dense_layers * dense + mixed_layers * mixed

    @property
    def parameters(self) -> int:
        query = self.num_attention_heads * self.head_dim
        key_value = 2 * self.num_key_value_heads * self.head_dim
        bias = query + key_value if self.attention_bias else 0
        mixed_layers = self.num_hidden_layers - self.dense_layers if self.experts else 0
        routers = mixed_layers * self.hidden_size * self.experts
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = self.num_hidden_layers * (bias + 2 * self.hidden_size) + self.hidden_size
        return self._linear + routers + embeddings + norms

    @property
    def weights_bytes(self) -> int:
        linear_bytes = self.bytes_per_weight if self.linear_bits is None else self.linear_bits / 8
        rest = self.parameters - self._linear
        return int(self._linear * linear_bytes + rest * self.bytes_per_weight)

    def kv_bytes_per_token(self, bytes_per_value: float | None = None) -> int:
        """Keys and values of one token in all layers."""
        values = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return int(values * (bytes_per_value or self.kv_value_bytes))


def _has_narrow_kv(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint says that the KV cache has values of a byte or less."""
    quantization = config.get("quantization_config") or {}
    inner = quantization.get("quantization") or quantization
    keys = ("kv_cache_scheme", "kv_cache_quant_algo")
    return any(each.get(key) for each in (quantization, inner) for key in keys)


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    """Layers of a mixture of experts that are not one, as Qwen's configs name them."""
    dense = set(config.get("mlp_only_layers") or ())
    step = config.get("decoder_sparse_step") or 1
    return sum(layer in dense or (layer + 1) % step != 0 for layer in range(layers))


def _linear_bits(config: Mapping[str, Any]) -> float | None:
    """Bits of a weight of a linear layer, scales included; None where it is not quantized.

    Raises:
        KeyError: the quantization is none of those whose size is known here.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return None
    method = str(quantization.get("quant_method") or "").replace("_", "-")
    if method in ("compressed-tensors", "") and (groups := quantization.get("config_groups")):
        weights = [group.get("weights") or {} for group in groups.values()]
        return max(
            _with_scales(weight["num_bits"], weight.get("group_size", 128)) for weight in weights
        )
    if method == "bitsandbytes":
        return 8.0 if quantization.get("load_in_8bit") else _with_scales(4, 64)
    if method == "modelopt":
        inner = quantization.get("quantization") or quantization
        return _MODELOPT_BITS[inner["quant_algo"]]
    if method in ("awq", "gptq", "gptq-marlin", "awq-marlin", ""):
        bits = quantization.get("bits") or quantization["w_bit"]
        return _with_scales(bits, quantization.get("group_size", 128))
    return _QUANTIZED_BITS[method.replace("-", "_")]


def _with_scales(bits: int, group_size: int | None) -> float:
    """With a scale of 16 bits and a zero point for each group, where there are groups.

    Raises:
        KeyError: no quantization has so many bits.
    """
    if type(bits) is not int or not 1 <= bits <= 16:
        raise KeyError(bits)
    if bits >= 8 or not group_size or group_size < 0:
        return float(bits)
    return bits + (16 + bits) / group_size


def _qwen(
    hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, tied: bool = False
) -> ModelShape:
    return ModelShape(hidden, inner, layers, heads, kv, vocab, hidden // heads, tied)


# The published config.json of each, so that nothing is fetched to choose among them.
QWEN25: Mapping[str, ModelShape] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen(896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen(3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2.5-14B-Instruct": _qwen(5120, 13824, 48, 40, 8, 152064),
    "Qwen/Qwen2.5-32B-Instruct": _qwen(5120, 27648, 64, 40, 8, 152064),
    "Qwen/Qwen2.5-72B-Instruct": _qwen(8192, 29568, 80, 64, 8, 152064),
}
# What `auto` chooses from: larger ones are a decision about money.
_AUTO = tuple(list(QWEN25)[:4])


def needed_bytes(
    shape: ModelShape,
    memory: EngineMemory | int | str | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    overhead_bytes: int = OVERHEAD_BYTES,
) -> int:
    """GPU memory that each GPU must give, bytes.

    Args:
        memory: what the engine arguments say, or only `max_model_len`.
    """
    if not isinstance(memory, EngineMemory):
        memory = EngineMemory.of({"max_model_len": memory})
    shards = tensor_parallel_size * pipeline_parallel_size
    weights = max(0, shape.weights_bytes // shards - memory.offload_bytes)
    return (
        weights
        + _kv_bytes(shape, memory, tensor_parallel_size, pipeline_parallel_size)
        + (overhead_bytes)
    )


def _kv_bytes(shape: ModelShape, memory: EngineMemory, tp: int, pp: int) -> int:
    """Of the KV cache of one GPU: as configured, or the least that vLLM starts with."""
    if memory.kv_cache_bytes is not None:
        return memory.kv_cache_bytes
    if memory.fitted:
        return 0
    # With more GPUs than KV heads each head is kept more than once.
    shards = min(tp, shape.num_key_value_heads) * pp
    tokens = memory.max_model_len or shape.max_position_embeddings
    tokens = min(tokens, shape.window or tokens)
    return shape.kv_bytes_per_token(memory.kv_value_bytes) * tokens // shards


def usable_bytes(gpus: Sequence[Gpu], memory: EngineMemory) -> int | None:
    """What the engine may use of each GPU; None where the driver does not report its memory.

    A KV cache of a set size is taken instead of a share of the memory, so the share does not bound
    it.
    """
    sizes = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes is not None]
    if len(sizes) < len(gpus):
        return None
    share = 1.0 if memory.kv_cache_bytes is not None else memory.utilization
    return int(min(sizes) * share)


def tensor_parallel_sizes(shape: ModelShape, gpus: int) -> list[int]:
    """The sizes that this model can be split into: powers of two that divide its heads.

    KV heads are split as well, or, where there are more GPUs than KV heads, each is kept by the
    same number of GPUs.
    """
    sizes = [2**n for n in range(gpus.bit_length()) if 2**n <= gpus]
    kv = shape.num_key_value_heads
    return [
        size
        for size in sizes
        if shape.num_attention_heads % size == 0 and (kv % size == 0 or size % kv == 0)
    ]


def choose_tensor_parallel_size(
    model: str,
    shape: ModelShape,
    gpus: tuple[Gpu, ...],
    memory: EngineMemory = EngineMemory(),
    pipeline_parallel_size: int = 1,
) -> int:
    """The fewest GPUs of one machine that hold the model; as many as it can be split into where
    that is close, for vLLM to measure.

    Raises:
        ConfigError: they cannot hold it; says what is needed and found, and what fits.
    """
    usable = usable_bytes(gpus, memory)
    sizes = tensor_parallel_sizes(shape, len(gpus))
    if usable is None:
        return 1
    for size in sizes:
        if needed_bytes(shape, memory, size, pipeline_parallel_size) <= usable:
            return size
    least = needed_bytes(shape, memory, sizes[-1], pipeline_parallel_size, MIN_OVERHEAD_BYTES)
    if least <= usable:
        return sizes[-1]
    needed = needed_bytes(shape, memory, sizes[-1], pipeline_parallel_size)
    smaller = [name for name in QWEN25 if _fits(QWEN25[name], gpus, memory)]
    raise ConfigError(
        "model",
        model,
        f"needs {needed / GIB:.1f} GiB on each of {sizes[-1]} GPUs and finds "
        f"{usable / GIB:.1f} GiB ({len(gpus)} x {gpus[0].name}); lower engine.max_model_len, "
        f"or take {smaller[-1] if smaller else 'a larger GPU'}",
    )


def choose_model(gpus: tuple[Gpu, ...], memory: EngineMemory = EngineMemory()) -> str:
    """The largest Qwen2.5-Instruct, up to 7B, that the GPUs of one machine hold.

    Raises:
        ConfigError: not even the smallest fits, or the GPUs' memory is not known.
    """
    if usable_bytes(gpus, memory) is None:
        raise ConfigError(
            "model", "auto", f"the memory of {gpus[0].name} is not known; name the model to serve"
        )
    for name in reversed(_AUTO):
        if _fits(QWEN25[name], gpus, memory):
            return name
    smallest = _AUTO[0]
    choose_tensor_parallel_size(smallest, QWEN25[smallest], gpus, memory)
    return smallest


def _fits(shape: ModelShape, gpus: tuple[Gpu, ...], memory: EngineMemory) -> bool:
    usable = usable_bytes(gpus, memory) or 0
    sizes = tensor_parallel_sizes(shape, len(gpus))
    return any(needed_bytes(shape, memory, size) <= usable for size in sizes)
