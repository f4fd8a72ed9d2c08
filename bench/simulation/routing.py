"""The cost and the benefit of each routing policy of `serve_app.gateway.routing`.

    python -m bench.simulation.routing [--replicas 2,4,8] [--requests 600] [--cache 0.6] ...

Cost: microseconds of CPU time for the keys of a prompt and for a decision of the prefix router
while it remembers 10,000 prompts of 4,000 tokens that differ from their first block on, and the
bytes that it takes for them, on 2, 8 and 64 replicas. The same with the first quarter of all
prompts in common, where every replica holds some of every prompt.

Worth: a modelled fleet (`enginemodel.py`: 7B on L4, by roofline) under Poisson arrivals of prompts
that begin with one of 64 prefixes, as popular as each other or by Zipf's law. Said are, of what
came after the first fifth:

    hit share   prompt tokens that were not read, as a share of all
    ttft        p50 and p99, seconds
    load        the busiest replica beside the mean: of the tokens outstanding, over time (`queue`),
                and of the tokens it was sent, less those not read (`work`)

`--cache` is the share of all prefixes that one replica's KV cache holds: where it is 1 every policy
ends up with every prefix everywhere, and affinity is worth little. `--gateways` routers share the
load, each of which knows only its own requests. What the model leaves out: engines take the words
of a prompt out of their cache from its end, the model from its start, so that what is lost in part
is lost whole; running sequences do not push prefixes out; and all answers have the length that was
foreseen.

The last line is one JSON object.
"""

import argparse
import random
import statistics
import sys
import time
import tracemalloc
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import msgspec

from bench.simulation.batch import Batch
from bench.simulation.enginemodel import Engine, roofline
from bench.simulation.job import Job
from serve_app.gateway import routing
from serve_app.gateway.routing import Candidate, PrefixRouter, Router

BYTES_A_TOKEN = 4
WARM_SHARE = 0.2


# --- cost -----------------------------------------------------------------------------------


class Quantiles(msgspec.Struct, frozen=True):
    """Of the times of many decisions."""

    p50: float
    p99: float
    mean: float


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Of one decision.

    Attributes:
        common: share of each prompt that all of them begin with.
        live_prefixes: prompts that the router still knows whole.
        bytes, bytes_a_key: memory of the router.
    """

    replicas: int
    common: float
    live_prefixes: int
    keys_a_prompt: int
    keys_us: Quantiles
    choose_us: Quantiles
    decision_us: Quantiles
    bytes: int
    bytes_a_key: float


def cost(replicas: int, prompts: int, tokens: int, common: float, decisions: int) -> Cost:
    """Of one decision, all `prompts` being remembered; `common` is the share they begin with."""
    rng = random.Random(0)
    same = rng.randbytes(int(tokens * common) * BYTES_A_TOKEN)

    def prompt(number: int) -> bytes:
        rest = tokens * BYTES_A_TOKEN - len(same)
        return same + random.Random(number).randbytes(rest)

    def filled() -> PrefixRouter:
        # Room for all of them on each replica, so that all are live, wherever they went.
        room = prompts * tokens * BYTES_A_TOKEN
        router = PrefixRouter(random.Random(1), held_bytes=room, max_keys=1 << 30)
        for number in range(prompts):
            router.choose(fleet, routing.prefix_keys(prompt(number)), None)
        return router

    fleet = [Candidate(f"replica-{number}", 0, 0) for number in range(replicas)]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    router = filled()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    live = sum(
        any(
            router.shared(replica.name, keys) == len(keys) * routing.BLOCK_BYTES
            for replica in fleet
        )
        for keys in (routing.prefix_keys(prompt(number)) for number in range(prompts))
    )
    remembered = router.keys
    keys_us, choose_us = [], []
    for number in range(decisions):
        # Loads of which some are above the bound, so that nothing is decided early.
        fleet[rng.randrange(replicas)].outstanding = rng.randrange(20_000)
        body = prompt(rng.randrange(prompts))
        began = time.thread_time_ns()
        keys = routing.prefix_keys(body)
        keyed = time.thread_time_ns()
        router.choose(fleet, keys, None)
        ended = time.thread_time_ns()
        if number >= decisions // 10:
            keys_us.append((keyed - began) / 1e3)
            choose_us.append((ended - keyed) / 1e3)
    return Cost(
        replicas=replicas,
        common=common,
        live_prefixes=live,
        keys_a_prompt=tokens * BYTES_A_TOKEN // routing.BLOCK_BYTES,
        keys_us=_quantiles(keys_us),
        choose_us=_quantiles(choose_us),
        decision_us=_quantiles([a + b for a, b in zip(keys_us, choose_us, strict=True)]),
        bytes=used,
        bytes_a_key=round(used / remembered, 1),
    )


def _quantiles(values: Sequence[float]) -> Quantiles:
    ordered = sorted(values)
    return Quantiles(
        p50=round(ordered[len(ordered) // 2], 1),
        p99=round(ordered[int(0.99 * (len(ordered) - 1))], 1),
        mean=round(statistics.fmean(ordered), 1),
    )


# --- worth ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What comes. Tokens, and requests a second and replica.

    Attributes:
        common: that all prefixes begin with, like a system prompt of everybody.
        shared: of a prefix, `common` included.
        zipf: whether prefix n is asked for 1 / n as often as the first one.
    """

    prefixes: int = 64
    common: int = 0
    shared: int = 2000
    unique: int = 50
    output: int = 64
    rate: float = 2.0
    requests: int = 600
    zipf: bool = False
    seed: int = 0


@dataclass(eq=False)
class Replica:
    """One engine and what it was sent: (request, prompt tokens that it was thought to hold)."""

    batch: Batch
    sent: dict[Job, int] = field(default_factory=dict)
    work_tokens: int = 0

    def outstanding(self, jobs: dict[Job, int]) -> int:
        """As a gateway counts them: a prompt is unread until the first token comes."""
        total = 0
        steps = len(self.batch.step_end_s)
        for job, tokens in jobs.items():
            total += job.output_tokens - job.written
            total += job.input_tokens - tokens if job.first < 0 else job.first - steps
        return total


class Gateway:
    """A router, and what it sent."""

    def __init__(self, router: Router, replicas: Sequence[Replica]) -> None:
        self.router = router
        self.replicas = replicas
        self.candidates = [Candidate(f"replica-{i}", 0, 0) for i in range(len(replicas))]
        self.sent: list[dict[Job, int]] = [{} for _ in replicas]

    def send(self, job: Job, prompt: bytes) -> Replica:
        for candidate, replica, jobs in zip(self.candidates, self.replicas, self.sent, strict=True):
            for ended in [ended for ended in jobs if ended.end_s is not None]:
                del jobs[ended]
            candidate.requests = len(jobs)
            candidate.outstanding = replica.outstanding(jobs)
        choice = self.router.choose(self.candidates, routing.prefix_keys(prompt), None)
        index = [candidate.name for candidate in self.candidates].index(choice.name)
        self.sent[index][job] = self.replicas[index].sent[job] = choice.shared // BYTES_A_TOKEN
        return self.replicas[index]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a fleet served a load.

    Attributes:
        hit_share: prompt tokens that came from a cache.
        queue_max_over_mean, work_max_over_mean: the busiest replica beside the mean of all.
    """

    hit_share: float
    ttft_p50_s: float
    ttft_p99_s: float
    queue_max_over_mean: float
    work_max_over_mean: float


class Row(Outcome, frozen=True, kw_only=True):
    """The outcome of one policy on one fleet."""

    replicas: int
    popularity: str
    policy: str


def simulate(
    made: Callable[[random.Random], Router],
    load: Load,
    engine: Engine,
    replicas: int,
    gateways: int = 1,
) -> Outcome:
    """One policy on one fleet; the same requests for every policy."""
    rng = random.Random(load.seed)
    weights = [1 / number if load.zipf else 1.0 for number in range(1, load.prefixes + 1)]
    upto = list(accumulate(weights))
    common = rng.randbytes(load.common * BYTES_A_TOKEN)
    rest = (load.shared - load.common) * BYTES_A_TOKEN
    texts = [common + rng.randbytes(rest) for _ in range(load.prefixes)]
    fleet = [Replica(Batch(engine)) for _ in range(replicas)]
    doors = [Gateway(made(random.Random(load.seed + i)), fleet) for i in range(gateways)]
    count = load.requests * replicas
    jobs: list[tuple[Job, Replica]] = []
    queues: list[list[int]] = []
    now_s = 0.0
    for number in range(count):
        now_s += rng.expovariate(load.rate * replicas)
        prefix = bisect(upto, rng.random() * upto[-1])
        prompt = texts[prefix] + rng.randbytes(load.unique * BYTES_A_TOKEN)
        door = rng.choice(doors)
        for replica in fleet:
            for ended in replica.batch.advance(now_s):
                replica.sent.pop(ended, None)
        warm = number >= WARM_SHARE * count
        if warm:
            queues.append([replica.outstanding(replica.sent) for replica in fleet])
        size = load.shared + load.unique
        job = Job(number, now_s, size, load.output, hashes=_blocks(prefix, load, engine))
        replica = door.send(job, prompt)
        replica.batch.add(job, now_s)
        if warm:
            jobs.append((job, replica))
    for replica in fleet:
        replica.batch.advance(float("inf"))
    ttft_s = []
    for job, replica in jobs:
        ttft_s.append(replica.batch.step_end_s[job.spans[0][0]] - job.at_s)
        replica.work_tokens += job.input_tokens - job.cached_tokens + job.output_tokens
    read = sum(job.input_tokens for job, _ in jobs)
    ttft_s.sort()
    return Outcome(
        hit_share=round(sum(job.cached_tokens for job, _ in jobs) / read, 4),
        ttft_p50_s=round(ttft_s[len(ttft_s) // 2], 4),
        ttft_p99_s=round(ttft_s[int(0.99 * (len(ttft_s) - 1))], 4),
        # Poisson arrivals see what is there over time.
        queue_max_over_mean=_max_over_mean([sum(each) for each in zip(*queues, strict=True)]),
        work_max_over_mean=_max_over_mean([replica.work_tokens for replica in fleet]),
    )


def _blocks(prefix: int, load: Load, engine: Engine) -> tuple[int, ...]:
    """What the engine knows the whole blocks of a prompt by; those of `common` are the same."""
    every = load.common // engine.block_tokens
    own = range(every, load.shared // engine.block_tokens)
    return (*range(every), *((prefix + 1) * 100_000 + block for block in own))


def _max_over_mean(values: Sequence[float]) -> float:
    return round(max(values) / max(statistics.fmean(values), 1e-9), 3)


def engine_for(load: Load, cache: float) -> Engine:
    """7B on L4 with a KV cache for the share `cache` of all prefixes."""
    engine = roofline("L4", "Qwen2.5-7B")
    own = load.prefixes * (load.shared - load.common) + load.common
    return replace(
        engine, prefix_caching=True, kv_blocks=max(512, int(own * cache) // engine.block_tokens)
    )


def held_bytes(engine: Engine) -> int:
    return engine.kv_blocks * engine.block_tokens * BYTES_A_TOKEN


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    load = Load()
    parser.add_argument("--replicas", default="2,4,8", help="of the modelled fleets")
    parser.add_argument("--requests", type=int, default=load.requests, help="a replica")
    parser.add_argument("--rate", type=float, default=load.rate, help="requests/s and replica")
    parser.add_argument("--shared", type=int, default=load.shared, help="tokens of a shared prefix")
    parser.add_argument(
        "--common", type=int, default=load.common, help="of them, tokens that all prefixes share"
    )
    parser.add_argument(
        "--unique", type=int, default=load.unique, help="tokens of a request after the prefix"
    )
    parser.add_argument("--cache", type=float, default=0.6, help="prefixes that a replica holds")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--seed", type=int, default=load.seed)
    parser.add_argument(
        "--decisions",
        type=int,
        default=20_000,
        help="routing decisions to time; 0: do not time any",
    )
    parser.add_argument(
        "--live", type=int, default=10_000, help="prefixes that the router remembers"
    )
    options = parser.parse_args()
    costs = []
    for replicas in (2, 8, 64) if options.decisions else ():
        for common in (0.0, 0.25):
            costs.append(cost(replicas, options.live, 4000, common, options.decisions))
            print(_json(costs[-1]), file=sys.stderr)
    load = replace(
        load,
        common=options.common,
        shared=options.shared,
        unique=options.unique,
        rate=options.rate,
        requests=options.requests,
        seed=options.seed,
    )
    engine = engine_for(load, options.cache)
    made = dict(routing.ROUTERS)
    made["prefix"] = lambda rng: PrefixRouter(rng, held_bytes=held_bytes(engine))
    worth = []
    for replicas in [int(text) for text in options.replicas.split(",")]:
        for zipf in (False, True):
            for policy, make in made.items():
                outcome = simulate(
                    make, replace(load, zipf=zipf), engine, replicas, options.gateways
                )
                row = Row(
                    replicas=replicas,
                    popularity="zipf" if zipf else "uniform",
                    policy=policy,
                    **msgspec.structs.asdict(outcome),
                )
                worth.append(row)
                print(_json(row), file=sys.stderr)
    print(_json({"benchmark": "routing", "cost": costs, "worth": worth}))
    return 0


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


if __name__ == "__main__":
    sys.exit(main())
