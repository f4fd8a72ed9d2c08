"""One request of a simulated load."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.records import Record


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
