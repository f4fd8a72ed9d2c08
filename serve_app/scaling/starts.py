"""The duration of starts, from when a replica is requested until it serves. Pure.

It is measured by the controller, so it includes the wait for a node and its image, which no replica
can report. Replicas report their own part of a start in a few phases (`PARTS`); the rest is the
wait. The phases vary independently, so a start can be as fast as the fastest of each, or as slow as
the slowest: the distribution is that of all combinations.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

# The estimate is the median of this many starts.
_STARTS = 7
# A first start that takes longer than this many times the configured time is not believed before
# a second one confirms it: it waited for a GPU, or its image had to be fetched once.
_PLAUSIBLE = 4.0
# Nobody knows when a replica was wanted that appeared during a longer gap between two looks.
_MAX_GAP_S = 10.0
# What a replica reports, and the phases (observe/phases.py) that each is made of. All others are
# of the first.
CODE = "code"
PARTS: Mapping[str, tuple[str, ...]] = {
    CODE: (),
    "weights": ("download", "weights"),
    "kernels": ("caches", "profile", "compile", "KV cache", "kernels", "CUDA graphs"),
    "answers": ("front ends", "warm-up"),
}
# Of a distribution of so many combinations as many quantiles are kept.
_QUANTILES = 101


def parts_of(phases_s: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each of the parts, from seconds of each phase."""
    part_of = {phase: part for part, phases in PARTS.items() for phase in phases}
    seconds_of = dict.fromkeys(PARTS, 0.0)
    for phase, took_s in phases_s.items():
        seconds_of[part_of.get(phase, CODE)] += took_s
    return seconds_of


class Starts:
    """Measures starts and estimates how long the next one takes.

    A replica that already runs when it is first seen says nothing about a start. The estimate is a
    median, so one odd start (two hours of waiting for a GPU) does not move it.

    Args:
        start_s: the configured time, until starts were measured.
        took_s: starts that were measured before, oldest first.
        parts_s: of each of them what its replica reported; empty where it reported nothing.
        resumed: whether replicas may have been wanted before the first look. Then those that
            start at that moment are not measured.
    """

    def __init__(
        self,
        start_s: float,
        took_s: Iterable[float] = (),
        parts_s: Iterable[Mapping[str, float]] = (),
        resumed: bool = False,
    ) -> None:
        self._configured_s = start_s
        self._took_s: deque[float] = deque(took_s, maxlen=_STARTS)
        self._parts_s: deque[dict[str, float]] = deque(map(dict, parts_s), maxlen=_STARTS)
        # Those of the starts that were seen and not reported yet.
        self._unreported: deque[dict[str, float]] = deque(maxlen=_STARTS)
        self._distribution_s: list[float] | None = None
        self._resumed = resumed
        self._wanted_s: deque[float] = deque()
        self._seen: tuple[float, int, int] | None = None

    @property
    def start_s(self) -> float:
        return self.quantile_s(0.5)

    def quantile_s(self, quantile: float) -> float:
        """The time within which a start ends with this probability, 0 to 1; as far as it was
        measured, or the configured one."""
        if not self._took_s:
            return self._configured_s
        if len(self._took_s) == 1 and self._took_s[0] > _PLAUSIBLE * self._configured_s:
            return self._configured_s
        if self._distribution_s is None:
            self._distribution_s = distribution_s(self._took_s, self._parts_s)
        last = len(self._distribution_s) - 1
        return self._distribution_s[int(quantile * last)]

    def report(self, parts_s: Mapping[str, float]) -> None:
        """Record the report of a replica about its start, once it serves."""
        if self._unreported:
            self._unreported.popleft().update(parts_s)
            self._distribution_s = None

    @property
    def took_s(self) -> tuple[float, ...]:
        """The starts behind the estimate, oldest first."""
        return tuple(self._took_s)

    @property
    def parts_s(self) -> tuple[Mapping[str, float], ...]:
        """What their replicas reported, of as many of them."""
        return tuple(self._parts_s)

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
                self._parts_s.append({})
                self._unreported.append(self._parts_s[-1])
                self._distribution_s = None
        if running >= target:
            self._wanted_s.clear()


def distribution_s(took_s: Sequence[float], parts_s: Sequence[Mapping[str, float]]) -> list[float]:
    """Times of a start, in order and equally likely: sums of what each part took in any start.

    Where a start has no report, its whole counts as one part; so it does where starts were
    measured of which one was not reported, as parts of different starts would not add up.
    """
    if len(parts_s) != len(took_s) or not all(parts_s):
        return sorted(took_s)
    names = dict.fromkeys(name for parts in parts_s for name in parts)
    waits_s = [
        max(0.0, whole_s - sum(parts.values()))
        for whole_s, parts in zip(took_s, parts_s, strict=True)
    ]
    rows = [waits_s, *([parts.get(name, 0.0) for parts in parts_s] for name in names)]
    sums = [0.0]
    for row in rows:
        sums = _thinned(sorted(left + other for left in sums for other in row))
    return sums


def _thinned(values: list[float]) -> list[float]:
    """The quantiles to keep, including the least and the greatest."""
    if len(values) <= _QUANTILES:
        return values
    last = len(values) - 1
    return [values[round(place * last / (_QUANTILES - 1))] for place in range(_QUANTILES)]
