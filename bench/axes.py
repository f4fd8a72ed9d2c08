"""Ticks, legends, line styles and labels of plots."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bench.digits import distinct
from bench.figure import SERIES, SERIES_COLOURS

# A second cue beside the colour.
_DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1)), "-"]
MARKERS = "osD^vP"
_LABEL = 60


def short(text: str) -> str:
    """A name that fits in a plot: one line, of characters that can be seen.

    Matplotlib takes a leading underscore for "not in the legend".
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= _LABEL else f"{line[: _LABEL - 1]}…"
    return f" {line}" if line.startswith("_") else line


def line_style(index: int) -> dict[str, Any]:
    return {
        "color": SERIES[index % SERIES_COLOURS],
        "linestyle": _DASHES[index % len(_DASHES)],
    }


def legend_below(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend for all panels, as every curve keeps its look in each."""
    labelled: dict[tuple[str, Any], Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labelled.setdefault((label, handle.get_color()), handle)
    if len(labelled) > 1:
        labels = [label for label, _ in labelled]
        columns = min(3, len(labelled))
        figure.legend(list(labelled.values()), labels, loc="outside lower left", ncols=columns)


def log_ticks(axis: Any) -> None:
    """Plain numbers on a log axis; also 2 and 5 where less than two decades are shown.

    Where the axis spans so little that these are fewer than two, evenly spaced ones, with as many
    digits as tell them apart.
    """
    low, high = axis.get_view_interval()
    subs = (1.0,) if high / max(low, 1e-12) > 300 else (1.0, 2.0, 5.0)
    ticks = _inside(LogLocator(base=10, subs=subs, numticks=12), low, high)
    for intervals in (4, 8, 16):
        if len(ticks) < 2:
            ticks = _inside(MaxNLocator(intervals), low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: distinct(value, ticks)))
    axis.set_minor_formatter(NullFormatter())


def _inside(locator: Any, low: float, high: float) -> list[float]:
    return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def linear_ticks(axis: Any, max_intervals: int = 6, whole: bool = False) -> None:
    """Plain numbers on a linear axis.

    Args:
        max_intervals: between ticks.
        whole: only whole numbers, as of users.
    """
    locator = MaxNLocator(max_intervals, integer=whole, steps=[1, 2, 2.5, 5, 10])
    axis.set_major_locator(locator)
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: distinct(value, axis.get_majorticklocs()))
    )


def ratio_ticks(span: float) -> list[float]:
    """Round ratios from 1/span to span, 1 among them."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2):
        if span - 1 / span <= 6 * step:
            return [round(1 + step * count, 2) for count in range(-6, 7) if count * step > -1]
    steps = [1.5, 2, 3, 5, 10] if span < 12 else [10.0**power for power in range(1, 7)]
    return [1 / step for step in reversed(steps)] + [1.0, *map(float, steps)]
