"""Plots of a report: latencies of single requests, and throughput against latency."""

from collections.abc import Mapping, Sequence

import msgspec
from markupsafe import Markup

from bench import measure, pareto, plots
from bench.matrix import Matrix
from bench.measure import Mean
from bench.pages import figures
from bench.pages.loaded import Loaded
from bench.pages.tables import Cell, cell, fewest
from bench.plots import Curve
from bench.search import RatePoint, RateResult, SweepResult, UsersPoint

_Points = Sequence[tuple[str, Mapping[str, Mean]]]  # (what the load was, summary)


class Chart(msgspec.Struct, kw_only=True):
    """A plot; `absent`: what is not in it, and why.

    Attributes:
        repeats, step_s, steady: of a plot over time: repeats of the result, the length of a step,
            and whether a steady state is shaded.
    """

    name: str = ""
    svg: str = ""
    absent: list[str] = []
    repeats: int = 0
    step_s: float = 0.0
    steady: bool = False


class Charts(msgspec.Struct, kw_only=True):
    """Several plots of one kind."""

    figures: list[Chart]
    absent: list[str]


def served(loaded: Sequence[Loaded]) -> list[Loaded]:
    """Results with one load, which have latencies to plot."""
    several = (Matrix, SweepResult, RateResult, pareto.Curve)
    return [result for result in loaded if not isinstance(result.data, several)]


def cdfs(loaded: Sequence[Loaded]) -> Chart:
    """Latencies of single requests, one curve a result."""
    absent, curves = [], []
    for result in served(loaded):
        measured = result.measured()
        if measured:
            curves.append((result.name, measured))
        if result.records_absent or not measured:
            absent.append(f"{result.name}: {result.records_absent or 'no request succeeded'}")
    panels = []
    for title, of, metric in (
        ("Time to first token", measure.ttft_s, "ttft"),
        ("Time per output token", measure.tpot_s, "tpot"),
        ("End to end", measure.e2e_s, "e2e"),
    ):
        unit, scale = figures.scale(metric)
        series = [
            (name, [value * scale for record in measured if (value := of(record)) is not None])
            for name, measured in curves
        ]
        panels.append((title, unit, series))
    drawn = [panel for panel in panels if any(values for _, values in panel[2])]
    if curves:
        absent += [f"{panel[0]}: no request has it" for panel in panels if panel not in drawn]
    svg = plots.cdfs(drawn, "cdf") if drawn else ""
    return Chart(
        svg=Markup(svg), absent=absent or ([] if curves else ["no single run is in this report"])
    )


def users_and_gpus(loaded: Sequence[Loaded]) -> Chart:
    """What users get against what GPUs give, of the results that measured it."""
    lines = [(each.name, each.data.curve) for each in loaded if isinstance(each.data, pareto.Curve)]
    judged = [line for line in lines if any(point.front is not None for point in line[1])]
    svg = plots.pareto(judged, "pareto") if judged else ""
    why = "nothing was measured for it: that takes `bench pareto` with --gpus"
    return Chart(svg=Markup(svg), absent=[] if judged else [why])


def throughput(loaded: Sequence[Loaded]) -> Charts:
    """Throughput against latency, of whatever was measured at several loads."""
    panels = [("", [line for result in loaded for line in _of_search(result)])]
    panels += [(result.name, _of_cells(result)) for result in loaded]
    drawn = [
        Chart(name=name, svg=Markup(svg))
        for place, (name, lines) in enumerate(panels)
        if (svg := _curves(lines, f"throughput{place}"))
    ]
    why = "nothing was measured at more than one load: that takes a sweep, a search or a matrix"
    return Charts(figures=drawn, absent=[] if drawn else [why])


def _curves(lines: Sequence[tuple[str, "_Points"]], prefix: str) -> str:
    """Both latencies over throughput; empty where no point has them."""
    panels = []
    for metric, title in (
        ("ttft_p50_s", "Time to first token, median"),
        ("tpot_p50_s", "Time per output token, median"),
    ):
        drawn = [_curve(name, points, metric) for name, points in lines]
        panels.append((title, "milliseconds (log)", [curve for curve in drawn if curve.x]))
    panels = [panel for panel in panels if panel[2]]
    return plots.curves(panels, "output tokens/s, all users together", prefix) if panels else ""


def _of_search(result: Loaded) -> list[tuple[str, _Points]]:
    if not isinstance(result.data, SweepResult | RateResult) or not result.data.points:
        return []
    points: Sequence[UsersPoint | RatePoint] = result.data.points
    return [(result.name, [(_load_of(point), point.summary) for point in points])]


def _of_cells(result: Loaded) -> list[tuple[str, _Points]]:
    """A curve for each pair of lengths, over users."""
    by_label: dict[str, list[tuple[str, Mapping[str, Mean]]]] = {}
    for each in result.data.cells if isinstance(result.data, Matrix) else []:
        name = f"{each.cell.input_tokens} tokens in, {each.cell.output_tokens} out"
        by_label.setdefault(name, []).append((f"{each.cell.users}", each.summary))
    return list(by_label.items())


def _curve(name: str, points: _Points, metric: str) -> Curve:
    drawn = [
        (summary["output_tokens_per_s"]["mean"], summary[metric]["mean"] * 1e3, load)
        for load, summary in points
        if metric in summary and "output_tokens_per_s" in summary
    ]
    return Curve(
        label=name,
        x=[x for x, _, _ in drawn],
        y=[y for _, y, _ in drawn],
        notes=[load for _, _, load in drawn],
    )


def _load_of(point: UsersPoint | RatePoint) -> str:
    return f"{point.users}" if isinstance(point, UsersPoint) else f"{point.rate:.3g}/s"


class Probed(msgspec.Struct, kw_only=True):
    """A point of a search; `good`: how many requests met the objective."""

    load: str
    verdict: str
    looks: int
    good: str
    cells: list[Cell]


class Searched(msgspec.Struct, kw_only=True):
    """A search: its points, and its result in words."""

    name: str
    by_rate: bool
    text: str
    resolved: bool
    reason: str
    rows: list[Probed]


def search(name: str, result: SweepResult | RateResult) -> Searched:
    """The points of a search, and its result."""
    points: Sequence[UsersPoint | RatePoint] = result.points
    return Searched(
        name=name,
        by_rate=isinstance(result, RateResult),
        text=_conclusion(result),
        resolved=result.resolved,
        reason=result.reason,
        rows=[_probed(point) for point in points],
    )


def _probed(point: UsersPoint | RatePoint) -> Probed:
    ok, good = fewest(point.measures), ""
    if isinstance(point, RatePoint):
        verdict: str = point.verdict
        if point.share.counted:
            good = f"{point.share.good} of {point.share.counted}"
    else:
        verdict = "resolved" if point.resolved else "unresolved"
    shown = ["output_tokens_per_s", "requests_per_s", "ttft_p50_s", "ttft_p99_s"]
    shown += ["tpot_p50_s", "tpot_p99_s"]
    return Probed(
        load=_load_of(point),
        verdict=verdict,
        looks=point.looks,
        good=good,
        cells=[cell(point.summary, metric, ok) for metric in shown],
    )


def _conclusion(result: SweepResult | RateResult) -> str:
    if isinstance(result, RateResult):
        text = f"; {result.fails_at:.3g} did not" if result.fails_at is not None else ""
        if result.rate is None:
            return f"no rate passed{text}"
        return f"{result.rate:.3g} requests/s kept the objective{text}"
    if result.users is None or not result.tokens_per_s:
        return "nothing was answered"
    rate = f"{figures.number(result.tokens_per_s)} output tokens/s"
    return f"throughput levels off at {result.users} users, at {rate}"
