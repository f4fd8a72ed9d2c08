"""A result beside the one it is held against."""

from collections.abc import Sequence

import msgspec
from markupsafe import Markup

from bench import plots
from bench.errors import ResultError
from bench.matrix import Matrix
from bench.pages import compare, figures
from bench.pages.loaded import Loaded
from bench.pages.matrices import SHOWN
from bench.plots import Ratio


class Row(msgspec.Struct, kw_only=True):
    """One metric of both results, as texts; `value` is the ratio."""

    metric: str
    title: str
    cell: str
    unit: str
    a: str
    b: str
    value: float
    ratio: str
    range: str
    verdict: str


class Pair(msgspec.Struct, kw_only=True):
    """A result beside the one it is compared with."""

    base: str
    now: str
    svg: str
    rows: list[Row]
    notes: list[str]


class Comparison(msgspec.Struct, kw_only=True):
    """All pairs of a report; `absent`: which there are not, and why."""

    pairs: list[Pair]
    absent: list[str]


def comparison(loaded: Sequence[Loaded], against: Loaded | None) -> Comparison:
    """Each result beside the one it is to be held against: `against`, or the engine alone."""
    pairs, absent = [], []
    for result in loaded:
        if against is not None and _comparable(against, result):
            pairs.append((against, result))
        elif against is not None:
            absent.append(f"{result.name}: a {result.kind} cannot be held against a {against.kind}")
    alone = [result for result in loaded if result.kind == "baseline"]
    if against is None:
        pairs = [(base, result) for base in alone for result in loaded if result.kind == "matrix"]
        absent = [] if pairs else ["no baseline was given: use --against FOLDER"]
    shown = []
    for place, (base, now) in enumerate(pairs):
        try:
            shown.append(_compared(base, now, place))
        except ResultError as error:
            absent.append(f"{now.name} against {base.name}: {error}")
    return Comparison(pairs=shown, absent=absent)


def _comparable(base: Loaded, now: Loaded) -> bool:
    return base.kind == now.kind or all(isinstance(each.data, Matrix) for each in (base, now))


def _compared(base: Loaded, now: Loaded, place: int) -> Pair:
    rows = compare.compare(base.data, now.data)
    if "baseline" in (base.kind, now.kind):
        # An engine in this process has no stream, hence no gaps between tokens.
        rows = [row for row in rows if not row.metric.startswith("itl_")]
    panels = _ratio_panels(rows)
    svg = plots.ratios(panels, "now / baseline (log)", f"ratio{place}") if panels else ""
    return Pair(
        base=base.name,
        now=now.name,
        svg=Markup(svg),
        rows=[_compared_row(row) for row in rows],
        notes=[
            note.replace("A is", f"{base.name} is", 1).replace("B is", f"{now.name} is", 1)
            for note in compare.notes(base.data, now.data)
        ],
    )


def _ratio_panels(rows: Sequence[compare.Row]) -> list[tuple[str, list[Ratio]]]:
    """One panel of all metrics for a run; for cells, one for each metric that a matrix shows."""
    if rows and not rows[0].cell:
        return [("", [_ratio(row, figures.title(row.metric)) for row in rows])]
    metrics = [metric for metric, _, _ in SHOWN]
    by_cell: dict[str, dict[str, compare.Row]] = {}
    for row in rows:
        by_cell.setdefault(row.cell, {})[row.metric] = row
    whole = [
        figures_of
        for figures_of in by_cell.values()
        if all(metric in figures_of for metric in metrics)
    ]
    if not whole:
        return []
    return [
        (
            figures.title(metric),
            [_ratio(figures_of[metric], figures_of[metric].cell) for figures_of in whole],
        )
        for metric in metrics
    ]


def _ratio(row: compare.Row, label: str) -> Ratio:
    return Ratio(label=label, ratio=row.ratio, low=row.low, high=row.high, verdict=row.verdict)


def _compared_row(row: compare.Row) -> Row:
    unit, scale = figures.scale(row.metric)
    bounded = row.low is not None and row.high is not None
    return Row(
        metric=row.metric,
        title=figures.title(row.metric),
        cell=row.cell,
        unit=unit or "per s",
        a=figures.number(row.a * scale),
        b=figures.number(row.b * scale),
        value=row.ratio,
        ratio=f"{row.ratio:.3f}",
        range=f"{row.low:.3f} to {row.high:.3f}" if bounded else "one repeat: none",
        verdict=row.verdict,
    )
