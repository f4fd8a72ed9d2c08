"""The load of one replica: counted at every step of its engine, reported about once a second.

engine.py reports each step, and admission.py each arrival and each wait; `load` derives from both
the input of a scaling policy. Under direct ingress only the replica can measure this: for Ray
Serve, a request that waits in the replica is a request that runs.

A step may take only milliseconds and bring a latency for each of hundreds of sequences. So only
counts are kept, in slots of one second: tokens, time, and latencies by size. Memory does not grow
with the load, and a step costs microseconds.

The time between tokens is one figure a second, the mean. A stream that pauses during the prefill
of another request loses nothing that its reader notices, while percentiles of single gaps mostly
reflect prompts.
"""

import math
import time
from collections.abc import Callable, Sequence

from serve_app.scaling.types import ReplicaLoad

# How far back "recent" goes. Long enough for a percentile of a hundred requests at 10 a second,
# short enough that a burst is over in the report soon after it is over.
WINDOW_S = 10
# Latencies from 0.1 ms to 1000 s, in sizes that differ by 3%: a percentile is off by half of that.
_LEAST_S, _RATIO = 1e-4, 1.03
_SIZES = math.ceil(math.log(1e7) / math.log(_RATIO)) + 1
_PER_SIZE = 1 / math.log(_RATIO)
# Bytes of a body for each token of its prompt, until requests have told: English as JSON. They
# count as much as so many bytes of real requests, and those as much as so many later ones.
_BYTES_A_TOKEN, _BYTES_KNOWN, _BYTES_KEPT = 4.0, 4_000.0, 4_000_000.0


class Latencies:
    """The percentile of the latencies of the last `WINDOW_S` seconds."""

    def __init__(self) -> None:
        self._slots = [[0.0] * _SIZES for _ in range(WINDOW_S + 1)]
        self._counts = [0.0] * (WINDOW_S + 1)

    def add(self, slot: int, latency_s: float, weight: float = 1.0) -> None:
        size = int(math.log(latency_s / _LEAST_S) * _PER_SIZE) if latency_s > _LEAST_S else 0
        self._slots[slot][min(size, _SIZES - 1)] += weight
        self._counts[slot] += weight

    def clear(self, slot: int) -> None:
        if self._counts[slot]:
            self._slots[slot] = [0.0] * _SIZES
            self._counts[slot] = 0.0

    def percentile_s(self, percentile: float) -> float | None:
        """None where nothing was measured."""
        total = sum(self._counts)
        if not total:
            return None
        filled = [slot for slot, count in zip(self._slots, self._counts, strict=True) if count]
        counts = [sum(of_size) for of_size in zip(*filled, strict=True)]
        size = reached(counts, percentile / 100 * total)
        return float(_LEAST_S * _RATIO ** (size + 0.5))


def reached(weights: Sequence[float], wanted: float) -> int:
    """The first place at which the sum of the weights comes to `wanted`, and to anything."""
    total = 0.0
    for place, weight in enumerate(weights):
        total += weight
        if weight and total >= wanted * (1 - 1e-9):
            return place
    return len(weights) - 1


class Count:
    """What came in the last `WINDOW_S` seconds."""

    def __init__(self) -> None:
        self._slots = [0.0] * (WINDOW_S + 1)

    def add(self, slot: int, amount: float) -> None:
        self._slots[slot] += amount

    def clear(self, slot: int) -> None:
        self._slots[slot] = 0.0

    @property
    def total(self) -> float:
        return sum(self._slots)

    def mean_percentile(self, of: "Count", percentile: float) -> float | None:
        """Of this for each of `of`, by the second, weighed by `of`; None where there was none."""
        means = sorted(
            (amount / count, count)
            for amount, count in zip(self._slots, of._slots, strict=True)
            if count
        )
        if not means:
            return None
        weights = [count for _, count in means]
        return means[reached(weights, percentile / 100 * sum(weights))][0]


class Signals:
    """The load of one replica. For one event loop.

    Attributes:
        first_tokens: gets the number of sequences whose first token a step produced.

    Args:
        percentile: of the latencies in a report, 0 to 100.
        clock: monotonic seconds.
        ttft_s, itl_s: limits, to the first token and between tokens as the mean of a stream;
            requests that ended beyond one are counted. None for no limit.
    """

    def __init__(
        self,
        percentile: float = 95.0,
        clock: Callable[[], float] = time.monotonic,
        *,
        ttft_s: float | None = None,
        itl_s: float | None = None,
    ) -> None:
        self._percentile = percentile
        self._ttft_s, self._itl_s = ttft_s, itl_s
        self._clock = clock
        self.first_tokens: Callable[[int], None] = lambda sequences: None
        self._began_s = clock()
        self._second = int(self._began_s)
        self._ttft = Latencies()
        self._gaps, self._gap_s = Count(), Count()
        self._prompt, self._generated = Count(), Count()
        self._preempted, self._arrived = Count(), Count()
        self._steps, self._busy_s = Count(), Count()
        self._finished, self._missed = Count(), Count()
        self._counts = (
            *(self._gaps, self._gap_s, self._prompt, self._generated, self._preempted),
            *(self._arrived, self._steps, self._busy_s, self._finished, self._missed),
        )
        # Since when each engine core has been in the step that is still to be told of, and when
        # the first request came to an engine that was in none.
        self._stepping: dict[int, float] = {}
        self._woken_s: float | None = None
        # By engine core: more than one with data parallelism.
        self._state: dict[int, tuple[int, int, float]] = {}
        # How long the last request that was let in had waited for that.
        self._waited_s = 0.0
        self._bytes, self._tokens = _BYTES_KNOWN, _BYTES_KNOWN / _BYTES_A_TOKEN

    # From admission.py.

    def arrived(self) -> None:
        """A request came, whether or not there is room for it."""
        self._arrived.add(self._slot(), 1)

    def admitted(self, waited_s: float, body_bytes: int) -> None:
        """A request goes to the engine, after `waited_s` in the queue before it."""
        self._waited_s = waited_s
        self._bytes += body_bytes
        if not self._stepping and self._woken_s is None:
            # The engine was idle. With one engine core the step that begins now is its; with more
            # it is nobody's yet, and is counted from the next one on.
            self._woken_s = self._clock()

    # From engine.py.

    def state(self, engine: int, running: int, waiting: int, kv_usage: float) -> None:
        """What the scheduler of one engine core holds after a step. Called once a step."""
        now_s, slot = self._clock(), self._slot()
        since_s = self._stepping.pop(engine, self._woken_s)
        self._woken_s = None
        if since_s is not None:
            self._steps.add(slot, 1)
            self._busy_s.add(slot, now_s - since_s)
        if running or waiting:
            self._stepping[engine] = now_s
        self._state[engine] = running, waiting, kv_usage

    def steps(
        self, engine: int, steps: int, busy_s: float, running: int, waiting: int, kv_usage: float
    ) -> None:
        """The same for several steps at once, whose times the engine core has added up."""
        slot = self._slot()
        self._woken_s = None
        self._steps.add(slot, steps)
        self._busy_s.add(slot, busy_s)
        self._state[engine] = running, waiting, kv_usage

    def step(
        self,
        prompt_tokens: int,
        generated_tokens: int,
        preempted: int,
        first_tokens_s: Sequence[float],
        gaps_s: Sequence[float],
        finished_s: Sequence[tuple[float, float]] = (),
    ) -> None:
        """What one step did.

        Args:
            prompt_tokens: of the prompts whose first token it made.
            first_tokens_s: of each such request, since the engine's front end got it.
            gaps_s: for each other sequence that got a token, since its last one.
            finished_s: of each request that ended: to its first token, since the engine's front end
                got it, and between its tokens, their mean.
        """
        slot = self._slot()
        self._generated.add(slot, generated_tokens)
        if prompt_tokens:
            self._prompt.add(slot, prompt_tokens)
            self._learn(prompt_tokens)
        if preempted:
            self._preempted.add(slot, preempted)
        for latency_s in first_tokens_s:
            # Requests are let in in their order: those that begin now waited about as long as the
            # last one that was let in.
            self._ttft.add(slot, latency_s + self._waited_s)
        if first_tokens_s:
            self.first_tokens(len(first_tokens_s))
        if gaps_s:
            self._gaps.add(slot, len(gaps_s))
            self._gap_s.add(slot, sum(gaps_s))
        for first_s, gap_s in finished_s:
            self._finished.add(slot, 1)
            late = self._ttft_s is not None and first_s + self._waited_s > self._ttft_s
            if late or (self._itl_s is not None and gap_s > self._itl_s):
                self._missed.add(slot, 1)

    def load(
        self,
        max_running: int,
        in_engine: int,
        queued: int = 0,
        queued_bytes: int = 0,
        unread_tokens: int = 0,
    ) -> ReplicaLoad:
        """The report of now.

        Args:
            max_running: sequences that the engine batches at most.
            in_engine: sequences that were let in and have not ended. An engine whose last client
                left takes no further step, and the last one said that it ran.
            queued, queued_bytes: requests in the queue before the engine, and their bodies.
            unread_tokens: prompt tokens of the requests in the engine without a first token.
        """
        self._slot()
        if not in_engine:
            self._stepping.clear()
            self._woken_s = None
        # Whole seconds behind, and the part of this one that is over; less just after the start.
        now_s = self._clock()
        span_s = max(1.0, min(now_s - self._began_s, WINDOW_S + now_s - self._second))
        states, cores = self._state.values(), max(1, len(self._state))
        running = min(sum(running for running, _, _ in states), in_engine)
        waiting = min(sum(waiting for _, waiting, _ in states), in_engine - running)
        return ReplicaLoad(
            running=running,
            waiting=queued + waiting,
            queued_tokens=unread_tokens + round(queued_bytes * self._tokens / self._bytes),
            kv_usage=max((kv for _, _, kv in states), default=0.0) if in_engine else 0.0,
            max_running=max_running,
            ttft_s=self._ttft.percentile_s(self._percentile),
            itl_s=self._gap_s.mean_percentile(self._gaps, self._percentile),
            prefill_tokens_per_s=self._prompt.total / span_s,
            decode_tokens_per_s=self._generated.total / span_s,
            preemptions_per_s=self._preempted.total / span_s,
            arrivals_per_s=self._arrived.total / span_s,
            steps_per_s=self._steps.total / cores / span_s,
            busy=min(1.0, self._busy_s.total / cores / span_s),
            finished_per_s=self._finished.total / span_s,
            missed_per_s=self._missed.total / span_s,
        )

    def _learn(self, prompt_tokens: int) -> None:
        """Bodies were counted as they were let in, their tokens now: over many, the ratio holds."""
        self._tokens += prompt_tokens
        if self._bytes > _BYTES_KEPT:
            self._bytes, self._tokens = self._bytes / 2, self._tokens / 2

    def _slot(self) -> int:
        """The slot of this second; those of seconds that are too old are emptied on the way."""
        second = int(self._clock())
        for passed in range(max(self._second + 1, second - WINDOW_S), second + 1):
            self._clear(passed % (WINDOW_S + 1))
        self._second = second
        return second % (WINDOW_S + 1)

    def _clear(self, slot: int) -> None:
        self._ttft.clear(slot)
        for count in self._counts:
            count.clear(slot)
