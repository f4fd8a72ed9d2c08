"""What `trial.Engine` and its process say to each other, as lines of JSON."""

import msgspec

from bench.measure import Slo
from bench.records import Record


class Load(msgspec.Struct, tag=True, kw_only=True):
    """The order to send a load.

    Attributes:
        what, when, count, seed: workload, load, requests and seed of `bench run`.
        slo: the load is broken off once it cannot be kept.
        live: limits of the scheduler for this load.
        limit_s: the load is broken off after so long.
        path: where the records are written.
        priorities: of requests, by their kind.
    """

    what: str
    when: str
    count: int
    seed: int
    slo: Slo | None
    live: dict[str, int]
    limit_s: float
    path: str
    priorities: dict[str, int]


class Complete(msgspec.Struct, tag=True, kw_only=True):
    """The order to complete prompts greedily, one at a time."""

    prompts: list[str]
    tokens: int


class Ready(msgspec.Struct, tag=True, kw_only=True):
    """The report of an engine that has started.

    Attributes:
        limits: of its scheduler, vLLM's defaults resolved.
        kv_blocks, block_tokens: of the KV cache.
        load_s: how long its start took.
    """

    limits: dict[str, int]
    kv_blocks: int
    block_tokens: int
    load_s: float


class LoadOutcome(msgspec.Struct, tag=True, kw_only=True):
    """The requests of a load and what the engine did for them.

    Attributes:
        lost: the load was aborted, because the objective could no longer be met.
        elapsed_s: until the last answer; `cpu_s`: of the engine's process meanwhile.
        steps: of the engine, and how long all of them took.
        kv_peak: greatest share of the KV cache in use; `preempted`: sequences that lost blocks.
        kv: samples of the KV cache over the load: time, blocks in use, tokens in them, running,
            waiting.
    """

    records: list[Record] = []
    lost: bool = False
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    steps: int = 0
    step_s: float = 0.0
    kv_peak: float = 0.0
    preempted: int = 0
    kv: list[dict[str, float]] = []


class Completions(msgspec.Struct, tag=True):
    """The tokens after each prompt."""

    tokens: list[list[int]]


class Refused(msgspec.Struct, tag=True):
    """The order cannot be carried out."""

    error: str


Order = Load | Complete
Answer = Ready | LoadOutcome | Completions | Refused


class Line(msgspec.Struct):
    """A line with an answer. Whatever else is printed has another beginning (`PREFIX`)."""

    bench: Answer


PREFIX = b'{"bench"'
