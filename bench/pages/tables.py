"""Figures of a report in tables: the headline, and classes of requests beside each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench import interval
from bench.pages import figures
from bench.pages.loaded import CELLS, Loaded

# The headline table: a heading over columns, each a metric of `measure` and its short name.
HEADLINE: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("Throughput", (("requests_per_s", "requests/s"), ("output_tokens_per_s", "tokens/s out"))),
    (
        "Time to first token, ms",
        (("ttft_p50_s", "p50"), ("ttft_p95_s", "p95"), ("ttft_p99_s", "p99")),
    ),
    (
        "Time per output token, ms",
        (("tpot_p50_s", "p50"), ("tpot_p95_s", "p95"), ("tpot_p99_s", "p99")),
    ),
    ("End to end, s", (("e2e_p50_s", "p50"), ("e2e_p95_s", "p95"), ("e2e_p99_s", "p99"))),
    ("Outcome", (("goodput_per_s", "in SLO/s"), ("failed_share", "failed"))),
    (
        "Tokens of a request",
        (
            ("input_tokens", "prompt"),
            ("output_tokens", "answer"),
            ("cached_share", "from prefix cache"),
        ),
    ),
    (
        "Cost",
        (
            ("joules_per_output_token", "J a token out"),
            ("usd_per_million_output_tokens", "$ a million out"),
        ),
    ),
)
# What only some results have: the column is left out where none of a report does.
_OPTIONAL = (
    "goodput_per_s",
    "cached_share",
    "joules_per_output_token",
    "usd_per_million_output_tokens",
)


def cell(summary: Mapping[str, Any], metric: str, ok: int | None) -> dict[str, Any]:
    """One figure of a table: its text, its interval and, where it is absent, why.

    Args:
        ok: see `_fewest`.
    """
    text, half = figures.with_interval(summary, metric)
    if not text:
        short, why = _why(metric, ok)
        return {"metric": metric, "value": None, "text": "—", "range": short, "why": why}
    value, half = summary[metric]["mean"], f"± {half}" if half else ""
    return {"metric": metric, "value": value, "text": text, "range": half, "why": ""}


def _why(metric: str, ok: int | None) -> tuple[str, str]:
    """Why a metric is absent, in a word or two and in a sentence."""
    if ok is None:
        return "", "this result does not have it"
    if metric == "goodput_per_s":
        return "no SLO", "no SLO was given"
    if not ok:
        return "", "nothing succeeded"
    percent = metric.rpartition("_p")[2].removesuffix("_s")
    needed = interval.samples_needed(int(percent) / 100) if percent.isdigit() else 0
    if ok < needed:
        return f"{ok}/{needed}", f"needs {needed} samples in each repeat; there were {ok}"
    return "", "not measured"


def fewest(repeats: Sequence[Mapping[str, Any]] | None) -> int | None:
    """Successes in the repeat that has the fewest; None where there are no repeats."""
    return min((int(repeat["ok"]) for repeat in repeats or []), default=None)


def headline(loaded: Sequence[Loaded]) -> dict[str, Any]:
    rows = [row for result in loaded for row in _headline_rows(result)]
    groups = [
        (
            heading,
            [
                (metric, name)
                for metric, name in columns
                if metric not in _OPTIONAL or any(metric in row["summary"] for row in rows)
            ],
        )
        for heading, columns in HEADLINE
    ]
    groups = [(heading, columns) for heading, columns in groups if columns]
    metrics = [metric for _, columns in groups for metric, _ in columns]
    firsts = [columns[0][0] for _, columns in groups]
    for row in rows:
        row["cells"] = [
            cell(row["summary"], metric, row["ok"]) | {"first": metric in firsts}
            for metric in metrics
        ]
    return {"groups": groups, "rows": rows}


def _headline_rows(result: Loaded) -> list[dict[str, Any]]:
    """A row for a result; of a matrix, its fastest cell; of a search, the point it found."""
    if result.kind in CELLS:
        cells = result.data.get("cells") or []
        best = max(cells, key=_throughput_of, default=None)
        if best is None:
            return []
        note = f"fastest of {len(cells)} cells: {best['name']}"
        return [_headline_row(result, best, note)]
    if "curve" in result.data:
        return []
    if "points" in result.data:
        point = found_point(result)
        return [_headline_row(result, *point)] if point else []
    return [_headline_row(result, result.data, "")]


def _headline_row(result: Loaded, figures: Mapping[str, Any], note: str) -> dict[str, Any]:
    repeats = figures.get("repeats") or figures.get("measures") or []
    whole = figures.get("whole") or repeats
    counts = f"{sum(int(each['requests']) for each in whole):,} requests"
    if len(repeats) > 1:
        counts += f" in {len(repeats)} repeats"
    return {
        "name": result.name,
        "notes": [part for part in (note, counts) if part],
        "summary": {
            **(figures.get("summary") or {}),
            **_requests(repeats),
            **(figures.get("efficiency") or {}),
        },
        "ok": fewest(repeats),
        "valid": result.data.get("valid", True),
    }


def _requests(repeats: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How long requests were and what of them was cached: means over repeats, where known."""
    cells = {}
    for name in ("input_tokens", "output_tokens", "cached_share"):
        values = [(each.get("answers") or {}).get(name) for each in repeats]
        present = [value for value in values if value is not None]
        if present:
            cells[name] = {"mean": sum(present) / len(present)}
    return cells


def _throughput_of(figures: Mapping[str, Any]) -> float:
    throughput = (figures.get("summary") or {}).get("output_tokens_per_s") or {}
    return float(throughput.get("mean") or 0.0)


def kinds(loaded: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Classes of requests that were served beside each other; of the first repeat."""
    kinds_of = []
    for result in loaded:
        repeat = (result.data.get("repeats") or [{}])[0]
        kinds = {k: v for k, v in (repeat.get("kinds") or {}).items() if k != "example"}
        if len(kinds) < 2:
            continue
        rows = [
            {
                "name": name,
                "requests": kind["requests"],
                "failed": kind["failed"],
                "cells": [
                    plain(kind.get(metric), metric, kind["requests"] - kind["failed"])
                    for metric in ("ttft_p50_s", "ttft_p95_s", "e2e_p50_s", "user_tokens_per_s")
                ],
            }
            for name, kind in kinds.items()
        ]
        kinds_of.append({"name": result.name, "rows": rows, "fairness": repeat.get("fairness")})
    return kinds_of


def sessions(result: Loaded) -> dict[str, Any] | None:
    """The sessions of a result, of its first repeat; None where it had none."""
    summary = (result.data.get("sessions") or [None])[0]
    if summary is None:
        return None
    rows = [
        {
            "name": turn["name"],
            "requests": turn["requests"],
            "failed": turn["failed"],
            "cells": [
                plain(turn.get(metric), metric, turn["requests"] - turn["failed"])
                for metric in (
                    "input_tokens",
                    "output_tokens",
                    "cached_share",
                    "reusable_share",
                    "ttft_mean_s",
                    "ttft_p50_s",
                    "ttft_p95_s",
                    "e2e_mean_s",
                )
            ],
        }
        for turn in summary["turns"]
    ]
    return {"name": result.name, **summary, "rows": rows}


def plain(value: float | None, metric: str, ok: int | None) -> dict[str, Any]:
    """A figure without an interval."""
    return cell({} if value is None else {metric: {"mean": value}}, metric, ok)


def found_point(result: Loaded) -> tuple[Mapping[str, Any], str] | None:
    for key, what in (("users", "users, where it levels off"), ("rate", "requests/s")):
        at = result.data.get(key)
        for point in result.data["points"]:
            if at is not None and point.get(key) == at:
                return point, f"at {at:.3g} {what}"
    return None
