"""The continuous batch of a simulated engine: which requests each step serves, and when it ends.

The scheduler is modelled on vLLM's, first come first served. In each step every running sequence
gets one token, and prompts are read in chunks with the rest of the step's token budget. A waiting
request is admitted when there is a place (`max_num_seqs`) and its whole prompt fits in the KV
cache. When a sequence needs a block and none is free, the last admitted sequence is preempted: it
gives up its blocks and is read again from the start.

Left out, because policies do not depend on it:

- the attention of a prompt to itself, which is quadratic: for 7B a tenth of the cost of a prompt of
  4,000 tokens;
- speculation;
- with asynchronous scheduling, that a place which becomes free is taken one step later as well;
- KV blocks that requests with a common prefix share: each request is charged for all of its blocks;
- chunks of blocks: a prompt takes all its blocks when it is admitted.

vLLM schedules a step while the one before it still runs, if the hardware allows it (by default on
GPUs, never on CPUs): a request that comes during a step is read in the step after the next one.
`Engine.schedules_ahead` says so.

The simulation jumps from event to event: a request arrives, a prompt is read, a request ends, the
cache is full. Between two events every step has the same sequences, so the length of a step grows
by a constant, and one formula gives the ends of all steps. They are kept, so each token has its
time.
"""

import heapq
import math
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bench.records import Record
from bench.simulation.enginemodel import Engine
from bench.simulation.job import Job, clone

# j, and j * (j - 1) / 2: what the end of the j-th step of a stretch is made of.
_STEPS = np.arange(1.0, 4097.0)
_PAIRS = _STEPS * (_STEPS - 1) / 2
_FEW = 40  # Up to so many steps a loop is faster.


class Batch:
    """The requests of one engine, from when they come to their last token.

    Attributes:
        now_s: the end of the last step; what came later has not been looked at yet.
        step_end_s, step_seqs, step_prefill: of every step: its end, the sequences that got a token
            besides the first ones, and the prompt tokens that were read.
        first_tokens: (when, TTFT) of every request that got one, in order.
        prefilled, decoded, preempted, arrived: totals: prompt tokens read, tokens written,
            sequences that lost their blocks, requests that came.
        busy_s: how long all steps together took.
    """

    def __init__(self, engine: Engine, start_s: float = 0.0) -> None:
        self.engine = engine
        self.now_s = start_s
        self.step_end_s = array("d")
        self.step_seqs = array("l")
        self.step_prefill = array("l")
        self.first_tokens: deque[tuple[float, float]] = deque()
        self.prefilled = self.decoded = self.preempted = self.arrived = 0
        self.busy_s = 0.0
        self._coming: deque[tuple[float, Job]] = deque()  # Not yet at the engine.
        self._accepted_s = -math.inf
        self._step_began_s = start_s  # When the last step began.
        self._waiting: deque[Job] = deque()
        self._waiting_tokens = 0
        self._running: dict[Job, None] = {}  # In the order in which they were let in.
        self._filling: Job | None = None  # The last of them, if its prompt is half read.
        self._seqs = 0  # Of the running, those that write.
        self._kv_tokens = 0  # Theirs, in the cache.
        self._ends: list[tuple[int, int, int, Job]] = []  # (last step, order, first step, job)
        # How many writing sequences need a new block in step s: at index -s modulo the block.
        self._boundary = [0] * engine.block_tokens
        self._free = engine.kv_blocks
        self._order = 0
        self._closed_step = -1  # No one is let in in a step in which one lost its blocks.
        self._blocks: OrderedDict[int, None] = OrderedDict()  # Prefix blocks, by last use.

    # What it looks like from outside.

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Those that came and are not in the batch, before and in the engine."""
        return len(self._waiting) + len(self._coming)

    @property
    def unread_tokens(self) -> int:
        """Prompt tokens of all that have no first token yet, the one being read among them."""
        filling = self._filling
        return self._waiting_tokens + (filling.input_tokens if filling else 0)

    @property
    def kv_usage(self) -> float:
        return 1 - self._free / self.engine.kv_blocks

    @property
    def idle(self) -> bool:
        return not (self._running or self._waiting or self._coming)

    def next_end_s(self) -> float:
        """A time before which no request ends unless another comes: `advance` can wait until then.

        Blocks that run out only make it later.
        """
        if self.idle:
            return math.inf
        if self._coming or self._filling is not None or self._can_admit() or not self._ends:
            return self.now_s
        steps = self._next_end() - len(self.step_end_s) + 1
        first_s = self.engine.step_time_s(0, self._seqs, self._kv_tokens)
        more_s = self.engine.costs.kv_token_s * self._seqs
        # A millionth less, as sums of floats differ by the way they are made.
        return self.now_s + (steps * first_s + more_s * steps * (steps - 1) / 2) * (1 - 1e-6)

    def add(self, job: Job, at_s: float) -> None:
        """A request comes, not before one that came earlier.

        One that cannot fit in the cache even alone is refused, as a server's length limit would.
        """
        self.arrived += 1
        if self.engine.blocks(job.input_tokens + job.output_tokens) > self.engine.kv_blocks:
            job.error = "http 400: longer than the KV cache"
            return
        job.base = job.input_tokens
        before_s = self._accepted_s + self.engine.accept_s
        self._accepted_s = max(at_s + self.engine.costs.request_s, before_s)
        self._coming.append((self._accepted_s, job))
        self._waiting_tokens += job.input_tokens

    def advance(self, until_s: float, stop: bool = False, stop_at_first: bool = False) -> list[Job]:
        """Run every step that begins before `until_s`; the last may end after it.

        Returns:
            The requests that ended. With `stop`, it returns as soon as any did, and `now_s` is then
            when they ended; with `stop_at_first` also as soon as one got its first token.
        """
        ended: list[Job] = []
        coming = self._coming
        while self.now_s < until_s:
            if not self._running and not self._waiting:
                if not coming or coming[0][0] >= until_s:
                    break
                self.now_s = self._step_began_s = max(self.now_s, coming[0][0])
            scheduled_s = self._step_began_s if self.engine.schedules_ahead else self.now_s
            while coming and coming[0][0] <= scheduled_s:
                self._waiting.append(coming.popleft()[1])
            begun = len(self.first_tokens)
            if self._filling is not None or self._can_admit():
                self._mixed(ended)
            else:
                self._stretch(self._undisturbed_until_s(until_s), ended)
            if (stop and ended) or (stop_at_first and len(self.first_tokens) > begun):
                break
        return ended

    # Steps.

    def _undisturbed_until_s(self, until_s: float) -> float:
        """A time before which no step begins that has a request more; at most `until_s`."""
        if not self._coming:
            return until_s
        # Only a scheduler that is ahead has left a request out that is there: for this one step.
        return min(until_s, max(self._coming[0][0], math.nextafter(self.now_s, math.inf)))

    def _can_admit(self) -> bool:
        return bool(
            self._waiting
            and len(self._running) < self.engine.max_num_seqs
            and self.engine.blocks(self._waiting[0].base) <= self._free
            and len(self.step_end_s) != self._closed_step
        )

    def _mixed(self, ended: list[Job]) -> None:
        """One step in which prompts are read beside the sequences that write."""
        step = len(self.step_end_s)
        boundary = self._boundary
        at = -step % len(boundary)
        while boundary[at] > self._free:
            self._preempt()
        self._free -= boundary[at]
        read, total = self._read(self.engine.token_budget - self._seqs)
        seqs, kv_tokens = self._seqs, self._kv_tokens
        step_s = self.engine.step_time_s(total, seqs, kv_tokens)
        self._step_began_s = self.now_s
        self.now_s += step_s
        self.busy_s += step_s
        self.step_end_s.append(self.now_s)
        self.step_seqs.append(seqs)
        self.step_prefill.append(total)
        self._kv_tokens += seqs
        self.prefilled += total
        self.decoded += seqs + len(read)
        self._finish(step, ended)
        for job in read:
            self._begin_writing(job, step, ended)

    def _read(self, budget: int) -> tuple[list[Job], int]:
        """Read up to this many prompt tokens. Returns the prompts that are now read, and the count
        of tokens.
        """
        read: list[Job] = []
        total = 0
        while budget > 0:
            job = self._filling
            if job is None:
                if not self._can_admit():
                    break
                job = self._admit()
            part = min(job.left, budget)
            job.left -= part
            budget -= part
            total += part
            self._filling = job if job.left else None
            if not job.left:
                read.append(job)
        return read, total

    def _stretch(self, until_s: float, ended: list[Job]) -> None:
        """Steps in which nothing changes but the length of each sequence."""
        step = len(self.step_end_s)
        steps = self._room(step, self._next_end() - step + 1)
        if not steps:
            self._preempt()
            return
        seqs, costs = self._seqs, self.engine.costs
        first_s = self.engine.step_time_s(0, seqs, self._kv_tokens)
        more_s = costs.kv_token_s * seqs  # By which each step is longer than the one before.
        steps = min(steps, _begun(until_s - self.now_s, first_s, more_s))
        now_s, long_s = self.now_s, first_s
        for done in range(0, steps, len(_STEPS)):
            count = min(steps - done, len(_STEPS))
            if count > _FEW:
                ends_s = now_s + long_s * _STEPS[:count] + more_s * _PAIRS[:count]
                self.step_end_s.frombytes(ends_s.tobytes())
                now_s = float(ends_s[-1])
                long_s += more_s * count
                continue
            for _ in range(count):
                now_s += long_s
                long_s += more_s
                self.step_end_s.append(now_s)
        self.step_seqs.extend([seqs] * steps)
        self.step_prefill.extend([0] * steps)
        self.busy_s += now_s - self.now_s
        self._step_began_s = self.step_end_s[-2] if steps > 1 else self.now_s
        self.now_s = now_s
        self._free -= self._new_blocks(step, steps)
        self._kv_tokens += seqs * steps
        self.decoded += seqs * steps
        self._finish(step + steps - 1, ended)

    def _admit(self) -> Job:
        job = self._waiting.popleft()
        self._waiting_tokens -= job.base - job.written
        self._free -= self.engine.blocks(job.base)
        self._running[job] = None
        if job.hashes and self.engine.prefix_caching:
            job.cached_tokens = self._prefix_hit(job)
        # The last token is always computed: its logits are the answer's first token.
        job.left = max(1, job.base - job.cached_tokens)
        return job

    def _begin_writing(self, job: Job, step: int, ended: list[Job]) -> None:
        """The prompt is read, and the step's end is the first token (of what is left)."""
        if job.written == 0:
            self.first_tokens.append((self.now_s, self.now_s - job.at_s))
        job.first = step
        last = step + job.output_tokens - job.written - 1
        self._seqs += 1
        self._kv_tokens += job.base
        self._boundary[(job.base - step - 1) % self.engine.block_tokens] += 1
        if last == step:
            self._end(job, step, ended)
            return
        self._order += 1
        heapq.heappush(self._ends, (last, self._order, step, job))

    def _next_end(self) -> int:
        """The step in which the next sequence ends."""
        ends = self._ends
        while ends[0][3].first != ends[0][2]:  # It lost its blocks since.
            heapq.heappop(ends)
        return ends[0][0]

    def _finish(self, step: int, ended: list[Job]) -> None:
        ends = self._ends
        while ends and ends[0][0] <= step:
            _, _, first, job = heapq.heappop(ends)
            if job.first == first:
                self._end(job, step, ended)

    def _end(self, job: Job, step: int, ended: list[Job]) -> None:
        self._release(job, step)
        del self._running[job]
        job.spans.append((job.first, step - job.first + 1))
        job.end_s = self.now_s
        job.first = -1
        ended.append(job)

    # The cache.

    def _release(self, job: Job, step: int) -> None:
        """Give back the blocks of a sequence that has written until `step`."""
        tokens = job.base + step - job.first
        self._free += self.engine.blocks(tokens)
        self._kv_tokens -= tokens
        self._seqs -= 1
        self._boundary[(job.base - job.first - 1) % self.engine.block_tokens] -= 1

    def _preempt(self) -> None:
        """The one let in last gives up its blocks and waits, before all others."""
        job, _ = self._running.popitem()
        step = len(self.step_end_s)
        if job is self._filling:
            self._filling = None
            self._free += self.engine.blocks(job.base)
        else:
            self._release(job, step - 1)
            job.spans.append((job.first, step - job.first))
            job.written += step - job.first
            job.base = job.input_tokens + job.written
            job.first = -1
        job.preemptions += 1
        self.preempted += 1
        self._closed_step = step
        self._waiting.appendleft(job)
        self._waiting_tokens += job.base - job.written

    def _new_blocks(self, step: int, steps: int) -> int:
        """How many blocks the writing sequences take in `steps` steps from `step` on."""
        size = self.engine.block_tokens
        rounds, rest = divmod(steps, size)
        boundary = self._boundary
        return rounds * self._seqs + sum(boundary[-(step + more) % size] for more in range(rest))

    def _room(self, step: int, steps: int) -> int:
        """How many of `steps` steps the free blocks are enough for."""
        size = self.engine.block_tokens
        if self._seqs * (steps // size + 1) <= self._free:
            return steps
        rounds, rest = divmod(self._free, self._seqs)
        room = rounds * size
        while room < steps and self._boundary[-(step + room) % size] <= rest:
            rest -= self._boundary[-(step + room) % size]
            room += 1
        return min(room, steps)

    def _prefix_hit(self, job: Job) -> int:
        """How many tokens of a prompt are known; and what it holds is known from now on."""
        blocks = self._blocks
        hits = 0
        for block in job.hashes:
            if block not in blocks:
                break
            hits += 1
        for block in job.hashes:
            blocks[block] = None
            blocks.move_to_end(block)
        while len(blocks) > self.engine.kv_blocks:
            blocks.popitem(last=False)
        return min(hits * self.engine.block_tokens, job.base - 1)


def _begun(span_s: float, first_s: float, more_s: float) -> int:
    """How many steps begin within `span_s`: the first at 0, and each is `more_s` longer.

    Step j begins at j * first_s + more_s * j * (j - 1) / 2.
    """
    if span_s == math.inf:
        return 1 << 60
    half_s = first_s - more_s / 2
    if more_s > 1e-9 * first_s:
        steps = (math.sqrt(half_s * half_s + 2 * more_s * span_s) - half_s) / more_s
    else:
        steps = span_s / first_s
    steps_begun = max(1, math.ceil(steps))
    # Rounding may have put the last step on the wrong side.
    while (
        steps_begun > 1
        and (steps_begun - 1) * first_s + more_s * (steps_begun - 1) * (steps_begun - 2) / 2
        >= span_s
    ):
        steps_begun -= 1
    return steps_begun


# --- one engine under one load --------------------------------------------------------------


def serve(engine: Engine, jobs: Sequence[Job]) -> list[Record]:
    """The records of an open load on one engine: jobs in the order of their times."""
    batch = Batch(engine)
    mine = [clone(job) for job in jobs]
    for job in mine:
        batch.add(job, job.at_s)
    batch.advance(math.inf)
    return [job.record(batch.step_end_s) for job in mine]


def serve_closed(
    engine: Engine, jobs: Sequence[Job], users: int, think_s: float = 0.0
) -> list[Record]:
    """The records of a closed load: `users` users, each of whom takes the next job when free."""
    batch = Batch(engine)
    mine = [replace(clone(job), at_s=0.0) for job in jobs]
    taken: dict[Job, int] = {}
    free = [(0.0, user) for user in range(users)]
    waiting = iter(mine)
    while True:
        at_s = free[0][0] if free else math.inf
        ended = batch.advance(at_s, stop=True)
        for job in ended:
            heapq.heappush(free, ((job.end_s or 0.0) + think_s, taken[job]))
        if ended:
            continue
        if not free:
            break
        at_s, user = heapq.heappop(free)
        following = next(waiting, None)
        if following is None:
            continue
        following.at_s, taken[following] = at_s, user
        batch.add(following, at_s)
        if following.error:
            heapq.heappush(free, (at_s, user))
    return [job.record(batch.step_end_s, taken[job]) for job in mine if job in taken]
