"""Sessions: how long a task takes from its first request to its last answer, and its turns.

A session is done when all of its planned turns were answered. One whose turn failed is over and has
failed; one that the end of the run cut off is neither. Turns are counted over the whole repeat,
with its beginning and its end.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from bench import interval
from bench.measure.answers import answers
from bench.measure.latency import e2e_s, percentile, present, ttft_s
from bench.records import Record


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """The requests with one place in their sessions, or of one kind.

    Attributes:
        name: "turn 3", or the kind of those who speak: "user", "tool", "sub-agent".
        input_tokens, cached_share: of the mean prompt, as the server's usage says.
        reusable_share: of the prompt tokens, those that the workload had sent before, in this
            session or as the beginning of all: what a perfect prefix cache would answer.
    """

    name: str
    requests: int
    failed: int
    input_tokens: float | None
    output_tokens: float | None
    cached_share: float | None = None
    reusable_share: float | None = None
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    e2e_mean_s: float | None


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One session.

    Attributes:
        number: of it in its repeat; `turns`: requests that were answered.
        task_s: from its first planned time to its last answer; None unless it is done.
        input_tokens, cached_tokens: of all its prompts, of which the cache answered so many; None
            where an answer has no usage.
    """

    number: int
    turns: int
    task_s: float | None
    input_tokens: int | None
    cached_tokens: int | None

    @property
    def cached_share(self) -> float | None:
        if self.cached_tokens is None or not self.input_tokens:
            return None
        return self.cached_tokens / self.input_tokens


class Sessions(msgspec.Struct, frozen=True, kw_only=True):
    """All sessions of a repeat.

    Attributes:
        planned, begun, done, failed: how many.
        task_mean_s, task_p50_s, task_p95_s: from the planned time of the first request to the end
            of the last answer, thinking and tools included, of those that are done.
        served_share: of that time, the share in which a request of the session was under way.
        cached_share: the share of a session's prompt tokens that came from the prefix cache, in
            the mean over sessions that are done; `cached_share_low`, `_high`: its 95% interval.
        turns: by their number, and then by who speaks.
        each: the sessions that were begun.
    """

    planned: int
    begun: int
    done: int
    failed: int
    task_mean_s: float | None
    task_p50_s: float | None
    task_p95_s: float | None
    served_share: float | None
    cached_share: float | None = None
    cached_share_low: float | None = None
    cached_share_high: float | None = None
    turns: list[Turn] = []
    each: list[Session] = []


def sessions(records: Sequence[Record], sizes: Mapping[int, int]) -> Sessions | None:
    """What became of the sessions of a repeat; None where it had none.

    Args:
        sizes: of each session that was planned, its number of requests.
    """
    if not sizes:
        return None
    each: dict[int, list[Record]] = {}
    for record in records:
        if record.session is not None:
            each.setdefault(record.session, []).append(record)
    done = {
        number: turns
        for number, turns in each.items()
        if len(turns) == sizes[number] and all(turn.ok for turn in turns)
    }
    tasks_s = present(map(_task_s, done.values()))
    served_s = sum(map(_served_s, done.values()))
    one_by_one = [_session(number, turns, number in done) for number, turns in each.items()]
    shares = present(session.cached_share for session in one_by_one if session.number in done)
    low, high = interval.of_mean(shares.tolist()) or (None, None)
    everything = [record for turns in each.values() for record in turns]
    return Sessions(
        planned=len(sizes),
        begun=len(each),
        done=len(done),
        failed=sum(any(not turn.ok for turn in turns) for turns in each.values()),
        task_mean_s=float(tasks_s.mean()) if len(tasks_s) else None,
        task_p50_s=percentile(tasks_s, 50),
        task_p95_s=percentile(tasks_s, 95),
        served_share=served_s / float(tasks_s.sum()) if tasks_s.sum() > 0 else None,
        cached_share=float(shares.mean()) if len(shares) else None,
        cached_share_low=low if low is None else max(0.0, low),
        cached_share_high=high if high is None else min(1.0, high),
        turns=_by_turn(everything) + _by_kind(everything),
        each=one_by_one,
    )


def _session(number: int, turns: Sequence[Record], done: bool) -> Session:
    ok = [turn for turn in turns if turn.ok]
    counted = bool(ok) and all(
        turn.input_tokens is not None and turn.cached_tokens is not None for turn in ok
    )
    return Session(
        number=number,
        turns=len(ok),
        task_s=_task_s(turns) if done else None,
        input_tokens=sum(turn.input_tokens or 0 for turn in ok) if counted else None,
        cached_tokens=sum(turn.cached_tokens or 0 for turn in ok) if counted else None,
    )


def _task_s(turns: Sequence[Record]) -> float | None:
    ends_s = [turn.end_s for turn in turns if turn.end_s is not None]
    return max(ends_s) - min(turn.planned_s for turn in turns) if ends_s else None


def _served_s(turns: Sequence[Record]) -> float:
    """How long at least one request of a session was under way."""
    spans = sorted((t.planned_s, t.end_s) for t in turns if t.end_s is not None)
    total_s, until_s = 0.0, -np.inf
    for from_s, to_s in spans:
        total_s += max(0.0, to_s - max(from_s, until_s))
        until_s = max(until_s, to_s)
    return total_s


def _by_turn(records: Sequence[Record]) -> list[Turn]:
    numbers = sorted({record.turn for record in records if record.kind != "sub-agent"})
    return [
        _turn(f"turn {n}", [r for r in records if r.turn == n and r.kind != "sub-agent"])
        for n in numbers
    ]


def _by_kind(records: Sequence[Record]) -> list[Turn]:
    kinds = sorted({record.kind for record in records})
    if len(kinds) < 2:
        return []
    return [_turn(kind or "other", [r for r in records if r.kind == kind]) for kind in kinds]


def _turn(name: str, records: Sequence[Record]) -> Turn:
    ok = [record for record in records if record.ok]
    ttfts_s, took_s, answered = present(map(ttft_s, ok)), present(map(e2e_s, ok)), answers(ok)
    return Turn(
        name=name,
        requests=len(records),
        failed=len(records) - len(ok),
        input_tokens=answered.input_tokens,
        output_tokens=answered.output_tokens,
        cached_share=answered.cached_share,
        reusable_share=_reusable_share(ok),
        ttft_mean_s=float(ttfts_s.mean()) if len(ttfts_s) else None,
        ttft_p50_s=percentile(ttfts_s, 50),
        ttft_p95_s=percentile(ttfts_s, 95),
        e2e_mean_s=float(took_s.mean()) if len(took_s) else None,
    )


def _reusable_share(successes: Sequence[Record]) -> float | None:
    read = sum(record.input_tokens or 0 for record in successes)
    return sum(r.shared * (r.input_tokens or 0) for r in successes) / read if read else None
