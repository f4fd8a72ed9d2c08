"""The baseline matrix of a report: small tables, shaded."""

import math
from collections.abc import Sequence

import msgspec

from bench.matrix import Matrix, Measured
from bench.pages.tables import Cell, cell, fewest, plain

# What a matrix shows, a table each: metric, title, whether more is better.
SHOWN = (
    ("output_tokens_per_s", "Output tokens/s", True),
    ("ttft_mean_s", "Time to first token, mean, ms", False),
    ("tpot_mean_s", "Time per output token, mean, ms", False),
)


class Row(msgspec.Struct, kw_only=True):
    """Prompts and answers of one length, in tokens: a cell for each number of users."""

    input: int
    output: int
    cells: list[Cell]


class Heat(msgspec.Struct, kw_only=True):
    """One metric of a matrix; `good`: whether more is better."""

    title: str
    rows: list[Row]
    good: bool


class Matrices(msgspec.Struct, kw_only=True):
    """A matrix in heat tables, whose columns are numbers of users."""

    name: str
    kind: str
    users: list[int]
    tables: list[Heat]
    absent: list[str]


def matrix(name: str, result: Matrix) -> Matrices:
    """Small heat tables: a row for each pair of lengths, a column for each number of users."""
    cells = result.cells
    users = sorted({each.cell.users for each in cells})
    lengths = sorted({(each.cell.input_tokens, each.cell.output_tokens) for each in cells})
    by_place = {
        (each.cell.input_tokens, each.cell.output_tokens, each.cell.users): each for each in cells
    }
    tables = []
    for metric, title, more_is_better in SHOWN:
        rows = [
            Row(
                input=read,
                output=written,
                cells=[_matrix_cell(by_place.get((read, written, n)), metric) for n in users],
            )
            for read, written in lengths
        ]
        _shade([cell for row in rows for cell in row.cells])
        tables.append(Heat(title=title, rows=rows, good=more_is_better))
    return Matrices(
        name=name,
        kind=result.benchmark,
        users=users,
        tables=tables if cells else [],
        absent=[] if cells else [f"{name}: no cell was measured"],
    )


def _matrix_cell(each: Measured | None, metric: str) -> Cell:
    if each is None:
        absent = plain(None, metric, 0)
        absent.why = "this cell was not measured"
        return absent
    return cell(each.summary, metric, fewest(each.repeats))


def _shade(cells: Sequence[Cell]) -> None:
    """How dark each cell is, 0 to 100, evenly in the logarithm: cells differ by factors."""
    logs = [math.log(each.value) for each in cells if each.value]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    for each in cells:
        if each.value:
            each.shade = round(8 + 47 * (math.log(each.value) - low) / (high - low or 1.0))
