"""The output of a simulation: a table for the console, and a page with plots.

The page is one HTML file that needs nothing else; its plots are those of plots.py.
"""

import html
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench import plots
from bench.measure import Slo
from bench.simulation import reality
from bench.simulation.simulated import Simulated, Simulation, Tried
from serve_app.document import document

_POINTS = 400  # Of a curve in a plot.
_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = (
    "policy",
    "kept %",
    "GPU-h",
    "TTFT p50/p95/p99 s",
    "TPOT p50/p95/p99 ms",
    "changes",
    "replicas",
)


def table(data: Simulated) -> str:
    """The result as text: one line a policy, and its replicas over time."""
    rows = [list(_COLUMNS)]
    for row in data.policies:
        rows.append([row.spec, *cells(row)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    highest = max((row.replicas_most for row in data.policies), default=1)
    lines += ["", f"replicas over time, of {highest}"]
    lines += [f"{bar(row, highest)}  {row.spec}" for row in data.policies]
    return "\n".join([*lines, *data.notes])


def cells(row: Simulation) -> list[str]:
    """The figures of one policy, as text; without its name."""
    measures = row.measures
    return [
        _with_interval(row.kept, row.kept_interval, 100) + _VERDICTS[row.holds],
        _with_interval(row.gpu_hours, row.gpu_hours_interval),
        "/".join(_number(getattr(measures, f"ttft_p{percent}_s"), 2) for percent in (50, 95, 99)),
        "/".join(
            _number(getattr(measures, f"tpot_p{percent}_s"), 0, 1e3) for percent in (50, 95, 99)
        ),
        f"{row.changes} ({row.reversals} back)",
        f"{row.replicas_mean:.2f}, at most {row.replicas_most}",
    ]


_VERDICTS: dict[bool | None, str] = {True: "", False: " (not held)", None: " (undecided)"}


def _with_interval(value: float, bounds: Sequence[float] | None, scale: float = 1.0) -> str:
    shown = f"{scale * value:.2f}"
    if bounds is None:
        return shown
    return f"{shown} ({scale * bounds[0]:.2f} to {scale * bounds[1]:.2f})"


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def bar(row: Simulation, highest: int, width: int = 80) -> str:
    """Replicas that are paid for, over time."""
    paid = _paid(row)
    if not len(paid):
        return ""
    parts = np.array_split(paid, min(width, len(paid)))
    return "".join(
        _BARS[min(len(_BARS) - 1, int(part.mean() / max(highest, 1) * len(_BARS)))]
        for part in parts
    )


def _paid(row: Simulation) -> Any:
    return reality.paid(row.timeline)


# --- the page -------------------------------------------------------------------------------


_BODY = string.Template("""\
<p>$about</p>
<div><table><tr>$heads</tr>
$rows</table></div>
<h2>Over time</h2>
$timeline
<h2>What it costs</h2>
<p>Each point is a setting of a policy that no other of its settings beats: further left is cheaper,
further down is better.</p>
$price
""")


def page(data: Simulated) -> str:
    """The result as an HTML page that needs nothing else."""
    slo, size = data.slo or Slo(), data.fleet
    limits = [
        f"{name} {value * 1e3:g} ms"
        for name, value in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s), ("whole", slo.e2e_s))
        if value is not None
    ]
    about = (
        f"{data.requests} requests of {data.workload}, {data.load}, {data.copies} of "
        f"each; {size.engine.name}; a replica starts in {size.start_s:g} s, "
        f"{size.min_replicas} to {size.max_replicas} of them. Objective: "
        f"{slo.percentile:g} % of requests with {', '.join(limits)}"
        + (f", judged from {data.judged_from_s:g} s on." if data.judged_from_s else ".")
        + _about_seeds(data)
    )
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in (row.spec, *cells(row)))
        + "</tr>\n"
        for row in data.policies
    )
    body = _BODY.substitute(
        about=html.escape(about),
        heads="".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS),
        rows=rows,
        timeline=_timeline(data),
        price=_price(data),
    )
    return document("Policies under one load, simulated", body)


def _about_seeds(data: Simulated) -> str:
    if data.seeds == 1:
        return "".join(f" {note[0].upper()}{note[1:]}." for note in data.notes)
    return (
        f" Shares and GPU-hours are means over {data.seeds} seeds with 95 % intervals; "
        "latencies, changes and plots are of the first seed."
    )


def _timeline(data: Simulated) -> str:
    t_s, per_s = zip(*data.requests_per_s, strict=True) if data.requests_per_s else ((), ())
    rows = data.policies
    replicas = [_curve(row, _paid(row)) for row in rows]
    queued = [row for row in rows if row.timeline.waiting]
    waiting = [_curve(row, row.timeline.waiting) for row in queued]
    shown = [
        plots.Curve(
            label=row.spec,
            x=[at_s for at_s, _ in row.kept_by_minute],
            y=[100 * share for _, share in row.kept_by_minute],
        )
        for row in rows
    ]
    offered = [plots.Curve(label="offered", x=t_s, y=per_s)]
    panels = [
        plots.Panel(title="Load", y_title="requests/s", curves=offered, filled=(0,), low=True),
        plots.Panel(title="Replicas paid for", y_title="replicas", curves=replicas),
        plots.Panel(title="Waiting requests", y_title="requests", curves=waiting),
        plots.Panel(title="Kept the objective, by minute", y_title="%", curves=shown, top=101),
    ]
    return plots.timeline(panels, "simulate")


def _curve(row: Simulation, values: Any) -> plots.Curve:
    """Thinned to the greatest value of each stretch."""
    t_s = np.asarray(row.timeline.t_s)
    values = np.asarray(values, dtype=float)
    if len(t_s) > _POINTS:
        starts = np.linspace(0, len(t_s), _POINTS, endpoint=False).astype(int)
        t_s, values = t_s[starts], np.maximum.reduceat(values, starts)
    return plots.Curve(label=row.spec, x=t_s.tolist(), y=values.tolist())


def _price(data: Simulated) -> str:
    least = 50 / max(1, data.requests)  # Half a request: a log axis has no 0.
    curves = []
    for row in data.policies:
        front = _front(row.tried)
        curves.append(
            plots.Curve(
                label=row.policy,
                x=[trial.gpu_hours for trial in front],
                y=[max(least, 100 * (1 - trial.kept)) for trial in front],
                notes=[
                    trial.spec.partition(":")[2] if trial.spec == row.spec else ""
                    for trial in front
                ],
            )
        )
    panel = ("Requests that missed the objective", "% (log)", curves)
    return plots.curves([panel], "GPU-hours", "price")


def _front(tried: Sequence[Tried]) -> list[Tried]:
    """Of the settings of a policy those that no other beats in both price and share kept."""
    front: list[Tried] = []
    for trial in sorted(tried, key=lambda trial: (trial.gpu_hours, -trial.kept)):
        if not front or trial.kept > front[-1].kept:
            front.append(trial)
    return front
