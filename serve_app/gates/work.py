"""The work of the engine for one request, filled in by the layers that observe it.

The first gate that needs it leaves one in `scope["state"]["work"]`, and AdmissionGate sets the
context variable for the time of the answer; vLLM's client (replica/llm.py) and the door of the fast
lane add to it.
"""

import asyncio
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Work:
    """Counts of one request, all of its sequences together.

    Attributes:
        cached_tokens: of the prompt tokens, those that were found in the prefix cache.
        gpu_s: seconds of GPUs (BatchClock).
        begun: whether the engine was asked for it.
        has_counts: whether the engine reported the counts of the request.
        estimated: whether part of it is an estimate, because a replica was killed.
        reported: done once the counts are complete, if the engine belongs to another process.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    gpu_s: float = 0.0
    begun: bool = False
    has_counts: bool = False
    estimated: bool = False
    reported: "asyncio.Future[None] | None" = None


work: ContextVar[Work | None] = ContextVar("work", default=None)


class BatchClock:
    """Divides the time of an engine's GPUs among the sequences that run.

    Each sequence gets one token in each step, so that a step's time is divided evenly. What all
    requests got together is the time in which anything ran, times the number of GPUs.

    Attributes:
        sequence_s: what one sequence that ran from the start on would have got.
    """

    def __init__(self, gpus: int = 1, now_s: Callable[[], float] = time.monotonic) -> None:
        self._gpus, self._now_s = gpus, now_s
        self._changed_s = now_s()
        self.sequence_s = 0.0

    def advance(self, running: int) -> float:
        """`sequence_s` now, given the number of sequences that ran since the last call."""
        now_s = self._now_s()
        if running:
            self.sequence_s += self._gpus * (now_s - self._changed_s) / running
        self._changed_s = now_s
        return self.sequence_s
