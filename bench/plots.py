"""Plots of a report: numbers in, an SVG that can be inlined in a page out.

The functions draw what they are given and derive no metric. Drawing is done once for light and
dark pages: every colour is a placeholder in matplotlib and becomes a CSS variable of the page in
the SVG (`--ink`, `--muted`, `--grid`, `--series-0` ..), backgrounds are transparent, and text
stays text in the page's own font. Heat maps are rasterised, in tones that both backgrounds bear.
Ids are prefixed, since those of matplotlib repeat from one SVG to the next.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import msgspec
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bench.measure import CurvePoint

SERIES_COLOURS = 6
_INK, _MUTED, _GRID = "#0a0b10", "#0a0b11", "#0a0b12"
_SERIES = [f"#0a0b0{index}" for index in range(SERIES_COLOURS)]
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(_SERIES)},
}
# Blue to orange differ for every common kind of colour blindness; faint to opaque reads as
# few to many on white and on black alike.
_HEAT = LinearSegmentedColormap.from_list(
    "heat", [(0.29, 0.56, 0.78, 0.22), (0.29, 0.56, 0.78, 0.9), (0.91, 0.45, 0.1, 1.0)]
)
# A second cue beside the colour.
_DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1)), "-"]
_MARKERS = "osD^vP"
_ALONE = ("#0b62a8", "#c4520a", "#2c7a3f", "#7b3fa0", "#8a6d00", "#5b6470")
_LINE_POINTS = 300
# Points of a curve that say their value when pointed at.
_TIPS = 60
_LABEL = 60
_WIDTH_IN = 10.4
_TIP_RADIUS = 4
_POINTS_PER_INCH = 72
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


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


class Tip(msgspec.Struct, frozen=True, kw_only=True):
    """What a point of a plot says when pointed at. It is not seen."""

    axis: Any
    x: float
    y: float
    text: str


class Plot(Figure):
    """A figure with tips. They are no artists of matplotlib, whose layout would measure each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tips: list[Tip] = []


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
    with _figure(_WIDTH_IN, 3.3) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, unit, series) in zip(axes, panels, strict=True):
            for index, (label, values) in enumerate(series):
                x, y = _ecdf(values)
                axis.plot(x, y, label=short(label), **_line(index), drawstyle="steps-post")
                for percent in (10, 25, 50, 75, 90, 95, 99) if len(values) else ():
                    at = float(np.percentile(values, percent))
                    _tip(axis, at, percent, f"{label}: {percent} % within {_plain(at)} {unit}")
            axis.set(title=title, xscale="log", ylim=(0, 100.5), xlabel=f"{unit} (log)")
            _log_ticks(axis.xaxis)
        axes[0].set(ylabel="share of requests answered within (%)", yticks=[0, 25, 50, 75, 95])
        _legend_below(figure, axes)
        return _svg(figure, prefix, "Cumulative distributions of latency")


def curves(panels: Sequence[tuple[str, str, Sequence[Curve]]], x_title: str, prefix: str) -> str:
    """Latency over throughput: one panel for each (title, y title, curves), log y."""
    with _figure(_WIDTH_IN, 3.5) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, y_title, lines) in zip(axes, panels, strict=True):
            for index, curve in enumerate(lines):
                axis.plot(
                    curve.x,
                    curve.y,
                    label=short(curve.label),
                    marker=_MARKERS[index % len(_MARKERS)],
                    markersize=4,
                    **_line(index),
                )
            axis.set(title=title, xlabel=x_title, ylabel=y_title, yscale="log")
            axis.margins(x=0.08, y=0.16)
            axis.set_xlim(left=0)
            low, high = axis.get_ylim()
            if high < 1.4 * low:  # Magnified, noise would look like a trend.
                axis.set_ylim(low / 1.2, high * 1.2)
            _log_ticks(axis.yaxis)
            _notes(axis, lines)
            for curve in lines:
                for at, (x, y) in enumerate(zip(curve.x, curve.y, strict=True)):
                    load = f"{curve.notes[at]}: " if at < len(curve.notes) else ""
                    _tip(axis, x, y, f"{curve.label}, {load}{_plain(y)} at {_plain(x)} tokens/s")
        _legend_below(figure, axes)
        return _svg(figure, prefix, "Latency over throughput")


def pareto(lines: Sequence[tuple[str, Sequence[CurvePoint]]], prefix: str) -> str:
    """What users get against what GPUs give, with intervals; the front is a step function.

    Args:
        lines: (legend, points of a curve).
    """
    with _figure(_WIDTH_IN * 0.7, 3.8) as figure:
        axis = figure.subplots()
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
                **_line(index),
            )
        axis.set(
            xlabel="output tokens/s of a user (1 / p90 of TPOT)", ylabel="output tokens/s of a GPU"
        )
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        _legend_below(figure, [axis])
        return _svg(figure, prefix, "Throughput of a GPU against that of a user")


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
    colour = _SERIES[index % SERIES_COLOURS]
    axis.errorbar([x], [y], xerr=errors[0], yerr=errors[1], color=colour, linewidth=1, fmt="none")
    marker = _MARKERS[index % len(_MARKERS)]
    face = colour if point.front else "none"
    axis.plot([x], [y], marker, color=colour, markerfacecolor=face, markersize=5)
    words = [f"{point.users} users: {x:.3g} tokens/s a user, {y:.4g} a GPU"]
    for name, unit in (
        ("joules_per_output_token", "J an output token"),
        ("usd_per_million_output_tokens", "$ a million output tokens"),
    ):
        if name in figures:
            words.append(f"{figures[name]['mean']:.3g} {unit}")
    _tip(axis, x, y, ", ".join(words))
    axis.annotate(
        f"{point.users}",
        (x, y),
        xytext=(5, 4),
        textcoords="offset points",
        fontsize=7.5,
        color=_MUTED,
    )


def _both(point: CurvePoint) -> tuple[float, float]:
    figures = point.efficiency
    return figures["user_tokens_per_s"]["mean"], figures["gpu_tokens_per_s"]["mean"]


def standalone(svg: str) -> str:
    """An SVG that can be opened by itself: with the colours that a page would give it."""
    style = "--ink:#1b1f24;--muted:#5b6470;--grid:#d9dee4;--plot-font:sans-serif;" + "".join(
        f"--series-{index}:{colour};" for index, colour in enumerate(_ALONE)
    )
    return svg.replace("<svg ", f'<svg style="{style}background:#fff" ', 1)


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
    with _figure(_WIDTH_IN, 0.5 + 0.32 * len(panels) + 0.9 * sum(heights)) as figure:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[
            :, 0
        ]
        for axis, panel in zip(axes, panels, strict=True):
            _strip(axis, panel)
            for from_s, to_s in shaded_s:
                axis.axvspan(from_s, to_s, color=_GRID, alpha=0.45, linewidth=0, zorder=0)
            for at_s, _ in events:
                axis.axvline(at_s, color=_SERIES[1], linewidth=1, linestyle=(0, (2, 2)))
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
                color=_SERIES[1],
            )
        axes[-1].set(xlabel="seconds since the start of the run")
        axes[0].margins(x=0.005)
        figure.align_ylabels(axes)
        return _svg(figure, prefix, "Timeline of the run")


def heat(at_s: Sequence[float], heights: Sequence[float], y_title: str, prefix: str) -> str:
    """Counts of `heights` (log bins) over the time `at_s` (linear bins). Neither may be empty."""
    times, values = np.asarray(at_s), np.maximum(np.asarray(heights), 1e-2)
    with _figure(_WIDTH_IN, 3.3) as figure:
        axis = figure.subplots()
        low, high = np.log10(values.min()) - 0.05, np.log10(values.max()) + 0.05
        x_edges = np.linspace(min(0.0, times.min()), max(times.max(), 1e-3), 121)
        y_edges = np.logspace(low, high, 57)
        counts, _, _ = np.histogram2d(times, values, bins=[x_edges, y_edges])
        shown = np.where(counts.T > 0, counts.T, np.nan)
        norm = LogNorm(1, max(2.0, counts.max()))
        mesh = axis.pcolormesh(x_edges, y_edges, shown, cmap=_HEAT, norm=norm, rasterized=True)
        axis.set(yscale="log", xlabel="seconds since the start of the run", ylabel=y_title)
        axis.grid(False)
        _log_ticks(axis.yaxis)
        bar = figure.colorbar(mesh, ax=axis, pad=0.015, aspect=28)
        bar.set_label("gaps in the cell (log)")
        bar.outline.set_visible(False)
        bar.ax.minorticks_off()
        _log_ticks(bar.ax.yaxis)
        if bar.solids is not None:
            bar.solids.set(rasterized=True, edgecolor="none")
        return _svg(figure, prefix, "Heat map of the gaps between tokens over time")


def ratios(panels: Sequence[tuple[str, Sequence[Ratio]]], x_title: str, prefix: str) -> str:
    """Ratios with intervals on a log axis about 1; colour and marker say the verdict.

    Args:
        panels: (title, rows) side by side. Each has the same labels in the same order.
    """
    labels = [short(row.label) for row in panels[0][1]]
    with _figure(_WIDTH_IN, 0.95 + 0.25 * len(labels)) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, rows) in zip(axes, panels, strict=True):
            _forest(axis, rows)
            axis.set(title=title, xlabel=x_title)
        axes[0].set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.3, -0.7))
        return _svg(figure, prefix, "Ratios with their intervals")


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
                color=_MUTED,
            )


def _forest(axis: Any, rows: Sequence[Ratio]) -> None:
    colours = {"better": (_SERIES[2], "o"), "worse": (_SERIES[1], "s")}
    axis.axvline(1, color=_MUTED, linewidth=1)
    for place, row in enumerate(rows):
        colour, marker = colours.get(row.verdict, (_SERIES[5], "D"))
        if row.low is not None and row.high is not None:
            axis.plot([row.low, row.high], [place, place], color=colour, linewidth=2.2)
        axis.plot([row.ratio], [place], marker, color=colour, markersize=6)
    ends = [end for row in rows for end in (row.low, row.high, row.ratio) if end]
    span = max(1.02, *(max(end, 1 / end) for end in ends)) ** 1.1
    axis.set(xscale="log", xlim=(1 / span, span))
    axis.xaxis.set_major_locator(FixedLocator(_about_one(span)))
    axis.xaxis.set_major_formatter(FuncFormatter(_plain))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0, labelcolor=_INK)
    axis.spines["left"].set_visible(False)


def short(text: str) -> str:
    """A name that fits in a plot: one line, of characters that can be seen.

    Matplotlib takes a leading underscore for "not in the legend".
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= _LABEL else f"{line[: _LABEL - 1]}…"
    return f" {line}" if line.startswith("_") else line


# --- drawing --------------------------------------------------------------------------------


@contextmanager
def _figure(width_in: float, height_in: float) -> Iterator[Plot]:
    """A figure of its own: no pyplot, hence nothing global to close."""
    with matplotlib.rc_context(_STYLE):
        yield Plot(figsize=(width_in, height_in), layout="constrained", dpi=110)


def _line(index: int) -> dict[str, Any]:
    return {
        "color": _SERIES[index % SERIES_COLOURS],
        "linestyle": _DASHES[index % len(_DASHES)],
    }


def _strip(axis: Any, panel: Panel) -> None:
    for index, curve in enumerate(panel.curves):
        filled = index in panel.filled
        line = _line(index) | ({"linestyle": "-"} if filled else {})
        axis.plot(curve.x, curve.y, label=curve.label, **line, drawstyle="steps-post")
        if filled:
            axis.fill_between(
                curve.x, curve.y, step="post", color=line["color"], alpha=0.2, linewidth=0
            )
    for curve in panel.curves:
        for at in range(0, len(curve.x), max(1, len(curve.x) // _TIPS)):
            text = f"{curve.label}: {_plain(curve.y[at])} {panel.y_title} at {curve.x[at]:.1f} s"
            _tip(axis, curve.x[at], curve.y[at], text)
    axis.set(title=panel.title, ylabel=panel.y_title)
    highest = max((y for curve in panel.curves for y in curve.y), default=0.0)
    axis.set_ylim(bottom=0, top=panel.top or (None if highest > 0 else 1.0))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=3 if panel.low else 4, integer=highest >= 1))
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


def _log_ticks(axis: Any) -> None:
    """Plain numbers on a log axis; also 2 and 5 where less than two decades are shown.

    Where the axis spans so little that these are fewer than two, evenly spaced ones, with as many
    digits as tell them apart.
    """
    low, high = axis.get_view_interval()
    subs = (1.0,) if high / max(low, 1e-12) > 300 else (1.0, 2.0, 5.0)
    locator: Any = LogLocator(base=10, subs=subs, numticks=12)
    ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
    if len(ticks) < 2:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
        locator = FixedLocator(ticks)
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: distinct(value, ticks)))
    axis.set_minor_formatter(NullFormatter())


def distinct(value: float, ticks: Sequence[float]) -> str:
    """A tick in as few digits, three at least, as tell it from the others."""
    for digits in range(3, 12):
        texts = {_plain(tick, digits=digits) for tick in ticks}
        if len(texts) == len(set(ticks)):
            break
    return _plain(value, digits=digits)


def _plain(value: float, _: object = None, digits: int = 3) -> str:
    """A tick without an exponent."""
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}" if value >= 1000 or digits == 3 else f"{value:.0f}"
    return f"{value:.{digits}g}"


def _about_one(span: float) -> list[float]:
    """Round ratios from 1/span to span, 1 among them."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2):
        if span - 1 / span <= 6 * step:
            return [round(1 + step * count, 2) for count in range(-6, 7) if count * step > -1]
    steps = [1.5, 2, 3, 5, 10] if span < 12 else [10.0**power for power in range(1, 7)]
    return [1 / step for step in reversed(steps)] + [1.0, *map(float, steps)]


def _legend_below(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend for all panels, as every curve keeps its look in each."""
    labelled: dict[tuple[str, Any], Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labelled.setdefault((label, handle.get_color()), handle)
    if len(labelled) > 1:
        labels = [label for label, _ in labelled]
        columns = min(3, len(labelled))
        figure.legend(list(labelled.values()), labels, loc="outside lower left", ncols=columns)


def _tip(axis: Any, x: float, y: float, text: str) -> None:
    printable = "".join(c if c.isprintable() else " " for c in text)
    axis.figure.tips.append(Tip(axis=axis, x=x, y=y, text=printable))


# --- SVG ------------------------------------------------------------------------------------


def _svg(figure: Plot, prefix: str, label: str) -> str:
    """The figure as an SVG element for a page: own ids, the page's colours and font."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix}), warnings.catch_warnings():
        # Matplotlib only lays text out; the page's fonts draw what its own do not have.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}-', text)
    text = re.sub(r"font-family: [^;\"]+", "font-family: var(--plot-font)", text)
    text = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"\n\s*", "\n", text)
    text = text.replace("</svg>", f"{_tips(figure)}</svg>")
    return text.replace("<svg ", f'<svg class="plot" role="img" aria-label="{label}" ', 1)


def _tips(figure: Plot) -> str:
    """Unseen circles over the points that say something, laid out as the figure was saved."""
    scale, height = _POINTS_PER_INCH / figure.dpi, figure.get_figheight() * _POINTS_PER_INCH
    circles = []
    for tip in figure.tips:
        across, up = scale * tip.axis.transData.transform((tip.x, tip.y))
        if not np.isfinite([across, up]).all():  # Such as 0 on a log axis.
            continue
        at = f'cx="{across:.2f}" cy="{height - up:.2f}" r="{_TIP_RADIUS}"'
        title = f"<title>{html.escape(tip.text, quote=False)}</title>"
        circles.append(f'<circle {at} fill="transparent">{title}</circle>\n')
    return "".join(circles)
