"""The KV cache of an engine under a load: `bench kv`.

    python -m bench kv --model FOLDER --workload synthetic:input=1000,output=200 --out DIR

A sequence gets whole blocks, so its last block is partly empty. That is waste (`waste_share`), half
a block per sequence on average. Blocks of a shared prefix count once, so if prompts share much,
they have more tokens than their blocks hold, and there is no waste. When a sequence needs a block
and none is free, another sequence is preempted and computed again: any preemption means that the
cache is too small for `max_num_seqs`.

`fits` is a plain division: how many sequences of a length the cache holds at once.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from bench import result, run
from bench.engine import trial
from bench.engine.orders import LoadOutcome, Ready
from bench.engine.trial import Engine
from bench.result import EngineResult, Line

LENGTHS = (500, 1000, 2000, 4000, 8000, 16000, 32000)


class View(msgspec.Struct, kw_only=True):
    """What became of the cache during a load.

    Attributes:
        blocks, block_tokens, tokens: what there is.
        used_peak, used_mean: shares of the blocks.
        waste_share: of the tokens that the blocks in use could hold, those that they did not.
        hit_rate: share of prompt tokens found in the prefix cache; None where nothing was read.
        fits: sequences of each length that it holds at once.
        full_at: the most sequences that ran at once, and the share that they used.
    """

    blocks: int
    block_tokens: int
    tokens: int
    used_peak: float
    used_mean: float
    waste_share: float
    preempted: int
    hit_rate: float | None
    fits: dict[int, int]
    running_peak: int
    waiting_peak: int


def view(ready: Ready, answer: LoadOutcome) -> View:
    """The figures of a load; pure."""
    # One block is the engine's own: what nobody has is pointed at it.
    blocks, size = ready.kv_blocks - 1, ready.block_tokens
    used = [sample["blocks"] for sample in answer.kv]
    waste = [
        max(0.0, 1 - sample["tokens"] / (sample["blocks"] * size))
        for sample in answer.kv
        if sample["blocks"]
    ]
    measured = [record for record in answer.records if record.ok and record.input_tokens]
    read = sum(record.input_tokens or 0 for record in measured)
    cached = sum(record.cached_tokens or 0 for record in measured)
    return View(
        blocks=blocks,
        block_tokens=size,
        tokens=blocks * size,
        used_peak=max(used, default=0.0) / blocks,
        used_mean=fmean(used) / blocks if used else 0.0,
        waste_share=fmean(waste) if waste else 0.0,
        preempted=answer.preempted,
        hit_rate=cached / read if read else None,
        fits=fits(blocks, size),
        running_peak=int(max((sample["running"] for sample in answer.kv), default=0)),
        waiting_peak=int(max((sample["waiting"] for sample in answer.kv), default=0)),
    )


def fits(blocks: int, block_tokens: int, lengths: Sequence[int] = LENGTHS) -> dict[int, int]:
    """How many sequences of each length fit into this many blocks."""
    return {length: blocks // -(-length // block_tokens) for length in lengths}


def describe(cache: View) -> list[str]:
    """For a person."""
    room = ", ".join(f"{count} of {length:,}" for length, count in cache.fits.items() if count)
    hit = "unknown" if cache.hit_rate is None else f"{cache.hit_rate:.0%}"
    return [
        f"{cache.blocks:,} blocks of {cache.block_tokens} tokens hold {cache.tokens:,} tokens: "
        f"sequences {room or 'shorter than any asked about'}",
        f"in use: {cache.used_peak:.0%} at most, {cache.used_mean:.0%} on average; "
        f"{cache.waste_share:.1%} of it in blocks that are partly empty",
        f"{cache.preempted} preemptions; prefix cache hit rate {hit}; "
        f"{cache.running_peak} ran and {cache.waiting_peak} waited at most",
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench kv`."""
    add = parser.add_argument
    add("--model", required=True, help="a local folder or a hub id")
    add("--engine", type=json.loads, default={}, help="vLLM arguments, as JSON")
    add("--workload", default="synthetic:input=lognormal(800;0.5),output=200,max=3000")
    add(
        "--load",
        default="burst:size=256,every=1000",
        help="arrival times: see docs/benchmarking.md",
    )
    add("--requests", type=int, default=256)
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="folder of the result")


class KvCache(EngineResult, frozen=True, kw_only=True):
    """The result of `bench kv`; `samples` are over time, thinned for a plot."""

    benchmark: str = "kv"
    kv: View
    samples: list[Mapping[str, float]] = []


def command(options: argparse.Namespace) -> Line:
    """What `python -m bench kv` does with its options; returns its last line."""
    head = result.header(f"KV cache of {options.model}")
    with Engine(options.model, options.engine, options.out) as engine:
        assert engine.ready is not None
        answer = engine.load(
            options.workload,
            options.load,
            count=options.requests,
            seed=options.seed,
            limit_s=trial.START_S,
        )
        cache = view(engine.ready, answer)
    for line in describe(cache):
        run.say(line)
    doubts = ["the load was broken off"] if answer.lost else []
    output = KvCache(
        **head,
        model=options.model,
        engine=options.engine,
        workload=options.workload,
        load=options.load,
        valid=not doubts,
        doubts=doubts,
        kv=cache,
        samples=thinned(answer.kv),
    )
    return result.line(result.write(options.out, output), options.out, "kv")


def thinned(
    samples: Sequence[Mapping[str, float]], max_samples: int = 400
) -> list[Mapping[str, float]]:
    """As many samples as a plot shows."""
    step = max(1, -(-len(samples) // max_samples))
    return list(samples[::step])
