"""What a tenant gets beside one that floods: FCFS, round robin by request, and serve_app's queue.

    python -m bench.simulation.sharing [--engine H100/Qwen2.5-7B] [--flood 10] [--seeds 5] ...

One modelled engine (`enginemodel.py`, by roofline) behind a queue. The tenant `good` asks for
`--load` of its share, which is half of the capacity; `flood` asks for `--flood` times the capacity.
Both have the same lengths, unless `--flood-prompts` makes those of `flood` longer. Arrivals are
Poisson's. Said are, of what came after `--warm` seconds, over all seeds:

    ttft        of `good`: p50 and p99 in seconds; `alone` is the same requests without `flood`
    served      of the requests of `good`, how many were not turned away
    tokens/s    of all tenants: prompt and output; as a share of FCFS's; and as a share of what FCFS
                makes of the requests that this policy served, all there from the start: where the
                tenants' requests differ, a fair policy serves another mix than FCFS does
    jain        Jain's index of the work done for each tenant, as a share of what it should get: of
                its demand, or of an equal part of what others leave (max-min fairness)

The queue is bounded as in serve_app (`--queued`). FCFS turns away who comes when it is full; the
other two turn away the youngest request of the tenant that has the most there.

With `--oracle` there is a row for each number of prompt tokens: serve_app's queue before an engine
that prefers `good` in every step and reads no more than those of `flood` (oracle.py). With
`--priority` there is one for serve_app's queue before vLLM's priority scheduling.

The second table has the parts of the TTFT of `good`, in ms, as means of the requests around the p99
(the 98th to the 99.5th percentile):

    queue       until the queue lets it in
    before      on its way to the engine, and until the step of its first token begins
    writing     of that step, what it takes without any prompt
    own         of that step, its own prompt
    others      of that step, the prompts of others

The engine schedules each step when the one before it begins, as vLLM does by default on a GPU.
`--synchronous` is vLLM's `async_scheduling: false`, and its CPU engine.

The last line is one JSON object.
"""

import argparse
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bench.simulation.batch import Batch
from bench.simulation.enginemodel import Engine, roofline
from bench.simulation.job import Job, clone
from bench.simulation.oracle import Preferring, Prioritising
from serve_app.tenants.fair import UNREAD_TOKENS, Entry, FairQueue, Share, work_of

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

    def is_above(self, share: Share) -> bool:
        return False


class Ours(FairQueue[Job]):
    """As it is deployed."""

    def share(self, share: Share) -> Share:
        return share

    def work(self, prompt: float, output: float) -> float:
        return work_of(prompt, output)


# Of a time to first token; see above.
_PARTS = ("queue", "before", "writing", "own", "others")

Policy = Fcfs | RoundRobin | Ours
POLICIES: dict[str, Callable[[int], Policy]] = {
    "fcfs": Fcfs,
    "round_robin": RoundRobin,
    "ours": Ours,
}


@dataclass
class Outcome:
    """A run: its jobs as they ended, when the queue let each in, and the engine's steps."""

    jobs: list[tuple[Share, Job]]
    let_in_s: Mapping[Job, float]
    batch: Batch

    def ttft_s(self, share: Share, from_s: float) -> list[float]:
        return [
            self.batch.step_end_s[job.spans[0][0]] - job.at_s
            for of, job in self.jobs
            if of == share and job.at_s >= from_s and job.spans
        ]

    def parts_s(self, share: Share, from_s: float) -> list[tuple[float, ...]]:
        """Of each time to first token, the `_PARTS`."""
        batch, costs = self.batch, self.batch.engine.costs
        parts: list[tuple[float, ...]] = []
        for of, job in self.jobs:
            if of != share or job.at_s < from_s or not job.spans:
                continue
            step, let_in_s = job.spans[0][0], self.let_in_s[job]
            # An idle engine begins when the request reaches it.
            began_s = max([let_in_s + costs.request_s, *batch.step_end_s[max(0, step - 1) : step]])
            prompts_s = costs.prefill_token_s * batch.step_prefill[step]
            own_s = min(costs.prefill_token_s * job.input_tokens, prompts_s)
            writing_s = batch.step_end_s[step] - began_s - prompts_s
            waits_s = let_in_s - job.at_s, began_s - let_in_s
            parts.append((*waits_s, writing_s, own_s, prompts_s - own_s))
        return parts

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
    batch: Batch | None = None,
) -> Outcome:
    """Send `arrivals`, in the order of their times, through `queue` to the engine."""
    batch = batch or Batch(engine)
    running: dict[Job, Entry[Job]] = {}
    let_in_s: dict[Job, float] = {}
    place = 0

    def fits(entry: Entry[Job] | None) -> bool:
        return entry is not None and queue.fits(
            entry.share, 1, entry.prompt_tokens, len(running), max_running
        )

    def let_in(now_s: float) -> None:
        while True:
            entry = queue.first()
            if not fits(entry):
                entry = queue.first_below_share()
            if entry is None or not fits(entry):
                return
            queue.begin(entry, 1)
            running[entry.item] = entry
            let_in_s[entry.item] = now_s
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
        # An engine that prefers one tenant needs no queue that holds the prompts of others.
        prompt_tokens = 0 if isinstance(batch, Preferring) else job.input_tokens
        queue.push(of, 1, queue.work(job.input_tokens, 256), job, prompt_tokens)
        let_in(now_s)

    while batch.now_s < until_s:
        at_s = arrivals[place][1].at_s if place < len(arrivals) else until_s
        ended = batch.advance(at_s, stop=True, stop_at_first=True)
        first_tokens = len(batch.first_tokens)
        batch.first_tokens.clear()
        # Requests that came during the last step came before what ended with it.
        event_s = batch.now_s if ended or first_tokens else at_s
        while place < len(arrivals) and arrivals[place][1].at_s <= event_s:
            arrive(*arrivals[place], arrivals[place][1].at_s)
            place += 1
        queue.read(first_tokens)
        for job in ended:
            entry = running.pop(job)
            queue.end(entry, queue.work(job.input_tokens, job.output_tokens))
        let_in(event_s)
        if at_s >= until_s and not ended and not first_tokens:
            break
    return Outcome(list(arrivals), let_in_s, batch)


def poisson(
    share: Share, rate: float, until_s: float, lengths: Lengths, rng: random.Random
) -> list[tuple[Share, Job]]:
    arrivals_of: list[tuple[Share, Job]] = []
    at_s = rng.expovariate(rate)
    while at_s < until_s:
        prompt, output = lengths.draw(rng)
        job = Job(len(arrivals_of), at_s, prompt, output, kind=share.name)
        arrivals_of.append((share, job))
        at_s += rng.expovariate(rate)
    return arrivals_of


def capacity(engine: Engine, lengths: Lengths, max_running: int) -> float:
    """Requests a second that the engine can serve."""
    rng = random.Random("capacity")
    jobs = [Job(i, 0.0, *lengths.draw(rng)) for i in range(20 * max_running)]
    return saturated(engine, jobs, max_running)[0]


def saturated(engine: Engine, jobs: Sequence[Job], max_running: int) -> tuple[float, float]:
    """Requests and tokens a second of jobs that are all there from the start, in their order."""
    arrivals = [(FLOOD, job) for job in jobs]
    outcome = run(engine, arrivals, Fcfs(), max_running, len(jobs), math.inf)
    ends = sorted(job.end_s or 0.0 for job in jobs)
    low_s, high_s = ends[len(ends) // 4], ends[3 * len(ends) // 4]
    requests = 3 * len(ends) // 4 - len(ends) // 4
    tokens = outcome.tokens_between(None, low_s, high_s)
    return requests / (high_s - low_s), tokens / (high_s - low_s)


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
    oracle_tokens: tuple[int, ...] = ()
    max_unread_tokens: int = UNREAD_TOKENS
    priority: bool = False

    @property
    def names(self) -> list[str]:
        """The rows."""
        oracles = [f"oracle {tokens}" for tokens in self.oracle_tokens]
        return ["alone", *POLICIES, *["priority"] * self.priority, *oracles]

    def batch(self, name: str) -> Batch:
        """The engine of a row."""
        kind, _, other_tokens = name.partition(" ")
        if kind == "oracle":
            return Preferring(self.engine, GOOD.name, int(other_tokens))
        return Prioritising(self.engine, GOOD.name) if kind == "priority" else Batch(self.engine)


def compare(case: Case, seeds: Iterable[int]) -> dict[str, dict[str, float]]:
    """The figures of each policy."""
    max_seqs = case.engine.max_num_seqs
    good_rate = case.load * capacity(case.engine, case.lengths, max_seqs) / 2
    flood_rate = case.flood * capacity(case.engine, case.flood_lengths, max_seqs)
    figures: dict[str, Figures] = defaultdict(Figures)
    for seed in seeds:
        for name in case.names:
            rng = random.Random(f"{seed}/good")
            arrivals = poisson(GOOD, good_rate, case.seconds, case.lengths, rng)
            if name != "alone":
                rng = random.Random(f"{seed}/flood")
                arrivals += poisson(FLOOD, flood_rate, case.seconds, case.flood_lengths, rng)
                arrivals.sort(key=lambda each: each[1].at_s)
            queue = POLICIES.get(name, Ours)(case.max_unread_tokens)
            batch = case.batch(name)
            outcome = run(case.engine, arrivals, queue, max_seqs, case.queued, case.seconds, batch)
            figures[name].add(case, outcome, figures["alone"])
    return {name: each.summary(figures) for name, each in figures.items()}


@dataclass
class Figures:
    """Of one policy, over all seeds."""

    ttft_s: list[float] = field(default_factory=list)
    parts_s: list[tuple[float, ...]] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    of_good: list[float] = field(default_factory=list)
    efficiency: list[float] = field(default_factory=list)
    fair: list[float] = field(default_factory=list)

    def add(self, case: Case, outcome: Outcome, alone: "Figures") -> None:
        """The figures of another seed."""
        span_s = (case.warm_s, case.seconds)
        every, good = (outcome.tokens_between(share, *span_s) for share in (None, GOOD))
        tokens_per_s = every / (case.seconds - case.warm_s)
        self.ttft_s += outcome.ttft_s(GOOD, case.warm_s)
        self.parts_s += outcome.parts_s(GOOD, case.warm_s)
        self.served.append(outcome.served(GOOD, case.warm_s))
        self.tokens.append(tokens_per_s)
        self.of_good.append(good)
        if alone is self:
            return
        mix = [clone(job) for _, job in outcome.jobs if job.end_s and job.end_s >= case.warm_s]
        for job in mix:
            job.at_s = 0.0
        random.Random("mix").shuffle(mix)
        self.efficiency.append(
            tokens_per_s / saturated(case.engine, mix, case.engine.max_num_seqs)[1]
        )
        # Its demand is less than its half, so that the flood's part is the rest.
        demand = alone.of_good[-1]
        self.fair.append(jain([good / demand, (every - good) / max(1.0, every - demand)]))

    def summary(self, of: Mapping[str, "Figures"]) -> dict[str, float]:
        p50_s, p99_s = np.percentile(self.ttft_s, [50, 99])
        tokens_per_s = float(np.mean(self.tokens))
        return {
            "ttft_p50_s": float(p50_s),
            "ttft_p99_s": float(p99_s),
            "ttft_p99_to_alone": float(p99_s / np.percentile(of["alone"].ttft_s, 99)),
            "served": float(np.mean(self.served)),
            "tokens_per_s": tokens_per_s,
            "tokens_to_fcfs": tokens_per_s / float(np.mean(of["fcfs"].tokens)),
            "tokens_to_same": float(np.mean(self.efficiency)) if self.efficiency else math.nan,
            "jain": float(np.mean(self.fair)) if self.fair else math.nan,
            **self._parts_of_p99_s(),
        }

    def _parts_of_p99_s(self) -> dict[str, float]:
        low_s, high_s = np.percentile(self.ttft_s, [98, 99.5])
        around = np.array([each for each in self.parts_s if low_s <= sum(each) <= high_s])
        means_s = around.mean(axis=0) if len(around) else [math.nan] * len(_PARTS)
        return {f"{name}_s": float(each) for name, each in zip(_PARTS, means_s, strict=True)}


def table(compared: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        f"{'':12}{'p50':>9}{'p99':>9}{'to alone':>10}{'served':>8}"
        f"{'tokens/s':>10}{'to fcfs':>9}{'to same':>9}{'jain':>7}"
    ]
    for name, each in compared.items():
        lines.append(
            f"{name:12}{each['ttft_p50_s']:9.3f}{each['ttft_p99_s']:9.3f}"
            f"{each['ttft_p99_to_alone']:10.2f}{each['served']:8.3f}{each['tokens_per_s']:10.0f}"
            f"{each['tokens_to_fcfs']:9.3f}{each['tokens_to_same']:9.3f}{each['jain']:7.3f}"
        )
    lines.append(f"\n{'':12}" + "".join(f"{part:>9}" for part in _PARTS))
    for name, each in compared.items():
        parts_ms = "".join(f"{1000 * each[f'{part}_s']:9.0f}" for part in _PARTS)
        lines.append(f"{name:12}{parts_ms}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulation.sharing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", default="H100/Qwen2.5-7B", help="GPU/model: %(default)s")
    parser.add_argument("--seqs", type=int, default=256, help="max_num_seqs: %(default)s")
    parser.add_argument(
        "--budget", type=int, help="max_num_batched_tokens; the engine's by default"
    )
    parser.add_argument(
        "--load",
        type=float,
        default=0.8,
        help="rate of the quiet tenant, relative to its share: %(default)s",
    )
    parser.add_argument(
        "--flood",
        type=float,
        default=10.0,
        help="rate of the flood, relative to the capacity: %(default)s",
    )
    parser.add_argument(
        "--flood-prompts",
        type=float,
        default=600.0,
        help="median prompt tokens of the flood: %(default)s",
    )
    parser.add_argument("--queued", type=int, default=256, help="bound of the queue: %(default)s")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--warm", type=float, default=40.0)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: %(default)s")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--unread", type=int, default=UNREAD_TOKENS, help="max_unread_tokens")
    parser.add_argument("--synchronous", action="store_true", help="no asynchronous scheduling")
    parser.add_argument(
        "--priority", action="store_true", help="add a row for vLLM's priority scheduling"
    )
    parser.add_argument("--oracle", default="", help="prompt tokens of others in a step: 700,1000")
    arguments = parser.parse_args(argv)
    gpu, _, model = arguments.engine.partition("/")
    ahead = not arguments.synchronous
    engine = replace(roofline(gpu, model), max_num_seqs=arguments.seqs, schedules_ahead=ahead)
    if arguments.budget is not None:
        engine = replace(engine, token_budget=arguments.budget)
    case = Case(
        engine,
        Lengths(),
        Lengths(prompt_median=arguments.flood_prompts),
        arguments.load,
        arguments.flood,
        arguments.queued,
        arguments.warm,
        arguments.seconds,
        tuple(int(each) for each in arguments.oracle.split(",") if each),
        arguments.unread,
        arguments.priority,
    )
    first = arguments.first_seed
    compared = compare(case, range(first, first + arguments.seeds))
    print(table(compared))
    json.dump({"arguments": vars(arguments), **compared}, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
