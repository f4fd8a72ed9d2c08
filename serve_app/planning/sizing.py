"""How much GPU memory a model needs, from its config.json alone. Pure arithmetic.

Needed per GPU, with tensor parallelism over `tp` and pipeline parallelism over `pp` of them:

    weights / (tp * pp)  +  KV cache of one sequence of `max_model_len`  +  overhead

compared with `gpu_memory_utilization` of its memory. One sequence is the least that vLLM starts
with; whatever is left over becomes room for more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.errors import ConfigError
from serve_app.planning.hardware import Gpu

GIB = 2**30
# vLLM 0.32: CacheConfig.gpu_memory_utilization.
DEFAULT_UTILIZATION = 0.92
# CUDA context, NCCL buffers, CUDA graphs and the activations of a step. Between 1.2 and 2.5 GiB
# for models of this family; the engine itself measures the exact figure when it starts.
OVERHEAD_BYTES = 2 * GIB
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "auto": 2.0}


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder (Qwen2, Llama) that decide about memory."""

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

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """The shape that a Hugging Face config.json describes.

        Raises:
            KeyError: it lacks a dimension, as configs of other architectures do.
        """
        heads = config["num_attention_heads"]
        quantization = config.get("quantization_config") or {}
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        bits = quantization.get("bits")
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            vocab_size=config["vocab_size"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            # Qwen2 has a bias on q, k and v, and no key for it; Llama has the key.
            attention_bias=config.get("attention_bias", config.get("model_type") == "qwen2"),
            max_position_embeddings=config.get("max_position_embeddings", 32768),
            bytes_per_weight=bits / 8 if bits else _BYTES.get(dtype, 2.0),
        )

    @property
    def parameters(self) -> int:
        query = self.num_attention_heads * self.head_dim
        key_value = 2 * self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (query + key_value) + query * self.hidden_size
        bias = query + key_value if self.attention_bias else 0
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + bias + mlp + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size

    @property
    def weights_bytes(self) -> int:
        return int(self.parameters * self.bytes_per_weight)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Keys and values of one token in all layers."""
        return (
            2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value
        )


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
    max_model_len: int | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
) -> int:
    """GPU memory that each GPU must give, bytes."""
    shards = tensor_parallel_size * pipeline_parallel_size
    # With more GPUs than KV heads each head is kept more than once.
    kv_shards = min(tensor_parallel_size, shape.num_key_value_heads) * pipeline_parallel_size
    kv_bytes = shape.kv_bytes_per_token() * (max_model_len or shape.max_position_embeddings)
    return shape.weights_bytes // shards + kv_bytes // kv_shards + OVERHEAD_BYTES


def tensor_parallel_sizes(shape: ModelShape, gpus: int) -> list[int]:
    """The sizes that this model can be split into: powers of two that divide its heads."""
    sizes = [2**n for n in range(gpus.bit_length()) if 2**n <= gpus]
    return [size for size in sizes if shape.num_attention_heads % size == 0]


def choose_tensor_parallel_size(
    model: str,
    shape: ModelShape,
    gpus: tuple[Gpu, ...],
    max_model_len: int | None = None,
    utilization: float = DEFAULT_UTILIZATION,
    pipeline_parallel_size: int = 1,
) -> int:
    """The fewest GPUs of one machine that hold the model.

    Raises:
        ConfigError: none do; says what is needed and found, and the nearest model that fits.
    """
    usable = int(min(gpu.memory_bytes for gpu in gpus) * utilization)
    sizes = tensor_parallel_sizes(shape, len(gpus))
    for size in sizes:
        if needed_bytes(shape, max_model_len, size, pipeline_parallel_size) <= usable:
            return size
    needed = needed_bytes(shape, max_model_len, sizes[-1], pipeline_parallel_size)
    smaller = [name for name in QWEN25 if _fits(QWEN25[name], gpus, max_model_len, utilization)]
    raise ConfigError(
        "model",
        model,
        f"needs {needed / GIB:.1f} GiB on each of {sizes[-1]} GPUs and finds "
        f"{usable / GIB:.1f} GiB ({len(gpus)} x {gpus[0].name}); lower engine.max_model_len, "
        f"or take {smaller[-1] if smaller else 'a larger GPU'}",
    )


def choose_model(
    gpus: tuple[Gpu, ...],
    max_model_len: int | None = None,
    utilization: float = DEFAULT_UTILIZATION,
) -> str:
    """The largest Qwen2.5-Instruct, up to 7B, that the GPUs of one machine hold.

    Raises:
        ConfigError: not even the smallest fits.
    """
    for name in reversed(_AUTO):
        if _fits(QWEN25[name], gpus, max_model_len, utilization):
            return name
    smallest = _AUTO[0]
    choose_tensor_parallel_size(smallest, QWEN25[smallest], gpus, max_model_len, utilization)
    return smallest


def _fits(
    shape: ModelShape, gpus: tuple[Gpu, ...], max_model_len: int | None, utilization: float
) -> bool:
    usable = min(gpu.memory_bytes for gpu in gpus) * utilization
    sizes = tensor_parallel_sizes(shape, len(gpus))
    return any(needed_bytes(shape, max_model_len, size) <= usable for size in sizes)
