"""What a tenant gets beside one that floods: FCFS, round robin by request, and serve_app's queue.

    python -m bench.simulation.sharing [--engine H100/Qwen2.5-7B] [--flood 10] [--seeds 5] ...

One modelled engine (`enginemodel.py`, by roofline) behind a queue. The tenant `good` asks for
`--load` of its share, which is half of the capacity; `flood` asks for `--flood` times the capacity.
Both have the same lengths, unless `--flood-prompts` makes those of `flood` longer. Arrivals are
Poisson's. Said are, of what came after `--warm` seconds, over all seeds:

    ttft        of `good`: p50 and p99 in seconds; `alone` is the same requests without `flood`
    served      of the requests of `good`, how many were not turned away
    tokens/s    of all tenants: prompt and output; and as a share of FCFS's
    jain        Jain's index of the work done for each tenant, as a share of what it should get: of
                its demand, or of an equal part of what others leave (max-min fairness)

The queue is bounded as in serve_app (`--queued`). FCFS turns away who comes when it is full; the
other two turn away the youngest request of the tenant that has the most there.

The last line is one JSON object.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.simulation.enginemodel import Batch, Engine, Job, roofline
from serve_app.tenants.fair import Entry, FairQueue, Share, work_of

GOOD, FLOOD = Share("good"), Share("flood")


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths of prompts and answers."""

    prompt_median: float = 600.0
    prompt_sigma: float = 0.9
    output_median: float = 150.0
    output_sigma: float = 0.8
    most_prompt: int = 8000
    most_output: int = 2000

    def draw(self, rng: random.Random) -> tuple[int, int]:
        prompt = self.prompt_median * math.exp(self.prompt_sigma * rng.gauss(0, 1))
        output = self.output_median * math.exp(self.output_sigma * rng.gauss(0, 1))
        return (
            min(self.most_prompt, max(8, round(prompt))),
            min(self.most_output, max(4, round(output))),
        )


class Fcfs(FairQueue[Job]):
    """Everybody is one tenant."""

    def share(self, share: Share) -> Share:
        return Share("all")

    def work(self, prompt: float, output: float) -> float:
        return 0.0


class RoundRobin(FairQueue[Job]):
    """Each tenant in turn has one request served."""

    def share(self, share: Share) -> Share:
        return share

    def work(self, prompt: float, output: float) -> float:
        return 1.0

    def bound(self, share: Share, batch: int) -> int:
        return batch


class Ours(FairQueue[Job]):
    """As it is deployed."""

    def share(self, share: Share) -> Share:
        return share

    def work(self, prompt: float, output: float) -> float:
        return work_of(prompt, output)


Policy = Fcfs | RoundRobin | Ours
POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": Fcfs, "round_robin": RoundRobin, "ours": Ours}


@dataclass
class Outcome:
    """A run: its jobs as they ended, and the ends of the engine's steps."""

    jobs: list[tuple[Share, Job]]
    steps_s: Sequence[float]

    def ttft_s(self, share: Share, from_s: float) -> list[float]:
        return [
            self.steps_s[job.spans[0][0]] - job.at_s
            for of, job in self.jobs
            if of == share and job.at_s >= from_s and job.spans
        ]

    def served(self, share: Share, from_s: float) -> float:
        of = [job for each, job in self.jobs if each == share and job.at_s >= from_s]
        return sum(not job.error for job in of) / max(1, len(of))

    def tokens_between(self, share: Share | None, from_s: float, to_s: float) -> float:
        """Tokens of the requests that ended between two times."""
        return float(
            sum(
                job.input_tokens + job.output_tokens
                for of, job in self.jobs
                if share in (None, of) and job.end_s is not None and from_s <= job.end_s < to_s
            )
        )


def run(
    engine: Engine,
    arrivals: Sequence[tuple[Share, Job]],
    queue: Policy,
    max_running: int,
    max_queued: int,
    until_s: float,
) -> Outcome:
    """Send `arrivals`, in the order of their times, through `queue` to the engine."""
    batch = Batch(engine)
    running: dict[Job, Entry[Job]] = {}
    place = 0

    def fits(entry: Entry[Job] | None) -> bool:
        return entry is not None and len(running) < queue.bound(entry.share, max_running)

    def let_in(now_s: float) -> None:
        while True:
            entry = queue.first()
            if not fits(entry):
                entry = queue.first_below_share()
            if entry is None or not fits(entry):
                return
            queue.begin(entry, 1)
            running[entry.item] = entry
            batch.add(entry.item, now_s)

    def arrive(share: Share, job: Job, now_s: float) -> None:
        of = queue.share(share)
        if len(queue) >= max_queued:
            loser = queue.victim(of)
            if loser is None:
                job.error = "http 429"
                return
            loser.item.error = "http 429"
            queue.leave(loser)
        # The length of an answer is not known before: a constant, as for a request that says none.
        queue.push(of, 1, queue.work(job.input_tokens, 256), job)
        let_in(now_s)

    while batch.now_s < until_s:
        at_s = arrivals[place][1].at_s if place < len(arrivals) else until_s
        ended = batch.advance(at_s, stop=True)
        now_s = batch.now_s if ended else at_s
        while place < len(arrivals) and arrivals[place][1].at_s <= now_s:
            arrive(*arrivals[place], now_s)
            place += 1
        for job in ended:
            entry = running.pop(job)
            queue.end(entry, queue.work(job.input_tokens, job.output_tokens))
        let_in(now_s)
        if at_s >= until_s and not ended:
            break
    return Outcome(list(arrivals), batch.step_end_s)


def poisson(
    share: Share, rate: float, until_s: float, lengths: Lengths, rng: random.Random
) -> list[tuple[Share, Job]]:
    arrivals_of: list[tuple[Share, Job]] = []
    at_s = rng.expovariate(rate)
    while at_s < until_s:
        prompt, output = lengths.draw(rng)
        arrivals_of.append((share, Job(len(arrivals_of), at_s, prompt, output)))
        at_s += rng.expovariate(rate)
    return arrivals_of


def capacity(engine: Engine, lengths: Lengths, max_running: int) -> float:
    """Requests a second that the engine can serve."""
    rng = random.Random("capacity")
    jobs = [Job(i, 0.0, *lengths.draw(rng)) for i in range(20 * max_running)]
    outcome = run(engine, [(FLOOD, job) for job in jobs], Fcfs(), max_running, len(jobs), math.inf)
    ends = sorted(job.end_s or 0.0 for _, job in outcome.jobs)
    low, high = len(ends) // 4, 3 * len(ends) // 4
    return (high - low) / (ends[high] - ends[low])


def jain(values: Sequence[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


@dataclass(frozen=True)
class Case:
    engine: Engine
    lengths: Lengths
    flood_lengths: Lengths
    load: float
    flood: float
    queued: int
    warm_s: float
    seconds: float


def compare(case: Case, seeds: int) -> dict[str, dict[str, float]]:
    """The figures of each policy."""
    max_seqs = case.engine.max_num_seqs
    rate = capacity(case.engine, case.lengths, max_seqs)
    flood_rate = capacity(case.engine, case.flood_lengths, max_seqs)
    ttft: dict[str, list[float]] = {}
    tokens: dict[str, list[float]] = {}
    served: dict[str, list[float]] = {}
    fair: dict[str, list[float]] = {}
    for seed in range(seeds):
        good = case.load * rate / 2
        for name, make in {"alone": Ours, **POLICIES}.items():
            rng = random.Random(f"{seed}/good")
            arrivals = poisson(GOOD, good, case.seconds, case.lengths, rng)
            if name != "alone":
                rng = random.Random(f"{seed}/flood")
                flood = case.flood * flood_rate
                arrivals += poisson(FLOOD, flood, case.seconds, case.flood_lengths, rng)
                arrivals.sort(key=lambda each: each[1].at_s)
            outcome = run(case.engine, arrivals, make(), max_seqs, case.queued, case.seconds)
            span = (case.warm_s, case.seconds)
            ttft.setdefault(name, []).extend(outcome.ttft_s(GOOD, case.warm_s))
            served.setdefault(name, []).append(outcome.served(GOOD, case.warm_s))
            every = outcome.tokens_between(None, *span)
            tokens.setdefault(name, []).append(every / (case.seconds - case.warm_s))
            if name == "alone":
                alone = outcome.tokens_between(GOOD, *span)
                continue
            mine = outcome.tokens_between(GOOD, *span)
            # Its demand is less than its half, so that the flood's part is the rest.
            parts = [mine / alone, (every - mine) / max(1.0, every - alone)]
            fair.setdefault(name, []).append(jain(parts))
    by_policy = {}
    for name in ttft:
        by_policy[name] = {
            "ttft_p50_s": float(np.percentile(ttft[name], 50)),
            "ttft_p99_s": float(np.percentile(ttft[name], 99)),
            "ttft_p99_to_alone": float(
                np.percentile(ttft[name], 99) / np.percentile(ttft["alone"], 99)
            ),
            "served": float(np.mean(served[name])),
            "tokens_per_s": float(np.mean(tokens[name])),
            "jain": float(np.mean(fair[name])) if name in fair else math.nan,
        }
    for each in by_policy.values():
        each["tokens_to_fcfs"] = each["tokens_per_s"] / by_policy["fcfs"]["tokens_per_s"]
    return by_policy


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulation.sharing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", default="H100/Qwen2.5-7B", help="GPU/model: %(default)s")
    parser.add_argument("--seqs", type=int, default=256, help="of the batch: %(default)s")
    parser.add_argument("--load", type=float, default=0.8, help="of its share: %(default)s")
    parser.add_argument("--flood", type=float, default=10.0, help="times capacity: %(default)s")
    parser.add_argument("--flood-prompts", type=float, default=600.0, help="median: %(default)s")
    parser.add_argument("--queued", type=int, default=256, help="bound: %(default)s")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--warm", type=float, default=40.0)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args(argv)
    gpu, _, model = arguments.engine.partition("/")
    engine = replace(roofline(gpu, model), max_num_seqs=arguments.seqs)
    case = Case(
        engine,
        Lengths(),
        Lengths(prompt_median=arguments.flood_prompts),
        arguments.load,
        arguments.flood,
        arguments.queued,
        arguments.warm,
        arguments.seconds,
    )
    compared = compare(case, arguments.seeds)
    print(
        f"{'':12}{'p50':>9}{'p99':>9}{'to alone':>10}{'served':>8}"
        f"{'tokens/s':>10}{'to fcfs':>9}{'jain':>7}"
    )
    for name, each in compared.items():
        print(
            f"{name:12}{each['ttft_p50_s']:9.3f}{each['ttft_p99_s']:9.3f}"
            f"{each['ttft_p99_to_alone']:10.2f}{each['served']:8.3f}{each['tokens_per_s']:10.0f}"
            f"{each['tokens_to_fcfs']:9.3f}{each['jain']:7.3f}"
        )
    json.dump({"arguments": vars(arguments), **compared}, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
