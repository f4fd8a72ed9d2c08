"""The engine arguments that `bench tune` varies, with their meanings and values.

A setting is {knob: value}; a knob that is not in it stays as vLLM has it by default. The first
value of every knob is None, the default. `live` knobs are limits of the scheduler, which a running
engine can be told below what it was started with, so that a trial of one needs no other engine.
`lossy` ones change what the model answers: they are only turned when asked for, and a gain from
them is to be weighed against the quality of the answers, which no benchmark of speed sees.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from bench.errors import BenchError

Settings = Mapping[str, Any]


class Knob(msgspec.Struct, frozen=True, kw_only=True):
    """One knob.

    Attributes:
        values: what to try, the default (None) first.
        live: a running engine can be given a smaller one.
        lossy: it changes the answers.
        gpu: the CPU engine does not have it.
        real: dummy weights give it a false gain, as they repeat themselves.
        meaning: what it does, for the comment beside it in a configuration.
    """

    name: str
    values: tuple[Any, ...]
    meaning: str
    live: bool = False
    lossy: bool = False
    gpu: bool = False
    real: bool = False


_NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}

# In the order in which they are turned where nothing is known about their worth.
KNOBS: Sequence[Knob] = (
    Knob(
        name="quantization",
        values=(None, "fp8"),
        lossy=True,
        gpu=True,
        meaning="Weights in 8 bits: half the bytes to read, twice the rate of products. "
        "Changes the answers a little.",
    ),
    Knob(
        name="kv_cache_dtype",
        values=(None, "fp8"),
        lossy=True,
        gpu=True,
        meaning="KV cache in 8 bits: twice as many sequences fit. Changes the answers a little.",
    ),
    Knob(
        name="max_num_batched_tokens",
        values=(None, 512, 1024, 2048, 4096),
        live=True,
        meaning="Tokens of one step. More: prompts are read sooner (TTFT); "
        "less: who is being written for waits less for prompts of others (ITL).",
    ),
    Knob(
        name="max_num_seqs",
        values=(None, 32, 64, 128, 256),
        live=True,
        meaning="Sequences that are written at once. More: throughput; less: shorter steps (TPOT) "
        "and a queue before the engine (TTFT).",
    ),
    Knob(
        name="performance_mode",
        values=(None, "throughput", "interactivity"),
        gpu=True,
        meaning="throughput: twice the batch limits; interactivity: CUDA graphs for each small "
        "batch, for one request at a time.",
    ),
    Knob(
        name="compilation_config",
        values=(None, {"compile_sizes": [1, 2, 4, 8]}),
        gpu=True,
        meaning="compile_sizes: the fastest product for these batches is looked for at the start, "
        "which takes longer. For a few requests at once (TPOT).",
    ),
    Knob(
        name="gpu_memory_utilization",
        values=(None, 0.95),
        gpu=True,
        meaning="Share of the GPU's memory for weights and KV cache. More: more sequences fit; "
        "too much: out of memory.",
    ),
    Knob(
        name="enable_chunked_prefill",
        values=(None, False),
        live=True,
        meaning="A long prompt is read in parts between steps of others. "
        "false: in one go, and others wait.",
    ),
    Knob(
        name="enable_prefix_caching",
        values=(None, False),
        meaning="A prompt that begins like an earlier one is not read again. "
        "false: saves the hashing where no two do.",
    ),
    Knob(
        name="kv_offloading_size",
        values=(None, 8.0),
        gpu=True,
        meaning="GiB of host memory to which KV blocks go instead of being dropped; "
        "worth it where prompts come again.",
    ),
    Knob(
        name="speculative_config",
        values=(None, _NGRAM),
        real=True,
        meaning="Guesses the next tokens from n-grams of the prompt: fewer steps where answers "
        "repeat it, more work where they do not.",
    ),
    Knob(
        name="tensor_parallel_size",
        values=(None,),
        gpu=True,
        meaning="GPUs that share each layer: shorter steps for one request. "
        "`bench scale` compares it with replicas.",
    ),
)
BY_NAME: Mapping[str, Knob] = {knob.name: knob for knob in KNOBS}


def space(
    given: Iterable[str], *, on_gpu: bool, lossy: bool, dummy: bool, fixed: Settings
) -> list[Knob]:
    """The knobs to turn.

    Args:
        given: "NAME=VALUE,VALUE" each, values as JSON where they are; only these knobs are turned,
            the default beside the values. Empty: every knob that this machine has.
        dummy: weights are dummies: what they would mislead is left out.
        fixed: engine arguments that are set for all, and so no knobs.

    Raises BenchError for a knob that is not known, or that is also fixed.
    """
    chosen = [_parsed(text) for text in given]
    for knob in chosen:
        if knob.name in fixed:
            raise BenchError.of("knob", knob.name, "is also fixed in --engine")
    if chosen:
        return chosen
    return [
        knob
        for knob in KNOBS
        if len(knob.values) > 1
        and knob.name not in fixed
        and (on_gpu or not knob.gpu)
        and (lossy or not knob.lossy)
        and not (dummy and knob.real)
    ]


def _parsed(text: str) -> Knob:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise BenchError.of("knob", text, "not NAME=VALUE,VALUE")
    knob = BY_NAME.get(name)
    about = knob or Knob(name=name, values=(), meaning="An argument of vLLM.")
    return msgspec.structs.replace(about, values=(None, *_values(values)))


def _values(text: str) -> list[Any]:
    """A JSON list without its brackets, or words."""
    try:
        values: list[Any] = json.loads(f"[{text}]")
        return values
    except json.JSONDecodeError:
        return text.split(",")


def points(knobs: Sequence[Knob]) -> list[Settings]:
    """Every combination: the full grid."""
    points_so_far: list[Settings] = [{}]
    for knob in knobs:
        points_so_far = [
            point if value is None else {**point, knob.name: value}
            for point in points_so_far
            for value in knob.values
        ]
    return points_so_far


def started_with(settings: Settings, knobs: Sequence[Knob]) -> Settings:
    """The part of a setting that an engine must be started with: all but the live knobs."""
    live = {knob.name for knob in knobs if knob.live}
    return {name: value for name, value in settings.items() if name not in live}


def key(settings: Settings) -> str:
    """A setting as a text that is the same for the same setting."""
    return json.dumps(dict(sorted(settings.items())))


def describe(settings: Settings) -> str:
    """For a person: "max_num_seqs 64, kv_cache_dtype fp8"."""
    words = [f"{name} {_plain(value)}" for name, value in sorted(settings.items())]
    return ", ".join(words) or "vLLM's defaults"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
