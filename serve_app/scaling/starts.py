"""How long a replica takes to start, from when it is wanted until it serves. Pure.

Seen from outside, so that it includes what no replica can report: the wait for a node, its image
and its weights.
"""

from collections import deque
from collections.abc import Iterable
from statistics import median_low

# The estimate is the median of this many starts.
_STARTS = 7
# A first start that takes longer than this many times the configured time is not believed before
# a second one confirms it: it waited for a GPU, or its image had to be fetched once.
_PLAUSIBLE = 4.0
# Nobody knows when a replica was wanted that appeared during a longer gap between two looks.
_MAX_GAP_S = 10.0


class Starts:
    """Measures starts and estimates how long the next one takes.

    A replica that already runs when it is first seen says nothing about a start. The estimate is a
    median, so one odd start (two hours of waiting for a GPU) does not move it.

    Args:
        start_s: the configured time, until starts were measured.
        took_s: starts that were measured before, oldest first.
        resumed: whether replicas may have been wanted before the first look. Then those that
            start at that moment are not measured.
    """

    def __init__(self, start_s: float, took_s: Iterable[float] = (), resumed: bool = False) -> None:
        self._configured_s = start_s
        self._took_s: deque[float] = deque(took_s, maxlen=_STARTS)
        self._resumed = resumed
        self._wanted_s: deque[float] = deque()
        self._seen: tuple[float, int, int] | None = None

    @property
    def start_s(self) -> float:
        if len(self._took_s) == 1 and self._took_s[0] > _PLAUSIBLE * self._configured_s:
            return self._configured_s
        return median_low(self._took_s) if self._took_s else self._configured_s

    @property
    def took_s(self) -> tuple[float, ...]:
        """The starts behind the estimate, oldest first."""
        return tuple(self._took_s)

    def see(
        self, now_s: float, target: int, running: int, scaled_up_s: float | None = None
    ) -> None:
        """Note how many replicas are wanted and how many run.

        Args:
            scaled_up_s: when the target was last raised, where that is known.
        """
        if self._seen is None:
            self._seen = now_s, target, running
            if not self._resumed:
                self._wanted_s.extend([now_s] * (target - running))
            return
        seen_s, old_target, old_running = self._seen
        self._seen = now_s, target, running
        if target > old_target:
            wanted_s = now_s if scaled_up_s is None else min(max(scaled_up_s, seen_s), now_s)
            if scaled_up_s is not None or now_s - seen_s <= _MAX_GAP_S:
                self._wanted_s.extend([wanted_s] * (target - old_target))
        # The replicas that were wanted last are given up first.
        for _ in range(min(old_target - target, len(self._wanted_s))):
            self._wanted_s.pop()
        for _ in range(min(running - old_running, len(self._wanted_s))):
            took_s = now_s - self._wanted_s.popleft()
            # One that was wanted and ran between two looks: its time is unknown.
            if took_s > 0:
                self._took_s.append(took_s)
        if running >= target:
            self._wanted_s.clear()
