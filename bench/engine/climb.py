"""The highest rate of a ladder that keeps an objective, found in few probes."""


class Climb:
    """The highest rung of a ladder that passes, from a start, in strides that halve.

    Args:
        start, stride: rungs, any whole number.
        gap: how far apart the highest that passed and the lowest that failed may be.
        lowest: nothing below is tried.
        probes: how many rungs are tried at most.
    """

    def __init__(
        self, start: int, *, stride: int = 4, gap: int = 1, lowest: int = -60, probes: int = 12
    ) -> None:
        self._at, self._stride, self._gap = start, max(stride, gap), gap
        self._least, self._left = lowest, probes
        self.passed: int | None = None
        self.failed: int | None = None

    @property
    def result(self) -> int | None:
        """The highest that passed; where the probes did not narrow it down, the middle of what is
        left; a stride below what failed, where nothing passed. None where that is off the ladder.
        """
        if self.passed is None:
            below = None if self.failed is None else self.failed - self._gap
            return below if below is not None and below >= self._least else None
        wide = self.failed is not None and self.failed - self.passed > self._gap
        return (self.passed + (self.failed or 0)) // 2 if wide else self.passed

    def ask(self) -> int | None:
        """The rung to probe next; None when the search is over."""
        if self._left <= 0 or self._at < self._least:
            return None
        if self.passed is not None and self.failed is not None:
            return None if self.failed - self.passed <= self._gap else self._at
        return self._at

    def tell(self, passed: bool) -> None:
        self._left -= 1
        at = self._at
        if passed:
            self.passed = at if self.passed is None else max(self.passed, at)
        else:
            self.failed = at if self.failed is None else min(self.failed, at)
        if self.passed is not None and self.failed is not None:
            self._at = (self.passed + self.failed) // 2
            return
        # Further each time: what is thought may be far off.
        self._at = at + self._stride if passed else at - self._stride
        self._stride = min(2 * self._stride, 8)
