"""The baseline matrix of a report: small tables, shaded."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from bench.pages.loaded import Loaded
from bench.pages.tables import cell, fewest, plain

# What a matrix shows, a table each: metric, title, whether more is better.
SHOWN = (
    ("output_tokens_per_s", "Output tokens/s", True),
    ("ttft_mean_s", "Time to first token, mean, ms", False),
    ("tpot_mean_s", "Time per output token, mean, ms", False),
)


def matrix(result: Loaded) -> dict[str, Any]:
    """Small heat tables: a row for each pair of lengths, a column for each number of users."""
    cells = result.data.get("cells") or []
    keys = [each["cell"] for each in cells]
    users = sorted({key["users"] for key in keys})
    lengths = sorted({(key["input_tokens"], key["output_tokens"]) for key in keys})
    by_place = {
        (each["cell"]["input_tokens"], each["cell"]["output_tokens"], each["cell"]["users"]): each
        for each in cells
    }
    tables = []
    for metric, title, more_is_better in SHOWN:
        rows = [
            {
                "input": read,
                "output": written,
                "cells": [_matrix_cell(by_place.get((read, written, n)), metric) for n in users],
            }
            for read, written in lengths
        ]
        _shade([cell for row in rows for cell in row["cells"]])
        tables.append({"title": title, "rows": rows, "good": more_is_better})
    absent = [] if cells else [f"{result.name}: no cell was measured"]
    shown = {"name": result.name, "kind": result.kind, "users": users}
    return shown | {"tables": tables if cells else [], "absent": absent}


def _matrix_cell(each: Mapping[str, Any] | None, metric: str) -> dict[str, Any]:
    if each is None:
        absent = plain(None, metric, 0)
        return absent | {"why": "this cell was not measured"}
    return cell(each.get("summary") or {}, metric, fewest(each.get("repeats")))


def _shade(cells: Iterable[dict[str, Any]]) -> None:
    """How dark each cell is, 0 to 100, evenly in the logarithm: cells differ by factors."""
    every = list(cells)
    logs = [math.log(each["value"]) for each in every if each["value"]]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    for each in every:
        share = (math.log(each["value"]) - low) / (high - low or 1.0) if each["value"] else 0.0
        each["shade"] = round(8 + 47 * share) if each["value"] else 0
