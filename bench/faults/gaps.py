"""The silences that a client saw, and the disturbance to which each belongs.

Pure. A client cannot know which streams ran on a victim. But a stream on the victim stops at about
the time of the disturbance, so its longest silence overlaps it. The longest silence of another
stream overlaps it only by chance, and is short.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec
import numpy as np

from bench import interval
from bench.traffic.transcript import Transcript

# What was on its way, and what notices a death, takes so long at most: a silence that begins later
# has another cause.
_LATE_S = 2.0


class Span(msgspec.Struct, frozen=True):
    """From when to when, in seconds since the start of the load."""

    from_s: float
    to_s: float

    @property
    def lasted_s(self) -> float:
        return self.to_s - self.from_s


def longest(transcript: Transcript) -> Span | None:
    """The longest silence of a stream, the one before its first event among them.

    None for an answer in one piece, which is silent all the time, and for what was refused.
    """
    if transcript.whole or transcript.sent_s is None or transcript.status != 200:
        return None
    times = [transcript.sent_s, *transcript.chunk_s]
    if transcript.end_s is not None:
        times.append(transcript.end_s)
    spans = [Span(*pair) for pair in pairwise(times)]
    return max(spans, key=lambda span: span.lasted_s, default=None)


def felt(disturbance: Span) -> Span:
    """How long a disturbance may be felt: until it is noticed, requests still go to the dead."""
    return Span(disturbance.from_s, disturbance.to_s + _LATE_S)


def met(transcript: Transcript, disturbance: Span) -> bool:
    """Whether an answer was under way while something was disturbed."""
    if transcript.sent_s is None:
        return False
    end_s = transcript.sent_s if transcript.end_s is None else transcript.end_s
    return transcript.sent_s <= disturbance.to_s and end_s >= disturbance.from_s


def cause(silence: Span, disturbances: Sequence[Span]) -> int | None:
    """Which disturbance a silence belongs to: of those it lies over, the nearest to its start."""
    over = [
        (abs(disturbance.from_s - silence.from_s), number)
        for number, disturbance in enumerate(disturbances)
        if silence.from_s <= felt(disturbance).to_s and silence.to_s >= disturbance.from_s
    ]
    return min(over)[1] if over else None


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """How many silences there are, and how long; percentiles are None where there are too few."""

    count: int
    p50_s: float | None
    p99_s: float | None
    max_s: float | None


def statistics(lengths_s: Iterable[float]) -> Lengths:
    values = np.asarray(list(lengths_s), dtype=float)
    percentiles = {
        f"p{percent}_s": float(np.percentile(values, percent))
        if len(values) >= interval.samples_needed(percent / 100)
        else None
        for percent in (50, 99)
    }
    longest_s = float(values.max()) if len(values) else None
    return Lengths(count=len(values), max_s=longest_s, **percentiles)
