"""When the whole machine was stalled: the part of a silence that is not the server's fault.

    python -m bench.faults.stalls

Prints a line `from to` for each stall, on the monotonic clock, until stdin ends.

A separate process needs almost no CPU time: it sleeps for a few milliseconds at a time. When it
wakes much later, the machine was stopped by its host, or was too busy to run anything.
"""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from bench.faults.gaps import Span

_NAP_S = 0.005
_LEAST_S = 0.05  # Later than that is no accident of a timer.


@dataclass
class Stalls:
    """`seen` holds (from, to), monotonic seconds."""

    seen: list[tuple[float, float]] = field(default_factory=list)

    def since(self, start_s: float) -> list[Span]:
        """Those seen so far, on the clock that began at `start_s`."""
        return [Span(from_s - start_s, to_s - start_s) for from_s, to_s in self.seen]


@contextlib.contextmanager
def watching() -> Iterator[Stalls]:
    """Watch until the end of the block."""
    stalls = Stalls()
    command = [sys.executable, "-m", "bench.faults.stalls"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def read() -> None:
            for line in process.stdout or ():
                from_s, to_s = map(float, line.split())
                stalls.seen.append((from_s, to_s))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield stalls
        finally:
            if process.stdin is not None:
                process.stdin.close()
            reader.join()


def overlap_s(span: Span, stalls: Iterable[Span]) -> float:
    """How much of a span lies in stalls, seconds."""
    return sum(
        max(0.0, min(span.to_s, stall.to_s) - max(span.from_s, stall.from_s)) for stall in stalls
    )


def _watch() -> None:
    over = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    last_s = time.monotonic()
    while not over.wait(_NAP_S):
        now_s = time.monotonic()
        if now_s - last_s - _NAP_S > _LEAST_S:
            print(last_s + _NAP_S, now_s, flush=True)
        last_s = now_s


if __name__ == "__main__":
    _watch()
