"""Pools of clients, as providers see them: few send most, each in bursts and lengths of its own.

    clients:count=50,rate=10,requests=1000,skew=1.2,cv=2,spread=0.5,input=300,output=100

What a service receives is the sum of its clients (ServeGen, 2025): with one process for all, bursts
and lengths would be independent of who sends. Client n of `count` sends a share of the rate that
falls as n ** -skew, in gamma arrivals with a coefficient of variation of its own (median `cv`), and
lengths that are those of `input` and `output` times a factor of its own (lognormal, `spread`). The
requests have times: replay them with --load trace.
"""

import heapq
import itertools
import random
from collections.abc import Iterator

from bench import spec
from bench.traffic import words
from bench.traffic.lengths import MAX_TOKENS, length
from bench.traffic.request import Request, Workload

OPTIONS = ("count", "rate", "requests", "skew", "cv", "spread", "input", "output")
_NAMED = 5  # The clients that send most are kinds of their own, and the others are one.


def pool(options: spec.Options, seed: int, salted: str) -> Workload:
    """The first `requests` of all clients together."""
    count, rate = options.whole("count", 50, minimum=1), options.number("rate", above=0.0)
    requests = options.whole("requests", 1000, minimum=1)
    skew, cv = (
        options.number("skew", 1.2, maximum=10),
        options.number("cv", 2.0, above=0.0, maximum=100),
    )
    spread = options.number("spread", 0.5, maximum=3)
    read, written = length(options, "input"), length(options, "output")
    weights = [rank**-skew for rank in range(1, count + 1)]
    clients = [random.Random(f"{seed}/client/{number}") for number in range(count)]
    factors = [rng.lognormvariate(0.0, spread) if spread else 1.0 for rng in clients]
    arrivals = [
        _arrivals(rng, number, rate * weights[number] / sum(weights), cv)
        for number, rng in enumerate(clients)
    ]
    merged = list(itertools.islice(heapq.merge(*arrivals), requests))

    def request(index: int) -> Request:
        at_s, client = merged[index]
        rng = random.Random(f"{seed}/length/{index}")
        tokens, answer = (
            min(MAX_TOKENS, max(1, round(of.draw(rng) * factors[client]))) for of in (read, written)
        )
        return Request(
            prompt=words.text(salted, "prompt", index, tokens),
            input_tokens=tokens,
            output_tokens=answer,
            kind=f"client {client + 1}" if client < _NAMED else "other clients",
            at_s=at_s,
        )

    return Workload(options.name, request, requests, timed=True)


def _arrivals(
    rng: random.Random, client: int, rate: float, median_cv: float
) -> Iterator[tuple[float, int]]:
    """Endless times of one client, from a moment of its own on."""
    cv = max(0.05, median_cv * rng.lognormvariate(0.0, 0.3))
    shape, scale_s = cv**-2, cv**2 / rate
    at_s = rng.uniform(0.0, 1.0 / rate)
    while True:
        yield at_s, client
        at_s += rng.gammavariate(shape, scale_s)
