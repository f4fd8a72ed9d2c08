"""Plots of a report: numbers in, an SVG that can be inlined in a page out.

The functions draw the data that they get and compute no metric. Heat maps are rasterised, in tones
that both light and dark backgrounds allow.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from bench.axes import (
    MARKERS,
    legend_below,
    line_style,
    linear_ticks,
    log_ticks,
    ratio_ticks,
    short,
)
from bench.digits import distinct, plain
from bench.figure import (
    GRID,
    INK,
    MUTED,
    SERIES,
    SERIES_COLOURS,
    add_strip_tip,
    add_tip,
    figure,
    svg,
)
from bench.measure import CurvePoint

# Blue to orange differ for every common kind of colour blindness; faint to opaque reads as
# few to many on white and on black alike.
_HEAT = LinearSegmentedColormap.from_list(
    "heat", [(0.29, 0.56, 0.78, 0.22), (0.29, 0.56, 0.78, 0.9), (0.91, 0.45, 0.1, 1.0)]
)
_LINE_POINTS = 300
# Points of a curve that say their value when pointed at.
_TIPS = 60
_WIDTH_IN = 10.4
_COUNTS = 64  # Whole numbers up to this are counts, such as of GPUs, with ticks between none.


class Curve(msgspec.Struct, kw_only=True):
    """Points of one line, named in the legend. `note` is written at each point where given."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    notes: Sequence[str] = ()


class Panel(msgspec.Struct, kw_only=True):
    """One strip of a timeline: lines over the common clock.

    Attributes:
        filled: numbers of the curves below which the strip is filled.
        low: less high than others.
        top: end of the y axis; by default what the curves need.
    """

    title: str
    y_title: str
    curves: list[Curve]
    filled: tuple[int, ...] = ()
    low: bool = False
    top: float | None = None


class Ratio(msgspec.Struct, kw_only=True):
    """One line of a comparison: a ratio with its interval and what it was found to be."""

    label: str
    ratio: float
    low: float | None
    high: float | None
    verdict: str


def cdfs(
    panels: Sequence[tuple[str, str, Sequence[tuple[str, Sequence[float]]]]], prefix: str
) -> str:
    """Cumulative distributions side by side.

    Args:
        panels: (title, unit, [(legend, latencies in that unit), ..]) for each metric; a legend
            keeps its colour from panel to panel by its place.
    """
    with figure(_WIDTH_IN, 3.3) as plot:
        axes = plot.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, unit, series) in zip(axes, panels, strict=True):
            for index, (label, values) in enumerate(series):
                x, y = _ecdf(values)
                axis.plot(x, y, label=short(label), **line_style(index), drawstyle="steps-post")
                for percent in (10, 25, 50, 75, 90, 95, 99) if len(values) else ():
                    at = float(np.percentile(values, percent))
                    add_tip(axis, at, percent, f"{label}: {percent} % within {plain(at)} {unit}")
            axis.set(title=title, xscale="log", ylim=(0, 100.5), xlabel=f"{unit} (log)")
            log_ticks(axis.xaxis)
        axes[0].set(ylabel="share of requests answered within (%)", yticks=[0, 25, 50, 75, 95])
        legend_below(plot, axes)
        return svg(plot, prefix, "Cumulative distributions of latency")


def curves(panels: Sequence[tuple[str, str, Sequence[Curve]]], x_title: str, prefix: str) -> str:
    """Curves over one quantity: one panel for each (title, y title, curves), log y."""
    with figure(_WIDTH_IN, 3.5) as plot:
        axes = plot.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, y_title, lines) in zip(axes, panels, strict=True):
            for index, curve in enumerate(lines):
                axis.plot(
                    curve.x,
                    curve.y,
                    label=short(curve.label),
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=4,
                    **line_style(index),
                )
            axis.set(title=title, xlabel=x_title, ylabel=y_title, yscale="log")
            axis.margins(y=0.16)
            xs = [x for curve in lines for x in curve.x]
            axis.set_xlim(0, 1.06 * max(xs, default=1.0) or 1.0)
            linear_ticks(axis.xaxis, whole=all(x == round(x) and x <= _COUNTS for x in xs))
            low, high = axis.get_ylim()
            if high < 1.4 * low:  # Magnified, noise would look like a trend.
                axis.set_ylim(low / 1.2, high * 1.2)
            log_ticks(axis.yaxis)
            _notes(axis, lines)
            for curve in lines:
                for at, (x, y) in enumerate(zip(curve.x, curve.y, strict=True)):
                    load = f"{curve.notes[at]}: " if at < len(curve.notes) else ""
                    add_tip(
                        axis,
                        x,
                        y,
                        f"{curve.label}, {load}{plain(y)} {_unit(y_title)} at {plain(x)} {x_title}",
                    )
        legend_below(plot, axes)
        return svg(plot, prefix, f"{', '.join(title for title, _, _ in panels)}, over {x_title}")


def _unit(axis_title: str) -> str:
    return axis_title.removesuffix(" (log)")


def pareto(lines: Sequence[tuple[str, Sequence[CurvePoint]]], prefix: str) -> str:
    """What users get against what GPUs give, with intervals; the front is a step function.

    Args:
        lines: (legend, points of a curve).
    """
    with figure(_WIDTH_IN * 0.7, 3.8) as plot:
        axis = plot.subplots()
        for index, (label, points) in enumerate(lines):
            judged = [point for point in points if point.front is not None]
            for point in judged:
                _pareto_point(axis, point, index)
            best = sorted(_both(point) for point in judged if point.front)
            axis.plot(
                [x for x, _ in best],
                [y for _, y in best],
                label=short(label),
                drawstyle="steps-pre",
                **line_style(index),
            )
        axis.set(
            xlabel="output tokens/s of a user (1 / p90 of TPOT)", ylabel="output tokens/s of a GPU"
        )
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        linear_ticks(axis.xaxis)
        linear_ticks(axis.yaxis)
        legend_below(plot, [axis])
        return svg(plot, prefix, "Throughput of a GPU against that of a user")


def _pareto_point(axis: Any, point: CurvePoint, index: int) -> None:
    x, y = _both(point)
    figures = point.efficiency
    errors: list[list[list[float]] | None] = []
    for name, value in (("user_tokens_per_s", x), ("gpu_tokens_per_s", y)):
        low, high = figures[name]["low"], figures[name]["high"]
        if low is None or high is None:
            errors.append(None)
        else:
            errors.append([[value - low], [high - value]])
    colour = SERIES[index % SERIES_COLOURS]
    axis.errorbar([x], [y], xerr=errors[0], yerr=errors[1], color=colour, linewidth=1, fmt="none")
    marker = MARKERS[index % len(MARKERS)]
    face = colour if point.front else "none"
    axis.plot([x], [y], marker, color=colour, markerfacecolor=face, markersize=5)
    words = [f"{point.users} users: {x:.3g} tokens/s a user, {y:.4g} a GPU"]
    for name, unit in (
        ("joules_per_output_token", "J an output token"),
        ("usd_per_million_output_tokens", "$ a million output tokens"),
    ):
        if name in figures:
            words.append(f"{figures[name]['mean']:.3g} {unit}")
    add_tip(axis, x, y, ", ".join(words))
    axis.annotate(
        f"{point.users}",
        (x, y),
        xytext=(5, 4),
        textcoords="offset points",
        fontsize=7.5,
        color=MUTED,
    )


def _both(point: CurvePoint) -> tuple[float, float]:
    figures = point.efficiency
    return figures["user_tokens_per_s"]["mean"], figures["gpu_tokens_per_s"]["mean"]


def timeline(
    panels: Sequence[Panel],
    prefix: str,
    shaded_s: Sequence[tuple[float, float]] = (),
    events: Sequence[tuple[float, str]] = (),
) -> str:
    """Panels over one clock.

    Args:
        shaded_s: spans that were measured, in seconds of the clock.
        events: what happened when; drawn through all panels and named in the first.
    """
    heights = [0.75 if panel.low else 1.2 for panel in panels]
    with figure(_WIDTH_IN, 0.5 + 0.32 * len(panels) + 0.9 * sum(heights)) as plot:
        axes = plot.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[
            :, 0
        ]
        for axis, panel in zip(axes, panels, strict=True):
            _strip(axis, panel)
            for from_s, to_s in shaded_s:
                axis.axvspan(from_s, to_s, color=GRID, alpha=0.45, linewidth=0, zorder=0)
            for at_s, _ in events:
                axis.axvline(at_s, color=SERIES[1], linewidth=1, linestyle=(0, (2, 2)))
        if events:  # Room for their names above the curve.
            axes[0].set_ylim(top=axes[0].get_ylim()[1] * 1.25)
        for at_s, what in events:
            axes[0].annotate(
                short(what),
                (at_s, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, -9),
                textcoords="offset points",
                fontsize=7.5,
                color=SERIES[1],
            )
        axes[-1].set(xlabel="seconds since the start of the run")
        for axis in axes:
            axis.margins(x=0.005)
        linear_ticks(axes[-1].xaxis, max_intervals=9)
        plot.align_ylabels(axes)
        return svg(plot, prefix, "Timeline of the run")


def heat(at_s: Sequence[float], heights: Sequence[float], y_title: str, prefix: str) -> str:
    """Counts of `heights` (log bins) over the time `at_s` (linear bins). Neither may be empty."""
    times, values = np.asarray(at_s), np.maximum(np.asarray(heights), 1e-2)
    with figure(_WIDTH_IN, 3.3) as plot:
        axis = plot.subplots()
        low, high = np.log10(values.min()) - 0.05, np.log10(values.max()) + 0.05
        x_edges = np.linspace(min(0.0, times.min()), max(times.max(), 1e-3), 121)
        y_edges = np.logspace(low, high, 57)
        counts, _, _ = np.histogram2d(times, values, bins=[x_edges, y_edges])
        shown = np.where(counts.T > 0, counts.T, np.nan)
        norm = LogNorm(1, max(2.0, counts.max()))
        mesh = axis.pcolormesh(x_edges, y_edges, shown, cmap=_HEAT, norm=norm, rasterized=True)
        axis.set(yscale="log", xlabel="seconds since the start of the run", ylabel=y_title)
        axis.grid(False)
        log_ticks(axis.yaxis)
        linear_ticks(axis.xaxis, max_intervals=9)
        column_of = np.clip(np.searchsorted(x_edges, times, "right") - 1, 0, len(x_edges) - 2)
        for column, (from_s, to_s) in enumerate(pairwise(x_edges)):
            _tell_column(axis, from_s, to_s, values[column_of == column])
        bar = plot.colorbar(mesh, ax=axis, pad=0.015, aspect=28)
        bar.set_label("gaps in the cell (log)")
        bar.outline.set_visible(False)
        bar.ax.minorticks_off()
        log_ticks(bar.ax.yaxis)
        if bar.solids is not None:
            bar.solids.set(rasterized=True, edgecolor="none")
        return svg(plot, prefix, "Heat map of the gaps between tokens over time")


def _tell_column(axis: Any, from_s: float, to_s: float, gaps_ms: np.ndarray[Any, Any]) -> None:
    if not len(gaps_ms):
        return
    middle, slow = np.percentile(gaps_ms, [50, 95])
    text = (
        f"{from_s:.1f} to {to_s:.1f} s: {len(gaps_ms):,} gaps, median {plain(middle)} ms, "
        f"95 % within {plain(slow)} ms, longest {plain(gaps_ms.max())} ms"
    )
    add_strip_tip(axis, from_s, to_s, text)


def ratios(panels: Sequence[tuple[str, Sequence[Ratio]]], x_title: str, prefix: str) -> str:
    """Ratios with intervals on a log axis about 1; colour and marker say the verdict.

    Args:
        panels: (title, rows) side by side. Each has the same labels in the same order.
    """
    labels = [short(row.label) for row in panels[0][1]]
    with figure(_WIDTH_IN, 0.95 + 0.25 * len(labels)) as plot:
        axes = plot.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, rows) in zip(axes, panels, strict=True):
            _forest(axis, rows)
            axis.set(title=title, xlabel=x_title)
        axes[0].set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.3, -0.7))
        return svg(plot, prefix, "Ratios with their intervals")


def _notes(axis: Any, lines: Sequence[Curve]) -> None:
    """Write the notes at their points, but none over another."""
    placed: list[tuple[float, float]] = []
    for curve in lines:
        for x, y, note in zip(curve.x, curve.y, curve.notes, strict=False):
            across, up = axis.transData.transform((x, y))
            if any(abs(across - a) < 45 and abs(up - u) < 16 for a, u in placed):
                continue
            placed.append((across, up))
            axis.annotate(
                note,
                (x, y),
                xytext=(-4, 4),
                textcoords="offset points",
                ha="right",
                fontsize=7.5,
                color=MUTED,
            )


def _forest(axis: Any, rows: Sequence[Ratio]) -> None:
    colours = {"better": (SERIES[2], "o"), "worse": (SERIES[1], "s")}
    axis.axvline(1, color=MUTED, linewidth=1)
    for place, row in enumerate(rows):
        colour, marker = colours.get(row.verdict, (SERIES[5], "D"))
        if row.low is not None and row.high is not None:
            axis.plot([row.low, row.high], [place, place], color=colour, linewidth=2.2)
        axis.plot([row.ratio], [place], marker, color=colour, markersize=6)
        bounds = (
            "" if row.low is None or row.high is None else f" ({row.low:.3f} to {row.high:.3f})"
        )
        add_tip(axis, row.ratio, place, f"{row.label}: {row.ratio:.3f}{bounds}, {row.verdict}")
    ends = [end for row in rows for end in (row.low, row.high, row.ratio) if end]
    span = max(1.02, *(max(end, 1 / end) for end in ends)) ** 1.1
    axis.set(xscale="log", xlim=(1 / span, span))
    ticks = ratio_ticks(span)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: distinct(value, ticks)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.spines["left"].set_visible(False)


def _strip(axis: Any, panel: Panel) -> None:
    for index, curve in enumerate(panel.curves):
        filled = index in panel.filled
        line = line_style(index) | ({"linestyle": "-"} if filled else {})
        axis.plot(curve.x, curve.y, label=curve.label, **line, drawstyle="steps-post")
        if filled:
            axis.fill_between(
                curve.x, curve.y, step="post", color=line["color"], alpha=0.2, linewidth=0
            )
    for curve in panel.curves:
        for at in range(0, len(curve.x), max(1, len(curve.x) // _TIPS)):
            text = f"{curve.label}: {plain(curve.y[at])} {panel.y_title} at {curve.x[at]:.1f} s"
            add_tip(axis, curve.x[at], curve.y[at], text)
    axis.set(title=panel.title, ylabel=panel.y_title)
    highest = max((y for curve in panel.curves for y in curve.y), default=0.0)
    axis.set_ylim(bottom=0, top=panel.top or (None if highest > 0 else 1.0))
    linear_ticks(axis.yaxis, max_intervals=3 if panel.low else 4, whole=highest >= 1)
    if len(panel.curves) > 1:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def _ecdf(values: Sequence[float]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Steps of the distribution in percent; thinned evenly in rank where there are many."""
    ordered = np.sort(np.asarray(values, dtype=float))
    rank = np.arange(1, len(ordered) + 1) * (100 / len(ordered))
    if len(ordered) > _LINE_POINTS:
        drawn = np.unique(np.linspace(0, len(ordered) - 1, _LINE_POINTS).round().astype(int))
        ordered, rank = ordered[drawn], rank[drawn]
    x, y = np.maximum(ordered, 1e-5), rank
    return np.concatenate([x[:1], x]), np.concatenate([[0.0], y])
