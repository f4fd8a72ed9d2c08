"""Engines that prefer one tenant, which a queue in front of them cannot do.

`Prioritising` is vLLM with `scheduling_policy: priority`: prompts of the preferred tenant go before
others that wait in it.

`Preferring` is one that vLLM does not have, a bound for any queue. It decides in each step and to
the token whose prompt is read: those of the preferred tenant first, whoever came before; and of the
others none while one of those is there, and else at most `other_tokens`, so that the step under way
is short when a preferred request comes. What it cannot have either is a step without the sequences
that write.
"""

from collections import deque

from bench.simulation.batch import Batch
from bench.simulation.enginemodel import Engine
from bench.simulation.job import Job


class Prioritising(Batch):
    """The batch of vLLM with priorities.

    Args:
        kind: of the jobs that go first.
    """

    def __init__(self, engine: Engine, kind: str) -> None:
        super().__init__(engine)
        self._kind = kind

    def _read(self, budget: int) -> tuple[list[Job], int]:
        self._waiting = deque(sorted(self._waiting, key=lambda job: job.kind != self._kind))
        return super()._read(budget)


class Preferring(Batch):
    """The batch of such an engine.

    Args:
        kind: of the jobs that are preferred.
        other_tokens: of the prompts of others, in one step.
    """

    def __init__(self, engine: Engine, kind: str, other_tokens: int) -> None:
        super().__init__(engine)
        self._kind, self._other_tokens = kind, other_tokens
        self._partial: list[Job] = []  # Prompts that are read in part.

    def _read(self, budget: int) -> tuple[list[Job], int]:
        self._partial.sort(key=self._is_other)
        self._waiting = deque(sorted(self._waiting, key=self._is_other))
        heads = (*self._partial[:1], *list(self._waiting)[:1])
        others = self._other_tokens if all(map(self._is_other, heads)) else 0
        read: list[Job] = []
        total = 0
        jobs, self._partial = self._partial, []
        while budget > 0:
            job = jobs.pop(0) if jobs else self._next(others)
            if job is None:
                break
            part = min(job.left, budget, others if self._is_other(job) else budget)
            others -= part if self._is_other(job) else 0
            job.left -= part
            budget -= part
            total += part
            (self._partial if job.left else read).append(job)
        self._partial += jobs
        self._filling = self._partial[0] if self._partial else None
        return read, total

    def _next(self, others: int) -> Job | None:
        if not self._can_admit() or (self._is_other(self._waiting[0]) and not others):
            return None
        return self._admit()

    def _preempt(self) -> None:
        job = next(reversed(self._running))
        if job in self._partial:
            self._partial.remove(job)
            self._filling = job
        super()._preempt()
        self._filling = self._partial[0] if self._partial else None

    def _is_other(self, job: Job) -> bool:
        return job.kind != self._kind
