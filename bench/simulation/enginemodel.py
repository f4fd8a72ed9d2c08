"""A model of one engine: what a continuous batch does, and how long each step takes.

    step = step_s + prefill_token_s * prompt tokens read in it
                  + decode_seq_s    * sequences that get a token in it
                  + kv_token_s      * tokens of those sequences in the KV cache

The scheduler is vLLM's, first come first served: every running sequence gets its token, a prompt is
read in chunks of what the step's token budget leaves, one that waits is let in while there is a
place (`max_num_seqs`) and its whole prompt fits in the KV cache, and when a sequence finds no block
the one let in last gives its blocks up and is read again from its start.

What it leaves out, because it is small beside what a policy must tell apart: attention of a prompt
to itself, which is quadratic (a tenth of a 4,000 token prompt's cost for 7B); speculation;
asynchronous scheduling, with which a request is let in a step later; the KV blocks that requests
with a common prefix share (each is charged for all of its own). A prompt's blocks are taken when it
is let in, not chunk by chunk.

Time is not stepped through. Between two events (a request comes, a prompt is read, one ends, the
cache is full) every step has the same sequences, so that its length grows by a constant and the
whole stretch is one formula; the end of every step is kept, so each token of each request still has
its own time. `roofline` gives the constants for a GPU and a model on paper, `enginefit.py` from
what a real engine was seen to do.
"""

import heapq
import math
from array import array
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bench.errors import BenchError
from bench.records import Record


@dataclass(frozen=True)
class Costs:
    """Seconds; see the formula above. `request_s` is what a request spends outside of the engine,
    before it can be let in: HTTP, checks, the tokenizer, the way to the engine and back."""

    step_s: float
    prefill_token_s: float
    decode_seq_s: float
    kv_token_s: float
    request_s: float = 0.0


@dataclass(frozen=True)
class Engine:
    """An engine: what it costs and what it holds.

    Attributes:
        costs: of a step.
        max_num_seqs: sequences of one batch.
        token_budget: tokens of one step (`max_num_batched_tokens`).
        kv_blocks, block_tokens: the KV cache.
        prefix_caching: prompts that begin like an earlier one are not read again.
        accept_s: what the server's front end needs for a request, one at a time. However small, it
            makes the first of many that come at once begin alone, and the others a step later.
        gpus: of one replica.
        name: what it is, in reports.
    """

    costs: Costs
    max_num_seqs: int = 256
    token_budget: int = 2048
    kv_blocks: int = 4096
    block_tokens: int = 16
    prefix_caching: bool = False
    accept_s: float = 0.0
    gpus: int = 1
    name: str = "an engine"

    def __post_init__(self) -> None:
        for key in ("max_num_seqs", "token_budget", "kv_blocks", "block_tokens", "gpus"):
            if getattr(self, key) < 1:
                raise BenchError.of(key, getattr(self, key), "must be at least 1")
        if self.token_budget < self.max_num_seqs:
            problem = f"must be at least max_num_seqs, {self.max_num_seqs}, as in vLLM"
            raise BenchError.of("token_budget", self.token_budget, problem)
        if self.costs.step_s <= 0:
            raise BenchError.of("step_s", self.costs.step_s, "must be above 0")

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def step_time_s(self, prefill_tokens: float, seqs: float, kv_tokens: float) -> float:
        costs = self.costs
        return (
            costs.step_s
            + costs.prefill_token_s * prefill_tokens
            + costs.decode_seq_s * seqs
            + costs.kv_token_s * kv_tokens
        )


# --- on paper -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Of the data sheet: dense bfloat16 operations a second, bytes a second, bytes."""

    flops: float
    bandwidth: float
    memory: float


@dataclass(frozen=True)
class Model:
    """Of config.json; `params` with embeddings, `body` without."""

    params: float
    body: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def kv_bytes(self) -> int:
        """Of one token, in bfloat16: a key and a value."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


GPUS: Mapping[str, Gpu] = {
    "H100": Gpu(989e12, 3.35e12, 80e9),
    "A100": Gpu(312e12, 2.04e12, 80e9),
    "A10G": Gpu(70e12, 600e9, 24e9),
    "L4": Gpu(121e12, 300e9, 24e9),
}
MODELS: Mapping[str, Model] = {
    "Qwen2.5-0.5B": Model(0.49e9, 0.36e9, 24, 2, 64),
    "Qwen2.5-1.5B": Model(1.54e9, 1.31e9, 28, 2, 128),
    "Qwen2.5-3B": Model(3.09e9, 2.77e9, 36, 2, 128),
    "Qwen2.5-7B": Model(7.61e9, 6.53e9, 28, 4, 128),
    "Qwen2.5-14B": Model(14.7e9, 13.1e9, 48, 8, 128),
    "Qwen2.5-32B": Model(32.5e9, 31.0e9, 64, 8, 128),
    "Qwen2.5-72B": Model(72.7e9, 70.0e9, 80, 8, 128),
}
# What kernels reach of the data sheet, and what does not shrink with the model: the host's share of
# a step, of a sequence in it (sampling, detokenizing, sending), and of a request.
_FLOPS_SHARE, _BANDWIDTH_SHARE = 0.55, 0.8
_HOST_STEP_S, _HOST_SEQ_S, _HOST_REQUEST_S, _ACCEPT_S = 1.5e-3, 2e-5, 5e-3, 5e-4
_ALL_REDUCE_S = 1.5e-5  # Two a layer, with tensor parallelism.
_MEMORY_SHARE, _WORKSPACE_BYTES = 0.92, 2e9
# vLLM's own limits for a server: larger ones from 70 GB on, but not for an A100.
_LARGE, _SMALL = (1024, 8192), (256, 2048)


def roofline(gpu: str, model: str, gpus: int = 1) -> Engine:
    """The engine that `gpus` GPUs and a model should make, from their data sheets.

    A step reads all weights once (`step_s`), computes what its prompt tokens need, and reads the KV
    cache of its sequences. The three are added, as if none hid behind another: too slow by up to
    the weights' part where much of a prompt is read. What the tokens that are written compute does
    hide behind the weights, up to some 150 sequences, and is left out.

    Raises BenchError for a GPU or model that is not known, or a model that does not fit.
    """
    if gpu not in GPUS:
        raise BenchError.of("gpu", gpu, "no such GPU", GPUS)
    if model not in MODELS:
        raise BenchError.of("model", model, "no such model", MODELS)
    card, shape = GPUS[gpu], MODELS[model]
    room = gpus * (card.memory * _MEMORY_SHARE - _WORKSPACE_BYTES) - 2 * shape.params
    flops = gpus * card.flops * _FLOPS_SHARE
    bandwidth = gpus * card.bandwidth * _BANDWIDTH_SHARE
    together_s = 2 * shape.layers * _ALL_REDUCE_S if gpus > 1 else 0.0
    seqs, budget = _LARGE if card.memory >= 70e9 and gpu != "A100" else _SMALL
    blocks = int(room / shape.kv_bytes / 16)
    if blocks < budget // 16:
        need = f"{2 * shape.params / 1e9:.0f} GB of weights leave no room for a KV cache"
        raise BenchError.of("model", model, f"does not fit {gpus} {gpu}: {need}")
    costs = Costs(
        step_s=2 * shape.params / bandwidth + _HOST_STEP_S + together_s,
        prefill_token_s=2 * shape.body / flops,
        decode_seq_s=_HOST_SEQ_S,
        kv_token_s=shape.kv_bytes / bandwidth,
        request_s=_HOST_REQUEST_S,
    )
    name = f"{model} on {f'{gpus} ' if gpus > 1 else ''}{gpu}, by roofline"
    limits = (seqs, budget, blocks, 16)
    return Engine(costs, *limits, accept_s=_ACCEPT_S, gpus=gpus, name=name)


# --- requests -------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Job:
    """One request. What it asks for, and what has become of it.

    Attributes:
        index, at_s: its place and time in the load.
        input_tokens, output_tokens: its lengths.
        cached_tokens: prompt tokens that need not be read.
        hashes: of the blocks its prompt is made of, each with all that come before it.
        kind: class, for fairness.
        spans: (first, count) of the steps whose ends are its tokens; more than one if it lost its
            blocks in between.
        written: tokens it has been sent before the current span.
        end_s: when its last token came; None while it waits or runs.
        preemptions: how often it lost its blocks.
        error: why it was refused.
        replica: which replica it went to; None while it waits where no replica is.
    """

    index: int
    at_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    hashes: tuple[int, ...] = ()
    kind: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    written: int = 0
    end_s: float | None = None
    preemptions: int = 0
    error: str = ""
    replica: int | None = None
    # Of the batch: tokens to read, those not yet read, the step in which reading ended.
    base: int = 0
    left: int = 0
    first: int = -1

    def record(
        self, step_end_s: Sequence[float], user: int | None = None, whole: bool = True
    ) -> Record:
        """What a client would have noted, had `step_end_s` been its server's steps.

        Without `whole` only the first and the last chunk are in it, which is quick, and enough for
        every latency but the one between two chunks.
        """
        chunks: list[float] = []
        if whole:
            for first, count in self.spans:
                chunks.extend(step_end_s[first : first + count])
        elif self.spans:
            (first, _), (begin, count) = self.spans[0], self.spans[-1]
            last = begin + count - 1
            chunks = [step_end_s[step] for step in ((first, last) if last > first else (first,))]
        ended = self.end_s is not None
        error = self.error or ("" if ended else "unfinished: the simulation ended before it")
        return Record(
            index=self.index,
            planned_s=self.at_s,
            kind=self.kind,
            user=user,
            sent_s=self.at_s,
            headers_s=chunks[0] if chunks else None,
            chunk_s=chunks,
            end_s=self.end_s,
            status=200 if ended else 0,
            error=error,
            asked_input_tokens=self.input_tokens,
            asked_output_tokens=self.output_tokens,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens if ended else None,
            cached_tokens=self.cached_tokens or None,
            finish_reason="length" if ended else "",
        )


def clone(job: Job) -> Job:
    """The same request as if it had not been sent, for another run."""
    return Job(
        job.index,
        job.at_s,
        job.input_tokens,
        job.output_tokens,
        job.cached_tokens,
        job.hashes,
        job.kind,
    )


# --- the batch ------------------------------------------------------------------------------


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
        while self.now_s < until_s:
            coming = self._coming
            while coming and coming[0][0] <= self.now_s:
                self._waiting.append(coming.popleft()[1])
            if not self._running and not self._waiting:
                if not coming or coming[0][0] >= until_s:
                    break
                self.now_s = coming[0][0]
                continue
            begun = len(self.first_tokens)
            if self._filling is not None or self._can_admit():
                self._mixed(ended)
            else:
                self._stretch(min(until_s, coming[0][0]) if coming else until_s, ended)
            if (stop and ended) or (stop_at_first and len(self.first_tokens) > begun):
                break
        return ended

    # Steps.

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
        """Read up to so many prompt tokens: the prompts that end with them, and how many."""
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
