"""Plots of a report: latencies of single requests, and throughput against latency."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bench import measure
from bench.pages import figures, plots
from bench.pages.loaded import CELLS, Loaded
from bench.pages.plots import Curve
from bench.pages.tables import cell, fewest

_Points = Sequence[tuple[str, Mapping[str, Any]]]  # (what the load was, summary)


def served(loaded: Sequence[Loaded]) -> list[Loaded]:
    """Results with one load, which have latencies to plot."""
    several = ("points", "curve")
    single = [result for result in loaded if result.kind not in CELLS]
    return [result for result in single if not any(key in result.data for key in several)]


def cdfs(loaded: Sequence[Loaded]) -> dict[str, Any]:
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
    return {
        "svg": Markup(svg),
        "absent": absent if curves or absent else ["no single run is in this report"],
    }


def pareto(loaded: Sequence[Loaded]) -> dict[str, Any]:
    """What users get against what GPUs give, of the results that measured it."""
    lines = [(result.name, result.data["curve"]) for result in loaded if result.data.get("curve")]
    judged = [line for line in lines if any(p.get("front") is not None for p in line[1])]
    svg = plots.pareto(judged, "pareto") if judged else ""
    why = "nothing was measured for it: that takes `bench pareto` with --gpus"
    return {"svg": Markup(svg), "absent": [] if judged else [why]}


def throughput(loaded: Sequence[Loaded]) -> dict[str, Any]:
    """Throughput against latency, of whatever was measured at several loads."""
    panels = [("", [line for result in loaded for line in _of_search(result)])]
    panels += [(result.name, _of_cells(result)) for result in loaded]
    drawn = [
        {"name": name, "svg": Markup(svg)}
        for place, (name, lines) in enumerate(panels)
        if (svg := _curves(lines, f"throughput{place}"))
    ]
    why = "nothing was measured at more than one load: that takes a sweep, a search or a matrix"
    return {"figures": drawn, "absent": [] if drawn else [why]}


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
    points = result.data.get("points") or []
    return (
        [(result.name, [(_load_of(p), p.get("summary") or {}) for p in points])] if points else []
    )


def _of_cells(result: Loaded) -> list[tuple[str, _Points]]:
    """A curve for each pair of lengths, over users."""
    by_label: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for each in result.data.get("cells") or []:
        cell = each["cell"]
        name = f"{cell['input_tokens']} tokens in, {cell['output_tokens']} out"
        by_label.setdefault(name, []).append((f"{cell['users']}", each.get("summary") or {}))
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


def _load_of(point: Mapping[str, Any]) -> str:
    return f"{point['users']}" if "users" in point else f"{point.get('rate', 0):.3g}/s"


def search(result: Loaded) -> dict[str, Any]:
    """The points of a search, and what it found."""
    data = result.data
    rows = []
    for point in data["points"]:
        summary, ok = point.get("summary") or {}, fewest(point.get("measures"))
        share = point.get("share") or {}
        verdict = point.get("verdict") or ("resolved" if point.get("resolved") else "unresolved")
        rows.append(
            {
                "load": _load_of(point),
                "verdict": verdict,
                "looks": point.get("looks"),
                "good": f"{share['good']} of {share['counted']}" if share.get("counted") else "",
                "cells": [
                    cell(summary, metric, ok)
                    for metric in (
                        "output_tokens_per_s",
                        "requests_per_s",
                        "ttft_p50_s",
                        "ttft_p99_s",
                        "tpot_p50_s",
                        "tpot_p99_s",
                    )
                ],
            }
        )
    return {"name": result.name, "rows": rows, "by_rate": "rate" in data, **_verdict(data)}


def _verdict(data: Mapping[str, Any]) -> dict[str, Any]:
    resolved, reason = bool(data.get("resolved")), str(data.get("reason") or "")
    if "rate" in data:
        rate, fails = data["rate"], data.get("fails_at")
        text = "no rate passed" if rate is None else f"{rate:.3g} requests/s kept the objective"
        text += f"; {fails:.3g} did not" if fails is not None else ""
    else:
        users, tokens = data.get("users"), data.get("tokens_per_s")
        text = "nothing was answered"
        if users is not None and tokens:
            rate = f"{figures.number(tokens)} output tokens/s"
            text = f"throughput levels off at {users} users, at {rate}"
    return {"text": text, "resolved": resolved, "reason": reason}
