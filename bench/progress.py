"""How a run is getting on: its counts, and the line that shows them.

On a terminal the line is rewritten in place. Elsewhere (a log, a CI job) a line is printed every
few seconds, so that a log shows that the run is alive and does not drown in it.
"""

import sys
import time
from collections.abc import Callable
from typing import TextIO

import msgspec

_QUIET_S = 5.0


class Progress(msgspec.Struct, kw_only=True):
    """The counts of a run so far, over all actors.

    Attributes:
        at_s: seconds since the start of the run.
        end_s: when the run is over, if that is known from its plan alone; else None.
        planned: requests in the plan; None where a duration ends the run before they are used up.
        sent, running, done, failed: requests; failed ones are among those done.
        tokens: output tokens of the requests that are done, by the server's usage.
        lag_p99_s: of the last thousand requests sent: how late they were; None before the first.
    """

    at_s: float = 0.0
    end_s: float | None = None
    planned: int | None = None
    sent: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    lag_p99_s: float | None = None


class Line:
    """Shows progress on a stream. Call it with each `Progress`; `close` it in the end."""

    def __init__(
        self,
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
        label: str = "",
    ) -> None:
        self._stream, self._clock, self._label = stream, clock, label
        self._terminal = stream.isatty()
        self._last: Progress | None = None
        self._shown: Progress | None = None
        self._counted = Progress()
        self._tokens_per_s = 0.0
        self._due_s = clock() + (0.0 if self._terminal else _QUIET_S)

    def __call__(self, progress: Progress) -> None:
        self._last = progress
        if self._terminal:
            self._show(progress)
        elif self._clock() >= self._due_s:
            self._show(progress)
            self._due_s = self._clock() + _QUIET_S

    def close(self) -> None:
        """Show the last counts, and leave the line."""
        if self._last and self._last is not self._shown:
            self._show(self._last)
        if self._terminal and self._shown:
            self._stream.write("\n")
            self._stream.flush()

    def _show(self, progress: Progress) -> None:
        text = self._label + describe(progress, self._rate(progress))
        self._stream.write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")
        self._stream.flush()
        self._shown = progress

    def _rate(self, progress: Progress) -> float:
        """Tokens per second since the line was last counted, over a second at least."""
        gap_s = progress.at_s - self._counted.at_s
        if gap_s >= 1.0:
            self._tokens_per_s = (progress.tokens - self._counted.tokens) / gap_s
            self._counted = progress
        return self._tokens_per_s


def time_left_s(progress: Progress) -> float | None:
    """How long the run may still take: by its plan, or at the pace so far; None where unknown."""
    if progress.end_s is not None and progress.at_s < progress.end_s:
        return progress.end_s - progress.at_s
    if not progress.planned or not progress.done or progress.at_s <= 0:
        return None
    return progress.at_s * max(0, progress.planned - progress.done) / progress.done


def describe(progress: Progress, tokens_per_s: float) -> str:
    """One line of text, shorter than a terminal is wide."""
    of = f"/{progress.planned}" if progress.planned else ""
    lag = "-" if progress.lag_p99_s is None else f"{progress.lag_p99_s * 1e3:.1f} ms"
    left_s = time_left_s(progress)
    parts = [
        f"{progress.at_s:6.1f} s",
        "left " + ("?" if left_s is None else f"{left_s:.0f} s"),
        f"sent {progress.sent}{of}",
        f"running {progress.running}",
        f"done {progress.done}",
        f"failed {progress.failed}",
        f"{tokens_per_s:.0f} tokens/s",
        f"lag p99 {lag}",
    ]
    return "  ".join(parts)
