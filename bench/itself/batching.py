"""A server of known throughput that answers in batches, with a closed loop of users.

Each step makes one token of every request and takes longer with more of them, and with each prompt
that is read in it. A closed loop therefore begins too fast, as nobody sends a second prompt yet,
and ends too fast, as users run out of work: a benchmark that measures its start or its end reports
a rate that is too high.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from bench import measure
from bench.records import Record

Lengths = Callable[[np.random.Generator, int], Sequence[int]]
TOKENS = 100
LENGTHS: dict[str, Lengths] = {
    "equal": lambda rng, count: [TOKENS] * count,
    "uniform": lambda rng, count: rng.integers(TOKENS // 2, 3 * TOKENS // 2 + 1, count).tolist(),
    "geometric": lambda rng, count: rng.geometric(1 / TOKENS, count).tolist(),
}


@dataclass(frozen=True)
class Server:
    """How long a step takes.

    Attributes:
        step_s: without requests. request_s, prompt_s: for each request, and for each new one.
        noise: standard deviation of the time of a step, as a share of its mean.
    """

    step_s: float = 0.0045
    request_s: float = 2e-5
    prompt_s: float = 4e-3
    noise: float = 0.03

    def tokens_per_s(self, users: int) -> float:
        """In the steady state, where each user has a request of `TOKENS` tokens on average."""
        return users / (self.step_s + users * (self.request_s + self.prompt_s / TOKENS))

    def answer(self, users: int, lengths: Sequence[int], rng: np.random.Generator) -> list[Record]:
        """Users who take the next request as soon as their last one was answered."""
        records, under_way, now_s = [], list[tuple[int, int, int]](), 0.0
        free, step, waiting = list(range(users)), 0, list(enumerate(lengths))[::-1]
        while waiting or under_way:
            taken = [(waiting.pop(), user) for user in free if waiting]
            begun_s = now_s
            count = len(under_way) + len(taken)
            mean_s = self.step_s + count * self.request_s + len(taken) * self.prompt_s
            now_s += mean_s * max(0.1, 1 + self.noise * float(rng.normal()))
            for (index, tokens), user in taken:
                records.append(_record(index, user, begun_s, now_s, tokens))
                heapq.heappush(under_way, (step + tokens, index, user))
            step, free = step + 1, []
            while under_way and under_way[0][0] <= step:
                _, index, user = heapq.heappop(under_way)
                records[index].end_s = now_s
                records[index].chunk_s.append(now_s)
                free.append(user)
        return records


def _record(index: int, user: int, planned_s: float, first_s: float, tokens: int) -> Record:
    return Record(
        index=index,
        user=user,
        planned_s=planned_s,
        sent_s=planned_s,
        chunk_s=[first_s],
        status=200,
        output_tokens=tokens,
    )


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """What bench makes of closed loops.

    Attributes:
        turns: requests for each user.
        steady: share of the runs in which bench finds a steady state; the others are doubted.
        ratio: mean of measured over true tokens/s in those; None without any.
        worst: the ratio that is farthest from 1.
    """

    lengths: str
    users: int
    turns: int
    steady: float
    ratio: float | None = None
    worst: float | None = None


def throughput(lengths: str, users: int, turns: int, trials: int) -> Throughput:
    server, ratios = Server(), []
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        records = server.answer(users, LENGTHS[lengths](rng, users * turns), rng)
        span = measure.window(records, users)
        if span is not None:
            measured = measure.measure(records, window=span).output_tokens_per_s or 0.0
            ratios.append(measured / server.tokens_per_s(users))
    return Throughput(
        lengths=lengths,
        users=users,
        turns=turns,
        steady=len(ratios) / trials,
        ratio=float(np.mean(ratios)) if ratios else None,
        worst=max(ratios, key=lambda ratio: abs(ratio - 1)) if ratios else None,
    )


def all_loops(trials: int) -> list[Throughput]:
    return [
        throughput(lengths, users, turns, trials)
        for lengths in LENGTHS
        for users in (8, 128)
        for turns in (3, 4, 6, 8, 12)
    ]


def table(rows: Sequence[Throughput]) -> str:
    """A line for each number of users and kind of lengths; a column for each number of turns."""
    turns = sorted({row.turns for row in rows})
    lines = [f"{'closed loop':18}{'users':>8}  " + "".join(f"{f'{n} turns':>18}" for n in turns)]
    by_line: dict[tuple[str, int], dict[int, Throughput]] = {}
    for row in rows:
        by_line.setdefault((row.lengths, row.users), {})[row.turns] = row
    for (lengths, users), mine in by_line.items():
        lines.append(f"{lengths:18}{users:>8}  " + "".join(f"{_cell(mine[n]):>18}" for n in turns))
    return "\n".join(lines)


def _cell(row: Throughput) -> str:
    return "none" if row.ratio is None else f"{row.ratio:.3f} of {row.steady:.0%}"
