"""How often bench's 95% intervals hold the truth, on processes whose truth is known."""

from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np

from bench import interval
from bench.itself.processes import KNOWN, Process, Values

COUNTS = (100, 400, 2000, 10_000)
SHARES = (None, 0.5, 0.95, 0.99)
_SAMPLES_AT_ONCE = 500_000
Bounds = interval.Bounds | None


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    """Of one kind of interval on one process.

    Attributes:
        trials: series of samples; `given`: of those, for how many there was an interval.
        below, above: intervals that lie wholly below the truth, and above it.
    """

    process: str
    figure: str
    samples: int
    trials: int
    given: int
    below: int
    above: int

    @property
    def covered(self) -> float:
        """Share of the intervals that were given; 1 where none was."""
        return 1 - (self.below + self.above) / self.given if self.given else 1.0

    @property
    def missed(self) -> float:
        """Share of all trials that gave an interval without the truth."""
        return (self.below + self.above) / self.trials


def coverage(
    process: Process, share: float | None, samples: int, trials: int, seed: int = 0
) -> Coverage:
    """Of the interval for a mean (`share` None) or a percentile of one series."""

    def bounds(series: Values) -> Bounds:
        return (
            interval.of_series(series) if share is None else interval.of_percentile(series, share)
        )

    batch = max(1, min(trials, _SAMPLES_AT_ONCE // samples))
    rng = np.random.default_rng(seed)

    def intervals() -> Iterable[Bounds]:
        for start in range(0, trials, batch):
            for series in process.sample(rng, min(batch, trials - start), samples):
                yield bounds(series)

    figure = "mean" if share is None else f"p{100 * share:g}"
    return count(process.name, figure, samples, intervals(), process.truth(share))


def of_repeats(
    values: Callable[[np.random.Generator], Sequence[float]],
    truth: float,
    name: str,
    trials: int,
    seed: int = 0,
) -> Coverage:
    """Of the interval for the mean of a few repeats."""
    rng = np.random.default_rng(seed)
    bounds = (interval.of_repeats(values(rng)) for _ in range(trials))
    return count(name, "mean of repeats", len(values(np.random.default_rng(0))), bounds, truth)


def count(
    process: str, figure: str, samples: int, intervals: Iterable[Bounds], truth: float
) -> Coverage:
    trials = given = below = above = 0
    for bounds in intervals:
        trials += 1
        if bounds is not None:
            given += 1
            below += bounds[1] < truth
            above += bounds[0] > truth
    return Coverage(
        process=process,
        figure=figure,
        samples=samples,
        trials=trials,
        given=given,
        below=below,
        above=above,
    )


def all_processes(trials: int) -> list[Coverage]:
    """Every process, number of samples and figure."""
    return [
        coverage(process, share, samples, trials)
        for process in KNOWN
        for samples in COUNTS
        for share in SHARES
    ]


def table(rows: Sequence[Coverage]) -> str:
    """A line for each process and number of samples."""
    figures = list(dict.fromkeys(row.figure for row in rows))
    lines = [f"{'process':18}{'samples':>8}  " + "".join(f"{name:>18}" for name in figures)]
    by_line: dict[tuple[str, int], dict[str, Coverage]] = {}
    for row in rows:
        by_line.setdefault((row.process, row.samples), {})[row.figure] = row
    for (process, samples), mine in by_line.items():
        cells = [_cell(mine[name]) if name in mine else "" for name in figures]
        lines.append(f"{process:18}{samples:>8}  " + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def _cell(row: Coverage) -> str:
    return f"{row.covered:.3f} of {row.given / row.trials:.0%}" if row.given else "none"
